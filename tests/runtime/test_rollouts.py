"""Batches made ahead: never too far, in order, with where the data stood. Dialogues are scripted, engines are none."""

import threading
import time
from types import SimpleNamespace

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

from openrlhf_gopo import platform

platform.activate()

from openrlhf_gopo.config import GopoConfig  # noqa: E402
from openrlhf_gopo.envs import load_environment  # noqa: E402
from openrlhf_gopo.errors import DialogueError  # noqa: E402
from openrlhf_gopo.evaluation.records import append_trajectory  # noqa: E402
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play  # noqa: E402
from openrlhf_gopo.runtime.restarts import Restarts  # noqa: E402
from openrlhf_gopo.runtime.rollout_metrics import rollout_metrics  # noqa: E402
from openrlhf_gopo.runtime.rollouts import Rollouts, RolloutsAhead  # noqa: E402
from openrlhf_gopo.runtime.samples import DialogueSample  # noqa: E402
from openrlhf_gopo.runtime.samples_generator import GoalDataset, GOPOSamplesGenerator  # noqa: E402

WEIGHTS = {"expert": {"tse": 1.0}, "responder": {"gre": 1.0}}


class Scripted(GOPOSamplesGenerator):
    """The generator with a script where it would ask Ray."""

    def __init__(self, folder, goals, passes=2, queue=1, fail_at=None):
        self.env = load_environment("shop")
        dataset = GoalDataset(self.env.goals("train")[:goals])
        loader = StatefulDataLoader(dataset, 1, shuffle=True, collate_fn=GoalDataset.collate_fn)
        args = SimpleNamespace(
            rollout=SimpleNamespace(batch_size=2, n_samples_per_prompt=1, temperature=1.0),
            train=SimpleNamespace(num_episodes=passes, async_queue_size=queue),
        )
        spec = SimpleNamespace(seed=0, config=GopoConfig(env="shop"), reward_weights=WEIGHTS)
        strategy = SimpleNamespace(args=args)
        super().__init__(
            strategy, loader, None, None, [], expert_engines=None, restarts=Restarts({}), spec=spec, folder=folder
        )
        self.fail_at, self.log = fail_at, []

    def generate_samples(self, **_):
        self._rollouts += 1
        if self._rollouts == self.fail_at:
            raise DialogueError("3 of 4 dialogues failed")
        self.log.append(("begin", self._rollouts, self.version))
        if getattr(self, "_dataloader_iter", None) is None:
            self._dataloader_iter = iter(self.prompts_dataloader)
        goals = [goals[0] for _, (_, _, goals, _) in zip(range(2), self._dataloader_iter, strict=False)]
        samples = []
        for goal in goals:
            trajectory = play(self.env, goal, 0, self._rollouts, ScriptedPolicy(0.7))
            for turn in trajectory.turns:
                turn.version = self.version
            append_trajectory(self.trajectories, trajectory)
            trajectory.streams = {}
            samples.append(DialogueSample(trajectory, {}, {}))
        if len(goals) < 2:
            self._dataloader_iter = None
        return samples, None, len(goals), len(goals) < 2


def goals_of(batch):
    return [sample.trajectory.goal.id for sample in batch.samples]


@pytest.mark.parametrize("kind", [Rollouts, RolloutsAhead])
def test_all_batches_of_all_passes_in_order(tmp_path, kind):
    generator = Scripted(tmp_path, goals=7)
    batches = list(kind(generator, 0, 0))
    assert len(batches) == 6  # three whole batches a pass; the seventh goal is dropped
    assert [batch.consumed for batch in batches] == [2, 4, 6, 9, 11, 13]
    assert [batch.episode for batch in batches] == [0, 0, 0, 1, 1, 1]
    assert [batch.snapshot.samples["rollouts"] for batch in batches] == [1, 2, 3, 5, 6, 7]
    assert len({goal for batch in batches[:3] for goal in goals_of(batch)}) == 6


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_more_than_the_queue_is_made_ahead(tmp_path, size):
    generator = Scripted(tmp_path, goals=40, passes=1, queue=size)
    for step, batch in enumerate(RolloutsAhead(generator, 0, 0)):
        deadline = time.time() + 20  # learning: the thread has time to go as far as it may, and no further
        while step < 5 and generator.log[-1][1] < step + 1 + size and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        begun = generator.log[-1][1]
        assert begun == step + 1 + size if step < 5 else begun <= step + 1 + size
        generator.version = step + 1
        ages = {step - turn.version for sample in batch.samples for turn in sample.trajectory.turns}
        assert max(ages) <= size
    assert step == 19


