"""What tests of several folders need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from openrlhf_gopo.policy.two_level import TwoLevelPolicy

from .http_server import Server

ROOT = Path(__file__).parents[1]

# No property is about time, and a busy machine takes long for any example.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def policy() -> TwoLevelPolicy:
    """Both roles over a small ChatML tokenizer, with labels for the shop."""
    from openrlhf_gopo.platform.media import hide_what_cuda_builds_break

    hide_what_cuda_builds_break()
    where = ROOT / "examples" / "quickstart" / "build_model.py"
    spec = importlib.util.spec_from_file_location("quickstart_model", where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = module.train_tokenizer(["Customer: hello, I want a refund. Agent: sorry"] * 5, 400, 4096)
    return TwoLevelPolicy(tokenizer, tokenizer, 26)
