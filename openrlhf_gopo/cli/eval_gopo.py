"""``python -m openrlhf.cli.eval_gopo``: any number of policies on the same held-out goals with the same users.

    python -m openrlhf.cli.eval_gopo --gopo.env shop --out runs/eval --gopo.eval_goals 200 \\
        --policy before=pair:runs/quickstart/warm_expert,runs/quickstart/warm_responder \\
        --policy after=pair:runs/quickstart/expert,runs/quickstart/responder --policy random

Every dialogue is kept as it ends: the same command again goes on where it stopped. The first policy is what the others
are compared with, sampled with sampled and greedy with greedy. Flags have the names and meanings that they have in
train_gopo.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from openrlhf_gopo import platform
from openrlhf_gopo.config import GopoConfig, JudgeConfig, LlmConfig, flags
from openrlhf_gopo.errors import ConfigError, GopoError
from openrlhf_gopo.evaluation import contenders
from openrlhf_gopo.evaluation.endpoint import Prices
from openrlhf_gopo.flag import add_flags

if TYPE_CHECKING:
    from openrlhf_gopo.runtime.evaluation import Evaluation

# Of train_gopo's flags, those that an evaluation has a use for.
GOPO = (
    *("env", "data", "user", "max_turns", "reply_max_tokens", "labels", "names_only", "expert_mode"),
    *("expert_plan_tokens", "user_timeout", "attempts", "eval_goals", "worker_logs", "reward", "reward_timeout"),
)
UPSTREAM = (
    *("data.max_len", "eval.n_samples_per_prompt", "rollout.top_p", "train.seed"),
    *("train.full_determinism_enable", "vllm.num_engines", "vllm.tensor_parallel_size"),
    *("vllm.gpu_memory_utilization", "vllm.enable_prefix_caching", "vllm.enforce_eager", "ds.param_dtype"),
)
AT_LEAST_ONE = (
    *("concurrency", "round_goals", "eval.n_samples_per_prompt", "data.max_len"),
    *("vllm.num_engines", "vllm.tensor_parallel_size"),
)
# What changes the dialogues: an evaluation goes on only where all of it is as before.
FIXED = (
    *("gopo.env", "gopo.data", "gopo.user", "gopo.max_turns", "gopo.reply_max_tokens", "gopo.labels"),
    *("gopo.names_only", "gopo.expert_mode", "gopo.expert_plan_tokens", "data.max_len"),
    *("gopo.llm.temperature", "gopo.llm.max_new_tokens", "gopo.llm.extra_body", "gopo.reward"),
    *("rollout.top_p", "train.seed", "ds.param_dtype"),
)
JUDGED = ("temperature", "max_new_tokens", "extra_body", "rubric")  # the same, with --gopo.reward judge:


def build_parser(upstream: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of an evaluation; those of train_gopo are taken from their own definitions."""
    parser = argparse.ArgumentParser(
        prog="python -m openrlhf.cli.eval_gopo",
        description=__doc__,
        epilog=contenders.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--policy", action="append", default=[], metavar="[NAME=]SPEC", help="repeatable, and described at the end"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the dialogues and of the report")
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout", help="whose goals")
    parser.add_argument("--concurrency", type=int, default=64, help="dialogues under way at once")
    parser.add_argument("--price", metavar="PROMPT,COMPLETION", help="of a million tokens of endpoint policies")
    parser.add_argument(
        "--temperatures",
        default="1,0",
        help="every local model and vote is played at each; 0 is greedy, of a vote the most voted for",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=0,
        help="times that a case memory plays training goals, sampled at 1, and adds the dialogues, before it is "
        "evaluated",
    )
    parser.add_argument("--round_goals", type=int, default=64, help="training goals of a round, one dialogue each")
    add_flags(parser, GopoConfig, "gopo", GOPO)
    add_flags(parser, LlmConfig, LlmConfig.prefix)
    add_flags(parser, JudgeConfig, JudgeConfig.prefix)
    for action in upstream._actions:
        if action.dest in UPSTREAM:
            parser._add_action(action)
    parser.set_defaults(**{"eval.n_samples_per_prompt": 1, "vllm.num_engines": 1})
    platform.adapt_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Play, compare, report. Every expected error is one line; status 1: a policy had to be left out, 2: all had."""
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    argv = sys.argv[1:] if argv is None else argv
    try:
        from openrlhf_gopo.runtime.upstream.cli import UpstreamCli

        flat = vars(build_parser(UpstreamCli.load().parser).parse_args(argv))
        temperatures = contenders.parse_temperatures(flat["temperatures"])
        found = contenders.decoded(contenders.parse_contenders(flat["policy"]), temperatures)
        given = {f.name: flat[f"gopo.{f.name}"] for f in flags(GopoConfig) if f"gopo.{f.name}" in flat}
        llm = LlmConfig(**{f.name: flat[f"gopo.llm.{f.name}"] for f in flags(LlmConfig)})
        judge = JudgeConfig(**{f.name: flat[f"gopo.judge.{f.name}"] for f in flags(JudgeConfig)})
        config = GopoConfig(**given, llm=llm, judge=judge)
        for name in AT_LEAST_ONE:
            if flat[name] < 1:
                raise ConfigError(f"--{name} {flat[name]}: give 1 or more")
        if flat["rounds"] < 0:
            raise ConfigError(f"--rounds {flat['rounds']}: give 0 or more")
        platform.activate()  # before transformers is imported
        if any(contender.models for contender in found):
            platform.forks.start()
        from openrlhf_gopo.runtime.evaluation import Evaluation

        evaluation = Evaluation(_nested(flat), config, found, flat["out"], flat["split"], _fixed(flat))
        status = _report(flat["out"], evaluation, _prices(flat["price"]))
    except (GopoError, OSError) as error:  # --out is a file, or the disk is full
        print(f"eval_gopo: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if status:
        raise SystemExit(status)


def _fixed(flat: dict[str, Any]) -> dict[str, Any]:
    """What is kept beside the dialogues; of what may hold a key, or is a file, a digest."""
    fixed = {name: flat[name] for name in FIXED}
    if "judge:" in (flat["gopo.reward"] or ""):  # its scores are kept with the dialogues
        from openrlhf_gopo.rewards.judge import read_rubric

        fixed |= {f"gopo.judge.{name}": flat[f"gopo.judge.{name}"] for name in JUDGED}
        rubric = flat["gopo.judge.rubric"]
        fixed["gopo.judge.rubric"] = f"{rubric} ({_digest(read_rubric(rubric).encode())})"
    for name in ("gopo.llm.extra_body", "gopo.judge.extra_body"):
        if fixed.get(name):
            fixed[name] = _digest(fixed[name].encode())
    return fixed


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _nested(flat: dict[str, Any]) -> SimpleNamespace:
    """Upstream's flags as its classes read them: ``vllm.num_engines`` is ``args.vllm.num_engines``."""
    own = {name: flat[name] for name in ("concurrency", "rounds", "round_goals")}
    args = SimpleNamespace(**own, vllm=SimpleNamespace(enable_sleep=False))
    for name in UPSTREAM:
        group, _, leaf = name.partition(".")
        setattr(args, group, getattr(args, group, SimpleNamespace()))
        setattr(getattr(args, group), leaf, flat[name])
    return args


def _prices(text: str | None) -> Prices | None:
    if text is None:
        return None
    try:
        prompt, completion = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"--price {text}: give two numbers, of prompt and completion tokens, as in 2.5,10") from None
    return Prices(prompt, completion)


def _report(out: Path, evaluation: Evaluation, prices: Prices | None) -> int:
    """Play all, then write the report; the command's exit status."""
    from rich.console import Console

    from openrlhf_gopo.evaluation.decoding import named
    from openrlhf_gopo.evaluation.report import write_results
    from openrlhf_gopo.evaluation.tables import write_text

    rows, left_out = evaluation.run()
    phases, compared = named(rows)
    for name, why in left_out.items():
        print(f"eval_gopo: {name} left out: {why}", file=sys.stderr)
    if phases:
        written = write_results(out, phases, compared=compared)
        written["costs"] = write_text(out / "costs.md", evaluation.costs(phases, prices))
        console = Console(soft_wrap=True)
        console.print(written["table"].read_text(encoding="utf-8"), markup=False)
        for name, path in written.items():
            console.print(f"{name:>16}  {path}", markup=False)
    return (1 if phases else 2) if left_out else 0


if __name__ == "__main__":
    main()
