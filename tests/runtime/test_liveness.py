"""Deaths of real Ray actors, in a process of their own: what the user is told, and that nobody waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, time
from openrlhf_gopo import platform
platform.activate()
import ray
from openrlhf_gopo.errors import WorkerError
from openrlhf_gopo.runtime import liveness
from openrlhf_gopo.runtime.roles import Role

full, waits = "full" in sys.argv, "waits" in sys.argv
memory = {"memory_monitor_refresh_ms": 500, "memory_usage_threshold": 0.0} if full else {}
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _system_config=memory)

@ray.remote(num_cpus=0)
class Engine:
    def is_current(self):
        return True
    def end(self):
        os._exit(1)

liveness.GRACE = 2.0
engine = Engine.remote()
try:
    with liveness.watched({"expert": Role("expert", None, engines=[engine])}, "runs/ckpt"):
        if not full:
            engine.end.remote()
        while waits:
            time.sleep(1)
        while True:
            ray.get(engine.is_current.remote())
except WorkerError as error:
    print("WorkerError:", error)
"""


@pytest.mark.parametrize("waits", [False, True], ids=["the run fails", "the run waits for it"])
@pytest.mark.parametrize(
    ("how", "why"), [("dies", "killed, out of memory, or crashed"), ("full", "the machine's memory was full")]
)
def test_a_death_is_told_with_what_goes_on(how: str, why: str, waits: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, how, *["waits"] * waits],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OPENRLHF_GOPO_CPU": "1"},
    )
    assert done.returncode == (3 if waits else 0), done.stderr[-3000:]
    told = done.stderr if waits else done.stdout
    assert "the expert's rollout actor 0 died during the run" in told
    assert why in told
    assert "--ckpt.path runs/ckpt are whole" in told
