"""``python -m openrlhf_gopo.cli.sop``: check an SOP, draw it, walk it.

Exit status: 0 without findings, 1 with findings, 2 when there is nothing to check.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from openrlhf_gopo.cli.sop_walk import walk
from openrlhf_gopo.cli.terminal import say
from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.errors import ConfigError, GopoError
from openrlhf_gopo.sop import Procedure, Sop, load_sop
from openrlhf_gopo.sop.check import LIMIT, Finding, Report, check, unoffered
from openrlhf_gopo.sop.graph import draw, write_graph
from openrlhf_gopo.sop.schema import json_schema


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="python -m openrlhf_gopo.cli.sop", description=__doc__)
    parser.add_argument(
        "sop", nargs="?", metavar="FILE|ENV", help="an SOP file (.yaml), or as --gopo.env of train_gopo"
    )
    parser.add_argument("--data", default=None, help="as --gopo.data of train_gopo")
    parser.add_argument("--part", default=None, metavar="INTENT", help="one part only; default: all of them")
    parser.add_argument(
        "--graph", type=Path, metavar="OUT", help="draw it: .svg, .png or .pdf; .dot, .gv without Graphviz"
    )
    parser.add_argument("--walk", action="store_true", help="choose strategies and tell facts, turn by turn")
    parser.add_argument("--limit", type=int, default=LIMIT, help="states to visit before the checker gives up")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of SOP files and stop")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Check, and draw or walk where asked to."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.schema:
        say(json.dumps(json_schema(), indent=2))
        return
    if args.sop is None:
        parser.error("name an SOP file or an environment, or --schema")
    try:
        clean = _run(args)
    except GopoError as error:
        say(f"sop: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    raise SystemExit(0 if clean else 1)


def _run(args: argparse.Namespace) -> bool:
    if args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: give a number of states of 1 or more")
    procedures = _procedures(args.sop, args.data)
    parts = {
        part: (procedure, sop)
        for name, procedure in procedures.items()
        for part, sop in (procedure.parts() or {name: procedure.sop}).items()
    }
    if args.part is not None and args.part not in parts:
        raise ConfigError(f"--part {args.part}: no such part; choose one of {', '.join(parts)}")
    chosen = {name: sop for name, (_, sop) in parts.items() if args.part in (None, name)}
    if args.walk and len(chosen) > 1:
        raise ConfigError(f"--walk: walk one of several; add --part with one of {', '.join(parts)}")
    findings = []
    for name, procedure in procedures.items():
        findings += _report(name, procedure, [sop for part, sop in chosen.items() if parts[part][0] is procedure], args)
    if args.graph:
        write_graph(draw(chosen), args.graph)
        say(f"graph -> {args.graph}")
    if args.walk:
        [(part, sop)] = chosen.items()
        walk(sop, parts[part][0].strategies, sys.stdin, sys.stdout)
    return not findings


def _procedures(name: str, data: str | None) -> Mapping[str, Procedure]:
    if name.endswith((".yaml", ".yml")):
        if data is not None:
            raise ConfigError(f"--data {data}: an SOP file needs none; leave it out")
        procedure = load_sop(name)
        return {procedure.sop.name: procedure}
    found = load_environment(name, data).procedures()
    if not found:
        raise ConfigError(
            f"{name}: this environment shows no SOP: override its method procedures, or name a .yaml file"
        )
    return found


def _report(name: str, procedure: Procedure, chosen: list[Sop], args: argparse.Namespace) -> list[Finding]:
    """Check the ``chosen`` parts of a procedure and print what was found."""
    if not chosen:
        return []
    where = f" ({procedure.file})" if procedure.file else ""
    say(f"{name}{where}: {len(procedure.strategies)} strategies, {len(procedure.sop.parts)} parts")
    findings = [] if args.part else list(unoffered(procedure.sop))
    notes: list[Finding] = []
    for sop in chosen:
        report = check(sop, procedure.strategies, limit=args.limit)
        say(f"  {sop.name}: {_verdict(sop, report, args.limit)}")
        findings += report.findings
        found = {finding.kind for finding in report.findings}
        unanswered = check(sop, procedure.strategies, answered=False, limit=args.limit)
        notes += [finding for finding in unanswered.findings if finding.kind not in found]
    for finding in findings:
        say(_line(procedure, finding))
    for finding in notes:
        say(f"note, if questions stay unanswered: {_line(procedure, finding)}")
    return findings


def _verdict(sop: Sop, report: Report, limit: int) -> str:
    ends = f"ends with {', '.join(sop.terminal)}" if sop.terminal else "no terminal strategy"
    count = len(report.findings)
    verdict = f"{count} finding{'s' * (count != 1)}" if count else "no findings"
    if not report.complete:
        verdict += f", but the search stopped at {limit} states and may have missed some; raise --limit"
    return f"{len(sop.strategies)} strategies, {len(sop.rules)} rules, {ends}: {verdict}"


def _line(procedure: Procedure, finding: Finding) -> str:
    place = procedure.locate(finding.where)
    also = f" (the other rule: {procedure.locate(finding.also)})" if place and finding.also else ""
    return f"{place}{': ' if place else ''}{finding.kind}: {finding.message}{also}"


if __name__ == "__main__":
    main()
