"""``python -m openrlhf_gopo.platform MODULE ARGS...``: run an upstream program as it is, on CPU, in one process.

For example SFT of a warm start: ``python -m openrlhf_gopo.platform openrlhf.cli.train_sft
--ds.attn_implementation sdpa --model.model_name_or_path ...``. With a GPU the program runs unchanged.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys

from openrlhf_gopo.platform import activate


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise SystemExit("usage: python -m openrlhf_gopo.platform MODULE ARGS...")
    activate()
    if "RANK" not in os.environ:  # not under torchrun or deepspeed
        _one_process()
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def _one_process() -> None:
    """What a launcher would set for a job of one process, so that DeepSpeed does not go looking for MPI."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    single = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in single.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    main(sys.argv[1:])
