"""The documentation: links lead somewhere, generated pages are up to date, and every command is run or says why not.

A fenced bash block in README.md, docs/ or a page below examples/ and benchmarks/ stands after a comment that says where
it is covered:

    <!-- run -->                    this test runs it, from the root of the checkout
    <!-- tested: FILE[, FILE] -->   the named tests run what it names
    <!-- needs: WHAT -->            it needs hardware, data or models that a test has not
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]
)
BLOCK = re.compile(
    r"(?:^<!-- (?P<how>run|tested|needs)(?:: (?P<what>[^>]+?))? -->\n)?^```bash\n(?P<code>.*?)^```", re.M | re.S
)
PROGRAM = re.compile(r"-m ([\w.]+)|([\w/]+\.(?:sh|py))")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks() -> list[tuple[Path, re.Match[str]]]:
    return [(page, found) for page in PAGES for found in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to the page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: {target}: no such file"
        if fragment:
            assert fragment in anchors(file), f"{name(page)}: {target}: {name(file)} has no such heading"


def test_every_command_says_where_it_is_covered() -> None:
    bare = [f"{name(page)}: {found['code'].splitlines()[0]}" for page, found in blocks() if not found["how"]]
    assert not bare, "put <!-- run -->, <!-- tested: FILE --> or <!-- needs: WHAT --> before:\n" + "\n".join(bare)


@pytest.mark.parametrize(
    ("page", "found"),
    [pytest.param(page, f, id=f"{name(page)}-{f.start()}") for page, f in blocks() if f["how"] == "tested"],
)
def test_the_named_tests_run_the_programs_of_the_block(page: Path, found: re.Match[str]) -> None:
    files = re.findall(r"[\w./]+/[\w.]+", found["what"])
    assert files
    for file in files:
        assert (ROOT / file).is_file(), f"{name(page)}: {file}: no such test"
    tests = "\n".join((ROOT / file).read_text() for file in files)
    programs = {
        Path(file).stem if file else module.rpartition(".")[2] for module, file in PROGRAM.findall(found["code"])
    }
    missing = {program for program in programs if not re.search(rf"\b{program}\b", tests)}
    assert not missing, f"{name(page)}: none of {', '.join(files)} names {missing}"


@pytest.mark.stack
@pytest.mark.parametrize(
    "code", [pytest.param(f["code"], id=f"{name(page)}-{f.start()}") for page, f in blocks() if f["how"] == "run"]
)
def test_commands_that_need_nothing_work(code: str) -> None:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_front_page_keeps_its_two_commands() -> None:
    commands = [found["code"] for page, found in blocks() if page == ROOT / "README.md"][:2]
    assert commands == ["bash examples/quickstart/run.sh\n", "bash tests/run.sh\n"]


@pytest.mark.stack
def test_the_flags_page_is_what_the_parsers_say() -> None:
    pytest.importorskip("openrlhf")
    from openrlhf_gopo.cli import flags

    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == flags.page(), "run: python -m openrlhf_gopo.cli.flags > docs/flags.md"
    assert "| `--gopo.offline.similarity` | `0.0` | in [0, 1]" in page  # a default that is false
    assert "`--actor.adam.lr`" in page
    assert "| `--expert." not in page


def test_the_index_of_errors_is_what_the_source_says() -> None:
    spec = importlib.util.spec_from_file_location("errors_page", ROOT / "docs" / "errors.py")
    errors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(errors)
    page = errors.PAGE.read_text(encoding="utf-8")
    assert page == errors.page(), "run: python docs/errors.py"
    found = errors.messages()
    assert sum(map(len, found.values())) > 150
    for text in ("--gopo.user_timeout …: give a positive number of seconds", "…:1: empty; an SOP needs at least"):
        assert text in page  # of a check by _require, and of a raise


def test_no_flag_in_the_documentation_is_unknown() -> None:
    """--gopo.* flags in prose and code exist; the generated page knows them all."""
    known = set(re.findall(r"`(--gopo\.[\w.]+)`", (ROOT / "docs" / "flags.md").read_text()))
    for page in PAGES:
        text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)
        if page.name == "troubleshooting.md":
            text = text.split("## Every message")[0]
        given = set(re.findall(r"--gopo\.[a-z_]+(?:\.[a-z_]+)?", text))
        strangers = {g for g in given if not any(k == g or k.startswith(g + ".") or _cut(g, k) for k in known)}
        assert not strangers, f"{name(page)}: no such flag: {', '.join(sorted(strangers))}"


def _cut(given: str, known: str) -> bool:
    """``--gopo.llm.budget_*`` stands for all that begin so; the pattern leaves its star out."""
    return given.endswith("_") and known.startswith(given)
