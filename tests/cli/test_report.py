"""The command ``report``, as a user runs it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_gopo.cli import report

GOLDEN = Path(__file__).parents[1] / "evaluation" / "golden"
BEFORE, AFTER = f"before={GOLDEN / 'before.jsonl'}", f"after={GOLDEN / 'after.jsonl'}"


def fails(capsys, *argv):
    """Stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as exit_:
        report.main([str(a) for a in argv])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_it_writes_the_report_and_shows_the_table(tmp_path, capsys):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"global_step": 0, "eval_tse": 30}\n')
    report.main([BEFORE, AFTER, "--out", str(tmp_path / "new" / "out"), "--metrics", str(metrics)])
    shown = capsys.readouterr().out
    assert "| after - before | 4 |" in shown
    files = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert files == {
        *("table.md", "table.csv", "slices.md"),
        *("intervals.png", "learning_curves.png", "transcripts.html"),
    }
    assert all(name in shown for name in files)


def test_a_file_of_a_killed_writer_is_used_up_to_its_last_line(tmp_path):
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes((GOLDEN / "after.jsonl").read_bytes()[:-1000])
    command = [sys.executable, "-m", "openrlhf_gopo.cli.report", BEFORE, f"torn={torn}", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (warning,) = done.stderr.splitlines()
    assert warning.startswith(f"report: WARNING: {torn}:8: the writer was killed within this last line")
    assert "| torn | 4 | 7 | 0 |" in done.stdout


def test_a_broken_line_in_the_middle_is_an_error(tmp_path, capsys):
    lines = (GOLDEN / "after.jsonl").read_bytes().splitlines(keepends=True)
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(lines[0] + lines[1][:500] + b"\n" + lines[2])
    assert f"report: error: {broken}:2: not JSON" in fails(capsys, f"a={broken}", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_file_does_not_stop_the_others(tmp_path, capsys, caplog):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    report.main([BEFORE, f"none={empty}", AFTER, "--out", str(tmp_path / "out")])
    assert f"{empty}: no dialogues; none has an empty row" in caplog.text
    shown = capsys.readouterr().out
    assert "| none | 0 | 0 | 0 | - |" in shown
    assert "| after - before | 4 |" in shown
    assert "none stands alone" in shown


def test_nothing_at_all_is_an_error(tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert f"{empty}: no dialogues; give files" in fails(capsys, f"a={empty}", "--out", tmp_path)


def test_policies_of_different_environments_stand_alone(tmp_path, capsys):
    report.main([BEFORE, f"coffee={GOLDEN / 'coffee.jsonl'}", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert (
        "coffee stands alone, without a difference to before: cannot pair 4 goals with 2: they share no goal id"
        in shown
    )
    assert "coffee - before" not in shown


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        (["before.jsonl"], "'before.jsonl': give a policy as NAME=FILE.jsonl"),
        (["=before.jsonl"], "'=before.jsonl': give a policy as NAME=FILE.jsonl"),
        (["a="], "'a=': give a policy as NAME=FILE.jsonl"),
        (["a=x.jsonl", "a=y.jsonl"], "'a=y.jsonl': 'a' names x.jsonl already; give each policy a name of its own"),
        (["a=nowhere.jsonl"], "nowhere.jsonl: no such trajectories file"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, capsys, policies, message):
    err = fails(capsys, *policies, "--out", tmp_path / "out")
    assert err.startswith(f"report: error: {message}")
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    shutil.copy(GOLDEN / "coffee.jsonl", tmp_path / "out")
    assert "report: error:" in fails(capsys, BEFORE, "--out", tmp_path / "out")
