"""Walking an SOP by hand: what is allowed now, why the rest is not, and what a choice or a fact changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from openrlhf_gopo.cli.terminal import say
from openrlhf_gopo.sop import Sop
from openrlhf_gopo.types import Strategy

HELP = "number or id: use the strategy; +fact: the fact becomes known; q: stop"


def walk(sop: Sop, catalogue: Iterable[Strategy], source: TextIO, out: TextIO) -> None:
    """Read one command a line from ``source`` until a terminal strategy, ``q`` or the end of the input."""
    entries = {strategy.id: strategy for strategy in catalogue}
    known = {fact for rule in sop.rules for fact in (*rule.requires_facts, *rule.without_facts)}
    names = sorted(known.union(sop.facts, *(entry.asks for entry in entries.values())))
    history: list[str] = []
    facts: set[str] = set()
    say(HELP, file=out)
    shown = None
    while True:
        if shown != (len(history), len(facts)):
            _show(sop, entries, history, facts, out)
            shown = (len(history), len(facts))
        say("> ", end="", file=out, flush=True)
        line = source.readline()
        words = line.split()
        if not line or words == ["q"]:
            break
        if words and all(word.startswith("+") for word in words):
            _tell(words, names, facts, out)
            continue
        choice = _choice(line.strip(), sop.allowed(history, facts))
        if choice not in sop.strategies:
            say(f"{choice!r}: {HELP}" if choice else HELP, file=out)
        elif (reason := sop.why_not(choice, history, facts)) is not None:
            say(f"{choice} {reason}", file=out)
        else:
            history.append(choice)
            asks = entries[choice].asks if choice in entries else ()
            say(f"used {choice}" + (f"; it asks: +{' +'.join(asks)} gives the answer" if asks else ""), file=out)
            if choice in sop.terminal:
                break
    say(f"\nThe walk: {', '.join(history) or 'nothing'}. Facts: {', '.join(sorted(facts)) or 'none'}.", file=out)


def _choice(word: str, allowed: tuple[str, ...]) -> str:
    number = int(word) if word.isdecimal() and word not in allowed else 0
    return allowed[number - 1] if 0 < number <= len(allowed) else word


def _tell(words: list[str], names: list[str], facts: set[str], out: TextIO) -> None:
    for fact in (word[1:] for word in words):
        if fact in names:
            facts.add(fact)
            say(f"{fact} is known", file=out)
        else:
            say(f"+{fact}: no rule looks at such a fact; choose from {', '.join(names) or 'none'}", file=out)


def _show(sop: Sop, entries: dict[str, Strategy], history: list[str], facts: set[str], out: TextIO) -> None:
    allowed = sop.allowed(history, facts)
    say(f"\nturn {len(history) + 1}, facts: {', '.join(sorted(facts)) or 'none'}", file=out)
    if not sop.free(history, facts):
        say("dead end: the rules forbid everything; only ending the dialogue is left", file=out)
    for number, strategy in enumerate(allowed, 1):
        say(f"  {number:2} {strategy}: {entries[strategy].description if strategy in entries else ''}", file=out)
    for strategy in sop.strategies:
        if strategy not in allowed:
            say(f"   - {strategy} {sop.why_not(strategy, history, facts)}", file=out)
