"""Standard operating procedures: rules that give the allowed strategies of every turn."""

from openrlhf_gopo.sop.files import Procedure, load_sop
from openrlhf_gopo.sop.rules import Part, Rule, Sop

__all__ = ["Part", "Procedure", "Rule", "Sop", "load_sop"]
