"""An SOP as a graph: strategies are boxes, the order that the rules demand are arrows.

A solid arrow: the second comes after the first. Dashed: after at least one of those with a dashed arrow. Red with a
bar: the first forbids the second. A double frame is terminal, a bold one mandatory. Facts and limits stand in the box.
Where a rule names more than ``FEW`` others, the box says so instead of arrows to everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import graphviz

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.sop.rules import Rule, Sop

FEW = 8
SOURCES = (".dot", ".gv")
PICTURES = (".svg", ".png", ".pdf")
# field of a rule -> how its arrows look
_ARROWS = {
    "after": {},
    "after_any": {"style": "dashed"},
    "not_after": {"color": "red", "arrowhead": "tee", "constraint": "false"},
}
_WORDS = {"after": "after all of", "after_any": "after any of", "not_after": "not after"}


def draw(parts: Mapping[str, Sop]) -> graphviz.Digraph:
    """The graph of several SOPs, each in a frame of its own with its name from ``parts``."""
    graph = graphviz.Digraph(
        graph_attr={"rankdir": "LR"}, node_attr={"shape": "box", "fontname": "Helvetica", "fontsize": "11"}
    )
    for part, sop in parts.items():
        with graph.subgraph(name=f"cluster_{part}") as frame:
            frame.attr(label=graphviz.escape(part), fontname="Helvetica", color="gray")
            for strategy in sop.strategies:
                _add(frame, part, sop, strategy)
    return graph


def write_graph(graph: graphviz.Digraph, path: Path) -> None:
    """Write a picture (``dot`` must be installed) or, for .dot and .gv, Graphviz's source (needs nothing).

    Raises:
        ConfigError: another suffix, a path that cannot be written, or no program ``dot``.
    """
    suffix = path.suffix.lower()
    if suffix not in (*SOURCES, *PICTURES):
        raise ConfigError(f"--graph {path}: choose a name that ends in {', '.join((*PICTURES, *SOURCES))}")
    try:
        picture = graph.source.encode() if suffix in SOURCES else graph.pipe(format=suffix[1:])
        path.write_bytes(picture)
    except graphviz.ExecutableNotFound as error:
        remedy = (
            f"install Graphviz (apt install graphviz, brew install graphviz), or --graph {path.with_suffix('.dot')}"
        )
        raise ConfigError(
            f"--graph {path}: the program dot, which draws pictures, is not on the PATH; {remedy}"
        ) from error
    except OSError as error:
        raise ConfigError(f"--graph {path}: cannot be written: {error.strerror or error}") from error


def _add(frame: graphviz.Digraph, part: str, sop: Sop, strategy: str) -> None:
    rules = [rule for rule in sop.rules if rule.strategy == strategy]
    ending = strategy in sop.terminal
    look = {"peripheries": "2"} if ending else {"style": "bold"} if strategy in sop.mandatory else {}
    notes = [note for rule in rules for note in _notes(rule)]
    frame.node(_node(part, strategy), label=graphviz.escape("\n".join([strategy, *notes])), **look)
    for rule in (*rules, Rule(strategy, after=sop.mandatory if ending else ())):
        for field, arrow in _ARROWS.items():
            for other in _few(getattr(rule, field)):
                frame.edge(_node(part, other), _node(part, strategy), **arrow)


def _notes(rule: Rule) -> list[str]:
    notes = [f"needs fact: {', '.join(rule.requires_facts)}"] if rule.requires_facts else []
    notes += [f"until known: {', '.join(rule.without_facts)}"] if rule.without_facts else []
    notes += [f"at most {rule.max_uses}x"] if rule.max_uses is not None else []
    notes += ["not twice in a row"] if rule.no_repeat else []
    many = {field: len(getattr(rule, field)) for field in _ARROWS if not _few(getattr(rule, field))}
    return notes + [f"{_WORDS[field]} {count} others" for field, count in many.items() if count]


def _few(names: Sequence[str]) -> Sequence[str]:
    return names if len(names) <= FEW else ()


def _node(part: str, strategy: str) -> str:
    # Not "part:strategy": in a name, Graphviz takes what follows a colon for a port.
    return f"{part}/{strategy}".replace(":", "_")
