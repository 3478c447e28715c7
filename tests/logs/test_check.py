"""Every bad input has an error that names file, line and field, and says what to do."""

import copy
import gzip
import json
import time
import tracemalloc

import pytest
from pydantic import ValidationError

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import DataError
from openrlhf_gopo.logs import Dialogue, read, validate
from openrlhf_gopo.logs.check import MAX_LINE, fits
from openrlhf_gopo.logs.schema import MAX_TEXT, MAX_TURNS

REMOVED = object()


def changed(record, path, value):
    """A copy of ``record`` with another value at ``path`` (keys and indices)."""
    record = copy.deepcopy(record)
    *outer, last = path
    inner = record
    for key in outer:
        inner = inner[key]
    if value is REMOVED:
        del inner[last]
    else:
        inner[last] = value
    return record


def problems(path, **options):
    """The problems of a file, without its name."""
    report = validate(path, **options)
    assert len(report.problems) == report.found
    return [problem.removeprefix(f"{path}:") for problem in report.problems]


def test_a_good_file_has_no_problem(good, write):
    second = changed(changed(good, ["id"], "c-18"), ["turns", 1], good["turns"][1] | {"strategy": None})
    del second["turns"][1]["engagement"]
    report = validate(write(good, b"  ", second))
    assert (report.dialogues, report.turns, report.found, report.problems) == (2, 4, 0, [])
    assert (report.unlabelled, report.neutral) == (1, 1)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (["source"], REMOVED, "1:source: Field required: add it"),
        (["goal", "subgoals"], REMOVED, "1:goal.subgoals: Field required: add it"),
        (["turns", 1, "strategy"], REMOVED, "1:turns[1].strategy: Field required: add it"),
        (["sauce"], "x", "1:sauce: Extra inputs are not permitted: remove it, or correct its name"),
        (["turns", 0, "skill"], "x", "1:turns[0].skill: Extra inputs are not permitted"),
        (["id"], 17, "1:id: Input should be a valid string, got 17"),
        (["id"], " c-17", "1:id: ' c-17' has white space around it"),
        (["id"], "", "1:id: '' is blank"),
        (["language"], "english!", "1:language: 'english!' is no BCP 47 language tag"),
        (["turns"], [], "1:turns: Tuple should have at least 1 item after validation, not 0: give at least one"),
        (["turns", 0, "reply"], " \n", "1:turns[0].reply: ' \\n' is blank"),
        (["turns", 1, "user"], "a\x00b", "1:turns[1].user: 'a\\x00b' holds a NUL character at position 1"),
        (["turns", 0, "briefing"], "\x00", "1:turns[0].briefing: '\\x00' holds a NUL character at position 0"),
        (["turns", 0, "user"], "x" * 1_000_000, f"1:turns[0].user: String should have at most {MAX_TEXT} characters"),
        (["turns", 1, "engagement"], 1.5, "1:turns[1].engagement: Input should be less than or equal to 1, got 1.5"),
        (["turns", 1, "engagement"], float("nan"), "1:turns[1].engagement: Input should be a finite number, got nan"),
        (["turns", 1, "engagement"], "1", "1:turns[1].engagement: Input should be a valid number, got '1'"),
        (["turns", 0, "allowed"], [], "1:turns[0].allowed: Tuple should have at least 1 item"),
        (["turns", 0, "allowed"], ["a", "a"], "1:turns[0].allowed: a strategy is listed twice"),
        (["turns", 0, "completed"], ["find", "pay"], "1:turns[0].completed: 'pay' is no subgoal of the goal: use one"),
        (
            ["turns", 1, "completed"],
            ["refund", "find"],
            "1:turns[1].completed: 'find' was already completed at turns[0",
        ),
        (["goal", "subgoals"], {"find": 0.4, "refund": 0.4}, "1:goal.subgoals: the weights sum to 0.8: divide each"),
        (["goal", "subgoals", "find"], 0, "1:goal.subgoals.find: Input should be greater than 0, got 0"),
        (["goal", "facts", "order"], 5, "1:goal.facts.order: Input should be a valid string, got 5"),
        (["outcome", "stop"], "won", "1:outcome.stop: Input should be 'completed', 'closed', 'user_left'"),
        (["outcome", "success"], False, "1:outcome.success: false, but every subgoal is completed"),
        (["outcome", "stop"], "closed", "1:outcome.stop: closed, but every subgoal is completed"),
        (["turns", 1, "completed"], [], "1:outcome.success: true, but refund not completed"),
    ],
)
def test_a_bad_field_is_named(good, write, path, value, expected):
    (problem,) = problems(write(changed(good, path, value)))
    assert problem.startswith(expected)
    assert problem.count(": ") >= 2  # what is wrong, and what to do


