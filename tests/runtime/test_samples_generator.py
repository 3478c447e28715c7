"""The samples generator's share of upstream's loop; whole rollouts are in tests/e2e."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

pytest.importorskip("openrlhf")

import ray
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from openrlhf_gopo.config import GopoConfig
from openrlhf_gopo.errors import DialogueError
from openrlhf_gopo.evaluation.records import read_trajectories
from openrlhf_gopo.rollout.sampled import ReplyGroup, TokenLimits
from openrlhf_gopo.runtime.requests import DialogueRequest
from openrlhf_gopo.runtime.restarts import Restarts
from openrlhf_gopo.runtime.samples_generator import GoalDataset, GOPOSamplesGenerator, RolloutSpec
from openrlhf_gopo.types import Goal, Trajectory

pytestmark = pytest.mark.stack


def generator_of(folder, of_each=2, engines=(), **flags):
    args = SimpleNamespace(
        rollout=SimpleNamespace(batch_size=4, n_samples_per_prompt=of_each),
        vllm=SimpleNamespace(enable_sleep=False),
        train=SimpleNamespace(async_enable=False, full_determinism_enable=False, partial_rollout_enable=False),
        algo=SimpleNamespace(dynamic_filtering_enable=True),
    )
    spec = RolloutSpec(None, TokenLimits(max_len=64, reply_max_tokens=8), {}, GopoConfig(env="shop", **flags), 7)
    options = {"expert_engines": None, "restarts": Restarts({}), "spec": spec, "folder": folder}
    return GOPOSamplesGenerator(SimpleNamespace(args=args), [], [], None, list(engines), **options)


@dataclass(eq=False)  # as Ray's references, equal to itself alone
class Asked:
    request: DialogueRequest
    samples: int


class Engine:
    """A rollout actor whose dialogues are over when Ray is asked for them; ``asked`` are its requests in order."""

    def __init__(self):
        self.asked = []
        self.generate_responses = SimpleNamespace(remote=self._remote)

    def _remote(self, label, num_samples, **_):
        self.asked.append(label)
        return Asked(label, num_samples)


@pytest.fixture
def heldout(monkeypatch, tmp_path):
    """An evaluation without Ray, whose last request is over first: (of_each, samples, temperatures) -> what came."""
    waited = []

    def wait(refs, num_returns):
        waited.append(len(refs))
        return refs[-1:], refs[:-1]

    def get(ref):
        request, rewards = ref.request, {"tse": ref.request.limits.expert_temperature}
        return [Trajectory(request.goal, n, request.dialogue_seed(n), rewards=rewards) for n in range(ref.samples)]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)

    def play(of_each, samples, temperatures, **flags):
        generator = generator_of(tmp_path, of_each=of_each, engines=[Engine(), Engine()], **flags)
        generator.restarts = SimpleNamespace(await_started=lambda: None, mending=nullcontext)
        goals = [Goal(f"g{number}", "refund", "", {"solve": 1.0}, split="heldout") for number in range(40)]
        generator.eval_dataloader = SimpleNamespace(dataset=GoalDataset(goals))
        files = {one: tmp_path / f"{one}.jsonl" for one in temperatures}
        return generator, generator.evaluate(files, samples), files, waited

    return play


@pytest.mark.parametrize(("of_each", "samples", "requests"), [(8, 1, 32), (8, 3, 10), (2, 16, 1)])
def test_an_evaluation_keeps_as_many_dialogues_under_way_as_a_rollout(heldout, of_each, samples, requests):
    *_, waited = heldout(of_each, samples, [1.0])
    assert max(waited) == requests
    assert waited.count(requests) == 40 - requests + 1  # until nothing is left to ask for


def test_both_decodings_are_under_way_together_with_the_same_users(heldout):
    generator, played, files, _ = heldout(8, 2, [1.0, 0.0], common_random_numbers=True)
    for temperature, trajectories in played.items():
        assert [(t.goal.id, t.sample) for t in trajectories] == [(f"g{n}", k) for n in range(40) for k in (0, 1)]
        assert {t.rewards["tse"] for t in trajectories} == {temperature}
        assert len(read_trajectories(files[temperature])) == 80
    assert [t.seed for t in played[1.0]] == [t.seed for t in played[0.0]]
    assert len({t.seed for t in played[1.0]}) == 80  # common random numbers are for training alone
    first, second = (engine.asked for engine in generator.vllm_engines)
    asked = [(request.goal.id, request.limits.responder_temperature) for request in first[:4]]
    assert asked == [("g0", 1.0), ("g0", 0.0), ("g2", 1.0), ("g2", 0.0)]  # a goal stays where its prefix is cached
    assert {request.limits.probabilities for request in first + second} == {True}


def test_an_evaluation_leaves_the_next_rollout_as_it_was(heldout):
    generator, *_ = heldout(8, 1, [1.0])
    assert generator.state()["requests"] == 0
    heldout(8, 1, [1.0])  # the file of an earlier evaluation is replaced
    assert len(read_trajectories(generator.trajectories.parent / "1.0.jsonl")) == 40


def test_failures_count_where_dynamic_filtering_drops_them(monkeypatch, tmp_path):
    """A group in which all failed has no success: upstream's filter drops it, and would go through all goals."""
    generator = generator_of(tmp_path, max_failure_rate=0.5)

    def upstream(self, **generate_kwargs):
        for number in range(4):
            failed = Trajectory(Goal(f"g{number}", "refund", "", {"solve": 1.0}), 0, 0, error="OSError: down\n")
            self._process_response_into_experience(failed)
        return [], None, 4, True

    monkeypatch.setattr(SamplesGenerator, "generate_samples", upstream)
    with pytest.raises(DialogueError, match=r"4 of 4 dialogues failed.* \(4 times\): OSError: down"):
        generator.generate_samples()
    monkeypatch.setattr(SamplesGenerator, "generate_samples", lambda self, **_: ([], None, 0, True))
    generator.generate_samples()  # the next batch begins anew


def test_the_share_of_groups_that_dynamic_filtering_kept(monkeypatch, tmp_path):
    """Upstream's figure is 100 * 2 dialogues / 8 goals."""
    kept = [object(), object()]  # one group of two dialogues
    monkeypatch.setattr(GOPOSamplesGenerator, "_generate_vllm", lambda self, *_, **__: (kept, 8, True))
    assert generator_of(tmp_path, of_each=2).generate_samples() == (kept, 1 / 8, 8, True)


def test_training_has_common_random_numbers(tmp_path):
    engine = Engine()
    generator = generator_of(tmp_path, engines=[engine], common_random_numbers=True)
    generator._dispatch_prompts_to_vllm(["g"], [Goal("g", "refund", "", {"solve": 1.0})], temperature=0.9)
    (request,) = engine.asked
    assert len({request.dialogue_seed(sample) for sample in range(4)}) == 1
    assert (request.limits.expert_temperature, request.limits.probabilities) == (0.9, False)


@pytest.mark.parametrize(("evaluating", "size"), [(False, 4), (True, None)])
def test_reply_groups_are_for_training_alone(tmp_path, evaluating, size):
    generator = generator_of(tmp_path)
    limits = replace(generator.spec.limits, reply_group=ReplyGroup(4, {"gre": 1.0}))
    generator.spec = replace(generator.spec, limits=limits)
    group = generator._limits(1.0, probabilities=evaluating).reply_group
    assert (group and group.size) == size
