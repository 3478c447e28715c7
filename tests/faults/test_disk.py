"""A real run whose checkpoint folder is full, then large enough; and one that cannot write at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_gopo import platform

sys.path.insert(0, str(Path(__file__).parent))
import kill

pytestmark = [pytest.mark.slow, pytest.mark.stack, pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU")]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 10 MB: two sets of the tiny model fit, a third does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_the_run_and_takes_nothing(tmp_path, small_disk):
    run = kill.Run(kill.build(tmp_path), tmp_path / "out")
    run.sets = small_disk / "ckpt"
    process = run.start()
    assert kill.wait(process, 4 * kill.PATIENCE)
    assert process.returncode == 2
    (error,) = [line for line in run.log.read_text().splitlines() if line.startswith("train_gopo: error: ")]
    assert f"--ckpt.path {run.sets}: checkpoint " in error
    assert "could not be written" in error
    assert "complete and untouched: global_step1" in error
    whole = run.newest()
    assert whole["step"] in (1, 2)
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    assert kill.wait(process := run.start(), 4 * kill.PATIENCE)
    assert process.returncode == 0, run.tail()
    assert f"going on from {whole['tag']} of" in run.log.read_text()
    steps = [r["global_step"] for r in run.records() if "expert/policy_loss" in r]
    assert steps == list(range(1, kill.STEPS + 1))
    dialogues = (run.results / "trajectories.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in dialogues]) == 4 * kill.STEPS


def test_a_folder_that_cannot_be_written_is_refused_before_ray_starts(tmp_path):
    """As root no mode bit refuses a write; /proc does."""
    run = kill.Run(kill.build(tmp_path), tmp_path / "out")
    run.sets = Path("/proc/none/ckpt")
    process = run.start()
    assert kill.wait(process, kill.PATIENCE)
    assert process.returncode == 2
    assert "checkpoint start could not be written" in run.tail()
    assert "Started a local Ray instance" not in run.log.read_text()
