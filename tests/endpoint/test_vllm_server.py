"""The LLM user and the judge against vLLM's own OpenAI server. Its untrained model says noise, the rest is real."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from openrlhf_gopo import platform
from openrlhf_gopo.config import JudgeConfig, LlmConfig
from openrlhf_gopo.endpoint import Endpoint
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import DialogueError
from openrlhf_gopo.evaluation.endpoint import TRIES, EndpointPolicy
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.rewards.custom import RewardSpec, load_rewards
from openrlhf_gopo.rollout.dialogue import run_dialogue
from openrlhf_gopo.rollout.sampled import SampledPolicy, TokenLimits
from openrlhf_gopo.types import StopReason
from openrlhf_gopo.users import UserSpec

from ..conftest import ROOT
from ..engine import Engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.stack,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU"),
]

KEY = "sk-test-0123456789abcdef"
LIMITS = TokenLimits(max_len=4000, max_turns=12, reply_max_tokens=16, user_timeout=60.0)


@dataclass
class Served:
    """A running server: its simulator's name, and how its untrained model is biased, by token id.

    It ends a message one time in 25; its words are drawn from everything but digits, which would be invented values.
    """

    user: str
    bias: dict[str, int]

    @property
    def judge(self) -> str:
        return self.user.replace("llm:", "judge:", 1)

    def spec(self, cache: Path | None = None) -> UserSpec:
        body = json.dumps({"logit_bias": self.bias})
        return UserSpec(
            self.user, LlmConfig(temperature=1.0, max_new_tokens=200, extra_body=body, cache=cache and str(cache))
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    environment = os.environ | {"OPENRLHF_GOPO_CPU": "1", "HF_HUB_OFFLINE": "1"}
    builder = [sys.executable, ROOT / "examples/quickstart/build_model.py", "--hidden", "64", "--layers", "2"]
    subprocess.run([*map(str, builder), "--out", str(folder / "model")], check=True, env=environment, timeout=120)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "openrlhf_gopo.platform", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder / "model"), "--served-model-name", "tiny", "--api-key", KEY]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-num-seqs", "8"]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(process, f"http://127.0.0.1:{port}/health", log)
        config = json.loads((folder / "model/config.json").read_text())
        vocabulary = json.loads((folder / "model/tokenizer.json").read_text())["model"]["vocab"]
        bias = {str(token): -100 for piece, token in vocabulary.items() if re.search(r"\d", piece)}
        yield Served(f"llm:tiny@http://127.0.0.1:{port}/v1", {**bias, str(config["eos_token_id"]): 5})
    finally:
        process.terminate()
        process.wait(60)


def wait_for(process: subprocess.Popen, url: str, log: Path) -> None:
    until = time.monotonic() + 180
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"no server: {log.read_text()[-4000:]}")


def play(served, policy, seeds, cache=None, vague=True):
    """Dialogues of one customer at once. The agent's replies mean nothing, so all the customer says is that."""
    env = load_environment("shop", None, served.spec(cache))
    goal = next(g for g in env.goals("train") if g.data["vague"] == vague and g.intent == "advice")
    engine = Engine(policy, reply="hm")

    async def all_of_them():
        runs = [
            run_dialogue(env, goal, SampledPolicy(policy, engine.generators(), LIMITS), LIMITS, seed=seed)
            for seed in seeds
        ]
        return await asyncio.gather(*runs)

    return asyncio.run(all_of_them()), env.users.shares[0].simulator.endpoint.usage


