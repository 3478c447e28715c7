"""``python -m openrlhf.cli.train_gopo``: OpenRLHF's ``train_ppo_ray`` with two policies and the GOPO objective.

All of upstream's flags and their validation are upstream's own. ``--expert.*`` mirrors ``--actor.*`` (the responder)
and takes its value where it is not given; ``--gopo.*`` is this project's.
"""

from __future__ import annotations

import argparse
import copy
import logging
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn

from openrlhf_gopo import platform
from openrlhf_gopo.config import (
    GopoConfig,
    JudgeConfig,
    LlmConfig,
    PreferenceConfig,
    from_flags,
)
from openrlhf_gopo.errors import ConfigError, GopoError
from openrlhf_gopo.flag import add_flags
from openrlhf_gopo.platform import forks
from openrlhf_gopo.platform.imports import uncollected
from openrlhf_gopo.platform.media import hide_what_cuda_builds_break

if TYPE_CHECKING:
    from openrlhf_gopo.evaluation.decoding import Rows

SECTIONS = {
    "gopo": "this project's: environment, rollout, rewards, evaluation",
    "gopo.pref": "the expert's trajectory-level preference loss",
    "gopo.llm": "the endpoint of --gopo.user llm:MODEL@URL",
    "gopo.judge": "the endpoint of --gopo.reward judge:MODEL@URL, and its rubric",
    "expert": "the expert; every flag defaults to the value of --actor.*",
    "actor": "the responder (OpenRLHF's actor)",
    "ref": "reference models, one per role",
    "critic": "the responder's critic (--algo.advantage.estimator gae)",
    "reward": "upstream's reward flags",
    "rollout": "rollout",
    "vllm": "vLLM engines",
    "train": "training",
    "algo": "advantages and KL",
    "data": "data",
    "eval": "evaluation on held-out goals",
    "ckpt": "checkpoints and saved models",
    "ds": "DeepSpeed",
    "logger": "loggers",
}
# Upstream's flags that the environment replaces; an existing script may still carry them. The URL of a remote reward is
# not replaced, see _take_remote_reward.
REPLACED = (
    "train.agent_func_path",
    "data.prompt_dataset",
    "eval.dataset",
    "reward.remote_url",
    "reward.model_name_or_path",
)

COUNTS = (
    *("rollout.batch_size", "rollout.micro_batch_size", "train.batch_size", "train.micro_batch_size"),
    *("train.max_epochs", "train.num_episodes", "data.max_samples", "eval.n_samples_per_prompt"),
    *("vllm.tensor_parallel_size", "ds.tensor_parallel_size"),
)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line: the usage of 200 flags would bury them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.rpartition('.')[2]}: error: {message}; --help lists the flags\n")


