import base64
import csv
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.evaluation import report
from openrlhf_gopo.evaluation.curves import Metrics
from openrlhf_gopo.evaluation.report import write_learning_curves, write_results, write_table, write_transcripts
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.types import Goal, StopReason, Stream, Trajectory, Turn

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> <!--<script> <|im_end|> {{ 7*7 }} \u2028 \ud800"
)
PNG = b"\x89PNG\r\n\x1a\n"


def dialogue(goal_id, tse, text="hello", intent="return", sample=0):
    goal = Goal(goal_id, intent, text, {"solve": 1.0}, {"order": text}, {"tone": text}, {"private": "SECRET-17"})
    turn = Turn(text, ("a", text), "a", text, text, (text,), {"a": 3}, (text,), ("solve",), 0.5, True, -0.25)
    stream = Stream([424242], [(0, 1)], [-0.1])
    rewards = {"tse": tse, "gre": math.nan}
    return Trajectory(goal, sample, 7, [turn], StopReason.COMPLETED, {"expert": stream}, rewards)


class Page(HTMLParser):
    """Element counts, the text of each script, and everything an element would load."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.scripts, self.loads, self.policy, self._inside = [], [], [], "", False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.loads += [attrs[name] for name in ("src", "href") if name in attrs]
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]
        if tag == "script":
            self._inside = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "script"

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


def transcripts(tmp_path, phases, **options):
    return Page(write_transcripts(phases, tmp_path / "t.html", **options))


def test_text_of_a_dialogue_never_becomes_markup(tmp_path):
    clean = transcripts(tmp_path, {"before": [dialogue("g", 1)], "after": [dialogue("g", 2)]})
    hostile = {name: [dialogue("g", 1, HOSTILE, HOSTILE)] for name in ("before", HOSTILE)}
    page = transcripts(tmp_path, hostile)
    assert len(page.scripts) == len(clean.scripts) == 2
    assert page.scripts[1] == clean.scripts[1]
    assert sorted(page.tags) == sorted(clean.tags)
    assert page.loads == []


def test_hostile_text_reaches_the_reader_unchanged(tmp_path):
    page = transcripts(tmp_path, {"only": [dialogue("g", 1, HOSTILE, HOSTILE)]})
    (record,) = page.data["dialogues"]
    (turn,) = record["turns"]
    assert turn["user"] == turn["reply"] == turn["briefing"] == record["goal"]["context"] == HOSTILE
    assert record["goal"]["intent"] == HOSTILE
    assert not set("<>&") & set(page.scripts[0])


def test_only_our_script_may_run_and_nothing_is_loaded(tmp_path):
    page = transcripts(tmp_path, {"only": [dialogue("g", 1)]})
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy
    assert not re.search(r"https?://|@import|url\(", page.source)


def test_the_reader_builds_no_markup_from_text():
    script = report.jinja2.PackageLoader("openrlhf_gopo.evaluation", "templates")
    source = script.get_source(report.jinja2.Environment(), "reader.js")[0]  # autoescape plays no part here
    assert "textContent" in source
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", source)


def test_the_page_holds_what_the_reader_needs_and_nothing_private(tmp_path):
    phases = {"before": [dialogue("g", 1)], "after": [dialogue("g", 2.5)]}
    page = transcripts(tmp_path, phases)
    assert page.data["phases"] == ["before", "after"]
    first, second = page.data["dialogues"]
    assert (first["phase"], second["phase"], first["goal"]["id"], second["goal"]["id"]) == (0, 1, "g", "g")
    assert second["rewards"] == {"tse": 2.5, "gre": None}  # NaN is no JSON
    assert (first["stop"], first["done"], first["seed"]) == ("completed", ["solve"], 7)
    assert first["turns"][0]["expert_logprob"] == -0.25
    assert "SECRET-17" not in page.source
    assert "424242" not in page.source


def test_a_large_page_keeps_whole_goals_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PAGE_LIMIT", 5)
    phases = {name: [dialogue(f"g{i}", i) for i in range(9)] for name in ("before", "after")}
    page = transcripts(tmp_path, phases)
    shown = [(d["goal"]["id"], d["phase"]) for d in page.data["dialogues"]]
    assert shown == [("g0", 0), ("g0", 1), ("g1", 0), ("g1", 1)]
    assert "first 4 of 18 dialogues" in page.source


def test_the_learning_curves_are_embedded(tmp_path):
    (tmp_path / "c.png").write_bytes(PNG + b"123")
    page = transcripts(tmp_path, {"only": [dialogue("g", 1)]}, curves=tmp_path / "c.png")
    (uri,) = page.loads
    assert base64.b64decode(uri.removeprefix("data:image/png;base64,")) == PNG + b"123"


def results():
    before = [dialogue("a", 10), dialogue("b", 30), dialogue("c", 50)]
    after = [dialogue("a", 30), dialogue("b", 50), dialogue("c", 70)]
    return {"before": summarise(before), "after": summarise(after), "other": summarise([dialogue("z", 1)])}


def test_the_markdown_table_has_policies_intervals_and_paired_differences(tmp_path):
    write_table(results(), tmp_path / "table.md")
    text, stops = (tmp_path / "table.md").read_text().split("Stop reasons")
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines() if "|" in line}
    assert rows["policy"][1:5] == ["goals", "dialogues", "failed", "TSE (0-100)"]
    assert rows["before"][1:4] == ["3", "3", "0"]
    assert rows["before"][4].startswith("30.0 [")
    assert rows["after - before"][1:5] == ["3", "", "", "+20.0 [+20.0, +20.0]"]  # constant gain: no width
    assert rows["other"][4] == "1.0 [n/a]"
    assert "other - before" not in rows  # no common goal
    assert "| before | 100.0% |" in stops
    assert "GRE" not in text  # NaN everywhere: not measured


def test_the_csv_table_has_plain_numbers(tmp_path):
    write_table(results(), tmp_path / "table")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = {row["policy"]: row for row in csv.DictReader(file)}
    assert float(rows["before"]["tse"]) == 30.0
    assert 10.0 <= float(rows["before"]["tse_low"]) < 30.0 < float(rows["before"]["tse_high"]) <= 50.0
    assert float(rows["after - before"]["tse_low"]) == 20.0


def test_names_cannot_break_the_markdown_table(tmp_path):
    write_table({"a|b\n<b>": summarise([dialogue("a", 1)])}, tmp_path / "table")
    assert "| a\\|b &lt;b> | 1 |" in (tmp_path / "table.md").read_text()


def test_floating_point_noise_has_no_sign():
    assert report._cell(report.Interval(-1e-12, -2e-12, 1e-12, 5), "gre", signed=True) == "+0.000 [+0.000, +0.000]"


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


def test_the_results_folder_is_complete(tmp_path):
    phases = {"before": [dialogue("a", 10), dialogue("b", 30)], "after": [dialogue("a", 20), dialogue("b", 40)]}
    paths = write_results(
        tmp_path / "new" / "results", phases, metrics_file(tmp_path, {"global_step": 0, "eval_tse": 1})
    )
    names = {path.name for path in paths.values()}
    assert names == {"table.md", "table.csv", "slices.md", "learning_curves.png", "transcripts.html"}
    assert names == {path.name for path in (tmp_path / "new" / "results").iterdir()}
    assert "+10.0 [+10.0, +10.0]" in paths["table"].read_text()
    assert "| intent: return | after | 2 | 30.0 [20.0, 40.0] |" in paths["slices"].read_text()
    assert len(Page(paths["transcripts"]).loads) == 1


def test_evaluation_needs_no_training_stack():
    code = (
        "import sys, openrlhf_gopo.evaluation.report, openrlhf_gopo.evaluation.records\n"
        "print(sorted({'ray', 'vllm', 'deepspeed', 'openrlhf', 'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
