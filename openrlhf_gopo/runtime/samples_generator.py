"""Upstream's sample generator over goals instead of prompts: one request per goal, K dialogues at once."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.trainer.ray.vllm_engine import batch_vllm_engine_call
from torch.utils.data import Dataset
from tqdm import tqdm

from openrlhf_gopo.config import GopoConfig
from openrlhf_gopo.errors import DialogueError
from openrlhf_gopo.evaluation.records import append_trajectory
from openrlhf_gopo.rewards.custom import RewardSpec
from openrlhf_gopo.rollout.sampled import TokenLimits
from openrlhf_gopo.runtime.requests import DialogueRequest, PolicySpec
from openrlhf_gopo.runtime.restarts import Restarts
from openrlhf_gopo.runtime.samples import DialogueSample
from openrlhf_gopo.types import Goal, Trajectory


class GoalDataset(Dataset):
    """Goals in the shape of upstream's prompt data: (datasource, prompt, label, image)."""

    def __init__(self, goals: Sequence[Goal]) -> None:
        self.goals = goals

    def __len__(self) -> int:
        return len(self.goals)

    def __getitem__(self, index: int) -> Goal:
        return self.goals[index]

    @staticmethod
    def collate_fn(goals: list[Goal]) -> tuple[list, list, list, list]:
        """Lists of intents, goal ids, goals, and no images."""
        return [g.intent for g in goals], [g.id for g in goals], list(goals), [None] * len(goals)


@dataclass(frozen=True)
class RolloutSpec:
    """Everything about a dialogue but its goal and its temperature."""

    policy: PolicySpec
    limits: TokenLimits
    reward_weights: Mapping[str, Mapping[str, float]]
    config: GopoConfig
    seed: int


