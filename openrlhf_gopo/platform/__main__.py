"""``python -m openrlhf_gopo.platform MODULE ARGS...``: run an upstream program as it is, on CPU, in one process.

For example SFT of a warm start: ``python -m openrlhf_gopo.platform openrlhf.cli.train_sft
--ds.attn_implementation sdpa --model.model_name_or_path ...``. With a GPU the program runs unchanged.
"""

from __future__ import annotations

import runpy
import sys

from openrlhf_gopo.platform import activate, one_process


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise SystemExit("usage: python -m openrlhf_gopo.platform MODULE ARGS...")
    activate()
    one_process()
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
