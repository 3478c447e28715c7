"""Printing words that come from data: a customer's text may hold escape sequences, a terminal must not obey them."""

from __future__ import annotations

from typing import TextIO

from openrlhf_gopo.errors import visible


def say(text: str = "", *, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """``print`` of one text without controls (see ``visible``)."""
    print(visible(text), file=file, end=end, flush=flush)