def test_what_the_thread_raises_arrives_after_the_batches_before_it(tmp_path):
    generator = Scripted(tmp_path, goals=40, fail_at=4)
    batches = iter(RolloutsAhead(generator, 0, 0))
    assert [next(batches).snapshot.samples["rollouts"] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DialogueError, match="3 of 4 dialogues failed"):
        next(batches)


def test_a_trainer_that_fails_ends_the_thread(tmp_path):
    generator = Scripted(tmp_path, goals=40)
    batches = iter(RolloutsAhead(generator, 0, 0))
    next(batches)
    batches.close()  # what leaving the loop by an exception does
    deadline = time.time() + 10
    while any(thread.name == "gopo-rollouts" for thread in threading.enumerate()):
        assert time.time() < deadline, "the thread goes on"
        time.sleep(0.01)
    assert len(generator.log) <= 3


@pytest.mark.parametrize("kind", [Rollouts, RolloutsAhead])
def test_from_a_batchs_snapshot_the_next_batch_is_made_again(tmp_path, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    generator = Scripted(tmp_path / "a", goals=8, passes=1)
    batches = list(kind(generator, 0, 0))
    at = batches[1]
    again = Scripted(tmp_path / "b", goals=8, passes=1)
    again.prompts_dataloader.load_state_dict(at.snapshot.loader)
    again.restore(at.snapshot.samples, at.snapshot.buffered)
    later = list(kind(again, at.episode, at.consumed))
    assert [goals_of(batch) for batch in later] == [goals_of(batch) for batch in batches[2:]]
    log = (tmp_path / "a" / "trajectories.jsonl").read_bytes()
    assert log[: at.snapshot.logs["trajectories.jsonl"]].count(b"\n") == 4


def test_staleness_counts_the_updates_of_each_role(tmp_path):
    """Versions 1 and 3 at step 4, the roles taking turns: the expert learns at 0 and 2, the responder at 1 and 3."""
    env = load_environment("shop")
    samples = []
    for index, goal in enumerate(env.goals("train")[:2]):
        trajectory = play(env, goal, 0, 0, ScriptedPolicy(1.0))
        trajectory.streams = {role: SimpleNamespace(tokens=[1, 2]) for role in WEIGHTS}
        for turn in trajectory.turns:
            turn.version = 1 if index == 0 else 3
        samples.append(DialogueSample(trajectory, {}, {}))
    first, second = (len(sample.trajectory.turns) for sample in samples)
    found = rollout_metrics(samples, GopoConfig(env="shop", schedule="alternate"), 30, 4)
    assert found["expert/staleness_max"] == 1.0  # step 2
    assert found["responder/staleness_max"] == 2.0  # steps 1 and 3
    assert found["expert/staleness"] == pytest.approx(first / (first + second))
    assert found["responder/staleness"] == pytest.approx((2 * first + second) / (first + second))
    assert found["rollout/mixed_versions"] == 0.0
    shared = rollout_metrics(samples, GopoConfig(env="shop", schedule="alternate", sharing="shared"), 30, 4)
    assert shared["expert/staleness_max"] == shared["responder/staleness_max"] == 3.0  # one model, that of every step
    samples[0].trajectory.turns[-1].version = 2
    assert rollout_metrics(samples, GopoConfig(env="shop"), 30, 4)["rollout/mixed_versions"] == 0.5


def test_what_reply_groups_offered(tmp_path):
    """Turns with (0.5, 1, 0), best 1 above mean 0.5; (0.2, 0.2), alike; and one that drew a single reply."""
    env = load_environment("shop")
    goal = env.goals("train")[0]
    trajectory = play(env, goal, 0, 0, ScriptedPolicy(1.0))
    trajectory.streams = {role: SimpleNamespace(tokens=[1, 2]) for role in WEIGHTS}
    samples = [DialogueSample(trajectory, {}, {})]
    assert not any("reply_" in name for name in rollout_metrics(samples, GopoConfig(env="shop"), 30, 4))
    trajectory.turns[0].reply_group, trajectory.turns[1].reply_group = (0.5, 1.0, 0.0), (0.2, 0.2)
    found = rollout_metrics(samples, GopoConfig(env="shop", reply_group=3), 30, 4)
    assert found["rollout/reply_best_of_n"] == pytest.approx(0.25)
    assert found["rollout/reply_spread"] == 0.5
