"""Installed into OpenRLHF by openrlhf-gopo, which holds the code."""

from openrlhf_gopo.runtime.experience_maker import GOPOExperienceMaker

__all__ = ["GOPOExperienceMaker"]
