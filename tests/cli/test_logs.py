"""The command ``logs``, as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_gopo.cli import logs
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.logs import Dialogue, measured, read, to_trajectory

MGSHOP = Path(__file__).parents[1] / "logs" / "mgshop_fixture"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "human.jsonl"
    logs.main(["convert", "mgshop", str(MGSHOP), "--out", str(path)])
    return path


def fails(capsys, *argv):
    """Exit status, stdout and stderr."""
    with pytest.raises(SystemExit) as exit_:
        logs.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


def test_convert_says_what_it_wrote(tmp_path, capsys):
    file = tmp_path / "new" / "human.jsonl"
    logs.main(["convert", "mgshop", str(MGSHOP), "--out", str(file)])
    assert capsys.readouterr().out == f"2 dialogues of mgshop -> {file}\n"


def test_validate_a_good_file(file, capsys):
    capsys.readouterr()
    logs.main(["validate", str(file)])
    assert capsys.readouterr().out == (
        f"{file}: 2 good dialogues with 6 turns, 0 problems. "
        "Turns without a strategy: 1; without engagement or a known event: 2.\n"
    )


def test_validate_tells_problems_up_to_a_limit_and_fails(file, capsys):
    capsys.readouterr()
    code, out, _ = fails(capsys, "validate", file, "--env", "shop", "--limit", "1")
    first, more, total = out.splitlines()
    assert code == 1
    assert first.startswith(f"{file}:1:goal.intent: 'Tents' is no intent of the environment shop: use one of: address")
    assert more == "... and 1 more"
    assert "0 good dialogues with 0 turns, 2 problems" in total


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["validate", "none.jsonl"], "none.jsonl: no such file; give a .jsonl file of dialogues"),
        (["score", "none.jsonl"], "none.jsonl: no such file"),
        (["validate", "none.jsonl", "--env", "nosuch"], "--gopo.env nosuch: no such environment"),
        (["validate", "none.jsonl", "--env", "star"], "--gopo.data None: the environment star needs its data"),
        (["validate", "none.jsonl", "--data", "x"], "--data x: goes with --env"),
        (["validate", "none.jsonl", "--limit", "0"], "--limit 0: give at least 1"),
        (["convert", "star", "none", "--out", "out.jsonl"], "none: no such folder"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = fails(capsys, *argv)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"logs: error: {expected}")


def test_an_unknown_source_names_the_known(capsys):
    code, _, err = fails(capsys, "convert", "nosuch", ".", "--out", "x")
    assert code == 2
    assert "mgshop" in err
    assert "star" in err


def test_score_prints_the_summary(file, capsys):
    capsys.readouterr()
    logs.main(["score", str(file)])
    header, _, row, *rest = capsys.readouterr().out.splitlines()
    cells = dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    trajectories = [to_trajectory(dialogue) for _, dialogue in read(file)]
    for trajectory in trajectories:
        trajectory.rewards = measured(trajectory)
    expected = summarise(trajectories).metrics
    assert cells["policy"] == "human"
    assert cells["TSE (0-100)"] == f"{expected['tse'].mean:.1f} [n/a]"  # one goal gives no interval
    assert cells["success"] == "0.500 [n/a]"
    assert "GRE" not in cells
    assert any("not measured" in line for line in rest)


def test_score_stops_at_a_bad_line(file, capsys):
    file.write_text(file.read_text() + "{}\n")
    code, _, err = fails(capsys, "score", file)
    assert code == 2
    assert f"{file}:3:id: Field required: add it" in err


def test_schema_is_json_schema_of_a_line(capsys):
    logs.main(["schema"])
    printed = json.loads(capsys.readouterr().out)
    assert printed == Dialogue.model_json_schema()
    assert set(printed["required"]) == {"id", "source", "language", "goal", "turns", "outcome"}
    parts = [printed, *(part for part in printed["$defs"].values() if part["type"] == "object")]
    assert all("description" in part for part in parts)
    assert all("description" in field or "$ref" in field for part in parts for field in part["properties"].values())


def test_it_runs_as_a_module_without_the_training_stack(file):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "openrlhf_gopo.cli.logs", "validate", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-400:]
    assert "2 good dialogues" in done.stdout
    assert not re.search(r"\| +(torch|ray|vllm|transformers)$", done.stderr, re.M)
