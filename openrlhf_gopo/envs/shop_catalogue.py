"""The shop's 26 strategies and the SOP that its desks follow, from ``shop_sop.yaml``."""

from __future__ import annotations

from pathlib import Path

from openrlhf_gopo.sop.files import load_sop

PROCEDURE = load_sop(Path(__file__).with_name("shop_sop.yaml"))
STRATEGIES, SOP = PROCEDURE.strategies, PROCEDURE.sop
FACTS = SOP.facts  # what the desk can know: told by the customer, or found in its own systems
