"""The page as a browser shows it. The address sets filters, so that a page can be driven without a test driver."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import zlib
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlencode

import pytest

from openrlhf_gopo.cli import report as command
from openrlhf_gopo.evaluation import page
from openrlhf_gopo.evaluation.records import read_trajectories
from openrlhf_gopo.evaluation.report import write_results
from openrlhf_gopo.types import Goal, StopReason, Stream, Trajectory, Turn

GOLDEN = Path(__file__).parent / "golden"
POLICIES = ("before", "after", "fewer", "coffee")
HOSTILE = (
    "</script><script>document.title=1</script><img src=x onerror=document.title=2> <svg/onload=document.title=3> "
    "<!--<script> <|im_end|> {{ 7*7 }} \u2028 \ud800 \" ' &amp; __proto__"
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


class Dom(HTMLParser):
    """All elements in order as (tag, attributes, text of it and what it holds)."""

    VOID = ("meta", "img", "br", "input", "link")

    def __init__(self, source):
        super().__init__()
        self.source, self.elements, self._open = source, [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        element = [tag, dict(attrs), ""]
        self.elements.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag, css=""):
        wanted = set(css.split())
        return [e for e in self.elements if e[0] == tag and wanted <= set((e[1].get("class") or "").split())]

    def texts(self, tag, css=""):
        return [text for _, _, text in self.all(tag, css)]

    def by_id(self, name):
        return next(text for _, attrs, text in self.elements if attrs.get("id") == name)

    @property
    def blobs(self):
        return [json.loads(zlib.decompress(base64.b64decode(text))) for text in self.texts("script", "blob")]


def browse(path, folder, *flags, **state):
    """Run the page in Chromium with ``state`` in its address; the page's DOM when its script is done."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
    address = f"{Path(path).resolve().as_uri()}#{urlencode(state)}"
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={folder}", *(flags or ["--dump-dom"]), address],
        capture_output=True,
        timeout=180,
        check=True,
    )
    return Dom(done.stdout.decode("utf-8", "replace"))


def dialogue(goal_id="g", tse=1.0, text="hello", sample=0, **turn):
    goal = Goal(goal_id, text, text, {"solve": 1.0}, {"order": text}, {"tone": text}, {"private": "SECRET-17"})
    given = {"briefing": text, "expected": (text,), "events": (text,), "completed": ("solve",), "plan": text} | turn
    turn = Turn(text, ("a", text), text, text, relevance={"a": 3}, expert_logprob=-0.25, **given)
    stream = Stream([424242], [(0, 1)], [-0.1])
    return Trajectory(goal, sample, 7, [turn], StopReason.COMPLETED, {"expert": stream}, {"tse": tse, "gre": math.nan})


