"""Evaluations: contenders one after the other, their local models in OpenRLHF's vLLM rollout actors."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from tqdm import tqdm

from openrlhf_gopo.config import EXPERT, RESPONDER, GopoConfig
from openrlhf_gopo.endpoint import Endpoint
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import ConfigError, DataError, GopoError
from openrlhf_gopo.evaluation.case_bank import CaseBank
from openrlhf_gopo.evaluation.case_memory import CaseMemory
from openrlhf_gopo.evaluation.contenders import SCRIPTS, VOTES, Contender, Half
from openrlhf_gopo.evaluation.costs import add_usage, cost_table
from openrlhf_gopo.evaluation.decoding import decoding_name
from openrlhf_gopo.evaluation.endpoint import EndpointPolicy, Prices
from openrlhf_gopo.evaluation.human import logged
from openrlhf_gopo.evaluation.memento import CaseAdvice, CaseVote
from openrlhf_gopo.evaluation.records import read_trajectories
from openrlhf_gopo.evaluation.references import add_reference_scores
from openrlhf_gopo.evaluation.run import Job, evaluate
from openrlhf_gopo.evaluation.tables import write_text
from openrlhf_gopo.policy.two_level import SingleLevelPolicy, TwoLevelPolicy
from openrlhf_gopo.rewards.custom import RewardSpec, load_rewards
from openrlhf_gopo.rollout.agent import Advice, Halves, Policy
from openrlhf_gopo.rollout.dialogue import dialogue_seed
from openrlhf_gopo.rollout.sampled import SampledPolicy, TokenLimits
from openrlhf_gopo.runtime.budgets import check_budget
from openrlhf_gopo.runtime.engines import Engines
from openrlhf_gopo.runtime.requests import load_tokenizer
from openrlhf_gopo.types import Trajectory
from openrlhf_gopo.users import UserSpec


class Evaluation:
    """One run of ``cli.eval_gopo``: contenders on the same goals with the same users, a folder of dialogues each.

    Args:
        args: upstream's nested namespace with what ``cli.eval_gopo`` takes of it, ``concurrency``, ``rounds`` and
            ``round_goals``.
        contenders: with the temperature of each, see ``contenders.decoded``.
        fixed: flags and values that the dialogues depend on; kept beside them.

    Raises:
        ConfigError: no goals, or what ``load_environment`` raises.
    """

    def __init__(
        self,
        args: SimpleNamespace,
        config: GopoConfig,
        contenders: Sequence[Contender],
        out: Path,
        split: str,
        fixed: Mapping[str, Any],
    ) -> None:
        self.args, self.config, self.contenders = args, config, contenders
        self.out, self.fixed = out, fixed
        user = UserSpec(config.user, config.llm, config.user_timeout) if config.user else None
        self.env = load_environment(config.env, config.data, user)
        self.goals = list(self.env.goals(split))[: config.eval_goals]
        if not self.goals:
            raise ConfigError(f"--split {split}: the environment {config.env} has no such goals")
        self.rewards = load_rewards(RewardSpec.of(config))
        self.engines = Engines(args, max(len(contender.models) for contender in contenders))

    def costs(self, played: Mapping[str, Sequence[Trajectory]], prices: Prices | None) -> str:
        """What the rows needed, as a Markdown table."""
        folders = {contender.row: self._folder(contender) for contender in self.contenders}
        return cost_table({name: (trajectories, folders[name]) for name, trajectories in played.items()}, prices)

    def _policy_folder(self, contender: Contender) -> Path:
        return self.out / "policies" / contender.folder

    def _folder(self, contender: Contender) -> Path:
        """Of its dialogues: a policy that is played at several temperatures has one for each."""
        folder = self._policy_folder(contender)
        if contender.temperature is None:
            return folder
        return folder / decoding_name(contender.temperature).replace(" ", "_")

    def run(self) -> tuple[dict[tuple[str, float | None], list[Trajectory]], dict[str, str]]:
        """The scored dialogues of each contender by name and temperature, and by row why others have none."""
        played: dict[tuple[str, float | None], list[Trajectory]] = {}
        left_out: dict[str, str] = {}
        for contender in self.contenders:
            try:
                played[contender.name, contender.temperature] = self._dialogues(contender)
            except (GopoError, ray.exceptions.RayError) as error:
                left_out[contender.row] = str(error)
                self.engines.end()  # a dead one would fail the next policy, too
        self.engines.end()
        return played, left_out

    def _dialogues(self, contender: Contender) -> list[Trajectory]:
        """Played now or before.

        Raises:
            GopoError, RayError: the contender cannot be evaluated.
        """
        if contender.kind == "human":
            return logged(self.env, self.config.data, contender.file, self.goals)
        folder = self._policy_folder(contender)
        folder.mkdir(parents=True, exist_ok=True)
        self._check_settings(contender, folder / "settings.json")
        memory = self._memory(contender, folder)
        jobs = Job.of(self.goals, self.args.eval.n_samples_per_prompt, self.args.train.seed)
        trajectories = self._play(contender, memory, jobs, self._folder(contender))
        add_reference_scores(self.env, trajectories)
        return trajectories

    def _play(
        self, contender: Contender, memory: CaseMemory | CaseBank | None, jobs: Sequence[Job], folder: Path
    ) -> list[Trajectory]:
        """The dialogues of ``jobs``, which ``folder`` keeps."""
        folder.mkdir(parents=True, exist_ok=True)
        temperature = 1.0 if contender.temperature is None else contender.temperature  # None: nothing reads it
        limits = TokenLimits(
            max_len=self.args.data.max_len,
            max_turns=self.config.max_turns,
            reply_max_tokens=self.config.reply_max_tokens,
            user_timeout=self.config.user_timeout,
            expert_temperature=temperature,
            responder_temperature=temperature,
            responder_top_p=self.args.rollout.top_p,
            probabilities=True,
        )
        endpoints: list[Endpoint] = []
        played = evaluate(
            self.env,
            jobs,
            lambda: self._policy(contender, limits, memory, endpoints),
            limits,
            folder / "trajectories.jsonl",
            concurrency=self.args.concurrency,
            attempts=self.config.attempts,
            label=contender.row,
            rewards=self.rewards,
        )
        start = time.time()
        try:
            return asyncio.run(played)
        finally:
            add_usage(folder, endpoints, time.time() - start)

    def _policy(
        self,
        contender: Contender,
        limits: TokenLimits,
        memory: CaseMemory | CaseBank | None,
        endpoints: list[Endpoint],
    ) -> Policy:
        expert, responder = contender.expert, contender.responder
        advice = CaseAdvice(memory) if isinstance(memory, CaseBank) else None
        sampled = self._sampled(contender, limits, advice) if contender.models else None

        def half(of: Half) -> Policy:
            if of.kind == "model":
                return sampled
            if of.kind == "endpoint":
                return self._remote(of, advice if of is expert else None, endpoints)
            if of.kind in SCRIPTS:
                return of.script()
            return CaseVote(memory, by_q=of.kind == "vote_q", temperature=limits.expert_temperature)

        return half(expert) if expert == responder else Halves(half(expert), half(responder))

    def _remote(self, half: Half, advice: Advice | None, endpoints: list[Endpoint]) -> EndpointPolicy:
        llm = replace(self.config.llm, max_new_tokens=self.config.reply_max_tokens)
        endpoint = Endpoint.from_name("--policy", f"endpoint:{half.value}", llm)
        endpoints.append(endpoint)
        options = {"timeout": self.config.user_timeout, "seed": self.args.train.seed, "advice": advice}
        return EndpointPolicy(endpoint, names_only=self.config.names_only, **options)

    def _memory(self, contender: Contender, folder: Path) -> CaseMemory | CaseBank | None:
        """What an expert with cases acts on, frozen; None of others. It is kept in ``folder`` once it is whole.

        It begins with the training dialogues of its file. Then, ``--rounds`` times, it plays ``--round_goals`` training
        goals, sampled at temperature 1, and grows by them.

        Raises:
            DataError: the file has no case.
        """
        cases = contender.expert.cases
        if cases is None:
            return None
        kept, kind = folder / "cases.jsonl", CaseMemory if contender.expert.kind in VOTES else CaseBank
        if kept.exists():
            memory = kind.load(kept)
        else:
            memory = kind()
            for trajectory in tqdm(read_trajectories(cases, torn="skip", streams=False), desc="case memory"):
                memory.add(trajectory)
            if not len(memory):
                raise DataError(f"{cases}: no decision of a dialogue that did not fail; give training dialogues")
            learning = contender if contender.temperature is None else replace(contender, temperature=1.0)
            for number in range(self.args.rounds):
                memory.grow(self._play(learning, memory, self._round(number), folder / f"round_{number:03d}"))
            memory.save(kept)
        memory.frozen = True
        return memory

    def _round(self, number: int) -> list[Job]:
        """The training goals of a round, in an order of --train.seed; after the last the first, with new users."""
        goals, seed = list(self.env.goals("train")), self.args.train.seed
        random.Random(seed).shuffle(goals)
        places = range(number * self.args.round_goals, (number + 1) * self.args.round_goals)
        taken = [(goals[place % len(goals)], place // len(goals)) for place in places]
        return [Job(goal, sample, dialogue_seed(seed, goal, sample)) for goal, sample in taken]

    def _sampled(self, contender: Contender, limits: TokenLimits, advice: Advice | None) -> SampledPolicy:
        """The streams of local models; a half that is not local borrows the other's tokenizer, and is never used."""
        halves = {EXPERT: contender.expert, RESPONDER: contender.responder}
        local = {role: half.value for role, half in halves.items() if half.kind == "model"}
        tokenizers = {model: load_tokenizer("--policy", model) for model in contender.models}
        anyone = next(iter(local.values()))
        prompting = (SingleLevelPolicy if contender.kind == "single" else TwoLevelPolicy)(
            tokenizers[local.get(EXPERT, anyone)],
            tokenizers[local.get(RESPONDER, anyone)],
            self.env.catalogue_size(),
            self.config.labels,
            self.config.names_only,
            self.config.expert_plan_tokens if self.config.expert_mode == "plan" else 0,
        )
        check_budget(self.args, self.config, self.env, prompting, self.goals)
        self.engines.start(contender.models)
        generate = {role: self.engines.generate(model) for role, model in local.items()}
        return SampledPolicy(prompting, generate, limits, advice)

    def _check_settings(self, contender: Contender, path: Path) -> None:
        now = {"policy": contender.spec, **{f"--{name}": value for name, value in self.fixed.items()}}
        if contender.expert.cases is not None:
            now |= {"--rounds": self.args.rounds, "--round_goals": self.args.round_goals}
        now |= {f"weights of {model}": weights_digest(Path(model)) for model in contender.models}
        if not path.exists():
            write_text(path, json.dumps(now, indent=1) + "\n")
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); give another --out, or delete the folder") from error
        for name, value in now.items():
            if before.get(name) != value:
                raise ConfigError(
                    f"{path}: its dialogues were played with {name} {before.get(name)}, not {value}; give another "
                    "--out, or delete the folder"
                )


def weights_digest(model: Path) -> str | None:
    """Tells whether a folder's weights are what they were; None for a name on a hub, whose weights are not looked at.

    Of each file its name, its size and 256 blocks of 64 KiB: an optimizer step moves all of them.
    """
    files = sorted(p for p in model.glob("*") if p.suffix in (".safetensors", ".bin"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(size // 256, 1 << 16)):
                file.seek(offset)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16] if files else None
