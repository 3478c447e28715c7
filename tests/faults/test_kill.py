"""Six kills of real training runs; ``kill.py --kills 50`` is the nightly size. See there for what is checked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from openrlhf_gopo import platform

sys.path.insert(0, str(Path(__file__).parent))
import kill

pytestmark = [pytest.mark.slow, pytest.mark.stack, pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU")]


def test_killed_runs_go_on_and_end_as_if_nothing_had_happened(tmp_path):
    tally = kill.campaign(6, 0, tmp_path)
    assert tally.kills.total() == 6
    assert set(tally.kills) == {"driver", "policy", "rollout", "engine"}
