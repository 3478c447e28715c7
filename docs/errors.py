"""Writes the index of docs/troubleshooting.md: every message that the package raises on purpose, read from its source.

python docs/errors.py          rewrites the index, between its two markers
A test compares the page with what this gives.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "openrlhf_gopo"
PAGE = ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- index: written by docs/errors.py -->", "<!-- end of the index -->"
ERRORS = {node.name for node in ast.parse((PACKAGE / "errors.py").read_text()).body if isinstance(node, ast.ClassDef)}
CHECKS = ("_require", "require")  # (ok, flag, value, remedy): raise ConfigError("flag value: remedy")


def messages() -> dict[str, list[str]]:
    """Module -> its messages in order, with ``…`` where a value goes."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for text in _texts(node):
                if text.strip("… :;") and text not in found[str(path.relative_to(PACKAGE))]:
                    found[str(path.relative_to(PACKAGE))].append(text)
    return {module: texts for module, texts in found.items() if texts}


def _texts(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.Call) or not node.args:
        return
    name = (
        node.func.id
        if isinstance(node.func, ast.Name)
        else node.func.attr
        if isinstance(node.func, ast.Attribute)
        else ""
    )
    if name in ERRORS:
        yield _template(node.args[0])
    elif name in CHECKS and len(node.args) == 4:
        yield f"{_template(node.args[1])} …: {_template(node.args[3])}"


def _template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return "…"


def index() -> str:
    """The index, markers included."""
    lines = [BEGIN, ""]
    for module, texts in messages().items():
        lines += [f"**{module}**", "", *(f"- `{' '.join(text.replace('`', chr(39)).split())}`" for text in texts), ""]
    return "\n".join([*lines, END])


def page() -> str:
    """The whole page with its index as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + index() + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