def test_completed_needs_every_subgoal(good, write):
    record = changed(changed(good, ["turns", 1, "completed"], []), ["outcome", "success"], False)
    assert problems(write(record))[0].startswith("1:outcome.stop: completed, but refund not completed")
    assert problems(write(changed(record, ["outcome", "stop"], "user_left"))) == []


def test_all_problems_of_a_line_are_told(good, write):
    record = changed(changed(changed(good, ["source"], ""), ["turns", 0, "reply"], ""), ["turns", 1, "user"], 3)
    assert [p.split(": ")[0] for p in problems(write(record))] == ["1:source", "1:turns[0].reply", "1:turns[1].user"]


def test_problems_beyond_the_limit_are_counted(good, write):
    path = write(*[changed(good, ["id"], i) for i in range(30)], changed(good, ["source"], ""))
    report = validate(path, shown=7)
    assert (report.found, report.dialogues) == (31, 0)
    assert [p.split(":")[1] for p in report.problems] == [str(i) for i in range(1, 8)]


def test_an_id_occurs_once(good, write):
    other = changed(good, ["id"], "other")
    assert problems(write(good, other, good, b"", other)) == [
        "3:id: 'c-17' is also the id of line 1: give each dialogue an id of its own",
        "5:id: 'other' is also the id of line 2: give each dialogue an id of its own",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"id": "a", ', "2:column 13: not JSON (Expecting property name"),
        (b"not json", "2:column 1: not JSON (Expecting value): write each dialogue as one JSON object on one line"),
        (b"[1]", "2: Input should be an object"),
        (b"3", "2: Input should be an object, got 3"),
        (b"[" * 5000, "2: not readable (recursion limit exceeded"),
        (b'{"id": ' + b"9" * 5000 + b"}", "2: not readable (number out of range"),
    ],
)
def test_a_malformed_line_is_named(good, write, line, expected):
    (problem,) = problems(write(good, line, changed(good, ["id"], "next")))
    assert problem.startswith(expected)


def test_a_wrong_encoding_names_the_byte(good, write):
    first = json.dumps(good).encode()
    line = json.dumps(changed(good, ["id"], "b") | {"source": "Café"}, ensure_ascii=False).encode("latin-1")
    at = line.index(b"\xe9")
    expected = f"2: not UTF-8: byte 0xe9 at position {at} of the line, {len(first) + 1 + at} of the file: convert"
    assert problems(write(first, line))[0].startswith(expected)


@pytest.mark.parametrize(
    ("field", "where"), [(["turns", 1, "reply"], "turns[1].reply"), (["goal", "facts", "order"], "goal.facts.order")]
)
def test_a_lone_surrogate_names_the_field(good, write, field, where):
    record = changed(good, field, "broken \ud83d")
    (problem,) = problems(write(record))
    assert problem == f"1:{where}: a lone surrogate (half of a character): replace the broken character"
    assert problems(write(changed(good, field, "whole \U0001f600"))) == []


def test_a_lone_surrogate_in_python_is_refused_too(good):
    with pytest.raises(ValidationError):
        Dialogue.model_validate(changed(good, ["source"], "\ud83d"), strict=False)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "1: the file holds no dialogue: write each dialogue as one JSON object on one line"),
        (b"\n \n", "1: the file holds no dialogue"),
        ("{}".encode("utf-16"), "1: the file begins with a UTF-16 byte-order mark: convert the file to UTF-8"),
        ("{}".encode("utf-8-sig"), "1: the file begins with a UTF-8 byte-order mark: save the file as UTF-8"),
        (gzip.compress(b"{}", mtime=0), "1: the file begins with gzip's signature: unpack the file"),
        (b"[\n{}\n]", "1: the file begins with a JSON array: write each dialogue"),
    ],
)
def test_a_file_of_another_kind_is_one_problem(tmp_path, content, expected):
    path = tmp_path / "logs.jsonl"
    path.write_bytes(content)
    (problem,) = problems(path)
    assert problem.startswith(expected)


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="no such file; give a"):
            validate(path)


