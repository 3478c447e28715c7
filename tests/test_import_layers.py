"""Who may import whom (DESIGN, section 3): every module found on disk is imported with the forbidden ones blocked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "openrlhf_gopo"
STACK = ["openrlhf", "ray", "vllm", "deepspeed"]
TORCH = ["torch", "transformers", "numpy"]
OTHERS = ["graphviz", "httpx", "jinja2", "matplotlib", "pydantic", "yaml", "rich", "sacrebleu", "tenacity", "tqdm"]
HIGH = [f"openrlhf_gopo.{name}" for name in ("runtime", "platform", "cli")]
MIDDLE = ["sop", "endpoint", "envs", "users", "policy", "rollout", "rewards", "evaluation", "logs"]

# layer -> what none of its modules may import, directly or through another module
FORBIDDEN = {
    "types": [*STACK, *TORCH, *OTHERS, *HIGH],
    "config": [*STACK, *TORCH, *OTHERS, *HIGH],
    "config_llm": [*STACK, *TORCH, *OTHERS, *HIGH],
    "flag": [*STACK, *TORCH, *OTHERS, *HIGH],
    "threads": [*STACK, *TORCH, *OTHERS, *HIGH],
    "errors": [*STACK, *TORCH, *OTHERS, *HIGH],
    "plugins": [*STACK, *TORCH, *OTHERS, *HIGH],
    "core": [*STACK, *OTHERS, *HIGH, "transformers", *(f"openrlhf_gopo.{name}" for name in MIDDLE)],
    "envs": [*STACK, *HIGH, "openrlhf_gopo.core"],
    **{name: [*STACK, *HIGH] for name in MIDDLE if name != "envs"},
    # Cheap to import, whatever it adapts: vLLM loads it in all its processes, dry runs too.
    "platform": [*STACK, *TORCH, *OTHERS],
}

IMPORT_ALL = """
import importlib, sys

forbidden = sys.argv[1].split(",")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == f or name.startswith(f + ".") for f in forbidden):
            raise ImportError(f"{name} is forbidden in this layer")

sys.meta_path.insert(0, Blocked())
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"{name}: {error}")
"""


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layer_imports_only_what_it_may(layer: str) -> None:
    if layer == "core":
        pytest.importorskip("torch")
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(FORBIDDEN[layer]), *modules(layer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


def test_the_block_works() -> None:
    command = [sys.executable, "-c", IMPORT_ALL, "json", "json"]
    assert "json is forbidden" in subprocess.run(command, capture_output=True, text=True, timeout=60).stderr


def test_every_folder_has_its_layer() -> None:
    layers = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert layers - {"__init__", "runtime", "cli"} == FORBIDDEN.keys()


def test_nothing_imports_cli() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != "cli":
            assert "openrlhf_gopo.cli" not in path.read_text(encoding="utf-8"), path


def modules(layer: str) -> list[str]:
    single = PACKAGE / f"{layer}.py"
    files = [single] if single.is_file() else sorted((PACKAGE / layer).rglob("*.py"))
    assert files, layer
    names = [".".join(("openrlhf_gopo", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in files]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
