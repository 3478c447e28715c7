"""What fuzzing has found, each as the smallest input that did it: now refused with file and field, or flag."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from pathlib import Path

import pytest

from openrlhf_gopo.config import GopoConfig, LlmConfig, PreferenceConfig
from openrlhf_gopo.endpoint import Endpoint
from openrlhf_gopo.endpoint.cache import Cache
from openrlhf_gopo.envs import Environment, load_environment
from openrlhf_gopo.envs.reading import parse
from openrlhf_gopo.errors import ConfigError, DataError, DialogueError
from openrlhf_gopo.evaluation.curves import Metrics
from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.sop import load_sop
from openrlhf_gopo.types import Goal, Trajectory, Turn

DEEP = "[" * 100_000
LONG = "9" * 5_000  # more digits than Python turns into an int
FIXTURES = Path(__file__).parents[1] / "envs"


@pytest.mark.parametrize("text", [DEEP, LONG, DEEP + "]" * 100_000, '{"a":' * 100_000])
def test_json_of_any_reader(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"^f\.json:7"):
        parse(text.encode(), "f.json", 7)
    path = tmp_path / "t.jsonl"
    path.write_text(f"\n{text}\n")
    with pytest.raises(DataError, match=r"t\.jsonl:2: not JSON"):
        read_trajectories(path)
    with pytest.raises(DataError, match=r"t\.jsonl:2: "):
        Metrics.read(path)
    with pytest.raises(DialogueError, match="not a chat completion"):
        Endpoint("--gopo.user llm", "m", "http://localhost:9/v1", LlmConfig())._read(text.encode())
    with pytest.raises(ConfigError, match=r"--gopo\.llm\.extra_body"):
        LlmConfig(extra_body=text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("engagement", 10**400, r"turns\[0\]\.engagement: expected a number below 1e308"),
        ("relevance", {"a": 10**400}, r"turns\[0\]\.relevance\['a'\]: expected a grade from 0 to 3"),
        ("relevance", {"a": -1}, r"turns\[0\]\.relevance\['a'\]: expected a grade from 0 to 3, got -1"),
    ],
)
def test_trajectories(tmp_path: Path, field: str, value: object, message: str) -> None:
    path = tmp_path / "t.jsonl"
    append_trajectory(path, Trajectory(Goal("g", "i", "c", {"s": 1.0}), 0, 0, [Turn("u", ("a",), "a", "r")]))
    record = json.loads(path.read_text())
    record["turns"][0][field] = value
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=rf"t\.jsonl:1:{message}"):
        read_trajectories(path)


@pytest.mark.parametrize("step", [["a"], "1", None, True, {}])
def test_metrics_with_a_step_that_is_none(tmp_path: Path, step: object) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"global_step": 1, "x": 1}) + "\n" + json.dumps({"global_step": step, "x": 1}) + "\n")
    with pytest.raises(DataError, match=r"m\.jsonl:2:global_step: expected a number"):
        Metrics.read(path)


def test_a_metric_beyond_any_float_is_no_point(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"global_step": 1, "x": 10**400, "y": 2, "z": math.inf}) + "\n")
    assert dict(Metrics.read(path).series) == {"global_step": ([1], [1.0]), "y": ([1], [2.0])}


@pytest.mark.parametrize("number", [LONG, "1:" * 50_000 + "1", "0x" + "f" * 20_000, "1" + "0" * 30])
def test_sop_files_with_a_huge_number(tmp_path: Path, number: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(f"strategies: []\nname: {number}\n")
    with pytest.raises(DataError, match=r"s\.yaml:2: name: ") as error:
        load_sop(path)
    assert len(str(error.value)) < 500


def changed(tmp_path: Path, name: str, file: str, old: str, new: str) -> str:
    here = tmp_path / name
    shutil.copytree(FIXTURES / f"{name}_fixture", here)
    text = (here / file).read_text(encoding="utf-8")
    assert old in text
    (here / file).write_bytes(text.replace(old, new, 1).encode("utf-8", "surrogateescape"))
    return str(here)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("abcd", "kb.json", '"validate-purchase"', '["x"]', r"kb\.json:1:return_late\[\d\]: expected str"),
        (
            "abcd",
            "ontology.json",
            '"username"',
            "7",
            r"ontology\.json:1:actions\.kb_query\.validate-purchase\[0\]: exp",
        ),
        (
            "abcd",
            "ontology.json",
            '"refund_now"',
            "{}",
            r"ontology\.json:1:intents\.subflows\.returns\[1\]: expected str",
        ),
        ("abcd", "guidelines.json", '"subtext": []', '"subtext": [{}]', r"guidelines\.json:1:.*subtext\[0\]: expected"),
        (
            "abcd",
            "dialogues_dev.json",
            '"targets": ["return_late"',
            '"targets": [{}',
            r"targets\[0\]: .* is no subflow",
        ),
        ("abcd", "dialogues_dev.json", '"names": []', '"names": 0.5', r"scenario\.product\.names: expected list"),
        (
            "multiwoz",
            "db/restaurant_db.json",
            '"name"',
            '"title"',
            r"restaurant_db\.json:1:\[0\]: has none of leaveAt, ",
        ),
        (
            "star",
            "dialogues_01.jsonl",
            '"UserQuestionnaire": [',
            '"UserQuestionnaire": 0.5, "x": [',
            r"UserQuestionnaire: e",
        ),
        ("multiwoz", "valListFile", "SNG1", "\udcd7SNG1", r"valListFile:byte 0: not UTF-8"),
        ("multiwoz", "val.json", '[["', '[[{"a": 1}, "', r"dialog_act: expected act -> \[\[slot, value\]\]"),
        ("multiwoz", "db/taxi_db.json", '["blue"]', '{"a": 1}', r"taxi_db\.json:1:\[0\]\.taxi_colors: expected list"),
    ],
)
def test_published_data_sets(tmp_path: Path, name: str, file: str, old: str, new: str, message: str) -> None:
    folder = changed(tmp_path, name, file, old, new)
    with pytest.raises(DataError, match=message):
        load_environment(name, folder)


def test_a_star_dialogue_in_which_nothing_is_left_to_do(tmp_path: Path) -> None:
    """Its first query names a slot that nobody can tell."""
    here = tmp_path / "star"
    shutil.copytree(FIXTURES / "star_fixture", here)
    first, *others = (here / "dialogues_01.jsonl").read_text().splitlines()
    record = json.loads(first)
    constraints = next(event["Constraints"] for event in record["Events"] if event["Action"] == "query")
    constraints[1] = {"a": constraints[1]}
    (here / "dialogues_01.jsonl").write_text("\n".join([json.dumps(record), *others]))
    env = load_environment("star", str(here))
    goal = next(g for split in ("train", "heldout") for g in env.goals(split) if g.id == "star-0")
    with pytest.raises(DataError, match=r"--gopo\.data: dialogue 0: no strategy of its tasks does what it needs next"):
        play(env, goal)


def play(env: Environment, goal: Goal) -> None:
    dialogue = env.start(goal, 0)
    for _ in range(env.turn_limit(goal)):
        grades = dialogue.relevance()
        best = max(grades, key=lambda strategy: grades[strategy])
        dialogue.step(best, dialogue.reference_reply(best))


def test_a_damaged_cache(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    kept = Cache(str(path), "--gopo.llm.cache")
    for number in range(200):
        kept.put(str(number), "x" * 400)
    kept._base.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\x55" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises((ConfigError, DialogueError), match=r"--gopo\.llm\.cache .*answers\.sqlite"):
        Cache(str(path), "--gopo.llm.cache").put("new", "y")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no",
        "[]",
        "{}",
        '{"text": 1, "cut": false}',
        '{"text": "a", "cut": "no"}',
        '{"text": "a", "more": 1}',
        DEEP,
        b"\xff",
    ],
)
def test_a_cache_of_other_answers(tmp_path: Path, answer: str | bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.sqlite"
    endpoint = Endpoint("--gopo.user llm", "m", "http://localhost:9/v1", LlmConfig(cache=str(path)))
    body = {"choices": [{"message": {"content": "Hello."}}]}
    monkeypatch.setattr(endpoint._poster, "post", lambda *_, **__: json.dumps(body).encode())
    assert endpoint.chat([], 0, math.inf).text == "Hello."
    with sqlite3.connect(path) as base:
        base.execute("UPDATE answers SET answer = ?", (answer,))
    with pytest.raises(DialogueError, match=r"--gopo\.llm\.cache .*answers\.sqlite"):
        endpoint.chat([], 0, math.inf)


def test_a_count_of_tokens_that_is_infinite() -> None:
    body = '{"choices": [{"message": {"content": "Hello."}}], "usage": {"prompt_tokens": Infinity}}'
    with pytest.raises(DialogueError, match="not a chat completion"):
        Endpoint("--gopo.user llm", "m", "http://localhost:9/v1", LlmConfig())._read(body.encode())


def test_names_too_long_for_a_file() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_environment("x" * 5000 + ".py:Env")
    with pytest.raises(DataError, match=r"--gopo\.data .*: no such folder"):
        load_environment("star", "x" * 5000)


def test_a_message_shows_the_beginning_of_a_huge_value() -> None:
    with pytest.raises(ConfigError) as error:
        LlmConfig(extra_body=DEEP)
    assert len(str(error.value)) < 400


def test_a_url_with_half_a_character() -> None:
    with pytest.raises(ConfigError, match="not a URL"):
        Endpoint("--gopo.user llm", "m", "http://\ud800/v1", LlmConfig())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_flags_without_a_finite_value(value: float) -> None:
    for cls, flag, more in (
        (LlmConfig, "temperature", {}),
        (LlmConfig, "timeout", {}),
        (PreferenceConfig, "beta", {}),
        (GopoConfig, "user_timeout", {"env": "shop"}),
        (GopoConfig, "reward_timeout", {"env": "shop"}),
    ):
        with pytest.raises(ConfigError, match=rf"{flag} (inf|nan): give a finite number"):
            cls(**{flag: value}, **more)
