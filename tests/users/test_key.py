"""The endpoint's key after dialogues that failed in every way: in no file, log, message or output."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from dataclasses import asdict

import pytest

from openrlhf_gopo.config import LlmConfig
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.evaluation.records import append_trajectory
from openrlhf_gopo.evaluation.report import write_results
from openrlhf_gopo.rollout.dialogue import run_dialogue
from openrlhf_gopo.rollout.sampled import SampledPolicy, TokenLimits
from openrlhf_gopo.types import StopReason
from openrlhf_gopo.users import UserSpec

from ..engine import Engine
from ..http_server import Reply, completion

KEY = "sk-live-0123456789abcdef"
ESCAPED = "".join(f"\\u{ord(c):04x}" for c in KEY)  # as JSON may write it
LIMITS = TokenLimits(max_len=4000, max_turns=2, reply_max_tokens=16, user_timeout=5.0)
# Each is one way of giving the key away while the dialogue fails; None: nobody answers.
WAYS = {
    "refused": Reply(401, f"no such key: {KEY}"),
    "forbidden": Reply(403, f'{{"error": "{ESCAPED}"}}'),
    "broken": Reply(500, f"Traceback: headers={{'Authorization': 'Bearer {KEY}'}}"),
    "busy": Reply(429, KEY, {"Retry-After": KEY}),
    "redirected": Reply(302, KEY, {"Location": f"http://127.0.0.1:1/?key={KEY}"}),
    "slow": Reply(delay=1.0),
    "dripping": Reply(body=completion(KEY), drip=0.05),
    "cut off": Reply(body=KEY, headers={"Content-Length": "9999"}),
    "no JSON": Reply(body=f"<html>{KEY}</html>"),
    "no text": Reply(body=json.dumps({"choices": [{"message": {"content": None, "key": KEY}}]})),
    "huge": Reply(body=KEY * 60_000),
    "said": Reply(body=completion(f"My key is {KEY}, thanks")),
    "said with escapes": Reply(body=completion("KEY").replace("KEY", ESCAPED)),
    "nobody": None,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_key_is_nowhere_after_a_dialogue_that_failed(server, policy, tmp_path, monkeypatch, caplog, capfd, way):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setattr("openrlhf_gopo.endpoint.post._FIRST_WAIT", 0.01)
    caplog.set_level(logging.DEBUG)
    reply, url = WAYS[way], server.url if WAYS[way] else "http://127.0.0.1:9/v1"
    server.script.extend([reply] * 30 if reply else [])
    config = LlmConfig(api_key_env="MY_KEY", attempts=2, timeout=0.3, cache=str(tmp_path / "answers.sqlite"))
    env = load_environment("shop", None, UserSpec(f"llm:m@{url}", config, 5.0))
    goal = env.goals("heldout")[0]
    agent = SampledPolicy(policy, Engine(policy).generators(), LIMITS)

    trajectory = asyncio.run(run_dialogue(env, goal, agent, LIMITS))

    assert trajectory.stop is StopReason.FAILED
    assert server.headers[0]["authorization"] == f"Bearer {KEY}" if reply else True
    append_trajectory(tmp_path / "trajectories.jsonl", trajectory)
    write_results(tmp_path / "results", {"before": [trajectory]})
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    logging.getLogger("test").error("failed", extra={"trajectory": trajectory})
    shown = [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert len(shown) >= 7
    out = capfd.readouterr()
    shown += [caplog.text, out.out, out.err, repr(trajectory), traceback.format_exc(), repr(env.users.shares)]
    assert not [text for text in shown if KEY in text or ESCAPED in text]
