"""Ray's start on a machine with GPUs, as far as it can be told without one."""

import pytest

pytest.importorskip("ray")

from openrlhf_gopo import platform
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
