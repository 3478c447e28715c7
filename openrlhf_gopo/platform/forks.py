"""Ray's workers as forks of one process that has imported the stack already.

Every worker imports torch, transformers, DeepSpeed and vLLM. That takes seven CPU seconds and more, and where eight of
them share a laptop's cores it is most of a start. So the driver starts one process that imports them beside its own
imports, and Ray starts workers by ``COMMAND`` in place of ``python`` (``runtime_env["py_executable"]``): it asks that
process for a fork, hands over arguments, environment, folder and streams, and waits for the fork's end. Where nobody
answers it runs the script itself.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from openrlhf_gopo.platform.environment import is_cpu

SOCKET = "OPENRLHF_GOPO_FORKS"  # environment variable: where the process listens, in a folder that is this user's alone
# Most of what a worker imports. Not Ray, which reads its workers' variables while it is imported, and nothing that
# starts threads, which a fork would lack.
IMPORTED = ("deepspeed", "peft", "vllm.engine.arg_utils")
COMMAND = f"{shlex.quote(sys.executable)} -c 'import sys; from {__name__} import main; main(sys.argv[1:])'"  # for bash
STARTED = b"1"
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def start(imported: Sequence[str] = IMPORTED) -> None:
    """Start the process; it ends with this one. Idempotent; does nothing when there is a GPU."""
    if not is_cpu() or SOCKET in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="openrlhf-gopo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(Path(folder) / "socket")
    # OpenBLAS: or it starts threads when numpy is imported. SOCKET first: see _become.
    env = {SOCKET: path, **os.environ, "OPENBLAS_NUM_THREADS": "1"}
    os.environ[SOCKET] = path
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(os.environ[SOCKET])
        listening.listen(64)  # who asks during the imports waits for them
        number = listening.fileno()
        code = (
            "from openrlhf_gopo import platform; platform.activate(); "
            f"platform.forks.serve({number}, {os.getpid()}, {list(imported)!r})"
        )
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, env=env, pass_fds=[number])


def serve(listening: int, parent: int, imported: Sequence[str]) -> None:
    """Import, then fork at every connection while ``parent`` lives. Returns in a fork alone, after its script.

    Args:
        listening: the socket's file descriptor.

    Raises:
        RuntimeError: what was imported has started threads, which forks would lack.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    with socket.socket(fileno=listening) as server:
        for name in imported:
            importlib.import_module(name)
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError(f"importing {', '.join(imported)} started threads: workers import for themselves")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for forks
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                break
            connection.close()
    _run(connection)


def _run(connection: socket.socket) -> None:
    """In a fork: become what was asked for. ``connection`` stays open until the process ends, whoever ends it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asked, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    job = json.loads(asked)
    _become(job["environment"])
    os.chdir(job["folder"])
    os.setpriority(os.PRIO_PROCESS, 0, job["niceness"])
    if "numpy" in sys.modules:  # its global generator was seeded before the fork, unlike Python's own
        sys.modules["numpy"].random.seed()
    sys.argv = job["argv"]
    connection.send(STARTED)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _become(environment: dict[str, str]) -> None:
    """Take over ``environment``, and leave alone what does not differ: Ray writes its processes' titles over their
    arguments, which it finds in memory before the first variable, as that was when the process began."""
    for name in os.environ.keys() - environment:
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def main(argv: list[str]) -> None:
    """Run ``argv``, a script and its arguments, in a fork, and end after it; or here, where there is nobody to fork."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.connect(os.environ[SOCKET])
            job = {
                "argv": argv,
                "environment": dict(os.environ),
                "folder": str(Path.cwd()),
                "niceness": os.getpriority(os.PRIO_PROCESS, 0),
            }
            socket.send_fds(connection, [json.dumps(job).encode()], [0, 1, 2])
            started = connection.recv(len(STARTED)) == STARTED
        except (KeyError, OSError):
            started = False
        if started:
            connection.recv(1)  # nothing comes but the end
            return
    os.execv(sys.executable, [sys.executable, *argv])
