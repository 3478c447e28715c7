"""Workers as forks of a process that has imported the stack: real processes, with a small module for the stack."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from openrlhf_gopo.platform import forks
from openrlhf_gopo.platform.environment import SWITCH

SCRIPT = """\
import gc, json, os, sys
print(json.dumps({
    "collects": gc.isenabled(), "frozen": gc.get_freeze_count() > 0,
    "argv": sys.argv, "pid": os.getpid(), "parent": os.getppid(), "here": os.getcwd(), "name": __name__,
    "loaded": "stack" in sys.modules, "variable": os.environ.get("GIVEN"), "niceness": os.nice(0),
}), flush=True)
if sys.argv[1:] == ["wait"]:
    import setproctitle
    setproctitle.setproctitle("ray::" + "a_long_title_" * 5)
    print("titled", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that has started the one that forks, which imports ``stack``; it tells where that one listens."""
    (tmp_path / "stack.py").write_text("import gc, time\nassert not gc.isenabled()\ntime.sleep(0.5)\n")
    (tmp_path / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    (tmp_path / "script.py").write_text(SCRIPT)
    yield from _driver(tmp_path, "stack")


@pytest.fixture
def driver_with_threads(tmp_path: Path, driver: subprocess.Popen) -> Iterator[subprocess.Popen]:
    yield from _driver(tmp_path, "threads")


def _driver(folder: Path, module: str) -> Iterator[subprocess.Popen]:
    code = (
        "import os, sys\n"
        "from openrlhf_gopo.platform import forks\n"
        f"forks.start([{module!r}])\n"
        "print(os.environ.get(forks.SOCKET, ''), flush=True)\n"
        "sys.stdin.read()\n"
    )
    env = {name: value for name, value in os.environ.items() if name != forks.SOCKET} | {SWITCH: "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, **pipes)
    process.socket = process.stdout.readline().strip()
    yield process
    process.kill()
    process.wait()


def worker(driver: subprocess.Popen, folder: Path, *argv: str) -> subprocess.Popen:
    """What Ray runs in place of ``python script.py ARGV``."""
    command = ["nice", "-n", "3", *shlex.split(forks.COMMAND), str(folder / "script.py"), *argv]
    env = os.environ | {forks.SOCKET: driver.socket, "GIVEN": "x"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=env, **pipes)


def test_a_worker_is_a_fork_with_its_own_arguments_environment_and_streams(
    driver: subprocess.Popen, tmp_path: Path
) -> None:
    (server,) = wait_for(lambda: psutil.Process(driver.pid).children())
    first, second = worker(driver, tmp_path, "wait"), worker(driver, tmp_path, "a b", "c")
    told = [json.loads(process.stdout.readline()) for process in (first, second)]
    assert [one["argv"][1:] for one in told] == [["wait"], ["a b", "c"]]
    for one, process in zip(told, (first, second), strict=True):
        assert (one["parent"], one["loaded"], one["name"]) == (server.pid, True, "__main__")
        assert (one["variable"], one["here"]) == ("x", str(tmp_path))
        assert one["niceness"] == os.nice(0) + 3
        assert (one["collects"], one["frozen"]) == (True, True)
        assert one["pid"] not in (process.pid, server.pid)
    assert second.wait(10) == 0  # it was done
    assert first.stdout.readline() == "titled\n"
    assert psutil.Process(told[0]["pid"]).cmdline()[0].startswith("ray::a_long_title_a_long")
    assert first.poll() is None
    os.kill(told[0]["pid"], signal.SIGKILL)
    assert first.wait(10) == 1


SPAWNING = """\
import json, multiprocessing, os, sys, time
from openrlhf_gopo.platform import end_spawned_with_this_process, forks
def child(pipe, what):
    os.write(1, b"a child's stream\\n")
    pipe.send([os.getpid(), os.getppid(), "stack" in sys.modules])
    if what == "exit":
        sys.exit(pipe.recv())
    if what == "raise":
        raise ValueError(pipe.recv())
    time.sleep(60)
if __name__ == "__main__":
    forks.fork_spawned(multiprocessing.spawn)
    if sys.argv[1] == "orphan":
        end_spawned_with_this_process()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=child, args=(theirs, sys.argv[1]))
    process.start()
    theirs.close()
    print(json.dumps(ours.recv()), flush=True)
    sys.stdin.readline()  # until the child was looked at
    if sys.argv[1] in ("exit", "raise"):
        ours.send(7)
    elif sys.argv[1] == "orphan":
        time.sleep(60)
    else:
        getattr(process, sys.argv[1])()
    process.join(20)
    print(process.exitcode, flush=True)