def written(folder, phases):
    return write_results(folder, phases)["transcripts"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    out = tmp_path_factory.mktemp("golden") / "report"
    command.main([*(f"{name}={GOLDEN / name}.jsonl" for name in POLICIES), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return tmp_path_factory.mktemp("profile")


@pytest.mark.parametrize("name", ["table.md", "table.csv", "slices.md"])
def test_the_golden_report(golden, name):
    """After a change that is meant: run the command of ``golden`` and put its files beside the trajectories."""
    assert (golden / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_only_our_script_may_run_and_nothing_is_loaded(tmp_path):
    dom = Dom(written(tmp_path, {"only": [dialogue()]}).read_text())
    ours = dom.texts("script")[-1]
    policy = next(attrs["content"] for _, attrs, _ in dom.all("meta") if "http-equiv" in attrs)
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(ours.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert not re.search(r"https?://|@import|url\(", dom.source)
    assert [attrs["src"][:15] for _, attrs, _ in dom.elements if "src" in attrs or "href" in attrs] == [
        "data:image/png;"
    ]
    assert "textContent" in ours
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", ours)


def test_the_page_holds_every_dialogue_and_nothing_private(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "CHUNK", 2)
    phases = {
        "before": [dialogue("g1", 1), dialogue("g2", 2)],
        "after": [dialogue("g1", 2.5), dialogue("g2", 3, HOSTILE), dialogue("g3")],
    }
    path = written(tmp_path, phases)
    index, *chunks = Dom(path.read_text()).blobs
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    found = [d for chunk in chunks for d in chunk]
    rows = [(index["policies"][p], index["goals"][g][0], tse) for p, g, _, _, tse, _ in index["dialogues"]]
    assert rows == [  # goal by goal: what is read side by side is unpacked at once
        ("before", "g1", 1.0),
        ("after", "g1", 2.5),
        ("before", "g2", 2.0),
        ("after", "g2", 3.0),
        ("after", "g3", 1.0),
    ]
    assert [(d["goal"]["id"], d["rewards"]["tse"]) for d in found] == [row[1:] for row in rows]
    assert found[0]["rewards"]["gre"] is None  # NaN is no JSON
    assert found[3]["turns"][0]["reply"] == found[3]["goal"]["facts"]["order"] == HOSTILE
    assert not re.search("SECRET-17|424242", json.dumps(found) + path.read_text())


@in_browser
def test_hostile_text_is_shown_and_never_run(tmp_path, profile):
    text = HOSTILE.replace("\ud800", "")  # Chromium's --dump-dom dies of a lone surrogate, whatever the page
    state = {"policy": 0, "beside": 1, "flow": "open", "stops": "open"}
    shown, harmless = (
        browse(written(tmp_path / folder, {name: [dialogue(text=name)], "b": [dialogue()]}), profile, **state)
        for folder, name in (("hostile", text), ("clean", "harmless"))
    )
    assert shown.texts("title") == ["Dialogue report"]
    for tag in ("script", "img", "svg"):
        assert len(shown.all(tag)) == len(harmless.all(tag))
    assert not [attrs for _, attrs, _ in shown.elements if {"onerror", "onload"} & attrs.keys()]
    assert shown.texts("div", "says")[:2] == ["User" + text, "Reply" + text]
    assert shown.texts("h3") == [f"{text}, sample 0"]
    assert shown.texts("article")[1] == "b has no dialogue about goal g."  # another intent: another goal
    assert f"start \u2192 {text}: 1 of 1" in [attrs.get("title") for _, attrs, _ in shown.all("td")]


@in_browser
def test_lone_surrogates_do_not_stop_the_page(tmp_path, profile):
    image = pytest.importorskip("matplotlib.image")
    pictures = []
    for folder, text in (("lone", "\ud800"), ("whole", "\ufffd")):  # shown as the replacement character
        path = written(tmp_path / folder, {"a": [dialogue(text=f"x{text}y")]})
        shot = tmp_path / f"{folder}.png"
        browse(path, profile, f"--screenshot={shot}", "--window-size=900,1800", flow="open")
        pictures.append(image.imread(shot))
    assert (pictures[0] == pictures[1]).all()


@in_browser
def test_two_policies_stand_side_by_side_on_the_same_goal(golden, profile):
    after = read_trajectories(GOLDEN / "after.jsonl")
    before = {(t.goal.id, t.sample): t for t in read_trajectories(GOLDEN / "before.jsonl")}
    dom = browse(golden / "transcripts.html", profile, policy=1, beside=0, sort="TSE, highest first")
    best = max(after, key=lambda t: t.rewards["tse"])
    other = before[best.goal.id, best.sample]
    assert dom.texts("h3") == [f"after, sample {best.sample}", f"before, sample {best.sample}"]
    assert len(dom.all("nav")) == 1
    assert dom.by_id("count") == f"{len(after)} of {8 + 8 + 4 + 2} dialogues"
    left, right = dom.texts("article")
    for view, shown in ((left, best), (right, other)):
        assert view.count("Turn ") == len(shown.turns)
        assert all(turn.reply in view and turn.user in view for turn in shown.turns)
    chosen = best.turns[0]
    named = f"{chosen.strategy}{chosen.relevance[chosen.strategy]}"
    share = dom.texts("div", "bar chosen")[0].removeprefix(named).removesuffix("%")
    assert float(share) == pytest.approx(100 * chosen.probabilities[chosen.strategy], abs=0.06)
    assert len(dom.all("div", "bar")) == sum(len(turn.probabilities) for turn in best.turns)  # none recorded before
    assert f"{len(other.turns[0].allowed)} allowed" in right
    assert other.completed
    assert not other.success  # the gains of its turns share out less than all weights
    for view, shown in ((left, best), (right, other)):
        gains = [float(n) for n in re.findall(r"TSE \+([\d.]+)", view)]
        assert sum(gains) == pytest.approx(shown.rewards["tse"], abs=0.05 * len(gains))


@in_browser
def test_the_flow_and_the_stops_are_those_of_the_dialogues(golden, profile):
    dom = browse(golden / "transcripts.html", profile, policy=0, flow="open", stops="open", intent="refund")
    found = [t for t in read_trajectories(GOLDEN / "before.jsonl") if t.goal.intent == "refund"]
    steps = Counter(
        step for t in found for step in pairwise(["start", *(turn.strategy for turn in t.turns), t.stop.value])
    )
    totals = Counter({name: sum(n for (source, _), n in steps.items() if source == name) for name, _ in steps})
    stops = Counter((t.stop.value, len(t.turns)) for t in found)
    expected = {f"{a} \u2192 {b}: {n} of {totals[a]}" for (a, b), n in steps.items()}
    expected |= {f"{stop} after {turns}: {n} of {len(found)}" for (stop, turns), n in stops.items()}
    assert {attrs["title"] for _, attrs, _ in dom.all("td") if "title" in attrs} == expected
    assert dom.texts("figcaption") == [f"before, {len(found)} dialogues"] * 2


@in_browser
def test_the_search_finds_text_in_every_chunk(tmp_path, profile, monkeypatch):
    monkeypatch.setattr(page, "CHUNK", 3)
    texts = ["apples", "pears", "Pears", "plums"]
    played = [dialogue(f"g{i}", i, texts[i % 4] + f" {i}", sample=i) for i in range(20)]
    dom = browse(written(tmp_path, {"only": played}), profile, query="pears 1", at=13)
    assert dom.by_id("count") == "6 of 20 dialogues"  # 1, 10, 13, 14, 17, 18
    assert dom.texts("h3") == ["only, sample 13"]


@in_browser
@pytest.mark.parametrize("width", [1400, 420])
def test_nothing_sticks_out_of_the_page(golden, profile, tmp_path, width):
    image = pytest.importorskip("matplotlib.image")
    shot = tmp_path / "shot.png"
    state = {"policy": 0, "beside": 1, "flow": "open"}
    browse(golden / "transcripts.html", profile, f"--screenshot={shot}", f"--window-size={width},3000", **state)
    pixels = image.imread(shot)
    assert pixels.shape[:2] == (3000, width)
    margin, inside = pixels[:, -6:, :3], pixels[:, 20:-20, :3]
    assert (margin == margin[0, 0]).all()
    assert inside.std() > 0.05


@in_browser
def test_a_page_cut_while_copied_says_so(golden, profile, tmp_path):
    source = (golden / "transcripts.html").read_text()
    blob = re.search(r'class="blob">([^<]*)<', source)[1]
    (tmp_path / "cut.html").write_text(source.replace(blob, blob[: len(blob) // 8 * 4]))
    assert "cannot be unpacked" in browse(tmp_path / "cut.html", profile).by_id("count")


def test_a_large_report_stays_small(tmp_path):
    played = read_trajectories(GOLDEN / "after.jsonl") * 50
    path = written(tmp_path, {"a": played})
    assert path.stat().st_size < 100_000 + 300 * len(played)  # as JSON one takes 5,000 bytes
