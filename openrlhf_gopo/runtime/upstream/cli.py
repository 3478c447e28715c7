"""OpenRLHF's own flags and validation, taken from its installed command (``train_ppo_ray``, ``train_dpo``), not copied.

Upstream builds its parser and validates under ``if __name__ == "__main__"``, so neither can be imported. This reads
the module's source, cuts that block in two around ``args = parser.parse_args()``, and runs the halves. The module
itself is not imported: that takes 7 s and needs the whole training stack, a dry run does not.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.metadata
import importlib.util
import runpy
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.runtime.upstream.contract import SUPPORTED

MODULE = "openrlhf.cli.train_ppo_ray"
HELPERS = "openrlhf.utils.config"  # of the standard library only, but its package imports DeepSpeed


@dataclass(frozen=True)
class UpstreamCli:
    """The two halves of upstream's ``__main__`` block. Each use runs upstream's code anew."""

    path: Path
    building: list[ast.stmt]
    validating: list[ast.stmt]

    @classmethod
    def load(cls, path: str | Path | None = None, module: str = MODULE) -> UpstreamCli:
        """Read the installed ``module``, or the one at ``path``.

        Raises:
            ConfigError: OpenRLHF is not installed, or this version's module is laid out differently.
        """
        path = Path(path) if path is not None else _find_source(module)
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        building, validating = _split(_main_block(tree, path), path)
        return cls(path, building=_with_definitions(building, tree), validating=_with_definitions(validating, tree))

    @property
    def parser(self) -> argparse.ArgumentParser:
        """A fresh parser with all of upstream's flags; their dests keep the dots (``actor.adam.lr``)."""
        return _run(self.building, self.path)["parser"]

    def validate(self, flat: argparse.Namespace) -> SimpleNamespace:
        """Upstream's nested namespace, after its own checks and derived values. ``flat`` stays as it is.

        Flags that upstream does not know (``expert.*``, ``gopo.*``) pass through into the nested namespace.

        Raises:
            ConfigError: upstream refuses the flags; its message is kept.
        """
        try:
            return _run(self.validating, self.path, args=copy.deepcopy(flat))["args"]
        except AssertionError as error:
            raise ConfigError(f"OpenRLHF refuses these flags: {error or _where(error, self.path)}") from error
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            # It reads a flag that was not given: gae without --reward.model_name_or_path raises AttributeError.
            raise ConfigError(
                f"OpenRLHF needs a flag that is missing: {error}, at {_where(error, self.path)}"
            ) from error


def _find_source(module: str) -> Path:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(f"{module} is not installed: install openrlhf=={SUPPORTED['openrlhf'][-1]}")
    return Path(spec.origin)


def _main_block(module: ast.Module, path: Path) -> list[ast.stmt]:
    blocks = [
        node.body
        for node in module.body
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "'__main__' == __name__")
    ]
    if len(blocks) != 1:
        raise _unexpected(path, f"{len(blocks)} `if __name__ == '__main__'` blocks instead of one")
    return blocks[0]


def _split(block: list[ast.stmt], path: Path) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """``block`` is: build ``parser``; ``args = parser.parse_args()``; validate ``args``; ``train(args)``."""
    source = [ast.unparse(statement) for statement in block]
    if source.count("args = parser.parse_args()") != 1:
        raise _unexpected(path, "not exactly one `args = parser.parse_args()`")
    if source[-1] != "train(args)":
        raise _unexpected(path, "the block does not end with `train(args)`")
    if not source[0].startswith("parser = argparse.ArgumentParser("):
        raise _unexpected(path, "the block does not begin with `parser = argparse.ArgumentParser(...)`")
    cut = source.index("args = parser.parse_args()")
    return block[:cut], block[cut + 1 : -1]


def _with_definitions(statements: list[ast.stmt], module: ast.Module) -> list[ast.stmt]:
    """``statements`` after the top-level statements of ``module`` that define the names they use, and no others:
    the parser needs ``argparse`` and ``datetime``, and not ``ray``."""
    needed = _names(statements)
    chosen: set[ast.stmt] = set()
    candidates = [node for node in module.body if not isinstance(node, ast.If)]
    while found := [node for node in candidates if node not in chosen and needed & _defines(node)]:
        chosen.update(found)
        needed |= _names(found)
    return [node for node in candidates if node in chosen] + statements


def _names(statements: Iterable[ast.stmt]) -> set[str]:
    return {node.id for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Name)}


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def _run(statements: list[ast.stmt], path: Path, **names: Any) -> dict[str, Any]:
    """Execute upstream's statements. ``optimize=0``: its checks are asserts, and ``python -O`` must not drop them."""
    light = [node for node in statements if isinstance(node, ast.ImportFrom) and node.module == HELPERS]
    namespace = {"__name__": MODULE, **_import_alone(light), **names}
    rest = [node for node in statements if node not in light]
    exec(compile(ast.Module(body=rest, type_ignores=[]), str(path), "exec", optimize=0), namespace)
    return namespace


def _import_alone(imports: list[ast.ImportFrom]) -> dict[str, Any]:
    """What these ``from openrlhf.utils.config import ...`` bind, from that file alone, without its heavy package."""
    if not imports:
        return {}
    source = _find_source(MODULE).parents[1] / "utils" / "config.py"
    helpers = runpy.run_path(str(source))
    return {alias.asname or alias.name: helpers[alias.name] for node in imports for alias in node.names}


def _where(error: BaseException, path: Path) -> str:
    """The line of upstream's that raised ``error``, with its number."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path.name}:{lines[-1].lineno}: {lines[-1].line}" if lines else path.name


def _unexpected(path: Path, what: str) -> ConfigError:
    try:
        version = importlib.metadata.version("openrlhf")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    known = ", ".join(SUPPORTED["openrlhf"])
    return ConfigError(f"{path}: {what}; found openrlhf {version}, this plugin knows {known}: install one of these")
