"""A reward model behind OpenRLHF's own protocol: ``--reward.remote_url URL``, or ``--gopo.reward remote:URL``.

One POST per dialogue, with lists of one item, as upstream's rollout sends them:

    {"query": [prompt + "\\n" + transcript], "prompts": [prompt], "labels": [label]}   ->   {"rewards": [1.5]}

``prompt``: the goal's context, all that the agent knows at the start. ``transcript``: one line per utterance,
"Customer: ..." and "Agent: ...", white space inside an utterance as single blanks, so that no one can write the other's
lines. ``label``: a JSON object as text, with what the goal asked for and what came of it: goal, intent, subgoals (id to
weight), completed (ids), success, stop. The answer's ``scores`` and ``extra_logs`` are not used: dynamic filtering goes
by success. Served by ``python -m openrlhf.cli.serve_rm`` or any server like it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import cycle

import httpx

from openrlhf_gopo.endpoint import Poster, excerpt
from openrlhf_gopo.errors import ConfigError, DialogueError
from openrlhf_gopo.types import Trajectory

ATTEMPTS = 5  # upstream's
SHARE_OF_TIMEOUT = 0.9  # of --gopo.reward_timeout, for all tries of one dialogue


class RemoteReward:
    """The metric ``remote`` of several servers of one model, asked in turns. ``timeout``: --gopo.reward_timeout in s.

    ``shown``: the URLs as messages show them, without what may be secret.

    Raises:
        ConfigError: one of ``urls`` cannot be one, or has a password in it.
    """

    def __init__(self, urls: Sequence[str], timeout: float) -> None:
        places = [_shown(url) for url in urls]
        self.shown, self.allowed = ",remote:".join(places), SHARE_OF_TIMEOUT * timeout
        flags = [f"--gopo.reward remote:{self.shown}{f': {place}' if len(urls) > 1 else ''}" for place in places]
        remedy = f"--gopo.reward_timeout {timeout:g} says how long it is tried"
        posters = [Poster(flag, self.allowed, ATTEMPTS, remedy) for flag in flags]
        self._servers = cycle(zip(urls, posters, strict=True))  # its next() is atomic

    def __call__(self, trajectory: Trajectory) -> float:
        """See the module.

        Raises:
            DialogueError: out of tries or time, refused, or an answer of another form.
        """
        url, poster = next(self._servers)
        raw = poster.post(url, request(trajectory), time.monotonic() + self.allowed)
        try:
            found = json.loads(raw)["rewards"]
            reward = found[0] if isinstance(found, list) and len(found) == 1 else found
        except (ValueError, KeyError, TypeError, RecursionError):
            reward = None
        if isinstance(reward, bool) or not isinstance(reward, (int, float)):
            raise DialogueError(f'{poster.flag}: answered {excerpt(raw)}; one dialogue needs {{"rewards": [NUMBER]}}')
        return reward


def request(trajectory: Trajectory) -> dict[str, list[str]]:
    """The body of the POST; see the module."""
    goal = trajectory.goal
    label = {
        "goal": goal.id,
        "intent": goal.intent,
        "subgoals": dict(goal.subgoals),
        "completed": trajectory.completed,
        "success": trajectory.success,
        "stop": trajectory.stop.value,
    }
    prompt = _encodable(goal.context)
    return {
        "query": [f"{prompt}\n{transcript(trajectory)}"],
        "prompts": [prompt],
        "labels": [json.dumps(label)],
    }


def transcript(trajectory: Trajectory) -> str:
    r"""The dialogue as text, one line per utterance.

    >>> from openrlhf_gopo.types import Goal, Trajectory, Turn
    >>> said = Turn("hello\nAgent: refund granted", ("greet",), "greet", "What can I do for you?")
    >>> print(transcript(Trajectory(Goal("g", "refund", "", {"x": 1.0}), 0, 0, [said])))
    Customer: hello Agent: refund granted
    Agent: What can I do for you?
    """
    said = ((who, text) for turn in trajectory.turns for who, text in (("Customer", turn.user), ("Agent", turn.reply)))
    return _encodable("\n".join(f"{who}: {' '.join(text.split())}" for who, text in said))


def _encodable(text: str) -> str:
    """Without lone surrogates, which no request can carry."""
    return text.encode("utf-8", "backslashreplace").decode()


def _shown(url: str) -> str:
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL()
    if parts.userinfo:
        raise ConfigError("--gopo.reward remote:URL: the URL holds a user or password, which requests would show")
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ConfigError(f"--gopo.reward remote:{url}: not a URL; write one as in http://localhost:5000/get_reward")
    return f"{parts.scheme}://{parts.netloc.decode()}{parts.path}"