class GOPOSamplesGenerator(SamplesGenerator):
    """Plays dialogues in the rollout actors of the responder and writes each to ``trajectories`` as it arrives."""

    def __init__(
        self,
        *args: Any,
        expert_engines: list | None,
        restarts: Restarts,
        spec: RolloutSpec,
        folder: Path,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.expert_engines, self.restarts, self.spec = expert_engines, restarts, spec
        self.trajectories = folder / "trajectories.jsonl"
        self._requests = self._rollouts = 0
        self._places: dict[str, int] = {}
        self._causes: list[str | None] = []  # of every dialogue played for a batch: why it failed, None if it did not
        self._seed = spec.seed
        self.version = 0  # updates that the engines' weights have had; the trainer counts

    def generate_samples(self, **generate_kwargs: Any) -> tuple[list[DialogueSample], float | None, int, bool]:
        """One training batch; users differ from one batch to the next, reproducibly.

        Returns:
            The batch's dialogues; with dynamic filtering the share of groups that it kept, else None; how many goals
            were used; True when no goal is left.

        Raises:
            DialogueError: more dialogues failed than --gopo.max_failure_rate allows.
        """
        self._rollouts += 1
        self._seed, self._causes = self.spec.seed + self._rollouts, []
        self.restarts.await_started()
        self._call(self.expert_engines, "wake_up")
        samples, rate, consumed, exhausted = super().generate_samples(**generate_kwargs)
        self._call(self.expert_engines, "sleep")
        self._check_failures()
        if rate is not None:  # upstream's is dialogues kept per 100 goals
            rate /= 100 * self.args.rollout.n_samples_per_prompt
        return samples, rate, consumed, exhausted

    def evaluate(self, files: Mapping[float, Path], samples: int) -> dict[float, list[Trajectory]]:
        """All held-out goals, ``samples`` dialogues each, at every temperature of ``files``; they go to its file.

        The users are the same every time and at every temperature; the expert's probabilities are asked for. Dialogues
        of all temperatures are under way together, as many as in a rollout.

        Returns:
            The dialogues by temperature, in the order of the goals.
        """
        self._seed = self.spec.seed
        for path in files.values():
            path.unlink(missing_ok=True)
        self.restarts.await_started()
        self._call(self.vllm_engines, "wake_up")
        self._call(self.expert_engines, "wake_up")
        try:
            with self._mending():
                return self._heldout(files, samples)
        finally:
            self._call(self.vllm_engines, "sleep")
            self._call(self.expert_engines, "sleep")

    def _heldout(self, files: Mapping[float, Path], samples: int) -> dict[float, list[Trajectory]]:
        goals = self.eval_dataloader.dataset.goals
        todo = deque((place, temperature) for place in range(len(goals)) for temperature in files)
        at_once = max(self.args.rollout.batch_size * self.args.rollout.n_samples_per_prompt // samples, 1)
        under_way: dict[Any, tuple[int, float]] = {}
        found: dict[tuple[int, float], list[Trajectory]] = {}
        with tqdm(total=len(todo), desc="Evaluate", unit="group", dynamic_ncols=True) as bar:
            while todo or under_way:
                while todo and len(under_way) < at_once:
                    place, temperature = todo.popleft()
                    limits = self._limits(temperature, probabilities=True)
                    under_way[self._ask(goals[place], place, limits, samples)] = place, temperature
                for ref in ray.wait(list(under_way), num_returns=1)[0]:
                    place, temperature = under_way.pop(ref)
                    found[place, temperature] = ray.get(ref)
                    for trajectory in found[place, temperature]:
                        append_trajectory(files[temperature], trajectory)
                    bar.update()
        return {one: [t for place in range(len(goals)) for t in found[place, one]] for one in files}

    def state(self) -> dict[str, Any]:
        """Where seeds and data stand, for a checkpoint; ``buffered`` holds the rest."""
        drained = getattr(self, "_dataloader_iter", None) is None
        return {"rollouts": self._rollouts, "requests": self._requests, "drained": drained}

    @property
    def buffered(self) -> list[Trajectory]:
        """Dialogues that were played and not yet trained on (--rollout.vllm_generate_batch_size)."""
        return [sample.trajectory for sample in getattr(self, "_sample_buffer", [])]

    def restore(self, state: Mapping[str, Any], buffered: Sequence[Trajectory]) -> None:
        """Go on from ``state``; the data loader has its own state back already."""
        self._rollouts, self._requests = state["rollouts"], state["requests"]
        self._sample_buffer = [DialogueSample.of(t, self.spec.reward_weights) for t in buffered]
        self._dataloader_iter = None if state["drained"] else iter(self.prompts_dataloader)

    def _generate_vllm(
        self, dataloader_iter: Any, num_prompts: int, *args: Any, **kwargs: Any
    ) -> tuple[list[DialogueSample], int, bool]:
        """Upstream's, whose groups come as they finish, in the order of their goals: a rerun is then the same run."""
        self._places = {}
        with self._mending():
            samples, consumed, exhausted = super()._generate_vllm(dataloader_iter, num_prompts, *args, **kwargs)
        return sorted(samples, key=lambda s: self._places[s.trajectory.goal.id]), consumed, exhausted

    def _dispatch_prompts_to_vllm(
        self, prompts: list[str], labels: list[Goal], *, images: list | None = None, **generate_kwargs: Any
    ) -> list:
        limits, refs = self._limits(generate_kwargs.get("temperature", 1.0), probabilities=False), []
        for goal in labels:
            turn, self._requests = self._requests, self._requests + 1
            self._places.setdefault(goal.id, turn)
            refs.append(self._ask(goal, turn, limits, self.args.rollout.n_samples_per_prompt))
        return refs

    def _limits(self, temperature: float, *, probabilities: bool) -> TokenLimits:
        return replace(
            self.spec.limits,
            expert_temperature=temperature,
            responder_temperature=temperature,
            probabilities=probabilities,
            reply_group=None if probabilities else self.spec.limits.reply_group,
        )

    def _ask(self, goal: Goal, turn: int, limits: TokenLimits, samples: int) -> Any:
        """Ray's reference to ``samples`` dialogues about ``goal``; ``turn`` picks one engine of each role.

        A goal stays on one engine per role: its dialogues share the cached prefix.
        """
        config, experts = self.spec.config, self.expert_engines
        request = DialogueRequest(
            goal=goal,
            spec=self.spec.policy,
            limits=limits,
            seed=self._seed,
            # An evaluation's dialogues of one goal are averaged, not compared with each other.
            common_random_numbers=config.common_random_numbers and not limits.probabilities,
            attempts=config.attempts,
            rewards=RewardSpec.of(config),
            deterministic=self.args.train.full_determinism_enable,
            version=self.version,
            per_turn=self.args.train.partial_rollout_enable and config.version_switch == "turn",
            expert_engine=experts[turn % len(experts)] if experts else None,
        )
        return self.vllm_engines[turn % len(self.vllm_engines)].generate_responses.remote(
            prompt=goal.id,
            label=request,
            sampling_params=None,
            max_length=limits.max_len,
            hf_tokenizer=None,
            num_samples=samples,
        )

    def _process_response_into_experience(self, response: Trajectory, **generate_kwargs: Any) -> DialogueSample:
        append_trajectory(self.trajectories, response)
        sample = DialogueSample.of(response, self.spec.reward_weights)
        self._causes.append((response.cause or "unknown") if sample.quarantined else None)
        return sample

    def _check_failures(self) -> None:
        """Over all that was played: dynamic filtering drops groups, and first of all those that failed."""
        causes, played = [cause for cause in self._causes if cause is not None], len(self._causes)
        if played and len(causes) / played > self.spec.config.max_failure_rate:
            cause, times = Counter(causes).most_common(1)[0]
            raise DialogueError(
                f"{len(causes)} of {played} dialogues failed, more than --gopo.max_failure_rate "
                f"{self.spec.config.max_failure_rate}; the commonest cause ({times} times): {cause}; tracebacks are in "
                f"{self.trajectories}"
            )

    def _mending(self) -> AbstractContextManager[None]:
        """Around dialogues while no policy learns: engines that are started again get the weights of now."""
        return nullcontext() if self.args.train.async_enable else self.restarts.mending()

    def _call(self, engines: list | None, method: str) -> None:
        """Wake ``engines`` or put them to sleep, where --vllm.enable_sleep lets them sleep at all."""
        if self.args.vllm.enable_sleep and engines:
            batch_vllm_engine_call(engines, method)
