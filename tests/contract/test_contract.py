"""The check of the contract in upstream's sources: what it says of the installed version, of others, and of gaps."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.runtime.upstream import contract
from openrlhf_gopo.runtime.upstream.contract import (
    CPU_NAMES,
    DECORATED,
    FLAGS,
    NAMES,
    NAMESPACES,
    OFFLINE_FLAGS,
    PLAIN,
    SIGNATURES,
    breaks,
)
from openrlhf_gopo.runtime.upstream.sources import Find, file_in, source_file

pytest.importorskip("openrlhf")
ROOT = Path(__file__).parents[2]
UPSTREAM = ("openrlhf", "ray", "vllm", "deepspeed")


@pytest.fixture
def copied(tmp_path: Path) -> tuple[Path, Find]:
    """A copy of the installed openrlhf, and how its modules are found."""
    installed = source_file("openrlhf")
    assert installed is not None
    tree = tmp_path / "openrlhf"
    shutil.copytree(installed.parent, tree, ignore=shutil.ignore_patterns("__pycache__"))

    def find(module: str) -> Path | None:
        top, *rest = module.split(".")
        return file_in(tree, rest) if top == "openrlhf" else source_file(module)

    return tree, find


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_the_installed_version_keeps_the_contract(copied: tuple[Path, Find]) -> None:
    assert list(breaks(source_file, cpu=True)) == []
    assert list(breaks(copied[1], cpu=True)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (
            "models/loss.py",
            "class PolicyLoss(",
            "class Gone(",
            "openrlhf.models:PolicyLoss.forward: expected (self log",
        ),
        (
            "trainer/ppo_trainer.py",
            "def broadcast_to_vllm(self",
            "def sync(self",
            "BasePPOTrainer.broadcast_to_vllm: expected (self), found nothing",
        ),
        (
            "trainer/ray/ppo_actor.py",
            "def _init_vllm_sync_group(self, backend",
            "def _init_vllm_sync_group(self, group, backend",
            "_init_vllm_sync_group: expected (self backend), found (self group backend)",
        ),
        (
            "trainer/ray/vllm_engine.py",
            "@ray.remote\nclass RolloutRayActor",
            "class RolloutRayActor",
            "RolloutRayActor: expected a class decorated with ray.remote, found one without",
        ),
        (
            "utils/agent.py",
            "class AgentExecutorBase(",
            "@ray.remote\nclass AgentExecutorBase(",
            "AgentExecutorBase: expected a class without ray.remote, found one with",
        ),
        ("trainer/ray/launcher.py", "import Actor,", "import", "openrlhf.trainer.ray.launcher:Actor: expected a name"),
        ("trainer/ppo_utils/experience.py", "    kl: ", "    klass: ", "Experience: expected fields sequences"),
        ("trainer/ray/ppo_actor.py", "count == num_params", "count >= num_params", "expected the line 'empty_cache=c"),
        ("cli/train_ppo_ray.py", '"--vllm.sync_backend"', '"--vllm.backend"', "--vllm.sync_backend: expected a flag"),
    ],
)
def test_what_is_gone_or_different_is_named(
    copied: tuple[Path, Find], file: str, old: str, new: str, expected: str
) -> None:
    tree, find = copied
    edit(tree / file, old, new)
    found = [str(one) for one in breaks(find, cpu=True)]
    assert found
    assert any(expected in one for one in found), found


def test_a_module_that_is_gone_is_named(copied: tuple[Path, Find]) -> None:
    tree, find = copied
    (tree / "utils" / "vlm_utils.py").unlink()
    assert [str(one) for one in breaks(find, cpu=True)] == [
        "openrlhf.utils.vlm_utils:merge_mm_train_inputs: expected (mm_train_inputs_list device), found nothing"
    ]


def test_what_only_the_cpu_needs_does_not_stop_a_machine_with_a_gpu(copied: tuple[Path, Find]) -> None:
    tree, find = copied
    edit(tree / "trainer/ray/ppo_actor.py", "count == num_params", "count >= num_params")
    assert list(breaks(find, cpu=True))
    assert list(breaks(find, cpu=False)) == []


def test_an_unknown_version_that_keeps_the_contract_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(contract.SUPPORTED, "openrlhf", ("0.10.9",))
    contract.check_upstream(lambda: True)
    told = capsys.readouterr().err
    assert re.fullmatch(
        r"warning: untested: openrlhf \S+ \(known to work: 0\.10\.9\); every symbol .* is there\n", told
    )


def test_a_known_version_is_not_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> Iterator[None]:
        raise AssertionError("read")

    monkeypatch.setattr(contract, "breaks", fail)
    contract.check_upstream(lambda: True)
    assert capsys.readouterr().err == ""


def test_a_broken_contract_names_symbol_and_versions(
    monkeypatch: pytest.MonkeyPatch, copied: tuple[Path, Find]
) -> None:
    tree, find = copied
    edit(tree / "models/actor.py", "class Actor(", "class Model(")
    monkeypatch.setitem(contract.SUPPORTED, "openrlhf", ("0.10.9",))
    monkeypatch.setattr(contract, "source_file", find)
    with pytest.raises(ConfigError) as error:
        contract.check_upstream(lambda: False)
    assert "known to work: 0.10.9" in str(error.value)
    assert "openrlhf.models:Actor: expected a class without ray.remote, found nothing" in str(error.value)


# The command, with an OpenRLHF of its own on the path, whose record says another version.
COMMAND = """
import sys
from openrlhf_gopo.cli.train_gopo import main
main(["--gopo.env", "shop", "--gopo.dry_run", "--actor.model_name_or_path", "nowhere"])  # refused for its groups of one
"""


@pytest.mark.parametrize(("change", "status"), [(None, "warning: untested: openrlhf 9.9.9"), ("x", "SamplesGenerator")])
def test_the_command_stops_at_once(tmp_path: Path, copied: tuple[Path, Find], change: str | None, status: str) -> None:
    tree, _ = copied
    (tmp_path / "openrlhf-9.9.9.dist-info").mkdir()
    (tmp_path / "openrlhf-9.9.9.dist-info" / "METADATA").write_text("Name: openrlhf\nVersion: 9.9.9\n")
    if change:
        edit(tree / "trainer/ppo_utils/samples_generator.py", "class SamplesGenerator", "class Generator")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n{COMMAND}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert status in done.stderr
    assert ("--rollout.n_samples_per_prompt 1" in done.stderr) == (change is None)  # goes on only after a warning


def test_the_check_imports_nothing_heavy_and_takes_no_time() -> None:
    code = (
        "import sys; from openrlhf_gopo.runtime.upstream.contract import breaks\n"
        "from openrlhf_gopo.runtime.upstream.sources import source_file\n"
        "import time; started = time.process_time(); assert not list(breaks(source_file, True))\n"
        "print(time.process_time() - started)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert float(done.stdout) < 5  # of CPU; about 0.7 s on a quiet machine


# Is the list whole? -----------------------------------------------------------------------------------------------


def ours() -> list[Path]:
    return [
        p for top in ("openrlhf_gopo/runtime", "openrlhf_gopo/platform", "patches") for p in ROOT.glob(f"{top}/**/*.py")
    ]


def test_every_import_from_upstream_is_in_the_contract() -> None:
    listed = {
        f"{module}:{name}"
        for names in (NAMES, NAMESPACES, CPU_NAMES)
        for module, all_ in names.items()
        for name in all_
    }
    listed |= {
        seam.partition(".")[0] if ":" not in seam else f"{seam.split(':')[0]}:{seam.split(':')[1].split('.')[0]}"
        for seam in (*DECORATED, *PLAIN, *SIGNATURES)
    }
    modules = {seam.partition(":")[0] for seam in listed}
    missing = []
    for path in ours():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UPSTREAM:
                for alias in node.names:
                    known = f"{node.module}:{alias.name}" in listed or f"{node.module}.{alias.name}" in modules
                    missing += [] if known else [f"{path.name}: {node.module}:{alias.name}"]
    assert missing == []


def test_every_upstream_flag_that_is_read_is_in_the_contract() -> None:
    listed = {f"{section}.{name}" for section, names in FLAGS.items() for name in names.split()}
    listed |= {*OFFLINE_FLAGS.split(), "ckpt.tag"}  # the last is no flag: roles.py sets it, and reads it
    known = {
        p for flag in listed for p in [flag, *(".".join(flag.split(".")[:n]) for n in range(2, flag.count(".") + 1))]
    }
    read, sections = set(), "|".join([*FLAGS, "expert"])
    for path in [*ours(), *ROOT.glob("openrlhf_gopo/cli/*.py")]:
        text = path.read_text(encoding="utf-8")
        read |= {match[1] for match in re.finditer(rf"\bargs\.((?:{sections})(?:\.[a-z0-9_]+)+)", text)}
    named = {re.sub(r"^expert\.", "actor.", name) for name in read}
    assert {name for name in named if name not in known and not any(name.startswith(f"{k}.") for k in known)} == set()
