"""The samples generator's share of upstream's loop; whole rollouts are in tests/e2e."""

from types import SimpleNamespace

import pytest

pytest.importorskip("openrlhf")

from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from openrlhf_gopo.runtime.restarts import Restarts
from openrlhf_gopo.runtime.samples_generator import GOPOSamplesGenerator

pytestmark = pytest.mark.stack


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
    args = SimpleNamespace(
        rollout=SimpleNamespace(batch_size=4, n_samples_per_prompt=of_each),
        vllm=SimpleNamespace(enable_sleep=False),
        train=SimpleNamespace(async_enable=False),
    )
    options = {"expert_engines": None, "restarts": Restarts({}), "spec": SimpleNamespace(seed=7), "folder": tmp_path}
    generator = GOPOSamplesGenerator(SimpleNamespace(args=args), [], [], None, [], **options)
    generator.generate_eval_samples(**flags)
    assert asked == [(goals, False, flags)]
