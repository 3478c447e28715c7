"""What the tests of the environments on human data share: playing, and reading a copied fixture."""

import json
import os
import random
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment


def real_data(name):
    """The environment ``name`` on the real data, or a skip."""
    path = Path(os.environ.get(f"GOPO_{name.upper()}_DATA") or Path(__file__).parents[3] / "shared" / "data" / name)
    if not path.is_dir():
        pytest.skip(f"no {name} data at {path}; set GOPO_{name.upper()}_DATA to a folder in upstream's layout")
    return load_environment(name, str(path))


def everything(env):
    return [*env.goals("train"), *env.goals("heldout")]


def play(env, goal, choose, seed=0):
    """(user, strategy, outcome) of every turn with the reference replies, checking what holds in every dialogue."""
    talk = env.start(goal, seed)
    seen, turns = talk.opening, []
    while len(turns) < env.turn_limit(goal):
        strategy = choose(talk.relevance())
        outcome = talk.step(strategy, talk.reference_reply(strategy))
        turns.append((seen.user, strategy, outcome))
        if outcome.stop is not None:
            break
        seen = outcome.next
    return turns


def best(grades):
    assert list(grades.values()).count(3) == 1
    return max(grades, key=grades.get)


def wander(seed):
    rng = random.Random(seed)
    return lambda grades: rng.choice(list(grades))


def edit(path, change):
    """Apply ``change`` to the JSON value in ``path``."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
