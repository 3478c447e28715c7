import copy
import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openrlhf_gopo.errors import DataError
from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.types import Goal, StopReason, Stream, Trajectory, Turn

text = st.text(st.characters(), max_size=12)  # lone surrogates, newlines and controls included
texts = st.lists(text, max_size=3).map(tuple)
numbers = st.floats(allow_nan=False)
whole = st.integers(-(2**40), 2**40)
goals = st.builds(
    Goal,
    id=text,
    intent=text,
    context=text,
    subgoals=st.dictionaries(text, numbers, max_size=3),
    facts=st.dictionaries(text, text, max_size=3),
    persona=st.dictionaries(text, st.none() | st.booleans() | whole | text | st.lists(text, max_size=2), max_size=3),
    split=text,
)
turns = st.builds(
    Turn,
    user=text,
    allowed=texts,
    strategy=text,
    reply=text,
    briefing=text,
    expected=texts,
    relevance=st.dictionaries(text, st.integers(0, 3), max_size=3),
    probabilities=st.dictionaries(text, st.floats(0, 1), max_size=3),
    events=texts,
    completed=texts,
    engagement=numbers,
    on_task=st.booleans(),
    expert_logprob=numbers,
    forced=st.booleans(),
    reply_cut=st.booleans(),
    invalid=st.none() | st.booleans(),
    reply_group=st.lists(numbers, max_size=3).map(tuple),
)
streams = st.builds(
    Stream,
    tokens=st.lists(whole, max_size=4),
    spans=st.lists(st.tuples(whole, whole), max_size=2),
    logprobs=st.lists(numbers, max_size=4),
    allowed=st.lists(st.lists(whole, max_size=3), max_size=2),
)
trajectories = st.builds(
    Trajectory,
    goal=goals,
    sample=whole,
    seed=whole,
    turns=st.lists(turns, max_size=3),
    stop=st.sampled_from(StopReason),
    streams=st.dictionaries(text, streams, max_size=2),
    rewards=st.dictionaries(text, numbers, max_size=3),
    error=st.none() | text,
)


def example(**changes):
    goal = Goal("g1", "return", "context", {"solve": 1.0}, facts={"order": "7"}, data={"secret": object})
    turn = Turn("hi", ("a", "b"), "a", "hello", relevance={"a": 3}, completed=("solve",))
    stream = Stream([1, 2], [(0, 2)], [-0.1, -0.2], [[5, 6]])
    return Trajectory(goal, 1, 2, [turn], StopReason.COMPLETED, {"expert": stream}, {"tse": 50.0}, **changes)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(trajectories, min_size=1, max_size=3))
def test_reading_gives_back_what_was_written(tmp_path, written):
    path = tmp_path / "rollout.jsonl"
    path.unlink(missing_ok=True)
    for trajectory in written:
        append_trajectory(path, trajectory)
    assert path.read_bytes().count(b"\n") == len(written)
    assert read_trajectories(path) == written


def test_the_goals_private_data_stays_out_of_the_file(tmp_path):
    trajectory = example()
    append_trajectory(tmp_path / "t.jsonl", trajectory)
    assert "secret" not in (tmp_path / "t.jsonl").read_text()
    (read,) = read_trajectories(tmp_path / "t.jsonl")
    assert read.goal.data == {}
    assert read.turns == trajectory.turns
    assert read.streams == trajectory.streams


