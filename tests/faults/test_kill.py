"""GOPO_KILLS kills of real training runs, by default one of each kind.

``kill.py``, which says what is checked, does 50 a night.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from openrlhf_gopo import platform

sys.path.insert(0, str(Path(__file__).parent))
import kill

KILLS = int(os.environ.get("GOPO_KILLS", "4"))

pytestmark = [pytest.mark.slow, pytest.mark.stack, pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU")]


def test_killed_runs_go_on_and_end_as_if_nothing_had_happened(tmp_path):
    tally = kill.campaign(KILLS, 0, tmp_path)
    assert tally.kills.total() == KILLS
    assert set(tally.kills) == {"driver", "policy", "rollout", "engine"}
