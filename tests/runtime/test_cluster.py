"""Ray's start: on a machine with GPUs, as far as it can be told without one, and where there is no time for it."""

import inspect

import pytest

pytest.importorskip("ray")

from openrlhf_gopo import platform
from openrlhf_gopo.errors import WorkerError
from openrlhf_gopo.runtime import cluster

pytestmark = pytest.mark.stack


@pytest.mark.parametrize(("gpus", "warned"), [(4, False), (8, True)])
def test_groups_that_wait_for_gpus_say_so(gpus, warned, monkeypatch, caplog):
    """Ray waits for a placement group without end and without a word."""
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **options: None)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": 4.0})
    cluster.init_ray(gpus)
    assert ("ask for 8 GPUs, Ray has 4" in caplog.text) == warned


def test_a_ray_that_is_late_is_told_in_one_line(monkeypatch):
    """Ray has a plain Exception for it, known by its words."""
    from ray._private import node

    def fails(message):
        def init(**options):
            raise Exception(message)

        monkeypatch.setattr(cluster.ray, "init", init)

    assert cluster.LATE in inspect.getsource(node)
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    fails(f"{cluster.LATE}. This could happen because some of the raylet failed to startup.")
    with pytest.raises(WorkerError, match="Ray did not start within the 30 s"):
        cluster.init_ray(1)
    fails("something else")
    with pytest.raises(Exception, match=r"^something else$"):
        cluster.init_ray(1)