def test_extra_keys_at_the_top_and_blank_lines_are_ignored(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n" + json.dumps({**example().to_json(), "global_step": 12}) + "\n\n")
    assert read_trajectories(path)[0].sample == 1


def broken(path, value):
    """The example's record with ``value`` at ``path``; None deletes the key."""
    record = copy.deepcopy(example().to_json())
    *parents, last = path
    place = record
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return record


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["sample"], "1", "t.jsonl:2:sample: expected a whole number, got '1'"),
        (["sample"], True, "t.jsonl:2:sample: expected a whole number, got True"),
        (["seed"], None, "t.jsonl:2:seed: missing from the trajectory"),
        (["stop"], "done", "t.jsonl:2:stop: expected one of completed, closed"),
        (["goal", "context"], None, "t.jsonl:2:goal.context: missing from the goal"),
        (["goal", "subgoals", "solve"], "1", r"t.jsonl:2:goal.subgoals\['solve'\]: expected a number"),
        (["turns"], {}, "t.jsonl:2:turns: expected a list"),
        (["turns", 0], 5, r"t.jsonl:2:turns\[0\]: expected an object, got 5"),
        (["turns", 0, "strategy"], None, r"t.jsonl:2:turns\[0\].strategy: missing from the turn"),
        (["turns", 0, "expected"], "x", r"t.jsonl:2:turns\[0\].expected: expected a list, got 'x'"),
        (["turns", 0, "compelted"], [], r"t.jsonl:2:turns\[0\].compelted: unknown field of a turn"),
        (["turns", 0, "allowed"], ["a", 1], r"t.jsonl:2:turns\[0\].allowed\[1\]: expected a string, got 1"),
        (["turns", 0, "probabilities"], {"a": "1"}, r"t.jsonl:2:turns\[0\].probabilities\['a'\]: expected a number"),
        (["turns", 0, "on_task"], 1, r"t.jsonl:2:turns\[0\].on_task: expected true or false, got 1"),
        (["streams", "expert", "spans"], [[0]], r"t.jsonl:2:streams\['expert'\].spans\[0\]: expected \[start, end\]"),
        (["rewards", "tse"], "50", r"t.jsonl:2:rewards\['tse'\]: expected a number"),
        (["error"], 3, "t.jsonl:2:error: expected a string, got 3"),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(tmp_path, path, value, message):
    file = tmp_path / "t.jsonl"
    append_trajectory(file, example())
    with file.open("a") as stream:
        stream.write(json.dumps(broken(path, value)) + "\n")
    with pytest.raises(DataError, match=message):
        read_trajectories(file)


@pytest.mark.parametrize(("line", "message"), [("{oops", "not JSON"), ("[]", "expected a JSON object, got list")])
def test_a_line_that_is_no_record_is_named(tmp_path, line, message):
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(DataError, match=rf"t.jsonl:1: {message}"):
        read_trajectories(tmp_path / "t.jsonl")


def test_a_missing_file_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match="no such trajectories file"):
        read_trajectories(tmp_path / "none.jsonl")


def test_a_line_torn_by_a_killed_writer_does_not_take_the_next_record_with_it(tmp_path):
    path = tmp_path / "t.jsonl"
    append_trajectory(path, example())
    path.write_bytes(path.read_bytes() + b'{"goal": {"id"')
    append_trajectory(path, example())
    with pytest.raises(DataError, match=r"t.jsonl:2: not JSON .* delete it"):
        read_trajectories(path)
    first, _torn, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + third)
    assert len(read_trajectories(path)) == 2


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_an_unfinished_last_line_is_left_out_on_request_and_named(tmp_path, caplog, cut):
    path = tmp_path / "t.jsonl"
    append_trajectory(path, example())
    append_trajectory(path, example())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2][:cut])  # as a kill leaves it
    assert len(read_trajectories(path, torn="skip")) == 2
    (warning,) = caplog.messages
    assert f"{path}:3: the writer was killed within this last line; it is left out, the 2 dialogues" in warning
    with pytest.raises(DataError, match=r"t.jsonl:3: not JSON"):
        read_trajectories(path)


def test_only_an_unfinished_last_line_is_left_out(tmp_path, caplog):
    path = tmp_path / "t.jsonl"
    append_trajectory(path, example())
    good = path.read_bytes()
    path.write_bytes(good + good[:40] + b"\n")  # a newline: no kill within this line
    with pytest.raises(DataError, match=r"t.jsonl:2: not JSON"):
        read_trajectories(path, torn="skip")
    path.write_bytes(good + b'{"sample": 1}')  # JSON, but no trajectory
    with pytest.raises(DataError, match=r"t.jsonl:2:goal: missing"):
        read_trajectories(path, torn="skip")
    path.write_bytes(good + good.rstrip())  # whole, only its newline is missing
    assert len(read_trajectories(path, torn="skip")) == 2
    assert not caplog.messages


def test_streams_can_be_left_out(tmp_path):
    append_trajectory(tmp_path / "t.jsonl", example())
    (read,) = read_trajectories(tmp_path / "t.jsonl", streams=False)
    assert (read.streams, read.turns) == ({}, example().turns)


def test_writers_that_share_a_file_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "t.jsonl"
    trajectory = example(error="x" * 20_000)
    writers = [threading.Thread(target=lambda: [append_trajectory(path, trajectory) for _ in range(10)]) for _ in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_trajectories(path)) == 30


def test_a_value_json_cannot_express_is_an_error_and_writes_nothing(tmp_path):
    trajectory = Trajectory(Goal("g1", "return", "", {}, persona={"mood": {1, 2}}), 0, 0)
    with pytest.raises(DataError, match=r"'g1'.*goal\.data"):
        append_trajectory(tmp_path / "t.jsonl", trajectory)
    assert not (tmp_path / "t.jsonl").exists()
