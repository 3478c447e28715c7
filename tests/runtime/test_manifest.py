"""Checkpoint sets on disk, with real files: whatever moment a writer dies at, the earlier sets stay whole."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_gopo.errors import CheckpointError
from openrlhf_gopo.runtime.checkpoints.manifest import START, CheckpointFolder

PARTS = ("trainer/{}", "expert/_actor/{}", "expert/_critic/{}", "responder/_actor/{}")


def parts(tag: str) -> list[str]:
    return [part.format(tag) for part in PARTS]


def write(folder: CheckpointFolder, tag: str, step: int, metric: float | None = None, size: int = 100):
    """A whole set; what models write here are files of ``size`` bytes."""
    folder.prepare(tag, parts(tag))
    for number, part in enumerate(parts(tag)):
        (folder.root / part / "shards").mkdir(parents=True)
        (folder.root / part / "shards" / "weights.pt").write_bytes(bytes([number]) * size)
    return folder.commit(tag, step, parts(tag), metric=metric, state={"step": step}, flags={"a": 1})


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "ckpt", max_num=3)


def test_the_newest_is_the_last_written_not_the_highest_step(folder):
    folder.start({}, {})
    assert folder.newest().tag == START
    write(folder, "global_step8", 8)
    assert write(folder, "global_step2", 2) == folder.newest()
    folder.start({}, {})
    assert folder.newest().tag == START  # a new run that has no checkpoint of its own yet


def truncated(folder, tag):
    (folder.root / f"expert/_actor/{tag}/shards/weights.pt").write_bytes(b"x")
    return "has 1 bytes, its manifest says 100"


def missing(folder, tag):
    (folder.root / f"responder/_actor/{tag}/shards/weights.pt").unlink()
    return "weights.pt is missing"


def mixed(folder, tag):
    os.rename(folder.root / f"expert/_actor/{tag}", folder.root / "away")
    os.rename(folder.root / "expert/_actor/global_step1", folder.root / f"expert/_actor/{tag}")
    os.rename(folder.root / "away", folder.root / "expert/_actor/global_step1")
    return "mixed: "


def torn(folder, tag):
    path = folder.root / f"{tag}.manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    return "not a manifest of this version"


def without(folder, tag):
    (folder.root / f"{tag}.manifest.json").unlink()
    return "has no manifest"


def newer(folder, tag):
    path = folder.root / f"{tag}.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": 2}))
    return "layout 2"


@pytest.mark.parametrize("damage", [truncated, missing, torn, without, newer])
def test_an_incomplete_set_is_named_and_skipped(folder, caplog, damage):
    whole = write(folder, "global_step1", 1)
    write(folder, "global_step2", 2)
    why = damage(folder, "global_step2")
    assert folder.newest() == whole
    named = [r.getMessage() for r in caplog.records if "global_step2" in r.getMessage()]
    assert any(why in message for message in named), named


def test_folders_of_two_sets_are_no_set(folder, caplog):
    write(folder, "global_step1", 1)
    write(folder, "global_step2", 2)
    mixed(folder, "global_step2")  # sizes agree everywhere
    assert folder.newest() is None
    assert sum("mixed" in r.getMessage() for r in caplog.records) == 2


def test_sets_go_whole_the_worst_first_never_the_new_one_nor_the_best(folder):
    for step, metric in enumerate((None, 5.0, 1.0, 3.0, 0.5), start=1):
        write(folder, f"global_step{step}", step, metric)
        if step == 2:
            write(folder, "best_global_step2", 2, metric)
    assert [s.tag for s in folder.sets()] == ["global_step2", "best_global_step2", "global_step4", "global_step5"]
    assert all(folder.problem(s) is None for s in folder.sets())
    left = {p.name for kind in ("trainer", "expert/_actor", "expert/_critic") for p in (folder.root / kind).iterdir()}
    assert left == {s.tag for s in folder.sets()}
    write(folder, "best_global_step6", 6, 9.0)
    assert [s.tag for s in folder.sets() if s.best] == ["best_global_step6"]


def test_max_mem_counts_all_sets(tmp_path):
    folder = CheckpointFolder(tmp_path, max_num=10, max_mem=2.5 * 4 * 2**20 / 2**30)
    for step in (1, 2, 3):
        write(folder, f"global_step{step}", step, size=2**20)
    assert [s.tag for s in folder.sets()] == ["global_step2", "global_step3"]
    tiny = CheckpointFolder(tmp_path, max_num=10, max_mem=0.0)
    write(tiny, "global_step4", 4)
    assert [s.tag for s in tiny.sets()] == ["global_step4"]


def test_a_set_written_again_is_not_complete_meanwhile(folder):
    old = write(folder, "global_step1", 1)
    write(folder, "global_step2", 2)
    folder.prepare("global_step2", parts("global_step2"))
    assert folder.newest() == old
    assert not any((folder.root / part).exists() for part in parts("global_step2"))


def test_a_folder_that_the_driver_does_not_see_is_an_error(folder):
    folder.start({}, {})
    with pytest.raises(CheckpointError, match="give a folder that all nodes share"):
        folder.commit("global_step1", 1, parts("global_step1"))


# Every call that touches the file system, counted by Python itself; the child dies right before the n-th.
DIES = """
import os, sys
sys.path.insert(0, sys.argv[3])
from test_manifest import CheckpointFolder, write
folder = CheckpointFolder(sys.argv[1], max_num=1)
left = int(sys.argv[2])
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
def hook(event, args):
    global left
    if event in EVENTS and not (event == "open" and args[2] & 3 == 0 and not str(args[0]).endswith(".json")):
        left -= 1
        if left == 0:
            os._exit(9)
sys.addaudithook(hook)
write(folder, "global_step3", 3)
"""


def test_a_kill_at_any_moment_of_writing_leaves_a_whole_set(tmp_path, caplog):
    """--ckpt.max_num 1: the old set goes only after the new one is there."""
    moment, outcomes = 0, []
    while True:
        moment += 1
        folder = CheckpointFolder(tmp_path / str(moment), max_num=1)
        write(folder, "global_step2", 2)
        command = [sys.executable, "-c", DIES, str(folder.root), str(moment), str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, 9), done.stderr
        newest = folder.newest()
        outcomes.append(newest.step)
        assert folder.problem(newest) is None
        write(folder, "global_step3", 3)  # and the run that goes on can write
        assert [s.step for s in folder.sets()] == [3]
        if done.returncode == 0:
            break
    assert moment > 40, "the hook saw nothing"
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {2, 3}


def test_a_full_disk_says_what_is_left(folder):
    write(folder, "global_step1", 1)
    folder.prepare("global_step2", parts("global_step2"))
    for part in parts("global_step2"):
        (folder.root / part).mkdir(parents=True)
        (folder.root / part / "weights.pt").write_bytes(b"x" * 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # the write fails, as on a full disk
    try:
        with pytest.raises(CheckpointError) as caught:
            folder.commit("global_step2", 2, parts("global_step2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    message = str(caught.value)
    assert "File too large" in message
    assert "complete and untouched: global_step1;" in message
    assert "--ckpt.load_enable" in message
    assert folder.newest().tag == "global_step1"


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start():
    """As root no mode bit refuses; /proc does."""
    with pytest.raises(CheckpointError, match=r"--ckpt\.path /proc/none/ckpt: checkpoint start could not be written"):
        CheckpointFolder("/proc/none/ckpt").start({}, {})


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "ckpt").write_text("a file")
    with pytest.raises(CheckpointError, match="checkpoint start could not be written"):
        CheckpointFolder(tmp_path / "ckpt").start({}, {})
