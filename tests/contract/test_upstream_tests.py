"""OpenRLHF's own unit tests, which its wheel carries: with this package active they do what they did without it."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

pytestmark = [pytest.mark.stack, pytest.mark.slow]
ROOT = Path(__file__).parents[2]

# As a plugin of pytest: what the command does before it imports the stack.
ACTIVATE = "from openrlhf_gopo import platform\nplatform.activate()\nimport openrlhf_gopo.runtime.models\n"
NOT_PASSED = ("failure", "error", "skipped")
RUN = "import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))"


def upstreams_tests() -> list[str]:
    try:
        files = distribution("openrlhf").files or []
    except PackageNotFoundError:
        pytest.skip("openrlhf is not installed")
    found = sorted(str(f.locate()) for f in files if f.parts[0] == "tests" and f.match("test_*.py"))
    found = [path for path in found if Path(path).is_file()]
    if not found:
        pytest.skip("this openrlhf was installed without its tests")
    return found


def outcomes(folder: Path, code: str, files: list[str]) -> dict[str, str]:
    """Name of a test -> passed, or what else."""
    folder.mkdir()
    report = folder / "report.xml"
    flags = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "junit_family=xunit1",
        "--rootdir",
        str(folder),
        f"--junitxml={report}",
        *files,
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]  # 1: some tests failed
    cases = ET.parse(report).iter("testcase")
    named = ((f"{c.get('file')}:{c.get('classname')}.{c.get('name')}", c) for c in cases)
    return {name: case[0].tag if len(case) and case[0].tag in NOT_PASSED else "passed" for name, case in named}


def test_what_passes_without_this_package_passes_with_it(tmp_path: Path) -> None:
    files = upstreams_tests()
    without, with_it = (outcomes(tmp_path / name, code + RUN, files) for name, code in (("no", ""), ("yes", ACTIVATE)))
    passed = {name for name, outcome in without.items() if outcome == "passed"}
    assert len(passed) > 100
    assert {name: with_it.get(name, "gone") for name in passed if with_it.get(name) != "passed"} == {}
