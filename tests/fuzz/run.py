"""Fuzzing: ``python tests/fuzz/run.py --inputs 1000000`` from the root of the repository.

Every input must give a result, or one of our errors with a message that names file or flag: no other exception, no
more than 2 seconds of CPU, no growth of memory, no control token out of a text, no markup out of a text. Findings are
printed once per place that raised, with the input in ``--findings``; the exit status is 1 when there are any.
``--target`` picks targets, ``--seed`` repeats a run. With ``--atheris`` (and atheris installed) coverage guides the
bytes of the one ``--target`` that is given.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

with contextlib.ExitStack() as _stack:
    if "--atheris" in sys.argv:
        import atheris

        _stack.enter_context(atheris.instrument_imports(include=["openrlhf_gopo"], enable_loader_override=False))
    from fuzz_streams import LITERALS
    from kit import SCRATCH, Target
    from mutate import Mutator
    from targets import TARGETS

CPU_SECONDS = 2.0
MEMORY = 256 * 1024  # KiB that one input may add to the largest memory so far


class Hang(BaseException):
    """An input that takes longer than ``CPU_SECONDS``."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="part of a target's name; default: all")
    parser.add_argument("--findings", type=Path, default=None, help="folder for the inputs that found something")
    parser.add_argument("--atheris", action="store_true")
    args = parser.parse_args(argv)
    chosen = [t for t in TARGETS if not args.target or any(part in t.name for part in args.target)]
    if not chosen:
        parser.error(f"--target {args.target}: choose from {', '.join(t.name for t in TARGETS)}")
    signal.signal(signal.SIGPROF, _hang)
    try:
        if args.atheris:
            return _guided(chosen[0], args.inputs, args.findings)
        return _mutated(chosen, args.inputs, args.seed, args.findings)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)


def _hang(*_: Any) -> None:
    raise Hang(f"more than {CPU_SECONDS} s of CPU")


def _mutated(chosen: list[Target], inputs: int, seed: int, findings: Path | None) -> int:
    total, found = sum(t.share for t in chosen), Counter[str]()
    started, done = time.time(), 0
    for target in chosen:
        count = max(1, round(inputs * target.share / total))
        began, accepted = time.process_time(), 0
        for number in range(count):
            given = target.make(Mutator(random.Random(f"{seed}/{target.name}/{number}"), LITERALS))
            problem, text, good = _tried(target, given)
            accepted += good
            if problem:
                found[problem] += 1
                if found[problem] == 1:
                    _tell(target, number, given, f"{problem}: {text}", findings)
        done += count
        spent = time.process_time() - began
        print(f"{target.name:36} {count:8} inputs, {accepted:8} accepted, {spent:7.1f} s CPU", flush=True)
    print(f"{done} inputs in {time.time() - started:.0f} s, {len(found)} findings ({sum(found.values())} inputs)")
    return 1 if found else 0


def _tried(target: Target, given: Any) -> tuple[str, str, bool]:
    """Where it went wrong ("" for nothing), with which message, and whether the input was accepted."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        good = target.try_one(given)
    except (Exception, Hang) as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        return _place(error), f"{error!s:.300}", False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return ("memory grew" if grown > MEMORY else ""), f"by {grown} KiB", good


def _place(error: BaseException) -> str:
    """Kind of error and the innermost line of the package or of a target, so that one fault is told once."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _told(Path(f.filename))]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else "?"
    return f"{type(error).__name__} at {where}"


def _told(file: Path) -> bool:
    return "openrlhf_gopo" in file.parts or file.name.startswith(("kit", "fuzz_"))


def _tell(target: Target, number: int, given: Any, problem: str, findings: Path | None) -> None:
    print(f"FINDING {target.name} #{number}: {problem}\n    input {given!r:.400}", flush=True)
    if findings is not None:
        findings.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "_" for c in target.name)
        (findings / f"{name}_{number}.txt").write_text(f"{problem}\n{given!r}\n", errors="backslashreplace")


def _guided(target: Target, inputs: int, findings: Path | None) -> int:
    """libFuzzer's search for new paths; it stops at the first finding."""
    sample = target.make(Mutator(random.Random(0), LITERALS))

    def one(data: bytes) -> None:
        given: Any = data
        if isinstance(sample, str):
            given = data.decode("utf-8", "surrogateescape")
        elif isinstance(sample, tuple):
            given = (sample[0], data) if isinstance(sample[1], bytes) else sample
        target.try_one(given)

    corpus = SCRATCH / "corpus"
    corpus.mkdir()
    for number in range(200):
        made = target.make(Mutator(random.Random(number), LITERALS))
        data = (
            made if isinstance(made, bytes) else made[1] if isinstance(made, tuple) else made.encode("utf-8", "replace")
        )
        (corpus / str(number)).write_bytes(data)
    keep = []
    if findings is not None:
        findings.mkdir(parents=True, exist_ok=True)
        keep = [f"-artifact_prefix={findings}/"]
    atheris.Setup([sys.argv[0], f"-runs={inputs}", "-timeout=5", "-rss_limit_mb=4096", *keep, str(corpus)], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
