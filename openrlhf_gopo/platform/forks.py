"""Ray's workers and vLLM's engine cores as forks of one process that has imported the stack already.

Each of them imports torch, transformers, DeepSpeed and vLLM. That takes seven CPU seconds and more, and where eight of
them share a laptop's cores it is most of a start. So the driver starts one process that imports them beside its own
imports. Ray starts workers by ``COMMAND`` in place of ``python`` (``runtime_env["py_executable"]``), and
``multiprocessing`` what it spawns (``fork_spawned``): the command asks that process for a fork, hands over arguments,
environment, folder and open files, and stands in for the fork until it ends: it passes SIGTERM on, takes the fork along
when it is killed, and ends with its status. Where nobody answers it runs what was asked for itself.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
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
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openrlhf_gopo.platform.environment import is_cpu
from openrlhf_gopo.platform.imports import uncollected

SOCKET = "OPENRLHF_GOPO_FORKS"  # environment variable: where the process listens, in a folder that is this user's alone
# Most of what a worker imports. Not Ray, which reads its workers' variables while it is imported, and nothing that
# starts threads, which a fork would lack.
IMPORTED = ("deepspeed", "peft", "vllm.engine.arg_utils")
CODE = f"import sys; from {__name__} import main; main(sys.argv[1:])"
COMMAND = shlex.join([sys.executable, "-c", CODE])  # for bash
STARTED = b"1"
FILES = 64  # most open files that are handed over
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
        with uncollected():
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
    asked, received, _, _ = socket.recv_fds(connection, 2**20, FILES)
    job = json.loads(asked)
    connection = _arrange(connection, received, job["files"])
    _become(job["environment"])
    os.chdir(job["folder"])
    os.setpriority(os.PRIO_PROCESS, 0, job["niceness"])
    if "numpy" in sys.modules:  # its global generator was seeded before the fork, unlike Python's own
        sys.modules["numpy"].random.seed()
    connection.send(STARTED)
    threading.Thread(target=_obey, args=(connection,), name="gopo-obey", daemon=True).start()
    status = 1
    try:
        _execute(job["argv"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        with contextlib.suppress(OSError):
            connection.send(bytes([status & 0xFF]))


def _arrange(connection: socket.socket, received: Sequence[int], wanted: Sequence[int]) -> socket.socket:
    """Give the files that were received the numbers that they have at the other end, of which arguments speak."""
    above = max(wanted) + 1
    moved = socket.socket(fileno=fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD_CLOEXEC, above))
    connection.close()
    aside = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, above) for number in received]
    for number in received:
        os.close(number)
    for number, final in zip(aside, wanted, strict=True):
        os.dup2(number, final)
        os.close(number)
    return moved


def _obey(connection: socket.socket) -> None:
    """Raise the signals that come, until the one who stands in for this process is gone, and it with him."""
    while number := connection.recv(1):
        os.kill(os.getpid(), number[0])
    os.kill(os.getpid(), signal.SIGKILL)


def _execute(argv: list[str]) -> None:
    """What ``python ARGV`` does, for a script and for ``OPTIONS -c CODE``, whose other options are taken as given."""
    if argv[0].startswith("-"):
        start = argv.index("-c")
        sys.argv = ["-c", *argv[start + 2 :]]
        exec(argv[start + 1], {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def _become(environment: dict[str, str]) -> None:
    """Take over ``environment``, and leave alone what does not differ: Ray writes its processes' titles over their
    arguments, which it finds in memory before the first variable, as that was when the process began."""
    for name in os.environ.keys() - environment:
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def main(argv: list[str]) -> None:
    """Run ``python ARGV`` in a fork and end as it does; or here, where there is nobody to fork."""
    files = [0, 1, 2, *_handed_down()]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.connect(os.environ[SOCKET])
            job = {
                "argv": argv,
                "environment": dict(os.environ),
                "files": files,
                "folder": str(Path.cwd()),
                "niceness": os.getpriority(os.PRIO_PROCESS, 0),
            }
            socket.send_fds(connection, [json.dumps(job).encode()], files)
            started = connection.recv(len(STARTED)) == STARTED
        except (KeyError, OSError):
            started = False
        if started:
            signal.signal(signal.SIGTERM, lambda number, frame: connection.send(bytes([number])))
            status = connection.recv(1) or b"\1"  # nothing: it was killed
            connection.recv(1)  # nothing comes but the end
            sys.exit(status[0])
    os.execv(sys.executable, [sys.executable, *argv])


def _handed_down() -> list[int]:
    """The files above the streams that whoever started this process left open for it."""
    numbers = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    found = []
    for number in numbers[3:]:
        with contextlib.suppress(OSError):  # the folder's own, closed by now
            if os.get_inheritable(number):
                found.append(number)
    return found


def fork_spawned(spawn: Any) -> None:
    """Patch of ``multiprocessing.spawn``: what it starts runs in a fork too."""
    get_command_line: Callable[..., list[str]] = spawn.get_command_line

    @functools.wraps(get_command_line)
    def through_a_fork(**numbers: int) -> list[str]:
        python, *argv = get_command_line(**numbers)
        return [python, "-c", CODE, *argv]

    spawn.get_command_line = through_a_fork
