"""The command as a user runs it: upstream's flags, bad input, and real training on CPU with a tiny model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openrlhf_gopo import platform
from openrlhf_gopo.cli import train_gopo_offline
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import ConfigError, DataError
from openrlhf_gopo.evaluation.scripted import demonstrations
from openrlhf_gopo.policy.two_level import TwoLevelPolicy
from openrlhf_gopo.runtime.offline.config import OfflineConfig
from openrlhf_gopo.runtime.offline.data import Logs

pytest.importorskip("openrlhf")
ROOT = Path(__file__).parents[2]
STAR = str(ROOT / "tests" / "envs" / "star_fixture")
GOOD = ["--gopo.env", "star", "--gopo.data", STAR, "--model.model_name_or_path", "no/m", "--data.dataset", "logs.jsonl"]


def test_upstreams_flags_and_ours():
    flags = [*GOOD, "--adam.lr", "3e-6", "--gopo.offline.role", "responder", "--gopo.pref.beta", "2"]
    args, shared, config = train_gopo_offline.parse(flags)
    assert (args.adam.lr, args.train.batch_size, shared["env"]) == (3e-6, 128, "star")
    assert (config.role, config.preference, config.imitation, config.pref.beta) == ("responder", 0.0, 1.0, 2.0)
    _, _, config = train_gopo_offline.parse(GOOD)
    assert (config.preference, config.imitation) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.beta", "0.1"], "--model.beta: use --gopo.pref.beta"),
        (["--ref.model_name_or_path=x"], "--ref.model_name_or_path x: the reference is the model as the run begins"),
        (["--data.prompt_key", "x"], "--data.prompt_key: logged dialogues have a schema of their own"),
        (["--train.batch_size", "12", "--train.micro_batch_size", "4"], "no multiple of --gopo.offline.group_size 8"),
        (["--train.micro_batch_size", "7"], "--train.batch_size 128: no multiple of --train.micro_batch_size 7"),
        (["--gopo.offline.reward", "love=1"], "unknown reward 'love'; choose from tse, .*rating"),
        (["--gopo.offline.similarity", "2"], r"--gopo.offline.similarity 2.0: give a number in \[0, 1\]"),
        (["--gopo.offline.group_size", "1"], "--gopo.offline.group_size 1: a preference compares two dialogues"),
        (["--gopo.offline.keep", "0"], "--gopo.offline.keep 0.0: give a share"),
        (["--gopo.offline.pref_coef", "0"], "there is nothing to learn; raise it or --gopo.offline.sft_coef"),
        (["--eval.dataset", "a/x.jsonl,b/x.jsonl"], "two files have one name"),
        (["--data.dataset", ""], "--data.dataset: name a file of logged dialogues"),
        (["--gopo.pref.beta", "0"], "--gopo.pref.beta 0.0: give a positive number"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(ConfigError, match=message):
        train_gopo_offline.parse([*GOOD, *flags])


def test_errors_of_the_command_are_one_line(capsys):
    for flags, message in (
        ([*GOOD, "--gopo.data", "/nowhere"], "/nowhere"),
        (GOOD, "--model.model_name_or_path no/m: no tokenizer there"),
        ([*GOOD, "--data.chosen", "x"], "unrecognized arguments: --data.chosen x"),
    ):
        with pytest.raises(SystemExit) as exit_:
            train_gopo_offline.main(flags)
        assert exit_.value.code == 2
        told = capsys.readouterr().err.strip().splitlines()[-1]  # of the model, transformers has its own say before
        assert told.startswith("train_gopo_offline: error:")
        assert message in told


# -- with a tiny model ---------------------------------------------------------------------------------------------


def record(trajectory, number, rating=None):
    """A scripted dialogue as a log has it."""
    goal = trajectory.goal
    fields = ("user", "strategy", "reply", "briefing", "events", "completed", "engagement", "on_task", "allowed")
    outcome = {"stop": trajectory.stop.value, "success": trajectory.success}
    return {
        "id": f"call {number}",
        "source": "script",
        "language": "en",
        "goal": {name: getattr(goal, name) for name in ("intent", "context", "subgoals", "facts")},
        "turns": [{name: getattr(turn, name) for name in fields} for turn in trajectory.turns],
        "outcome": outcome | ({} if rating is None else {"rating": rating}),
    }


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture(scope="module")
def env():
    return load_environment("star", STAR)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, env):
    """A folder with a tiny untrained model, and logs of a script that is right half of the time."""
    folder = tmp_path_factory.mktemp("offline")
    file = ROOT / "examples" / "quickstart" / "build_model.py"
    spec = importlib.util.spec_from_file_location("quickstart_build_model", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    argv = ["--env", "star", "--data", STAR, "--hidden", "64", "--layers", "1", "--vocab", "600", "--out"]
    subprocess.run([sys.executable, str(file), *argv, str(folder / "model")], check=True, cwd=ROOT, timeout=600)
    played = [t for skill in (0.2, 0.9) for t in demonstrations(env, 40, skill, seed=1)]
    records = [record(trajectory, number) for number, trajectory in enumerate(played)]
    write(folder / "train.jsonl", records[::2] + records[1::4])
    write(folder / "heldout.jsonl", records[3::4])
    return folder


@pytest.fixture(scope="module")
def policy(scene, env):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(scene / "model")
    return TwoLevelPolicy(tokenizer, tokenizer, env.catalogue_size())


def test_what_is_not_learnt_is_counted(scene, env, policy, tmp_path):
    records = lines(scene / "train.jsonl")
    long = [r for r in records if len(r["turns"]) >= 3][:6]
    long[0]["turns"][1]["strategy"] = None
    forbidden = next(s.id for s in env.catalogue(env.goals("train")[0]) if s.id not in long[1]["turns"][0]["allowed"])
    long[1]["turns"][0]["strategy"] = forbidden
    long[2]["goal"]["id"] = env.goals("heldout")[0].id
    long[3]["outcome"]["stop"] = "failed"
    path = write(tmp_path / "logs.jsonl", long)
    logs = Logs(env, policy, OfflineConfig(support=0), 4096)
    samples, census = logs.training(path)
    assert census == {
        "left out: held-out goal": 1,
        "left out: failed": 1,
        "turns without a strategy": 1,
        "decisions left out: not allowed by the SOP": 1,
    }
    by_name = {sample.name: sample for sample in samples}
    choices = {r["id"]: sum(len(turn["allowed"]) > 1 for turn in r["turns"]) for r in long}
    for r, missing in ((long[0], 1), (long[1], 1), (long[4], 0)):
        assert len(by_name[r["id"]].unit) == choices[r["id"]] - missing
    judged, _ = logs.heldout(path)
    assert long[2]["goal"]["id"] in {sample.name for sample in judged}


def test_the_support_guard_restricts_training_and_not_judging(scene, env, policy):
    path = str(scene / "train.jsonl")
    counted = [turn["strategy"] for r in lines(scene / "train.jsonl") for turn in r["turns"]]
    least = sorted(map(counted.count, set(counted)))[1]  # the rarest strategy falls out
    rare = min(set(counted), key=counted.count)
    assert counted.count(rare) < least
    guarded, census = Logs(env, policy, OfflineConfig(support=least), 4096).training(path)
    token = policy.label_ids(env.catalogue(env.goals("train")[0]))[rare]
    assert 0 < census["decisions left out: too rare in the logs"] <= counted.count(rare)
    assert not any(bool((sample.allowed == token).any()) for sample in guarded)
    judged, _ = Logs(env, policy, OfflineConfig(support=least), 4096).heldout(path)
    assert any(bool((sample.allowed == token).any()) for sample in judged)


def test_returns_groups_and_the_better_dialogues(scene, env, policy, tmp_path):
    records = lines(scene / "train.jsonl")[:8]
    for number, r in enumerate(records):
        r["outcome"]["rating"] = number / 10
        r["goal"]["id"] = f"goal {number % 2}"
    del records[7]["outcome"]["rating"]
    path = write(tmp_path / "logs.jsonl", records)
    samples, census = Logs(env, policy, OfflineConfig(reward="rating=1", keep=0.5), 4096).training(path)
    assert census["left out: no rating=1 in the log"] == 1
    assert [s.returned for s in samples] == pytest.approx([n / 10 for n in range(7)])
    assert [s.better for s in samples] == [False] * 3 + [True] * 4
    assert len({s.group for s in samples}) == 1
    samples, _ = Logs(env, policy, OfflineConfig(reward="rating=1", group="goal"), 4096).training(path)
    assert [{s.name for s in samples if s.group == g} for g in ("0", "1")] == [{"goal 0"}, {"goal 1"}]
    same = [r | {"outcome": r["outcome"] | {"rating": 0.5}} for r in records]
    with pytest.raises(DataError, match=r"nothing to learn from .*groups without spread: 1"):
        Logs(env, policy, OfflineConfig(reward="rating=1"), 4096).training(write(tmp_path / "flat.jsonl", same))
    with pytest.raises(DataError, match=r"nothing to learn from .*longer than --data.max_len 10: 8"):
        Logs(env, policy, OfflineConfig(), 10).training(path)


def run(scene, out, *flags):
    command = [sys.executable, "-m", "openrlhf_gopo.cli.train_gopo_offline", "--gopo.env", "star", "--gopo.data", STAR]
    command += ["--model.model_name_or_path", str(scene / "model"), "--data.dataset", str(scene / "train.jsonl")]
    command += ["--data.max_len", "4096", "--train.batch_size", "16", "--train.micro_batch_size", "4"]
    command += ["--gopo.offline.group_size", "4", "--lr_warmup_ratio", "0", "--ckpt.output_dir", str(out), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU")
def test_the_expert_learns_and_a_run_that_was_cut_ends_the_same(scene, tmp_path):
    flags = ["--eval.dataset", str(scene / "heldout.jsonl"), "--adam.lr", "3e-3", "--train.max_epochs", "4"]
    flags += ["--ckpt.path", str(tmp_path / "checkpoints"), "--ckpt.save_steps", "9", "--ckpt.load_enable"]
    whole = run(scene, tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr[-3000:]
    steps = lines(tmp_path / "whole" / "results" / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[0]["loss"] == pytest.approx(0.693, abs=0.02)
    assert sum(line["loss"] for line in steps[-3:]) / 3 < 0.55
    judged = lines(tmp_path / "whole" / "results" / "heldout.jsonl")
    assert [line["step"] for line in judged] == [0, 3, 6, 9, 12]
    assert judged[0]["metrics"]["pref_accuracy"][0] == 0.5
    assert judged[-1]["metrics"]["pref_accuracy"][0] > 0.65
    assert judged[-1]["change"]["top1"][1] > 0
    assert "| heldout | 20 | pref_accuracy |" in whole.stdout
    # The same command again goes on from step 9 as if it had never ended.
    again = run(scene, tmp_path / "again", *flags)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "144 dialogues consumed" in again.stdout
    assert [line["step"] for line in lines(tmp_path / "again" / "results" / "metrics.jsonl")] == [10, 11, 12]
    first, second, start = (weights(folder) for folder in (tmp_path / "whole", tmp_path / "again", scene / "model"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], start[name]) for name in start)
    # Other data: its place in them would be another.
    other = run(scene, tmp_path / "other", *flags, "--gopo.offline.group_size", "8")
    assert other.returncode == 2
    assert "saved with gopo.offline.group_size 4, this run has 8" in other.stderr


@pytest.mark.slow
@pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU")
def test_the_responder_learns_from_better_dialogues_and_from_pairs_at_equal_strategy(scene, tmp_path):
    flags = ["--eval.dataset", str(scene / "heldout.jsonl"), "--adam.lr", "3e-3", "--train.max_epochs", "2"]
    flags += ["--gopo.offline.role", "responder", "--gopo.offline.pref_coef", "0.1"]
    done = run(scene, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = lines(tmp_path / "out" / "results" / "metrics.jsonl")
    assert steps[-1]["sft_loss"] < steps[0]["sft_loss"] - 0.5
    assert all(line["pref_pairs"] > 0 for line in steps)
    judged = lines(tmp_path / "out" / "results" / "heldout.jsonl")
    assert judged[-1]["change"]["log_likelihood"][1] > 0.3
    assert "top1" not in judged[-1]["metrics"]
