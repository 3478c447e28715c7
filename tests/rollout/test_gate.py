"""The gate: nobody inside while weights change, everybody through afterwards, and who was played by which weights."""

import asyncio

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy
from openrlhf_gopo.rollout.dialogue import Limits, run_dialogue
from openrlhf_gopo.rollout.gate import Gate


def test_closing_waits_for_those_inside_and_keeps_the_others_out():
    events = []

    async def visitor(gate, name, stay):
        async with gate:
            events.append((name, "in", gate.version))
            await stay.wait()
            events.append((name, "out", gate.version))

    async def main():
        gate, leave, stays = Gate(3), asyncio.Event(), asyncio.Event()
        stays.set()
        early = asyncio.create_task(visitor(gate, "early", leave))
        await asyncio.sleep(0)
        closing = asyncio.create_task(gate.close())
        late = asyncio.create_task(visitor(gate, "late", stays))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not closing.done()
        assert events == [("early", "in", 3)]
        leave.set()
        await closing
        assert events == [("early", "in", 3), ("early", "out", 3)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not late.done()
        gate.open(4)
        await asyncio.gather(early, late)

    asyncio.run(main())
    assert events[2:] == [("late", "in", 4), ("late", "out", 4)]


def test_a_waiter_does_not_slip_through_a_gate_that_closes_again():
    async def main():
        gate, entered = Gate(), []

        async def visitor():
            async with gate:
                entered.append(gate.version)

        await gate.close()
        waiting = asyncio.create_task(visitor())
        await asyncio.sleep(0)
        gate.open(1)
        closing = asyncio.create_task(gate.close())  # before the waiter has run again
        await closing
        before = list(entered)
        await asyncio.sleep(0)
        assert entered == before
        gate.open(2)
        await waiting
        return entered

    (version,) = asyncio.run(main())
    assert version in (1, 2)


def test_an_empty_gate_closes_at_once_and_an_exception_leaves_it():
    async def main():
        gate = Gate()
        await asyncio.wait_for(gate.close(), 1)
        gate.open(1)
        with pytest.raises(ValueError, match="inside"):
            async with gate:
                raise ValueError("inside")
        await asyncio.wait_for(gate.close(), 1)

    asyncio.run(main())


def test_turns_record_the_weights_that_played_them():
    """Weights change between two turns, never while one is played: every turn sees one version, and they only grow."""
    env = load_environment("shop")
    goals = env.goals("heldout")[:12]

    class Slow:
        """The script, with a pause in its middle in which weights would change if they could."""

        script = ScriptedPolicy(0.6)

        def open(self, case):
            agent = self.script.open(case)

            class Responder:
                async def write(self, past, turn):
                    seen = gate.version
                    for _ in range(3):
                        await asyncio.sleep(0)
                    assert seen == gate.version == turn.version
                    return await agent.responder.write(past, turn)

            return type(agent)(agent.expert, Responder())

    gate = Gate()

    async def main():
        runs = [asyncio.create_task(run_dialogue(env, g, Slow(), Limits(), gate=gate)) for g in goals]
        version = 0
        while not all(run.done() for run in runs):
            await asyncio.sleep(0)
            version += 1
            await gate.close()
            gate.open(version)
        return await asyncio.gather(*runs)

    trajectories = asyncio.run(main())
    for trajectory in trajectories:
        assert trajectory.error is None
        versions = [turn.version for turn in trajectory.turns]
        assert versions == sorted(versions)
    assert max(len({turn.version for turn in t.turns}) for t in trajectories) > 1
    alone = asyncio.run(run_dialogue(env, goals[0], ScriptedPolicy(0.6), Limits()))
    assert [(t.user, t.reply) for t in alone.turns] == [(t.user, t.reply) for t in trajectories[0].turns]
