"""What a run that goes on compares and cuts: flags field by field, logs at the recorded length."""

from __future__ import annotations

import json

import pytest

from openrlhf_gopo.cli import train_gopo
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.runtime.checkpoints.resume import check_flags, cut_logs, log_offsets, recorded_flags

BASE = [
    "--gopo.env",
    "shop",
    "--actor.model_name_or_path",
    "m",
    "--algo.advantage.estimator",
    "group_norm",
    "--rollout.n_samples_per_prompt",
    "2",
]


def flags(*more: str) -> dict:
    return recorded_flags(*train_gopo.parse([*BASE, *more]))


def test_equal_flags_say_nothing():
    assert check_flags(json.loads(json.dumps(flags(), allow_nan=False)), flags(), "global_step1") == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--actor.model_name_or_path", "other"), "--actor.model_name_or_path was m, is other"),
        (("--expert.model_name_or_path", "other"), "--expert.model_name_or_path was m, is other"),
        (("--gopo.sharing", "shared"), "--gopo.sharing was separate, is shared"),
        (("--gopo.policy", "single_level"), "--gopo.policy was two_level, is single_level"),
        (("--gopo.env", "star"), "--gopo.env was shop, is star"),
        (("--rollout.n_samples_per_prompt", "4"), "--rollout.n_samples_per_prompt was 2, is 4"),
        (("--train.batch_size", "64"), "--train.batch_size was 128, is 64"),
        (("--ds.zero_stage", "3"), "--ds.zero_stage was 2, is 3"),
        (("--ds.lora.rank", "8"), "--ds.lora.rank was 0, is 8"),
        (("--actor.num_gpus_per_node", "2"), "--actor.ranks was 1, is 2"),
        (("--actor.optim", "muon"), "--actor.optim was adam, is muon"),
    ],
)
def test_what_breaks_is_refused_by_name(changed, named):
    with pytest.raises(ConfigError) as caught:
        check_flags(flags(), flags(*changed), "global_step1")
    message = str(caught.value)
    assert named in message
    assert "checkpoint global_step1 does not fit" in message
    assert "start a new run with another --ckpt.path" in message


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (("--actor.adam.lr", "0.5"), ["--actor.adam.lr was 1e-06, is 0.5", "--expert.adam.lr was 1e-06, is 0.5"]),
        (("--train.num_episodes", "7"), ["--train.num_episodes was 1, is 7"]),
        (("--eval.steps", "7"), ["--eval.steps was -1, is 7"]),
        (("--gopo.pref.beta", "7"), ["--gopo.pref.beta was 1.0, is 7.0"]),
        (("--ckpt.load_enable", "--gopo.worker_logs"), []),
    ],
)
def test_what_does_not_break_is_said(changed, named):
    assert check_flags(flags(), flags(*changed), "global_step1") == named


def test_the_same_ranks_on_other_nodes_fit():
    nodes = ("--actor.num_nodes", "1", "--actor.num_gpus_per_node", "4")
    other = ("--actor.num_nodes", "4", "--actor.num_gpus_per_node", "1")
    assert all("nodes" in n or "gpus" in n for n in check_flags(flags(*nodes), flags(*other), "x"))


def test_no_secret_is_recorded():
    secret = (
        "--gopo.llm.extra_body",
        '{"api_key": "s3cret"}',
        "--gopo.user",
        "llm:m@http://me:s3cret@host/v1?key=s3cret",
        "--gopo.judge.extra_body",
        '{"api_key": "s3cret"}',
        "--gopo.reward",
        "remote:http://me:s3cret@host/p?token=s3cret",
    )
    found = flags(*secret, "--logger.wandb.key", "s3cret")
    assert "s3cret" not in json.dumps(found)
    assert found["gopo.user"] == "llm:m@http://host/v1"
    assert found["gopo.reward"] == "remote:http://host/p"


@pytest.fixture
def results(tmp_path):
    (tmp_path / "trajectories.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    (tmp_path / "metrics.jsonl").write_text('{"m": 1}\n')
    return tmp_path


def lines(path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_later_lines_go_to_a_file_beside_once(results):
    offsets = log_offsets(results)
    with (results / "trajectories.jsonl").open("a") as file:
        file.write('{"n": 3}\n{"n": 4}\n{"n": ')  # killed while it wrote
    before = (results / "trajectories.jsonl").read_bytes()
    (notice,) = cut_logs(results, offsets)
    assert "2 lines of steps that are done again went to trajectories.lost.jsonl" in notice
    assert lines(results / "trajectories.jsonl") == [{"n": 1}, {"n": 2}]
    assert lines(results / "trajectories.lost.jsonl") == [{"n": 3}, {"n": 4}]
    assert lines(results / "metrics.jsonl") == [{"m": 1}]
    (results / "trajectories.jsonl").write_bytes(before)  # as if killed before the cut
    cut_logs(results, offsets)
    assert lines(results / "trajectories.lost.jsonl") == [{"n": 3}, {"n": 4}]
    with (results / "trajectories.jsonl").open("a") as file:
        file.write('{"n": 5}\n')
    cut_logs(results, offsets)
    assert lines(results / "trajectories.lost.jsonl") == [{"n": 3}, {"n": 4}, {"n": 5}]


def test_logs_that_are_not_the_checkpoints_stay(results, tmp_path):
    offsets = log_offsets(results)
    (results / "metrics.jsonl").write_text("")
    assert "the checkpoint knew 9" in cut_logs(results, offsets)[0]
    assert "stay as they are" in cut_logs(results, offsets | {"results": "/elsewhere"})[0]
    assert lines(results / "trajectories.jsonl") == [{"n": 1}, {"n": 2}]
