"""vLLM draws the replies of a group in one call, in OpenRLHF's own rollout actor."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_gopo import platform

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.stack,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU"),
]


def test_a_group_in_one_call(tmp_path):
    build = [sys.executable, str(HERE.parent / "platform" / "stack_script.py"), "build", str(tmp_path)]
    subprocess.run(build, check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, str(HERE / "replies_script.py"), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for group in found["together"]:
        assert len(group) == 5
        assert len({tuple(tokens) for tokens, _ in group}) == 5  # an untrained model never says the same twice
        for tokens, logprobs in group:
            assert 0 < len(tokens) == len(logprobs) <= 12
            assert 2 not in tokens[:-1]
            assert len(tokens) == 12 or tokens[-1] == 2
            assert all(value < 0 for value in logprobs)
    first, again = found["seeded"]
    assert first == again == found["alone"]
