import json
import math
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.evaluation import curves
from openrlhf_gopo.evaluation.curves import Metrics
from openrlhf_gopo.evaluation.report import write_learning_curves, write_results
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn

PNG = b"\x89PNG\r\n\x1a\n"


def dialogue(goal_id, tse):
    goal = Goal(goal_id, "return", "context", {"solve": 1.0}, persona={"tone": "terse"})
    turn = Turn("hello", ("a", "b"), "a", "hi", completed=("solve",), engagement=0.5)
    return Trajectory(goal, 0, 7, [turn], StopReason.COMPLETED, rewards={"tse": tse})


def metrics_file(tmp_path, *records, tail=""):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_metrics_are_read_by_step_and_the_last_value_of_a_step_counts(tmp_path):
    path = metrics_file(
        tmp_path,
        {"global_step": 2, "rollout/tse": 20, "note": "text", "flag": True},
        {"global_step": 1, "rollout/tse": 10, "expert/kl": math.nan},
        {"global_step": 2, "rollout/tse": 25, "eval_tse": 50},
        tail='{"global_step": 3, "roll',
    )
    metrics = Metrics.read(path)
    assert metrics.get("rollout/tse") == ([1, 2], [10.0, 25.0])
    assert metrics.get("eval_tse") == ([2], [50.0])
    assert [metrics.get(key) for key in ("note", "flag", "expert/kl", "absent")] == [None] * 4


def test_an_earlier_run_in_the_same_file_is_not_drawn(tmp_path):
    start = {"global_step": 0, "timing/imports": 9.0}
    old = [start, *({"global_step": step, "rollout/tse": 90} for step in range(1, 9))]
    new = [start | {"timing/imports": 8.0}, {"global_step": 0, "eval_tse": 1}, {"global_step": 1, "rollout/tse": 5}]
    metrics = Metrics.read(metrics_file(tmp_path, *old, *new))
    assert metrics.series == {
        "timing/imports": ([0], [8.0]),
        "eval_tse": ([0], [1.0]),
        "rollout/tse": ([1], [5.0]),
        "global_step": ([0, 1], [0.0, 1.0]),
    }


@pytest.mark.parametrize(("content", "message"), [("{x\n{}\n", ":1: not JSON"), ("{}\n[]\n", ":2: expected a JSON")])
def test_a_bad_metrics_line_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match="metrics.jsonl" + message):
        Metrics.read(metrics_file(tmp_path, tail=content))


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"global_step": 1, "eval_tse": 3.0}],
        [{"rollout/tse": 1.0, "rollout/stop/closed": 1.0}, {"expert/entropy_loss": 0.5}],
        [
            {
                "global_step": i,
                "eval_tse": i,
                "eval_tse_low": i - 1,
                "eval_tse_high": i + 1,
                "expert/pref_accuracy": 0.5,
            }
            for i in range(60)
        ],
    ],
    ids=["empty", "one point", "no steps", "many points"],
)
def test_curves_are_drawn_whatever_is_missing(tmp_path, records):
    png = write_learning_curves(metrics_file(tmp_path, *records), tmp_path / "curves.png")
    assert png.read_bytes().startswith(PNG)


def test_held_out_points_stand_over_the_training_curve_wherever_there_was_an_evaluation(tmp_path):
    """A run of 16 updates with --eval.steps 4: five places, each with its interval; greedy at the first and last."""
    records = [{"global_step": step, "rollout/tse": 30 + step} for step in range(1, 17)]
    for step in (0, 4, 8, 12, 16):
        records.append({"global_step": step, "eval_tse": 30 + step, "eval_tse_low": 28, "eval_tse_high": 50})
    records += [{"global_step": step, "eval_greedy_tse": 40.0} for step in (0, 16)]
    axes = Figure().subplots()
    curves._tse(axes, Metrics.read(metrics_file(tmp_path, *records)))
    points, _, bars = axes.containers[0].lines
    assert points.get_xydata().tolist() == [[step, 30 + step] for step in (0, 4, 8, 12, 16)]
    assert [bar[:, 1].tolist() for bar in bars[0].get_segments()] == [[28, 50]] * 5
    by_label = {line.get_label(): line for line in axes.get_lines()}
    assert by_label["held-out goals, greedy"].get_xdata().tolist() == [0, 16]
    assert points.zorder > by_label["training rollouts"].zorder
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["held-out goals [95%]", "held-out goals, greedy", "training rollouts"]


@pytest.mark.parametrize("accuracies", [(0.5, 0.5), (0.5, 0.6)])
def test_what_cannot_move_is_not_drawn(tmp_path, monkeypatch, accuracies):
    """With the sampler as reference the accuracy is 0.5 and the loss log 2 in every step: lines that say nothing."""
    drawn = []
    line = curves._line

    def recorded(axes, series, label, *rest, **options):
        drawn.extend([label] if series else [])
        return line(axes, series, label, *rest, **options)

    monkeypatch.setattr(curves, "_line", recorded)
    records = [
        {"global_step": i, "expert/pref_accuracy": a, "expert/pref_loss": math.log(2), "expert/entropy_loss": 1.0}
        for i, a in enumerate(accuracies)
    ]
    write_learning_curves(metrics_file(tmp_path, *records), tmp_path / "curves.png")
    preferences = ["preference accuracy (left)", "preference loss (right)"]
    assert drawn == [*(preferences if accuracies[1] != 0.5 else []), "expert entropy (right)"]


@pytest.mark.parametrize("metrics", [True, False])
def test_the_results_folder_is_complete(tmp_path, metrics):
    phases = {"before": [dialogue("a", 10), dialogue("b", 30)], "after": [dialogue("a", 20), dialogue("b", 40)]}
    run = metrics_file(tmp_path, {"global_step": 0, "eval_tse": 1}) if metrics else None
    paths = write_results(tmp_path / "new" / "results", phases, run)
    names = {path.name for path in paths.values()}
    pictures = {"intervals.png", "learning_curves.png"} if metrics else {"intervals.png"}
    assert names == {"table.md", "table.csv", "slices.md", "transcripts.html"} | pictures
    assert names == {path.name for path in (tmp_path / "new" / "results").iterdir()}
    assert "+10.0 [+10.0, +10.0] p=0.500" in paths["table"].read_text()  # two goals: ++ and -- of four sign patterns
    assert "| intent: return | after | 2 | 2 | 30.0 [20.0, 40.0] |" in paths["slices"].read_text()
    assert paths["transcripts"].read_text().count("data:image/png;base64,") == len(pictures)


def test_names_and_gaps_do_not_stop_the_picture_of_intervals(tmp_path):
    unmeasured = Trajectory(Goal("a", "return", "", {}), 0, 0, [], StopReason.CLOSED)
    phases = {"$x_1$ \ud800 " + 60 * "long": [dialogue("a", 1)], "none": [unmeasured], "empty": []}
    assert write_results(tmp_path, phases)["intervals"].read_bytes().startswith(PNG)


def test_evaluation_needs_no_training_stack():
    code = (
        "import sys, openrlhf_gopo.evaluation.report, openrlhf_gopo.evaluation.records\n"
        "print(sorted({'ray', 'vllm', 'deepspeed', 'openrlhf', 'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
