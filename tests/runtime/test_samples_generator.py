"""The samples generator's share of upstream's loop; whole rollouts are in tests/e2e."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("openrlhf")

from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from openrlhf_gopo.config import GopoConfig
from openrlhf_gopo.errors import DialogueError
from openrlhf_gopo.rollout.sampled import ReplyGroup, TokenLimits
from openrlhf_gopo.runtime.restarts import Restarts
from openrlhf_gopo.runtime.samples_generator import GOPOSamplesGenerator, RolloutSpec
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


@pytest.mark.parametrize(
    ("of_each", "flags", "goals"),
    [
        (8, {}, 4),  # training
        (8, {"n_samples_per_prompt": 1}, 32),  # an evaluation has 32 dialogues in flight too
        (8, {"n_samples_per_prompt": 3}, 8),  # 24 of at most 32
        (2, {"n_samples_per_prompt": 4}, 4),  # never fewer goals than upstream
    ],
)
def test_an_evaluation_keeps_as_many_dialogues_in_flight_as_training(monkeypatch, tmp_path, of_each, flags, goals):
    asked = []

    def upstream(self, dataloader_iter, num_prompts, dynamic_filtering, **generate_kwargs):
        asked.append((num_prompts, dynamic_filtering, generate_kwargs))
        return [], 0, True

    monkeypatch.setattr(SamplesGenerator, "_generate_vllm", upstream)
    generator_of(tmp_path, of_each=of_each).generate_eval_samples(**flags)
    assert asked == [(goals, False, flags)]


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


@pytest.mark.parametrize(("flags", "common"), [({}, True), ({"probabilities": True}, False)])
def test_common_random_numbers_are_for_training_alone(tmp_path, flags, common):
    """What is averaged over the dialogues of a held-out goal needs customers of its own for each."""
    asked = []

    class Engine:
        class generate_responses:
            remote = staticmethod(lambda **call: asked.append(call["label"]))

    generator = generator_of(tmp_path, engines=[Engine], common_random_numbers=True)
    generator._dispatch_prompts_to_vllm(["g"], [Goal("g", "refund", "", {"solve": 1.0})], **flags)
    assert [request.common_random_numbers for request in asked] == [common]
    assert len({asked[0].dialogue_seed(sample) for sample in range(4)}) == (1 if common else 4)


@pytest.mark.parametrize(("flags", "size"), [({}, 4), ({"probabilities": True}, None)])
def test_reply_groups_are_for_training_alone(tmp_path, flags, size):
    asked = []

    class Engine:
        class generate_responses:
            remote = staticmethod(lambda **call: asked.append(call["label"]))

    generator = generator_of(tmp_path, engines=[Engine])
    limits = replace(generator.spec.limits, reply_group=ReplyGroup(4, {"gre": 1.0}))
    generator.spec = replace(generator.spec, limits=limits)
    generator._dispatch_prompts_to_vllm(["g"], [Goal("g", "refund", "", {"solve": 1.0})], **flags)
    group = asked[0].limits.reply_group
    assert (group and group.size) == size
