"""What models and the driver put into a checkpoint set is enough to go on as if nothing had happened."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from openrlhf_gopo import platform
from openrlhf_gopo.runtime.checkpoints.random_states import random_states, restore_random_states
from openrlhf_gopo.runtime.restarts import Restarts
from openrlhf_gopo.runtime.samples_generator import GoalDataset, GOPOSamplesGenerator
from openrlhf_gopo.types import Goal, StopReason, Trajectory

sys.path.insert(0, str(Path(__file__).parent))
import test_parallel

folder = test_parallel.folder  # its model and dialogues
SCRIPT = str(Path(__file__).with_name("checkpoint_script.py"))
FLAGS = {
    "--train.batch_size": "4",  # two optimizer steps of two micro-batches, in a drawn order
    "--train.micro_batch_size": "2",
    "--actor.adam.lr": "0.05",
    "--critic.adam.lr": "0.05",
    "--ckpt.max_num": "1",
    "--algo.advantage.estimator": "rloo",
    "--rollout.n_samples_per_prompt": "4",
}
CASES = {
    "zero2": FLAGS | {"--ds.zero_stage": "2"},
    "zero3": FLAGS | {"--ds.zero_stage": "3"},
    "lora": FLAGS | {"--ds.zero_stage": "2", "--ds.lora.rank": "4", "--ds.lora.dropout": "0.3"},
    "q": FLAGS | {"--ds.zero_stage": "3", "--gopo.sharing": "shared", "--gopo.expert_credit": "q=1"},
    "critic": FLAGS | {"--ds.zero_stage": "2", "--algo.advantage.estimator": "gae"},
}


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Any]:
    """By case: what checkpoint_script.py returns from two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_parallel, "SCRIPT", SCRIPT)
        patch.setattr(test_parallel, "DEADLINE", 900.0)
        test_parallel.launch(2, str(folder), json.dumps(CASES))
    return torch.load(folder / "ranks2.pt", weights_only=True)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_model_goes_on_to_the_last_bit(saved, case):
    """Weights, optimizer, scheduler, the order of samples, dropout's noise and what Q is fitted to: of the same draws,
    on two ranks."""
    result = saved[case]
    assert not equal(result["first"], result["second"])
    assert equal(result["at_start"], result["first"])
    assert result["draws"]
    assert equal(result["again"], result["second"])
    assert result["lr"][0] == result["lr"][1]


@pytest.mark.slow
@pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU")
@pytest.mark.parametrize("case", CASES)
def test_models_leave_old_folders_alone(saved, folder, case):
    """--ckpt.max_num is 1 here: upstream's own retention would have removed two of the three."""
    kind = "_critic" if case == "critic" else "_actor"
    left = {p.name for p in (folder / f"ckpt_{case}" / "responder" / kind).iterdir()}
    assert {"global_step1", "best_global_step1", "global_step1b"} <= left
    assert "latest" not in left


def test_random_states_come_back_through_a_safe_file(tmp_path):
    torch.save(random_states(), tmp_path / "states.pt")
    drawn = random.random(), np.random.rand(), torch.rand(3).tolist()
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == drawn


class Rollouts(GOPOSamplesGenerator):
    """The real generator over a real loader; instead of engines, dialogues are over at once."""

    def _generate_vllm(self, dataloader_iter, num_prompts, dynamic_filtering, **_options):
        goals, exhausted = [], False
        while len(goals) < num_prompts:
            try:
                goals += next(dataloader_iter)[2]
            except StopIteration:
                exhausted = True
                break
        played = [self._process_response_into_experience(Trajectory(g, 0, self._seed)) for g in goals]
        return played, len(goals), exhausted


def generator(folder: Path, goals: int, batch: int, drawn: int) -> Rollouts:
    args = SimpleNamespace(
        rollout=SimpleNamespace(batch_size=batch, n_samples_per_prompt=1, vllm_generate_batch_size=drawn),
        vllm=SimpleNamespace(enable_sleep=False),
        algo=SimpleNamespace(dynamic_filtering_enable=False),
    )
    spec = SimpleNamespace(seed=7, reward_weights={}, config=SimpleNamespace(max_failure_rate=1.0))
    data: Dataset = GoalDataset([Goal(str(n), "order", "", {"a": 1.0}) for n in range(goals)])
    loader = StatefulDataLoader(data, 1, shuffle=True, collate_fn=GoalDataset.collate_fn, drop_last=True)
    folder.mkdir(exist_ok=True)
    strategy = SimpleNamespace(args=args)
    return Rollouts(
        strategy, loader, None, None, [], expert_engines=None, restarts=Restarts({}), spec=spec, folder=folder
    )


def drawn(rollouts: Rollouts, calls: int) -> list:
    """Goals and user seeds of the next calls, and whether the pass was over."""
    results = []
    for _ in range(calls):
        samples, _, _, exhausted = rollouts.generate_samples()
        results.append(([(s.trajectory.goal.id, s.trajectory.seed) for s in samples], exhausted))
    return results


@pytest.mark.parametrize(("goals", "batch", "at_once"), [(8, 4, 4), (10, 4, 4), (8, 4, 6), (8, 2, 8), (9, 2, 5)])
@pytest.mark.parametrize("before", [1, 2, 3, 4, 5, 6])
def test_the_data_goes_on_where_it_was(tmp_path, goals, batch, at_once, before):
    """At every point of two passes, buffered dialogues included: what follows is what would have followed."""
    torch.manual_seed(5)
    whole = generator(tmp_path / "a", goals, batch, at_once)
    drawn(whole, before)
    loader, state, states = whole.prompts_dataloader.state_dict(), whole.state(), random_states()
    buffered = [Trajectory(t.goal, t.sample, t.seed, stop=StopReason(t.stop)) for t in whole.buffered]
    expected = drawn(whole, 8)
    torch.manual_seed(6)
    resumed = generator(tmp_path / "b", goals, batch, at_once)
    torch.save({"loader": loader, "random": states}, tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.prompts_dataloader.load_state_dict(kept["loader"])
    resumed.restore(json.loads(json.dumps(state)), buffered)
    restore_random_states(kept["random"])
    assert drawn(resumed, 8) == expected
