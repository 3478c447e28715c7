"""Installed packages as source: what their modules define and with which parameters, without importing them."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

Find = Callable[[str], Path | None]  # the source file of a module


def source_file(module: str) -> Path | None:
    """The file of an installed module; its parent packages, which import half the stack, stay unimported."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    found = (file_in(Path(root), rest) for root in (spec.submodule_search_locations if spec else None) or ())
    return next((file for file in found if file is not None), None)


def file_in(package: Path, names: list[str]) -> Path | None:
    """The file of the module that ``names`` lead to inside a package's folder."""
    path = package.joinpath(*names)
    files = [*([path.with_suffix(".py")] if names else []), path / "__init__.py"]
    return next((file for file in files if file.is_file()), None)


class Sources:
    """Modules as syntax trees. Follows ``from a import b`` and base classes; knows nothing of what code would do."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self._bound: dict[str, Mapping[str, tuple[str, ast.AST]] | None] = {}

    def bound(self, module: str) -> Mapping[str, tuple[str, ast.AST]] | None:
        """What the module binds at its top level: name -> (the name at its origin, the statement); None: no module."""
        if module not in self._bound:
            path = self._find(module)
            tree = None if path is None else _parsed(path)
            self._bound[module] = None if tree is None else dict(_bindings(tree.body))
        return self._bound[module]

    def resolve(self, seam: str) -> ast.AST | None:
        """The definition of ``module:Name.method``; None when there is none."""
        module, _, path = seam.partition(":")
        name, *rest = path.split(".")
        return self._look_up(module, name, rest, 0)

    def signature(self, seam: str) -> list[str] | None:
        """The parameters of a function, as ``self a *args b **kwargs``."""
        node = self.resolve(seam)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return None
        a = node.args
        names = [arg.arg for arg in (*a.posonlyargs, *a.args)] + ([f"*{a.vararg.arg}"] if a.vararg else [])
        return names + [arg.arg for arg in a.kwonlyargs] + ([f"**{a.kwarg.arg}"] if a.kwarg else [])

    def fields(self, seam: str) -> list[str] | None:
        """The fields of a dataclass."""
        node = self.resolve(seam)
        if not isinstance(node, ast.ClassDef):
            return None
        return [s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]

    def flags(self, module: str) -> set[str]:
        """The flags that the module gives to ``add_argument``."""
        path = self._find(module)
        calls = (node for node in ast.walk(_parsed(path)) if isinstance(node, ast.Call)) if path else ()
        named = (c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "add_argument")
        return {
            a.value for call in named for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
        }

    def _look_up(self, module: str, name: str, rest: list[str], depth: int) -> ast.AST | None:
        found = (self.bound(module) or {}).get(name)
        if found is None or depth > 10:  # deeper: imports that go in a circle
            return None
        origin, node = found
        if isinstance(node, ast.ImportFrom):
            return self._look_up(self._origin(module, node), origin, rest, depth + 1)
        if not rest:
            return node
        if not isinstance(node, ast.ClassDef):
            return None
        inside = dict(_bindings(node.body)).get(rest[0])
        if inside is not None:
            return inside[1]
        bases = (self._look_up(module, b.id, rest, depth + 1) for b in node.bases if isinstance(b, ast.Name))
        return next((found for found in bases if found is not None), None)

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self._find(module)
        package = module.split(".")[: None if path and path.name == "__init__.py" else -1]
        return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, tuple[str, ast.AST]]]:
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.name, node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], (alias.name, node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        yield name.id, (name.id, node)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _bindings(node.body)
            for handler in getattr(node, "handlers", ()):
                yield from _bindings(handler.body)
            yield from _bindings([*getattr(node, "orelse", ()), *getattr(node, "finalbody", ())])
