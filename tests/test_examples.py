"""Every recipe under examples: sound shell, and flags that pass the dry run with a tokenizer made on the spot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.platform.media import hide_what_cuda_builds_break

hide_what_cuda_builds_break()

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.sh"))
COFFEE = f"{EXAMPLES / 'custom_env' / 'coffee.py'}:Coffee"
STAR = Path(__file__).parent / "envs" / "star_fixture"

# recipe -> OPENRLHF_GOPO_CPU, and what its dry run says of goals and GPUs
RECIPES = {
    "shop_cpu": ("1", "shop", "6 GPUs"),
    "star_cpu": ("1", "star", "6 GPUs"),
    "node8_colocated": ("0", "shop", "8 GPUs"),
    "two_nodes": ("0", "shop", "16 GPUs"),
}


def test_every_training_recipe_is_tested() -> None:
    assert {path.parent.name for path in EXAMPLES.glob("*/train.sh")} == RECIPES.keys()


def test_every_recipe_is_described() -> None:
    undescribed = [path for path in EXAMPLES.iterdir() if path.is_dir() and not (path / "README.md").is_file()]
    assert [path.name for path in undescribed if path.name not in ("quickstart", "__pycache__")] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shell_syntax(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(script, os.X_OK) or script.read_text().startswith("#!"), "neither executable nor with a shebang"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shellcheck(script: Path) -> None:
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a small ChatML tokenizer and no model: all that a dry run reads."""
    spec = importlib.util.spec_from_file_location("quickstart_model", EXAMPLES / "quickstart" / "build_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [strategy.description for strategy in load_environment("shop").catalogue(None)]
    module.train_tokenizer(words * 5, 600, 4096).save_pretrained(folder)
    return folder


def bash(script: Path, *args: object, cpu: str, **variables: object) -> subprocess.CompletedProcess:
    """Run a recipe as a user would, with this interpreter as ``python3``."""
    names = {"RAY_ADDRESS", "MODEL", "RESPONDER_MODEL", "EXPERT_MODEL", "DATA", "OUT"}
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"OPENRLHF_GOPO_CPU": cpu, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    env |= {name: str(value) for name, value in variables.items()}
    command = ["bash", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.stack
@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_of_every_recipe(recipe: str, tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("openrlhf")
    cpu, env, gpus = RECIPES[recipe]
    models = dict.fromkeys(("MODEL", "RESPONDER_MODEL", "EXPERT_MODEL"), tokenizer)
    script = EXAMPLES / recipe / "train.sh"
    done = bash(script, "--gopo.dry_run", cpu=cpu, DATA=STAR, OUT=tmp_path / "out", **models)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"dry run: {env}: ")
    assert f"{gpus}; everything checked" in done.stdout
    assert "[Warning]" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_further_flags_reach_the_command(tokenizer: Path) -> None:
    pytest.importorskip("openrlhf")
    flags = ("--train.batch_size", 33, "--gopo.dry_run")
    done = bash(EXAMPLES / "shop_cpu" / "train.sh", *flags, cpu="1", MODEL=tokenizer)
    assert done.returncode == 2
    assert "train_gopo: error: --train.batch_size 33: does not divide the 64 dialogues" in done.stderr


@pytest.mark.parametrize(("recipe", "variable"), [("shop_cpu", "MODEL"), ("star_cpu", "DATA")])
def test_a_recipe_without_its_model_or_data_says_so(recipe: str, variable: str) -> None:
    done = bash(EXAMPLES / recipe / "train.sh", cpu="1")
    assert done.returncode != 0
    assert f"{variable}: a" in done.stderr


def test_the_custom_environment_keeps_the_contract() -> None:
    env = load_environment(COFFEE)
    check_env(env)
    best = [play(env, goal, 0, 0, ScriptedPolicy(1.0, slip=0.0)) for goal in env.goals("heldout")]
    assert all(trajectory.success for trajectory in best)


@pytest.mark.stack
def test_the_custom_environment_passes_the_dry_run(tokenizer: Path) -> None:
    pytest.importorskip("openrlhf")
    done = bash(EXAMPLES / "shop_cpu" / "train.sh", "--gopo.env", COFFEE, "--gopo.dry_run", cpu="1", MODEL=tokenizer)
    assert done.returncode == 0, done.stderr
    assert "dry run: coffee: 12 training and 3 held-out goals, 3 labels" in done.stdout