def build_parser(upstream: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Upstream's flags, ``--expert.*`` and ``--gopo.*``, grouped by their first word for ``--help``."""
    parser = Parser(
        prog="python -m openrlhf.cli.train_gopo",
        description="Train a two-level dialogue policy with GOPO on OpenRLHF (Ray + DeepSpeed + vLLM).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    groups = {name: parser.add_argument_group(f"{name}.*", text) for name, text in SECTIONS.items()}
    other = parser.add_argument_group("other")
    prefixes = {PreferenceConfig: "gopo.pref", LlmConfig: LlmConfig.prefix, JudgeConfig: JudgeConfig.prefix}
    for cls, prefix in {GopoConfig: "gopo", **prefixes}.items():
        add_flags(groups[prefix], cls, prefix)
    for action in upstream._actions:
        if action.dest == "help":
            continue
        groups.get(action.dest.split(".")[0], other)._add_action(action)
        if action.dest.startswith("actor."):
            groups["expert"]._add_action(_mirrored(action))
    return parser


def _mirrored(action: argparse.Action) -> argparse.Action:
    """The ``--expert.*`` twin of an ``--actor.*`` flag; absent from the namespace unless given."""
    twin = copy.copy(action)
    twin.option_strings = [o.replace("--actor.", "--expert.", 1) for o in action.option_strings]
    twin.dest = action.dest.replace("actor.", "expert.", 1)
    twin.default = argparse.SUPPRESS
    twin.help = "default: the value of " + action.option_strings[0]
    return twin


def parse(argv: list[str]) -> tuple[SimpleNamespace, GopoConfig]:
    """Flags to upstream's nested namespace (with ``args.expert``) and this project's config.

    Raises:
        ConfigError: a value or combination that cannot work.
        SystemExit: argparse's own errors and --help.
    """
    from openrlhf_gopo.runtime.upstream.cli import UpstreamCli

    upstream = UpstreamCli.load()
    parser = build_parser(upstream.parser)
    platform.adapt_flags(parser)
    flat = vars(parser.parse_args(argv))
    _take_remote_reward(flat)
    config = from_flags(flat)
    expert = {k.removeprefix("expert."): v for k, v in flat.items() if k.startswith("expert.")}
    replaced = [name for name in REPLACED if flat.get(name)]
    for name in replaced:
        print(f"--{name} {flat[name]}: replaced by --gopo.env {config.env}", file=sys.stderr)
    own = {k: v for k, v in flat.items() if not k.startswith(("expert.", "gopo."))}
    _check_counts(own)
    # Rewards come from the environment, in the rollout; upstream's name for that is an agent.
    own |= dict.fromkeys(REPLACED) | {"reward.remote_url": "agent"}
    args = upstream.validate(argparse.Namespace(**own))
    args.expert = _expert_args(args.actor, expert, config)
    if platform.is_cpu():
        platform.check_flags(args)
    return args, config


def _check_counts(flat: dict) -> None:
    """Numbers of upstream's flags that it divides by or loops over, and does not look at itself."""
    for name in COUNTS:
        if flat[name] < 1:
            raise ConfigError(f"--{name} {flat[name]}: give 1 or more")
    for name in ("eval.steps", "ckpt.save_steps"):
        if flat[name] < 1 and flat[name] != -1:
            raise ConfigError(f"--{name} {flat[name]}: give 1 or more, or -1 for never")
    share = flat["vllm.gpu_memory_utilization"]
    if not 0 < share <= 1:
        raise ConfigError(f"--vllm.gpu_memory_utilization {share}: give a share of the GPU's memory, in (0, 1]")


def _take_remote_reward(flat: dict) -> None:
    """``--reward.remote_url http://A,http://B`` becomes ``--gopo.reward remote:http://A,remote:http://B``."""
    given = flat["reward.remote_url"] or ""
    if not given.startswith(("http://", "https://")):
        return
    flat["reward.remote_url"] = None
    servers = (f"remote:{url.strip()}" for url in given.split(","))
    flat["gopo.reward"] = ",".join(filter(None, (flat["gopo.reward"], *servers)))
    if not re.search(r"\bremote\s*=", f"{flat['gopo.expert_reward']},{flat['gopo.responder_reward']}"):
        print(
            "--reward.remote_url: measured and logged as the metric remote, but nobody's reward; add it to "
            "--gopo.expert_reward or --gopo.responder_reward, as in remote=1",
            file=sys.stderr,
        )


def _expert_args(actor: SimpleNamespace, given: dict, config: GopoConfig) -> SimpleNamespace:
    """``args.actor`` with the given ``--expert.*`` values on top."""
    expert = copy.deepcopy(actor)
    for name, value in given.items():
        node = expert
        *parents, leaf = name.split(".")
        for parent in parents:
            node = getattr(node, parent)
        if config.policy == "single_level":
            raise ConfigError(f"--expert.{name} {value}: --gopo.policy single_level has no expert; drop it")
        if config.sharing == "shared" and getattr(node, leaf) != value:
            raise ConfigError(
                f"--expert.{name} {value}: contradicts --gopo.sharing shared, where both roles are the actor's model "
                f"(--actor.{name} {getattr(node, leaf)}); drop it, or use --gopo.sharing separate"
            )
        setattr(node, leaf, value)
    if "eps_clip" in given and "eps_clip_low_high" not in given:
        expert.eps_clip_low_high = (expert.eps_clip, expert.eps_clip)
    return expert


def main(argv: list[str] | None = None) -> None:
    """Parse, check, train, report. Every expected error is one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    from openrlhf_gopo.runtime.upstream.contract import check_upstream

    try:
        check_upstream(platform.is_cpu)
        args, config = parse(argv)
        platform.activate()  # before transformers is imported
        _run(args, config)
    except GopoError as error:
        print(f"train_gopo: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _run(args: SimpleNamespace, config: GopoConfig) -> None:
    started = time.time()
    if config.dry_run:  # for GPUs, on a machine without one, where activate() did nothing
        hide_what_cuda_builds_break()
    from openrlhf_gopo.runtime import budgets, checks

    checks.check_flags(args, config)
    if not config.dry_run:
        forks.start()
    from openrlhf_gopo.runtime.requests import build_policy, policy_spec

    env, policy = build_policy(policy_spec(args, config))
    budgets.check_dialogues(args, config, env, policy)
    results = Path(config.results_dir or Path(args.ckpt.output_dir) / "results")
    if config.dry_run:
        from openrlhf_gopo.runtime.dry_run import describe

        print(describe(args, config, env, policy))
        return
    results.mkdir(parents=True, exist_ok=True)
    with uncollected():
        from openrlhf_gopo.runtime import launch

    rows = launch.train(args, config, results)
    _report(args, config, results, rows, time.time() - started)


def _report(args: SimpleNamespace, config: GopoConfig, results: Path, rows: Rows, seconds: float) -> None:
    """The last screen: what happened, and where things are."""
    from rich.console import Console

    from openrlhf_gopo.evaluation.curves import write_learning_curves
    from openrlhf_gopo.evaluation.decoding import named
    from openrlhf_gopo.evaluation.report import write_results

    metrics = results / "metrics.jsonl"
    if rows:
        phases, compared = named(rows)
        written = write_results(results, phases, metrics, compared)
    else:  # no --eval.steps, nothing to compare
        written = {"learning_curves": write_learning_curves(metrics, results / "learning_curves.png")}
    console = Console(soft_wrap=True)
    console.rule(f"GOPO on {config.env}: done in {seconds / 60:.1f} min")
    if "table" in written:
        console.print(written["table"].read_text(encoding="utf-8"), markup=False)
    roles = config.roles if config.own_expert else ("responder",)
    written |= {"trajectories": results / "trajectories.jsonl", "metrics": metrics}
    for name, path in ({role: Path(args.ckpt.output_dir) / role for role in roles} | written).items():
        console.print(f"{name:>16}  {path}", markup=False)


if __name__ == "__main__":
    main()
