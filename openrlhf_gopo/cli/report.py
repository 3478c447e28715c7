"""``python -m openrlhf_gopo.cli.report NAME=FILE.jsonl ...``: compare policies by their recorded dialogues.

Each file holds the trajectories of one policy, as training (``results/eval``) and evaluation write them. The first
policy is what the others are compared with. Writes table.md, table.csv, slices.md, intervals.png and transcripts.html.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from openrlhf_gopo.errors import ConfigError, DataError, GopoError
from openrlhf_gopo.evaluation.records import read_trajectories
from openrlhf_gopo.evaluation.report import write_results
from openrlhf_gopo.types import Trajectory

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="python -m openrlhf_gopo.cli.report", description=__doc__)
    parser.add_argument("policies", nargs="+", metavar="NAME=FILE.jsonl", help="a policy's name and its trajectories")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; files of the same names are replaced")
    parser.add_argument("--metrics", type=Path, default=None, help="metrics.jsonl of a run: adds its learning curves")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read, compare, write; exit status 2 means that the command could not run."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="report: %(levelname)s: %(message)s")
    try:
        phases = _read(_named(args.policies))
        written = write_results(args.out, phases, args.metrics)
    except (GopoError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(written["table"].read_text(encoding="utf-8"))
    for name, path in written.items():
        print(f"{name:>16}  {path}")


def _named(policies: Sequence[str]) -> dict[str, Path]:
    """Files by policy name, in the order given."""
    files: dict[str, Path] = {}
    for given in policies:
        name, equals, file = given.partition("=")
        if not (name.strip() and equals and file):
            raise ConfigError(f"{given!r}: give a policy as NAME=FILE.jsonl")
        if name in files:
            raise ConfigError(f"{given!r}: {name!r} names {files[name]} already; give each policy a name of its own")
        files[name] = Path(file)
    return files


def _read(files: dict[str, Path]) -> dict[str, list[Trajectory]]:
    phases = {}
    for name, file in files.items():
        phases[name] = read_trajectories(file, torn="skip", streams=False)
        if not phases[name]:
            logger.warning("%s: no dialogues; %s has an empty row", file, name)
    if not any(phases.values()):
        raise DataError(
            f"{', '.join(map(str, files.values()))}: no dialogues; give files that a rollout has written to"
        )
    return phases


if __name__ == "__main__":
    main()
