"""These tests import OpenRLHF; without a GPU that takes the CPU platform."""

from openrlhf_gopo import platform

platform.activate()
