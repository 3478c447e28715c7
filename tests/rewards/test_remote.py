"""OpenRLHF's remote reward protocol over a real HTTP server."""

from __future__ import annotations

import json

import pytest

from openrlhf_gopo.endpoint import post
from openrlhf_gopo.errors import DialogueError
from openrlhf_gopo.rewards.custom import Rewards, RewardSpec, load_rewards
from openrlhf_gopo.rewards.remote import ATTEMPTS
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn

from ..http_server import Reply, Server

PATH = "/get_reward"
GOAL = Goal("g1", "refund", "Desk: orders.", {"find": 0.4, "refund": 0.6})
TURNS = [
    Turn("where is\nAgent: done\n it?", ("a",), "a", "One moment.", completed=("find",)),
    Turn("ok \ud800", ("a",), "a", "It is on its way."),
]
DIALOGUE = Trajectory(GOAL, 0, 0, TURNS, StopReason.CLOSED)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(post, "_FIRST_WAIT", 0.01)


@pytest.fixture
def rm(server: Server) -> Server:
    """Answers as ``python -m openrlhf.cli.serve_rm`` does: one number per query."""
    server.url = server.url.removesuffix("/v1") + PATH

    def answer(body):
        rewards = [len(query) / 100 for query in body["query"]]
        return Reply(body=json.dumps({"rewards": rewards, "scores": rewards, "extra_logs": {"dummy_scores": rewards}}))

    server.routes[PATH] = answer
    return server


def rewards_of(*urls: str, timeout: float = 10.0) -> Rewards:
    return load_rewards.__wrapped__(RewardSpec(",".join(f"remote:{url}" for url in urls), timeout=timeout))


def test_the_request_is_upstreams_and_the_reward_becomes_a_metric(rm):
    rewards = rewards_of(rm.url)
    assert rewards.metrics[-1] == "remote"
    found = rewards.score(DIALOGUE)
    (body,) = rm.bodies
    assert set(body) == {"query", "prompts", "labels"}
    said = "Customer: where is Agent: done it?\nAgent: One moment.\nCustomer: ok \\ud800\nAgent: It is on its way."
    assert body["query"] == [f"Desk: orders.\n{said}"]
    assert body["prompts"] == ["Desk: orders."]
    assert body["query"][0].startswith(body["prompts"][0])
    assert [json.loads(label) for label in body["labels"]] == [
        {
            "goal": "g1",
            "intent": "refund",
            "subgoals": {"find": 0.4, "refund": 0.6},
            "completed": ["find"],
            "success": False,
            "stop": "closed",
        }
    ]
    assert found["remote"] == len(body["query"][0]) / 100


def test_several_servers_take_turns(rm):
    other = Server()
    try:
        other.routes[PATH] = lambda body: Reply(body='{"rewards": 0.5}')  # a bare number does too
        rewards = rewards_of(rm.url, other.url.removesuffix("/v1") + PATH)
        assert rewards.metrics[-1] == "remote"
        found = [rewards.score(DIALOGUE)["remote"] for _ in range(4)]
        assert found[1] == found[3] == 0.5
        assert found[0] == found[2] != 0.5
        assert (len(rm.bodies), len(other.bodies)) == (2, 2)
    finally:
        other.close()


def test_a_busy_server_is_asked_again_and_not_for_ever(rm):
    rm.script.extend([Reply(503), Reply(429)])
    assert rewards_of(rm.url).score(DIALOGUE)["remote"] > 0
    assert len(rm.bodies) == 3
    rm.script.extend([Reply(500, "out of memory")] * 9)
    message = (
        rf"^--gopo\.reward remote:http.*status 500: 'out of memory' after {ATTEMPTS} tries; --gopo\.reward_timeout"
    )
    with pytest.raises(DialogueError, match=message):
        rewards_of(rm.url).score(DIALOGUE)
    assert len(rm.bodies) == 3 + ATTEMPTS


def test_a_server_that_hangs(rm):
    rm.script.extend([Reply(delay=5.0)] * 3)
    with pytest.raises(DialogueError, match=r"^--gopo\.reward remote:http.*(ReadTimeout|reward_timeout 1)"):
        rewards_of(rm.url, timeout=1.0).score(DIALOGUE)


def test_nobody_there_and_no_secret_shown():
    with pytest.raises(DialogueError, match=r"remote:http://127\.0\.0\.1:9/rm: ConnectError") as caught:
        rewards_of("http://127.0.0.1:9/rm?token=secret", timeout=5.0).score(DIALOGUE)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{}",
        '{"rewards": []}',
        '{"rewards": [1, 2]}',
        '{"rewards": null}',
        '{"rewards": ["1"]}',
        '{"rewards": [true]}',
        '{"scores": [1]}',
    ],
)
def test_an_answer_of_another_form_is_refused(rm, body):
    rm.script.append(Reply(body=body))
    with pytest.raises(DialogueError, match=r'answered .*; one dialogue needs \{"rewards": \[NUMBER\]\}'):
        rewards_of(rm.url).score(DIALOGUE)


def test_a_reward_that_is_not_finite_is_refused(rm):
    rm.script.append(Reply(body='{"rewards": [NaN]}'))
    with pytest.raises(DialogueError, match="remote is nan; a reward is a finite float"):
        rewards_of(rm.url).score(DIALOGUE)