"""


@pytest.fixture
def spawning(driver: subprocess.Popen, tmp_path: Path):
    """Start a program that spawns a process which does what is asked; returns it and the process's number."""

    def start(what: str) -> tuple[subprocess.Popen, psutil.Process]:
        (server,) = wait_for(lambda: psutil.Process(driver.pid).children())
        (tmp_path / "spawning.py").write_text(SPAWNING)
        env = os.environ | {forks.SOCKET: driver.socket}
        command = [sys.executable, str(tmp_path / "spawning.py"), what]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        program = subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
        assert program.stdout.readline() == "a child's stream\n"
        pid, parent, loaded = json.loads(program.stdout.readline())
        assert (parent, loaded) == (server.pid, True)
        spawned = psutil.Process(pid)
        program.stdin.write("\n")
        program.stdin.flush()
        return program, spawned

    return start


@pytest.mark.parametrize(("what", "status"), [("exit", 7), ("raise", 1), ("terminate", 1), ("kill", -signal.SIGKILL)])
def test_what_multiprocessing_spawns_is_a_fork_that_ends_as_it_is_told(spawning, what: str, status: int) -> None:
    """Its pipes work by the numbers of their files; its own exit status comes back; signals reach it."""
    program, spawned = spawning(what)
    assert program.communicate(timeout=30)[0] == f"{status}\n"
    assert psutil.wait_procs([spawned], timeout=10)[1] == []


def test_a_spawned_fork_ends_with_the_process_that_spawned_it(spawning) -> None:
    program, spawned = spawning("orphan")
    assert spawned.is_running()
    program.kill()
    program.wait()
    assert psutil.wait_procs([spawned], timeout=10)[1] == []


def test_without_a_process_that_forks_the_script_runs_all_the_same(driver: subprocess.Popen, tmp_path: Path) -> None:
    (server,) = wait_for(lambda: psutil.Process(driver.pid).children())
    driver.kill()
    driver.wait()
    psutil.wait_procs([server], timeout=10)
    assert not server.is_running()  # it ends with the driver
    process = worker(driver, tmp_path)
    told = json.loads(process.communicate(timeout=10)[0])
    assert (told["pid"], told["loaded"], told["name"]) == (process.pid, False, "__main__")
    assert process.returncode == 0


def test_nothing_forks_from_a_process_with_threads(driver_with_threads: subprocess.Popen, tmp_path: Path) -> None:
    assert psutil.Process(driver_with_threads.pid).children() == []
    process = worker(driver_with_threads, tmp_path)
    told = json.loads(process.communicate(timeout=10)[0])
    assert told["pid"] == process.pid
    assert "workers import the stack for themselves" in driver_with_threads.communicate(timeout=10)[1]


def test_with_a_gpu_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    monkeypatch.delenv(forks.SOCKET, raising=False)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    forks.start(["no_such_module"])
    assert forks.SOCKET not in os.environ


def test_the_stack_is_imported_without_threads_and_without_ray() -> None:
    """What a fork cannot have; OPENBLAS_NUM_THREADS as ``start`` sets it."""
    code = (
        "import importlib, os, sys\n"
        "from openrlhf_gopo import platform\n"
        "platform.activate()\n"
        f"for name in {forks.IMPORTED!r}: importlib.import_module(name)\n"
        "print(len(os.listdir('/proc/self/task')), 'ray' in sys.modules)\n"
    )
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", SWITCH: "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=env)
    assert done.stdout.splitlines()[-1:] == ["1 False"], done.stdout + done.stderr


def wait_for(found, seconds: float = 10.0):
    end = time.monotonic() + seconds
    while not (answer := found()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer
