"""The HTML report: whatever a dialogue says, the markup is the page's own."""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from html.parser import HTMLParser
from typing import Any

from kit import SCRATCH, Target, Wrong

from openrlhf_gopo.evaluation.page import write_page
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.evaluation.tables import Table, slice_grid
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.blobs: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag, tuple(name for name, _ in attrs)] += 1
        self._inside = ("class", "blob") in attrs
        if self._inside:
            self.blobs.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags["/" + tag, ()] += 1
        self._inside = False

    def handle_comment(self, data: str) -> None:
        self.tags["!--", ()] += 1

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.blobs[-1] += data

    def dialogue(self) -> dict[str, Any]:
        """The one dialogue, as the page's script unpacks it."""
        _, chunk = self.blobs
        return json.loads(zlib.decompress(base64.b64decode(chunk)))[0]


def _page(texts: Sequence[str]) -> _Tags:
    intent, phase, words, persona = texts
    goal = Goal(words, intent, words, {"solve": 1.0}, {words: words}, {"mood": persona})
    turn = Turn(words, (words,), words, words, words, (words,), {words: 3}, {words: 0.5}, (words,), (), 0.5)
    told = Trajectory(goal, 0, 0, [turn], StopReason.CLOSED, rewards={"tse": 1.0}, error=words, user=words)
    page = _Tags()
    phases = {f"p{phase}": [told]}
    table = Table.of({name: summarise(dialogues) for name, dialogues in phases.items()})
    path = write_page(SCRATCH / "page.html", phases, table, slice_grid(phases), {})
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


@cache
def _plain_page() -> _Tags:
    return _page(("i", "p", "w", "m"))


def _report(texts: tuple[str, ...]) -> None:
    page = _page(texts)
    if page.tags != _plain_page().tags:
        raise Wrong(f"other markup: {page.tags - _plain_page().tags} {_plain_page().tags - page.tags}")
    told = page.dialogue()
    words, intent = (json.loads(json.dumps(text)) for text in (texts[2], texts[0]))  # JSON joins halves of a character
    if told["turns"][0]["reply"] != words or told["goal"]["intent"] != intent:
        raise Wrong(f"{texts!r} came back as {told!r:.500}")


TARGETS = (Target("report", 0.001, lambda m: tuple(m.text("w") for _ in range(4)), _report),)
