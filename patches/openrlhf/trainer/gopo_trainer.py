"""Installed into OpenRLHF by openrlhf-gopo, which holds the code."""

from openrlhf_gopo.runtime.trainer import GOPOTrainer

__all__ = ["GOPOTrainer"]
