"""The command eval_gopo with policies that need no engine; tests/e2e has those that do."""

import json
import re

import pytest

from openrlhf_gopo import platform

platform.activate()

from openrlhf_gopo.cli.eval_gopo import main  # noqa: E402
from openrlhf_gopo.endpoint import post  # noqa: E402
from openrlhf_gopo.evaluation.records import read_trajectories  # noqa: E402

from ..conftest import ROOT  # noqa: E402

STAR = ROOT / "tests" / "envs" / "star_fixture"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(post, "_FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def evaluate(out, *arguments, goals=4, env="shop"):
    """Exit status of the command."""
    try:
        main(["--gopo.env", env, "--out", str(out), "--gopo.eval_goals", str(goals), *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def policies(*texts):
    return [part for text in texts for part in ("--policy", text)]


def played(out, name, decoding=""):
    return read_trajectories(out / "policies" / name / decoding / "trajectories.jsonl")


def tse(dialogues):
    return sum(t.rewards["tse"] for t in dialogues) / len(dialogues)


def test_policies_meet_the_same_users_and_the_table_compares_them(tmp_path, capsys):
    assert evaluate(tmp_path, *policies("random", "best=scripted"), "--eval.n_samples_per_prompt", 2) == 0
    first, second = played(tmp_path, "random"), played(tmp_path, "best")
    assert len(first) == 8
    opening = {(t.goal.id, t.sample): (t.seed, t.turns[0].user) for t in first}
    assert opening == {(t.goal.id, t.sample): (t.seed, t.turns[0].user) for t in second}
    shown = capsys.readouterr().out
    assert "| random | 4 | 8 | 0 |" in shown
    assert "| best - random | 4 |" in shown
    for name in ("table.md", "table.csv", "slices.md", "transcripts.html", "costs.md"):
        assert (tmp_path / name).stat().st_size > 0


def test_it_goes_on_and_refuses_what_was_played_otherwise(tmp_path, capsys):
    assert evaluate(tmp_path, *policies("random")) == 0
    before = (tmp_path / "policies" / "random" / "trajectories.jsonl").read_bytes()
    assert evaluate(tmp_path, *policies("random", "scripted"), goals=6) == 0
    after = (tmp_path / "policies" / "random" / "trajectories.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 6
    capsys.readouterr()
    assert evaluate(tmp_path, *policies("random", "scripted:0.5"), "--gopo.max_turns", 3) == 1
    told = capsys.readouterr()
    assert "random left out" in told.err
    assert "--gopo.max_turns None, not 3" in told.err
    assert "| scripted:0.5 | 4 |" in told.out
    assert (tmp_path / "policies" / "random" / "trajectories.jsonl").read_bytes() == after


def test_it_refuses_weights_or_a_rubric_that_changed(tmp_path, server, capsys):
    rubric = tmp_path / "rubric.txt"
    server.answer = lambda body: '{"reason": "", "score": 5}'
    judged = ("--gopo.reward", f"judge:m@{server.url}", "--gopo.judge.rubric", rubric)
    secret = ("--gopo.llm.extra_body", '{"api_key": "s3cret"}')
    rubric.write_text("Politeness.")
    assert evaluate(tmp_path / "out", *policies("random"), *judged, *secret, goals=1) == 0
    assert "s3cret" not in (tmp_path / "out" / "policies" / "random" / "settings.json").read_text()
    rubric.write_text("Brevity.")
    assert evaluate(tmp_path / "out", *policies("random"), *judged, *secret, goals=1) == 2
    assert "--gopo.judge.rubric" in capsys.readouterr().err
    (tmp_path / "out" / "policies" / "random" / "settings.json").write_text("")
    assert evaluate(tmp_path / "out", *policies("random"), *judged, *secret, goals=1) == 2
    assert "settings.json: not JSON" in capsys.readouterr().err


def test_weights_are_known_by_what_they_hold(tmp_path):
    from openrlhf_gopo.runtime.evaluation import weights_digest

    assert weights_digest(tmp_path / "org" / "name") is None  # of a hub
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(range(256)) * (1 << 17))  # 32 MiB
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")  # wherever it stands, whenever written
    with (tmp_path / "b" / "model.safetensors").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"other" * 30_000)
    assert weights_digest(tmp_path / "a") != weights_digest(tmp_path / "b")


def test_a_gpu_machine_has_an_engine_unless_told_otherwise(monkeypatch):
    from openrlhf_gopo.cli.eval_gopo import build_parser
    from openrlhf_gopo.runtime.upstream.cli import UpstreamCli

    monkeypatch.setenv("OPENRLHF_GOPO_CPU", "0")
    parser = build_parser(UpstreamCli.load().parser)
    assert parser.get_default("vllm.num_engines") == 1


def test_a_policy_that_cannot_be_played_leaves_the_others_alone(tmp_path, capsys):
    dead = "dead=endpoint:m@http://127.0.0.1:9/v1"
    status = evaluate(tmp_path, *policies(dead, "random", "human"), "--gopo.llm.attempts", 1, goals=25)
    told = capsys.readouterr()
    assert status == 1
    assert re.search(r"dead left out: .*first \d+ dialogues failed.*ConnectError", told.err)
    assert "human left out: --policy human: shop was not made from human dialogues" in told.err
    assert "| random | 25 | 25 | 0 |" in told.out
    assert len(played(tmp_path, "dead")) >= 20  # with the reasons
    assert evaluate(tmp_path / "none", *policies("human")) == 2


def test_a_remote_model_has_a_row_with_its_tokens_and_price(tmp_path, server, capsys):
    server.answer = lambda body: (
        re.search(r"Allowed now: (\S+?),? ", body["messages"][-1]["content"] + " ")[1]
        if ("Allowed now" in body["messages"][-1]["content"])
        else "Let me look that up."
    )
    remote = f"big=endpoint:m@{server.url}"
    assert evaluate(tmp_path, *policies(remote), "--price", "1000,100000", goals=3) == 0
    dialogues = played(tmp_path, "big")
    assert all(turn.invalid in (False, None) for t in dialogues for turn in t.turns)
    usage = json.loads((tmp_path / "policies" / "big" / "usage.json").read_text())
    asked = sum(1 + (not turn.forced) for t in dialogues for turn in t.turns)
    assert usage["requests"] == asked
    cost = (1000 * 7 + 100000 * 3) * asked / 1e6  # the server counts 7 and 3 tokens for each
    assert f"| {cost:.2f} |" in (tmp_path / "costs.md").read_text()
    requests = len(server.bodies)
    assert evaluate(tmp_path, *policies(remote), "--price", "1000,100000", goals=3) == 0
    assert len(server.bodies) == requests
    assert f"| {cost:.2f} |" in (tmp_path / "costs.md").read_text()
    mixed = f"mixed=pair:{remote.partition('=')[2]},scripted"
    assert evaluate(tmp_path, *policies(mixed), goals=3) == 0
    assert all("Let me look" not in turn.reply for t in played(tmp_path, "mixed") for turn in t.turns)


def test_a_case_memory_learns_from_training_dialogues_alone(tmp_path, capsys):
    train = tmp_path / "train"
    assert evaluate(train, "--split", "train", *policies("skilled=scripted"), goals=60) == 0
    cases = train / "policies" / "skilled" / "trajectories.jsonl"
    vote = f"vote=pair:vote:{cases},scripted"
    assert evaluate(tmp_path, *policies("random", vote), goals=12) == 0
    assert tse(played(tmp_path, "vote", "greedy")) > tse(played(tmp_path, "random")) + 15
    kept = (tmp_path / "policies" / "vote" / "cases.jsonl").read_bytes()
    assert evaluate(tmp_path, *policies(vote), goals=14) == 0
    assert (tmp_path / "policies" / "vote" / "cases.jsonl").read_bytes() == kept  # frozen
    held_out = tmp_path / "policies" / "random" / "trajectories.jsonl"
    assert evaluate(tmp_path, *policies(f"leak=pair:vote:{held_out},scripted")) == 2
    assert "takes training goals only" in capsys.readouterr().err
    assert evaluate(tmp_path, *policies(vote), "--rounds", 1) == 2
    assert "--rounds 0, not 1" in capsys.readouterr().err


def test_every_policy_that_samples_has_a_row_for_each_decoding(tmp_path, capsys):
    train = tmp_path / "train"
    assert evaluate(train, "--split", "train", *policies("skilled=scripted"), goals=60) == 0
    cases = train / "policies" / "skilled" / "trajectories.jsonl"
    votes = [f"case memory (vote)=pair:vote:{cases},scripted", f"by q=pair:vote_q:{cases},scripted"]
    assert evaluate(tmp_path, *policies(*votes, "random"), goals=6) == 0
    shown = capsys.readouterr().out
    rows = re.findall(r"^\| ([^|]+) \| 6 \|", shown, re.MULTILINE)
    assert rows == [
        *("case memory (vote), sampled", "by q, sampled", "random", "case memory (vote), greedy", "by q, greedy"),
        *("by q, sampled - case memory (vote), sampled", "by q, greedy - case memory (vote), greedy"),
        "random - case memory (vote), sampled",
    ]
    sampled, greedy = (played(tmp_path, "case_memory_vote", decoding) for decoding in ("sampled", "greedy"))
    assert [(t.goal.id, t.seed, t.turns[0].user) for t in sampled] == [
        (t.goal.id, t.seed, t.turns[0].user) for t in greedy
    ]
    assert sampled != greedy
    assert any(turn.probabilities for t in sampled for turn in t.turns)
    assert (tmp_path / "policies" / "by_q" / "greedy" / "usage.json").exists()
    assert evaluate(tmp_path / "one", *policies(votes[0], "random"), "--temperatures", "0.5", goals=3) == 0
    assert "| case memory (vote), sampled at 0.5 | 3 |" in capsys.readouterr().out
    assert len(played(tmp_path / "one", "case_memory_vote", "sampled_at_0.5")) == 3


def test_a_case_memory_grows_by_rounds_of_its_own_before_it_is_evaluated(tmp_path, server):
    """Memento with a remote planner: it reads what its bank recalls, and the bank of a round holds those before it."""
    train = tmp_path / "train"
    assert evaluate(train, "--split", "train", *policies("skilled=scripted:0.5"), goals=10) == 0
    cases = train / "policies" / "skilled" / "trajectories.jsonl"
    server.answer = lambda body: re.search(r"Allowed now: (\S+?),? ", body["messages"][-1]["content"] + " ")[1]
    planner = f"memento=pair:memento:{cases}:endpoint:m@{server.url},scripted"
    vote = f"vote=pair:vote:{cases},scripted"
    rounds = ("--rounds", 2, "--round_goals", 5)
    assert evaluate(tmp_path, *policies(planner, vote), *rounds, goals=3) == 0
    firsts = [body["messages"] for body in server.bodies if len(body["messages"]) == 2]
    assert sum("examples" in messages[1]["content"] for messages in firsts) == len(firsts)
    kept = tmp_path / "policies" / "memento" / "cases.jsonl"
    bank = kept.read_text().splitlines()
    assert len(bank) == 1 + 10 + 2 * 5
    assert any(json.loads(bank[0])["weights"])  # Q learned from what was shown
    own = [t for number in (0, 1) for t in played(tmp_path, "memento", f"round_{number:03d}")]
    assert {t.goal.split for t in own} == {"train"}
    assert len({t.goal.id for t in own}) == 10
    assert {t.goal.split for t in played(tmp_path, "memento")} == {"heldout"}
    grown = (tmp_path / "policies" / "vote" / "cases.jsonl").read_text().count("\n")
    decisions = sum(
        not turn.forced
        for number in (0, 1)
        for t in played(tmp_path, "vote", f"round_{number:03d}")
        for turn in t.turns
    )
    assert grown == 1 + decisions + sum(not turn.forced for t in read_trajectories(cases) for turn in t.turns)
    requests = len(server.bodies)
    kept.unlink()  # killed before it was saved: the same dialogues give the same bank again
    assert evaluate(tmp_path, *policies(planner, vote), *rounds, goals=3) == 0
    assert kept.read_text().splitlines() == bank
    assert len(server.bodies) == requests


def test_human_dialogues_pair_with_a_policys_goal_by_goal(tmp_path, capsys):
    assert evaluate(tmp_path, "--gopo.data", STAR, *policies("human", "best=scripted"), env="star") == 0
    shown = capsys.readouterr().out
    (human,) = re.findall(r"^\| human \| (\d+) \| (\d+) \|", shown, re.MULTILINE)
    (pairs,) = re.findall(r"^\| best - human \| (\d+) \|", shown, re.MULTILINE)
    assert human[0] == human[1] == pairs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--policy: give at least one"),
        (["--policy", "gpt-5"], "--policy gpt-5: give"),
        (["--policy", "random", "--concurrency", "0"], "--concurrency 0: give 1 or more"),
        (["--policy", "random", "--vllm.num_engines", "0"], "--vllm.num_engines 0: give 1 or more"),
        (["--policy", "random", "--temperatures", "warm"], "--temperatures warm: give different numbers of 0 or more"),
        (["--policy", "random", "--rounds", "-1"], "--rounds -1: give 0 or more"),
        (["--policy", "random", "--round_goals", "0"], "--round_goals 0: give 1 or more"),
        (["--policy", "random", "--price", "cheap"], "--price cheap: give two numbers"),
        (["--policy", "random", "--gopo.reward", "nowhere.py:f"], "nowhere.py"),
        (
            ["--policy", "random", "--gopo.reward", "judge:m@http://h/v1", "--gopo.judge.rubric", "no.txt"],
            "--gopo.judge.rubric no.txt: cannot be read as UTF-8 text",
        ),
        (["--policy", "pair:no/such/model,random"], "--policy no/such/model: no tokenizer there"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, capsys, arguments, message):
    assert evaluate(tmp_path, *arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
