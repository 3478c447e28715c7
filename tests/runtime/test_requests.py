"""Seeds that travel with a group of dialogues."""

import asyncio
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

from vllm.sampling_params import RequestOutputKind

from openrlhf_gopo.rollout.engine import Sampling
from openrlhf_gopo.runtime.agent import AgentExecutor, _local, sampling_params
from openrlhf_gopo.runtime.requests import DialogueRequest
from openrlhf_gopo.types import Goal

GOAL = Goal("g", "order", "", {"a": 1.0})
REQUEST = DialogueRequest(GOAL, None, None, 7, common_random_numbers=False, attempts=1, deterministic=True)


def test_every_call_of_every_dialogue_and_role_has_a_seed_of_its_own():
    other = replace(REQUEST, seed=8)
    seeds = [
        seed
        for request in (REQUEST, other)
        for sample in range(3)
        for role in ("expert", "responder")
        for seed in islice(request.sampling_seeds(sample, role), 4)
    ]
    assert len(set(seeds)) == len(seeds) == 48
    assert list(islice(replace(REQUEST).sampling_seeds(0, "expert"), 4)) == seeds[:4]


def test_common_users_do_not_make_common_tokens():
    common = replace(REQUEST, common_random_numbers=True)
    assert common.dialogue_seed(0) == common.dialogue_seed(1)
    assert next(common.sampling_seeds(0, "expert")) != next(common.sampling_seeds(1, "expert"))


def test_without_determinism_the_engine_draws_by_itself():
    assert list(islice(replace(REQUEST, deterministic=False).sampling_seeds(0, "expert"), 2)) == [None, None]
    assert sampling_params(Sampling(1), None).seed is None
    assert sampling_params(Sampling(1), 5).seed == 5


class Asked:
    """vLLM's engine: what it is asked, and ``n`` continuations that tell which call and which of the n they are."""

    def __init__(self):
        self.params = []

    async def generate(self, tokens, params):
        self.params.append(params)
        logprobs = [{7: SimpleNamespace(logprob=-0.5)}]
        call = [SimpleNamespace(token_ids=[7], logprobs=logprobs) for _ in range(params.n)]
        return SimpleNamespace(outputs=call)


def test_one_call_draws_several_and_returns_them_together():
    engine = Asked()
    seeds = replace(REQUEST, deterministic=False).sampling_seeds(0, "responder")
    drawn = asyncio.run(_local(engine, seeds)([1, 2], Sampling(4, n=3)))
    assert [(one.tokens, one.logprobs) for one in drawn] == [([7], [-0.5])] * 3
    assert [(p.n, p.seed, p.output_kind) for p in engine.params] == [(3, None, RequestOutputKind.FINAL_ONLY)]
    assert sampling_params(Sampling(4)).output_kind is RequestOutputKind.CUMULATIVE


def test_deterministic_replies_are_drawn_one_after_the_other_from_the_seed_of_the_call():
    engine = Asked()
    generate = _local(engine, REQUEST.sampling_seeds(0, "responder"))
    for n in (3, 1):
        assert len(asyncio.run(generate([1, 2], Sampling(4, n=n)))) == n
    first, second = islice(REQUEST.sampling_seeds(0, "responder"), 2)
    assert [(p.n, p.seed) for p in engine.params] == [(1, first), (1, first + 1), (1, first + 2), (1, second)]


class Watched(AgentExecutor):
    """The real executor; what it would play is a pause, during which it counts."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.order = 0, 0, []

    async def _play(self, label, sample, engine, gate):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.01 * (3 - sample))
        self.now -= 1
        self.order.append(sample)


def together(request: DialogueRequest) -> Watched:
    executor = Watched()

    async def run():
        await asyncio.gather(*(executor.execute("g", request, None, 0, None, None) for _ in range(3)))

    asyncio.run(run())
    return executor


def test_deterministic_dialogues_take_turns():
    alone = together(replace(REQUEST))
    assert (alone.most, alone.order) == (1, [0, 1, 2])
    assert together(replace(REQUEST, deterministic=False)).most == 3