def test_whole_dialogues_with_its_words(served, policy, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    cache = tmp_path / "answers.sqlite"
    played, usage = play(served, policy, [1, 2, 3, 4, 1], cache)
    assert [t.error for t in played] == [None] * 5
    assert {t.stop for t in played} == {StopReason.USER_LEFT}
    assert {t.user for t in played} == {served.user}
    transcripts = [[turn.user for turn in t.turns] for t in played]
    assert all(len(words) >= 2 for words in transcripts)
    assert transcripts[0] == transcripts[4]  # the same seed
    assert len({tuple(words) for words in transcripts}) == 4
    turns = sum(len(words) for words in transcripts)
    assert usage.requests + usage.cached >= turns
    assert usage.completion_tokens > usage.requests
    assert usage.prompt_tokens > 100 * usage.requests
    again, replayed = play(served, policy, [1, 2, 3, 4, 1], cache)
    assert [[turn.user for turn in t.turns] for t in again] == transcripts
    assert replayed.requests == 0
    assert replayed.cached >= turns


def test_a_model_that_cannot_keep_to_the_draft_fails_its_dialogue(served, policy, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (trajectory,), usage = play(served, policy, [1], vague=False)  # the opening names what they want
    assert trajectory.stop is StopReason.FAILED
    # What an untrained model gets wrong last is chance; tests/users/test_llm.py has each case.
    assert re.search(
        r"3 wordings of .* failed, the last (leaves out|says nothing|invents|is cut)", trajectory.error, re.DOTALL
    )
    assert KEY not in json.dumps(trajectory.to_json())
    assert usage.requests == 3


def test_the_servers_errors_reach_the_user(served, policy, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0123456789")
    (trajectory,), _ = play(served, policy, [1])
    assert "status 401" in trajectory.error
    assert "set the key in the environment variable OPENAI_API_KEY" in trajectory.error
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    env = load_environment("shop", None, UserSpec(served.user.replace("tiny", "huge"), LlmConfig(), 60.0))
    with pytest.raises(DialogueError, match=r"llm:huge@.*status 404.*huge.*check the model's name"):
        env.start(env.goals("train")[0], 0)


def judged(served, policy, samples, **settings):
    """Dialogues with the shop's own customers, scored by the served model."""
    rewards = load_rewards(RewardSpec(served.judge, JudgeConfig(**settings), 60.0))
    env = load_environment("shop")
    goals = env.goals("train")[:samples]

    async def all_of_them():
        generate = Engine(policy).generators()
        return await asyncio.gather(
            *(run_dialogue(env, g, SampledPolicy(policy, generate, LIMITS), LIMITS, rewards=rewards) for g in goals)
        )

    return asyncio.run(all_of_them())


def test_an_untrained_model_is_no_judge(served, policy, monkeypatch):
    """Its noise is never taken for a score: every dialogue is quarantined, and says why."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    played = judged(served, policy, 3, max_new_tokens=40)
    for trajectory in played:
        assert (trajectory.stop, trajectory.rewards) == (StopReason.FAILED, {})
        why = r"--gopo\.reward judge:tiny@.*: 3 answers were no verdict, the last is (cut at|not the JSON asked for)"
        assert re.search(why, trajectory.error)
        assert KEY not in json.dumps(trajectory.to_json())


def test_a_server_that_holds_the_model_to_the_form_gives_verdicts(served, policy, tmp_path, monkeypatch):
    """vLLM's structured output by --gopo.judge.extra_body; equal seeds, temperature 0: the same verdicts again."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    form = {"structured_outputs": {"regex": r'\{"score": (10|[0-9]), "reason": "(good|bad)"\}'}}
    cache = str(tmp_path / "verdicts.sqlite")
    played = judged(served, policy, 3, extra_body=json.dumps(form), cache=cache)
    assert [trajectory.error for trajectory in played] == [None] * 3
    scores = [trajectory.rewards["judge"] for trajectory in played]
    assert all(score in [s / 10 for s in range(11)] for score in scores)
    load_rewards.cache_clear()
    again = judged(served, policy, 3, extra_body=json.dumps(form), cache=cache)
    assert [trajectory.rewards["judge"] for trajectory in again] == scores


def test_its_model_as_expert_and_responder(served, monkeypatch):
    """Noise is no label: every decision is left to chance, and the table says so."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = LlmConfig(temperature=1.0, max_new_tokens=6, extra_body=json.dumps({"logit_bias": served.bias}))
    model, _, url = served.user.removeprefix("llm:").partition("@")
    policy = EndpointPolicy(Endpoint("--policy endpoint", model, url, config), names_only=True)
    env = load_environment("shop")

    async def all_of_them():
        return await asyncio.gather(*(run_dialogue(env, g, policy, LIMITS) for g in env.goals("heldout")[:3]))

    played = asyncio.run(all_of_them())
    assert [t.error for t in played] == [None] * 3
    assert summarise(played).metrics["invalid"].mean == 1.0
    turns = [turn for t in played for turn in t.turns]
    decided = sum(not turn.forced for turn in turns)
    usage = policy.endpoint.usage
    assert usage.requests + usage.cached == TRIES * decided + len(turns)
    assert usage.completion_tokens <= 6 * usage.requests
    assert len({turn.reply for turn in turns}) > len(turns) // 2
