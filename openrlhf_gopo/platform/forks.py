"""Ray's workers and vLLM's engine cores as forks of one process that has imported the stack already.

Each of them imports torch, transformers, DeepSpeed and vLLM. That takes seven CPU seconds and more, and where eight of
them share a laptop's cores it is most of a start. So the driver, once it has checked its flags and imported them
for itself, forks a process that forks whenever it is asked to. Ray starts workers by ``COMMAND`` in place of
``python`` (``runtime_env["py_executable"]``), and ``multiprocessing`` what it spawns (``fork_spawned``): the command
asks that process for a fork, hands over arguments, environment, folder and open files, and stands in for the fork until
it ends: it passes SIGTERM on, takes the fork along when it is killed, and ends with its status. Where nobody answers it
runs what was asked for itself.
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
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
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
    """Import the stack, and fork the process that forks; it ends with this one. Idempotent; nothing with a GPU.

    Call it as early as there is nothing but the stack to import: forks have all that this process has. One with
    threads, which they would lack, or with Ray says so, and workers import for themselves.
    """
    if not is_cpu() or SOCKET in os.environ:
        return
    with _blas_without_threads(), uncollected():
        for name in imported:
            importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1 or "ray" in sys.modules:
        print("this process has threads, or Ray: its workers import the stack for themselves", file=sys.stderr)
        return
    folder = tempfile.mkdtemp(prefix="openrlhf-gopo-")
    os.environ[SOCKET] = str(Path(folder) / "socket")
    parent = os.getpid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(os.environ[SOCKET])
        listening.listen(64)
        if os.fork() == 0:
            with _nothing_behind():
                _serve(listening, parent)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


@contextlib.contextmanager
def _blas_without_threads() -> Iterator[None]:
    """OpenBLAS would start some when numpy is imported."""
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def _nothing_behind() -> Iterator[None]:
    """Of a fork, which stands in the middle of the driver's program: the end of what is within is the end of it."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _serve(listening: socket.socket, parent: int) -> None:
    """Fork at every connection while ``parent`` lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for forks
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    while os.getppid() == parent:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            _run(connection)
        connection.close()


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
    status = _execute(job["argv"])
    with contextlib.suppress(OSError):
        connection.send(bytes([status & 0xFF]))
    # As multiprocessing ends its forks: the end of Python, less what it would go back to.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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


def _execute(argv: list[str]) -> int:
    """What ``python ARGV`` does, for a script and for ``OPTIONS -c CODE``, whose other options are taken as given.

    Returns:
        The exit status.
    """
    try:
        if argv[0].startswith("-"):
            start = argv.index("-c")
            sys.argv = ["-c", *argv[start + 2 :]]
            sys.modules["__main__"] = ModuleType("__main__")  # not the driver's
            exec(argv[start + 1], vars(sys.modules["__main__"]))
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        if end.code is not None:
            print(end.code, file=sys.stderr)
        return int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


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
            signal.signal(signal.SIGTERM, lambda number, frame: connection.send(bytes([number])))
            started = connection.recv(len(STARTED)) == STARTED
        except (KeyError, OSError):
            started = False
        if started:
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