def test_limits_are_inclusive(good, write):
    turn = {"user": "x" * MAX_TEXT, "strategy": None, "reply": "é" * MAX_TEXT}
    assert problems(write(good | {"turns": [*good["turns"], turn]})) == []
    short = {"user": "", "strategy": None, "reply": "x"}
    many = [*good["turns"], *[short] * (MAX_TURNS - 2)]
    assert problems(write(good | {"turns": many})) == []
    (problem,) = problems(write(good | {"turns": [*many, short]}))
    assert problem.startswith(f"1:turns: Tuple should have at most {MAX_TURNS} items")


def test_a_line_longer_than_the_limit_is_skipped_whole(good, write):
    """It is never held in memory, and the lines behind it keep their numbers."""
    path = write(b'{"id": "' + b"x" * (3 * MAX_LINE) + b'"}', b"bad", good)
    tracemalloc.start()
    found = problems(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [p[:30] for p in found] == ["1: the line is longer than 167", "2:column 1: not JSON (Expectin"]
    assert peak < 2.6 * MAX_LINE
    assert validate(path).dialogues == 1


def test_a_long_utterance_takes_linear_time(good, write):
    """As long as may be, and in every field: a quadratic pass would take minutes."""
    texts = ("a" * MAX_TEXT, "1" * MAX_TEXT, "1." * (MAX_TEXT // 2), "\\" * MAX_TEXT, " " * (MAX_TEXT - 1) + "a")
    turns = [{"user": t, "strategy": "s", "reply": t, "briefing": t} for t in texts]
    path = write(good | {"turns": [*good["turns"], *turns]})
    start = time.perf_counter()
    assert problems(path) == []
    assert time.perf_counter() - start < 60


def test_memory_does_not_grow_with_the_file(good, write):
    """But for the ids: 2,000 dialogues more are 8 MB of text and less than 0.5 MB of memory."""

    def peak(count):
        padded = [changed(good, ["id"], f"c{i}") | {"source": "s" * 180} for i in range(count)]
        for record in padded:
            record["turns"][0]["briefing"] = "x" * 4000
        path = write(*padded, name=f"{count}.jsonl")
        del padded
        tracemalloc.start()
        assert validate(path).dialogues == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)  # what is built once
    assert peak(2200) - peak(200) < 500_000


def test_read_gives_lines_and_stops_at_the_first_problem(good, write):
    path = write(good, b"", changed(good, ["id"], "b"), good, b"bad")
    lines = read(path)
    assert [next(lines)[0], next(lines)[0]] == [1, 3]
    with pytest.raises(DataError, match=r"logs\.jsonl:4:id: 'c-17' is also the id of line 1"):
        next(lines)


def test_intents_and_strategies_are_those_of_the_environment(good, write):
    check = fits(load_environment("shop"))
    assert problems(write(good), check=check) == []
    wrong = changed(good, ["turns", 1, "strategy"], "look_up")
    wrong["turns"][0]["allowed"].append("dance")
    first, second = problems(write(wrong), check=check)
    assert first.startswith("1:turns[0].allowed: 'dance' is not in the catalogue of shop for refund: use one of: apol")
    assert second.startswith("1:turns[1].strategy: 'look_up' is not in the catalogue of shop for refund")
    assert problems(write(changed(good, ["turns", 1, "strategy"], None)), check=check) == []
    (problem,) = problems(write(changed(good, ["goal", "intent"], "opera")), check=check)
    assert problem.startswith("1:goal.intent: 'opera' is no intent of the environment shop: use one of: address,")


def test_a_contradiction_cannot_be_built_in_python_either(good):
    with pytest.raises(ValidationError, match="weights sum"):
        Dialogue.model_validate_json(json.dumps(changed(good, ["goal", "subgoals", "find"], 0.1)))
