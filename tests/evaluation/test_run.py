"""Playing a policy over goals: all of them, once, whatever happened before."""

import asyncio
import json

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import DataError, DialogueError
from openrlhf_gopo.evaluation.records import read_trajectories
from openrlhf_gopo.evaluation.run import HOPELESS, Job, evaluate
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy
from openrlhf_gopo.rollout.dialogue import Limits
from openrlhf_gopo.types import StopReason


@pytest.fixture(scope="module")
def shop():
    return load_environment("shop")


class Watched:
    """A script that counts its dialogues and fails those of some goals."""

    def __init__(self, fails=lambda case: False):
        self.script, self.fails = ScriptedPolicy(0.7), fails
        self.opened = []

    def open(self, case):
        self.opened.append((case.goal.id, case.sample))
        if self.fails(case):
            raise RuntimeError("no power")
        return self.script.open(case)


def jobs(shop, goals=6, samples=2, seed=1):
    return Job.of(shop.goals("heldout")[:goals], samples, seed)


def run(shop, todo, policy, path, **more):
    return asyncio.run(evaluate(shop, todo, lambda: policy, Limits(), path, **more))


def test_every_job_is_played_once_and_kept(shop, tmp_path):
    path, todo, policy = tmp_path / "t.jsonl", jobs(shop), Watched()
    played = run(shop, todo, policy, path)
    assert [(t.goal.id, t.sample, t.seed) for t in played] == [job.key for job in todo]
    assert sorted(policy.opened) == sorted((job.goal.id, job.sample) for job in todo)
    kept = {(t.goal.id, t.sample): t.turns for t in read_trajectories(path)}
    assert kept == {(t.goal.id, t.sample): t.turns for t in played}


def test_seeds_differ_by_sample_and_goal_and_repeat_by_run(shop):
    seeds = [job.seed for job in jobs(shop)]
    assert len(set(seeds)) == 12
    assert seeds == [job.seed for job in jobs(shop)]
    assert not set(seeds) & {job.seed for job in jobs(shop, seed=2)}


def test_it_goes_on_where_it_stopped(shop, tmp_path):
    path, todo = tmp_path / "t.jsonl", jobs(shop)
    whole = run(shop, todo, Watched(), tmp_path / "whole.jsonl")
    run(shop, todo[:5], Watched(), path)
    policy = Watched()
    resumed = run(shop, todo, policy, path)
    assert len(policy.opened) == 7
    assert [t.turns for t in resumed] == [t.turns for t in whole]
    done = asyncio.run(evaluate(shop, todo, lambda: pytest.fail("built for nothing"), Limits(), path))
    assert done == read_in_order(path, todo)


def read_in_order(path, todo):
    kept = {(t.goal.id, t.sample, t.seed): t for t in read_trajectories(path)}
    return [kept[job.key] for job in todo]


def test_a_torn_last_line_is_played_again(shop, tmp_path, caplog):
    path, todo = tmp_path / "t.jsonl", jobs(shop)
    whole = run(shop, todo, Watched(), path)
    torn = path.read_bytes()[:-40]
    lost = json.loads(path.read_text().splitlines()[-1])["goal"]["id"]
    path.write_bytes(torn)
    policy = Watched()
    assert [t.turns for t in run(shop, todo, policy, path)] == [t.turns for t in whole]
    assert [goal for goal, _ in policy.opened] == [lost]
    assert "torn" in caplog.text
    assert len(read_trajectories(path)) == 12


def test_a_broken_line_in_the_middle_is_an_error_and_nothing_is_lost(shop, tmp_path):
    path, todo = tmp_path / "t.jsonl", jobs(shop)
    run(shop, todo, Watched(), path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b'{"goal": 1}\n', *lines[1:]]))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"t\.jsonl:2:"):
        run(shop, todo, Watched(), path)
    assert path.read_bytes() == before


def test_failed_dialogues_are_tried_again_now_and_later(shop, tmp_path, caplog):
    path, todo = tmp_path / "t.jsonl", jobs(shop)
    bad = todo[0].goal.id
    policy = Watched(lambda case: case.goal.id == bad)
    played = run(shop, todo, policy, path, attempts=3)
    assert [t.stop is StopReason.FAILED for t in played] == [True] * 2 + [False] * 10
    assert len(policy.opened) == 10 + 2 * 3
    assert "2 of 12 dialogues failed with" in caplog.text
    assert "RuntimeError: no power" in caplog.text
    mended = Watched()
    assert not any(t.stop is StopReason.FAILED for t in run(shop, todo, mended, path))
    assert mended.opened == [(bad, 0), (bad, 1)]


def test_a_policy_that_never_works_is_given_up(shop, tmp_path):
    policy = Watched(lambda case: True)
    with pytest.raises(DialogueError, match=rf"row: the first {HOPELESS} dialogues failed, .*no power"):
        run(shop, jobs(shop, 40), policy, tmp_path / "t.jsonl", attempts=1, concurrency=4, label="row")
    assert HOPELESS <= len(read_trajectories(tmp_path / "t.jsonl")) < HOPELESS + 4


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_dialogues_than_allowed_are_under_way(shop, tmp_path, concurrency):
    path = tmp_path / "t.jsonl"
    under_way = []

    class Waits(Watched):
        def open(self, case):
            agent = super().open(case)
            ended = path.read_bytes().count(b"\n") if path.exists() else 0
            under_way.append(len(self.opened) - ended)

            class Expert:
                async def choose(self, past, turn):
                    await asyncio.sleep(0)
                    return await agent.expert.choose(past, turn)

            return type(agent)(Expert(), agent.responder)

    run(shop, jobs(shop, 8, 1), Waits(), path, concurrency=concurrency)
    assert max(under_way) == concurrency


def test_an_engines_exception_ends_it_and_what_was_played_stays(shop, tmp_path):
    class Dies(Watched):
        def open(self, case):
            agent = super().open(case)
            if len(self.opened) == 5:

                class Broken:
                    async def choose(self, past, turn):
                        raise ConnectionError("engine died")

                return type(agent)(Broken(), agent.responder)
            return agent

    path = tmp_path / "t.jsonl"
    with pytest.raises(ConnectionError, match="engine died"):
        run(shop, jobs(shop), Dies(), path, concurrency=1)
    assert len(read_trajectories(path)) == 4
    assert len(run(shop, jobs(shop), Watched(), path)) == 12
