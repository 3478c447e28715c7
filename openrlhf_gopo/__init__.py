"""GOPO for OpenRLHF: two-level dialogue policies trained from preferences between whole trajectories."""

__version__ = "0.1.0"
