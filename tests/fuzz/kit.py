"""What every target of the fuzzer is made of: an input, what is done with it, and when that is a finding."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutate import Mutator

from openrlhf_gopo.errors import GopoError

TESTS = Path(__file__).resolve().parents[1]
SCRATCH = Path(tempfile.mkdtemp(prefix="gopo-fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))


class Wrong(Exception):
    """An answer that must not be: a finding."""


@dataclass(frozen=True)
class Target:
    """How an input is made, and ``run``: it returns if the input is good, and raises one of our errors if it is not.

    ``share``: its part of all inputs.
    """

    name: str
    share: float
    make: Callable[[Mutator], Any]
    run: Callable[[Any], None]

    def try_one(self, given: Any) -> bool:
        """True when ``given`` was accepted, False when it was refused with a message that says where.

        Raises:
            Exception: a finding.
        """
        try:
            self.run(given)
        except GopoError as error:
            message = str(error)
            if not any(place in message for place in (str(SCRATCH), "--gopo.", "reward weights", "llm:", "text ")):
                raise Wrong(f"a message without file or flag: {message!r:.300}") from error
            if len(message) > 20_000:
                raise Wrong(f"a message of {len(message)} characters: {message[:300]!r}") from error
            return False
        return True


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"fuzz_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
