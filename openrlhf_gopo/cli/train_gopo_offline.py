"""``python -m openrlhf.cli.train_gopo_offline``: learn from logged dialogues, as OpenRLHF's ``train_dpo`` from pairs.

Launched like ``train_dpo``: ``deepspeed --module openrlhf.cli.train_gopo_offline`` on GPUs; plain ``python -m`` is one
process, with or without a GPU. Upstream's flags and their validation are those of its ``train_dpo``: ``--data.dataset``
is a file of logged dialogues (see ``cli.logs``), ``--eval.dataset`` a comma-separated list of them to judge by.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openrlhf_gopo import platform
from openrlhf_gopo.cli.train_gopo import Parser
from openrlhf_gopo.config import GopoConfig, PreferenceConfig, flags
from openrlhf_gopo.errors import ConfigError, GopoError
from openrlhf_gopo.flag import add_flags
from openrlhf_gopo.runtime.offline.config import OfflineConfig

SHARED = ("env", "data", "labels", "names_only", "results_dir")  # of train_gopo's --gopo.* flags
PREFERENCE = ("beta", "weights")
# train_dpo's flags that mean nothing here, and what to do instead.
DROPPED = {
    "model.beta": "use --gopo.pref.beta",
    "model.label_smoothing": "the preference loss has no such form; leave it out",
    "model.nll_loss_coef": "use --gopo.offline.sft_coef",
    "model.ipo_enable": "the preference loss has no such form; leave it out",
    "model.aux_loss_coef": "there is no such term; leave it out",
    "ref.model_name_or_path": "the reference is the model as the run begins; leave it out",
    "ref.offload": "no second model is kept: the reference's log-probabilities are computed once; leave it out",
    "ds.ring_attn_size": "decisions are not sliced over a ring; leave it out",
    "ds.ring_attn_head_stride": "decisions are not sliced over a ring; leave it out",
    "ds.tensor_parallel_size": "not supported here; leave it out, --ds.zero_stage 3 splits a model too",
    "data.dataloader_num_workers": "the logs are in memory; leave it out",
    "data.tokenizer_chat_template": "set chat_template in the model's tokenizer_config.json",
    **dict.fromkeys(
        ("data.dataset_probs", "data.dataset_split", "data.max_samples", "eval.split"),
        "--data.dataset is one file of logged dialogues; leave it out",
    ),
    **dict.fromkeys(
        ("data.prompt_key", "data.chosen_key", "data.rejected_key", "data.input_template", "data.apply_chat_template"),
        "logged dialogues have a schema of their own (cli.logs schema); leave it out",
    ),
}


def build_parser(upstream: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """train_dpo's flags but for those of ``DROPPED``, and ``--gopo.*``."""
    parser = Parser(
        prog="python -m openrlhf.cli.train_gopo_offline",
        description="Learn a dialogue policy from logged dialogues with GOPO on OpenRLHF (DeepSpeed).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_flags(parser.add_argument_group("gopo.*", "as in train_gopo"), GopoConfig, "gopo", SHARED)
    add_flags(parser.add_argument_group("gopo.offline.*", "what is learnt"), OfflineConfig, "gopo.offline")
    preference = parser.add_argument_group("gopo.pref.*", "the trajectory-level preference loss")
    add_flags(preference, PreferenceConfig, "gopo.pref", PREFERENCE)
    theirs = parser.add_argument_group("upstream's", "the flags of train_dpo")
    for action in upstream._actions:
        if action.dest != "help" and action.dest not in DROPPED:
            theirs._add_action(action)
    return parser


def parse(argv: list[str]) -> tuple[SimpleNamespace, dict[str, Any], OfflineConfig]:
    """Flags to upstream's nested namespace, the values of ``SHARED``, and the config of what is learnt.

    Raises:
        ConfigError: a value or combination that cannot work.
        SystemExit: argparse's own errors and --help.
    """
    from openrlhf_gopo.runtime.upstream.cli import UpstreamCli

    upstream = UpstreamCli.load(module="openrlhf.cli.train_dpo")
    for word in argv:
        name, _, value = word.partition("=")
        if name.removeprefix("--") in DROPPED:
            raise ConfigError(f"{name} {value}".rstrip() + f": {DROPPED[name.removeprefix('--')]}")
    defaults = upstream.parser
    parser = build_parser(upstream.parser)
    platform.adapt_flags(parser)
    flat = vars(parser.parse_args(argv))
    offline = {f.name: flat[f"gopo.offline.{f.name}"] for f in flags(OfflineConfig)}
    pref = PreferenceConfig(**{name: flat[f"gopo.pref.{name}"] for name in PREFERENCE})
    own = {name: value for name, value in flat.items() if not name.startswith("gopo.")}
    own |= {name: defaults.get_default(name) for name in DROPPED}
    args = upstream.validate(argparse.Namespace(**own))
    if platform.is_cpu():
        platform.check_flags(args)
    config = OfflineConfig(**offline, pref=pref)
    _check(args, config, flat["gopo.env"])
    return args, {name: flat[f"gopo.{name}"] for name in SHARED}, config


def _check(args: SimpleNamespace, config: OfflineConfig, env: str | None) -> None:
    """Flags that are needed, and batch arithmetic."""
    remedies = {
        "--gopo.env": (env, "name the environment whose strategies the logs use"),
        "--model.model_name_or_path": (args.model.model_name_or_path, "name the model that learns"),
        "--data.dataset": (args.data.dataset, "name a file of logged dialogues; cli.logs converts and checks them"),
    }
    for name, (value, remedy) in remedies.items():
        if not value:
            raise ConfigError(f"{name}: {remedy}")
    world, batch, micro = int(os.environ.get("WORLD_SIZE", "1")), args.train.batch_size, args.train.micro_batch_size
    for name, part in (("train.micro_batch_size", micro), ("gopo.offline.group_size", config.group_size)):
        if part < 1 or batch < 1 or batch % (part * world):
            raise ConfigError(
                f"--train.batch_size {batch}: no multiple of --{name} {part} times {world} processes; make it one"
            )
    names = [Path(path).stem for path in (args.eval.dataset or "").split(",")]
    if len(set(names)) < len(names):
        raise ConfigError(f"--eval.dataset {args.eval.dataset}: two files have one name; the tables need two")


def main(argv: list[str] | None = None) -> None:
    """Parse, check, train, judge. Every expected error is one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args, shared, config = parse(argv)
        platform.activate()  # before transformers is imported
        _run(args, shared, config)
    except GopoError as error:
        print(f"train_gopo_offline: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _run(args: SimpleNamespace, shared: dict[str, Any], config: OfflineConfig) -> None:
    from openrlhf_gopo.envs import load_environment
    from openrlhf_gopo.policy.two_level import TwoLevelPolicy
    from openrlhf_gopo.runtime.offline.data import Logs
    from openrlhf_gopo.runtime.requests import load_tokenizer

    env = load_environment(shared["env"], shared["data"])
    path = args.model.model_name_or_path
    tokenizer = load_tokenizer("--model.model_name_or_path", path, not args.data.disable_fast_tokenizer)
    policy = TwoLevelPolicy(tokenizer, tokenizer, env.catalogue_size(), shared["labels"], shared["names_only"])
    logs = Logs(env, policy, config, args.data.max_len)
    results = Path(shared["results_dir"] or Path(args.ckpt.output_dir) / "results")
    platform.one_process()
    from openrlhf_gopo.runtime.offline.launch import train

    train(args, config, logs, results)


if __name__ == "__main__":
    main()
