"""``python -m openrlhf_gopo.platform MODULE ARGS...``: run an upstream program as it is, on CPU, in one process.

For example SFT of a warm start: ``python -m openrlhf_gopo.platform openrlhf.cli.train_sft --model.model_name_or_path
...``. Its flags have this platform's defaults. With a GPU the program runs unchanged.
"""

from __future__ import annotations

import argparse
import functools
import runpy
import sys
from typing import Any

from openrlhf_gopo.platform import activate, adapt_flags, one_process


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise SystemExit("usage: python -m openrlhf_gopo.platform MODULE ARGS...")
    activate()
    one_process()
    _adapt_every_parser()
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _adapt_every_parser() -> None:
    """The program's parser stands under its ``__main__`` and cannot be had before it runs."""
    parse_args = argparse.ArgumentParser.parse_args

    @functools.wraps(parse_args)
    def adapted(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        adapt_flags(self)
        return parse_args(self, *args, **kwargs)

    argparse.ArgumentParser.parse_args = adapted  # type: ignore[method-assign]


if __name__ == "__main__":
    main(sys.argv[1:])
