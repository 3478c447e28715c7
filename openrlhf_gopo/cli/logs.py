"""``python -m openrlhf_gopo.cli.logs``: a company's own dialogues, checked, converted and scored.

The format is one JSON object per line, documented in ``openrlhf_gopo/logs/schema.py``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from openrlhf_gopo.cli.terminal import say
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import ConfigError, GopoError
from openrlhf_gopo.evaluation.report import table_text
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.logs import Dialogue, read, scored, validate
from openrlhf_gopo.logs.check import SHOWN, fits
from openrlhf_gopo.logs.convert import SOURCES, convert


def build_parser() -> argparse.ArgumentParser:
    """The command's verbs and their flags."""
    parser = argparse.ArgumentParser(prog="python -m openrlhf_gopo.cli.logs", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    checks = verbs.add_parser("validate", help="check every line; exit status 1 when there are problems")
    checks.add_argument("file", type=Path)
    checks.add_argument("--env", default=None, help="also check intents and strategies; as --gopo.env of train_gopo")
    checks.add_argument("--data", default=None, help="as --gopo.data of train_gopo")
    checks.add_argument("--limit", type=int, default=SHOWN, help="problems told one by one; the rest are counted")
    checks.set_defaults(run=_validate)

    converts = verbs.add_parser("convert", help="write a published data set in this format")
    converts.add_argument("source", choices=sorted(SOURCES))
    converts.add_argument("folder", type=Path, help="clone of the data set's repository")
    converts.add_argument("--out", type=Path, required=True, help="the .jsonl file to write")
    converts.add_argument(
        "--played", action="store_true", help="play the agents' strategies through the environment of that name"
    )
    converts.set_defaults(run=_convert)

    scores = verbs.add_parser("score", help="print the metrics of the logged dialogues: the human rows of a comparison")
    scores.add_argument("file", type=Path)
    scores.set_defaults(run=_score)

    schema = verbs.add_parser("schema", help="print the JSON schema of one line")
    schema.set_defaults(run=_schema)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one verb; exit status 1 means problems in the file, 2 that the command could not run."""
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
    except (GopoError, OSError) as error:
        say(f"logs: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if status:
        raise SystemExit(status)


def _validate(args: argparse.Namespace) -> int:
    if args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: give at least 1")
    if args.data is not None and args.env is None:
        raise ConfigError(f"--data {args.data}: goes with --env; name the environment that reads it")
    check = fits(load_environment(args.env, args.data)) if args.env else None
    report = validate(args.file, check, args.limit, progress=True)
    for problem in report.problems:
        say(problem)
    if report.found > len(report.problems):
        say(f"... and {report.found - len(report.problems)} more")
    say(
        f"{args.file}: {report.dialogues} good dialogues with {report.turns} turns, {report.found} problems. "
        f"Turns without a strategy: {report.unlabelled}; without engagement or a known event: {report.neutral}."
    )
    return int(report.found > 0)


def _convert(args: argparse.Namespace) -> int:
    logging.basicConfig(format="%(message)s")
    dialogues = convert(args.source, args.folder, args.out, through_env=args.played)
    say(f"{dialogues} dialogues of {args.source} -> {args.out}")
    return 0


def _score(args: argparse.Namespace) -> int:
    say(table_text({args.file.stem: summarise(scored(dialogue) for _, dialogue in read(args.file))}), end="")
    say("\nLogs have no grades of strategies and no expected strings: ESNDCG, realised and GRE are not measured.")
    return 0


def _schema(args: argparse.Namespace) -> int:
    say(json.dumps(Dialogue.model_json_schema(), indent=2))
    return 0


if __name__ == "__main__":
    main()
