"""A worker that trains never imports vLLM; everywhere else it is the real one."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
from openrlhf_gopo import platform
platform.activate()
import ray
from ray._private.worker import global_worker
if sys.argv[1] == "worker":
    global_worker.set_mode(ray.WORKER_MODE)
from openrlhf_gopo.runtime import actors
from openrlhf.trainer.ray.ppo_critic import CriticModelActor
loaded = [name for name in sys.modules if name.partition(".")[0] == "vllm"]
print(json.dumps({"vllm": len(loaded), "actor": actors._RolePolicy.__mro__[1].__module__}))
"""


@pytest.mark.parametrize("process", ["worker", "driver"])
def test_vllm_is_imported_by_the_driver_alone(process):
    done = subprocess.run([sys.executable, "-c", SCRIPT, process], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["actor"] == "openrlhf.trainer.ray.ppo_actor"
    assert (found["vllm"] == 0) == (process == "worker")
