"""Checkpoint sets on disk: the folders of all roles at one step, and the manifest that makes them one checkpoint.

A set is complete once ``TAG.manifest.json`` exists. It is written last and atomically, and names every file with its
size, so that a kill at any moment leaves the earlier sets whole and at most one set without a manifest. A set that
goes loses its manifest first. Standard library only.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openrlhf_gopo.errors import CheckpointError

SUFFIX = ".manifest.json"
MARKER = "set.json"  # in every folder of a set: tells a folder of another set of the same tag
START = "start"  # the tag of a run's beginning: a set without folders
BEST = "best_"  # upstream's prefix of the best set's tag
LAYOUT = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointSet:
    """One manifest. ``sequence`` orders sets by when they were written; steps do not, a folder may see several runs.

    ``parts``: folder relative to the root -> file -> bytes. ``metric``: evaluation at that time, for retention.
    """

    tag: str
    sequence: int
    step: int
    metric: float | None = None
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    layout: int = LAYOUT

    @property
    def best(self) -> bool:
        """True for the set that keeps the best evaluation."""
        return self.tag.startswith(BEST)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(size for files in self.parts.values() for size in files.values())


class CheckpointFolder:
    """The sets below ``--ckpt.path``; every method may raise CheckpointError with path and remedy.

    Args:
        max_num: regular sets to keep. max_mem: GiB that all sets may take.
    """

    def __init__(self, root: str | os.PathLike[str], max_num: int = 3, max_mem: float = float("inf")) -> None:
        self.root, self.max_num, self.max_mem = Path(root), max_num, max_mem

    def sets(self) -> list[CheckpointSet]:
        """All sets with a readable manifest, the newest last; others are named in a warning."""
        found = []
        for path in sorted(self.root.glob(f"*{SUFFIX}")):
            try:
                record = json.loads(path.read_bytes())
                read = CheckpointSet(**record)
                if read.layout != LAYOUT or read.tag + SUFFIX != path.name:
                    raise ValueError(f"layout {read.layout} of {read.tag}, expected {LAYOUT}")
                found.append(read)
            except (OSError, ValueError, TypeError) as error:
                logger.warning("%s: skipped: not a manifest of this version (%s)", path, error)
        return sorted(found, key=lambda s: s.sequence)

    def newest(self) -> CheckpointSet | None:
        """The newest complete set. Incomplete and mixed ones are named in a warning each."""
        for tag in self._without_manifest():
            logger.warning(
                "%s: checkpoint %s skipped: it has no manifest, its writing was cut short (or an older version wrote "
                "it, which cannot be resumed)",
                self.root,
                tag,
            )
        for candidate in reversed(self.sets()):
            problem = self.problem(candidate)
            if problem is None:
                return candidate
            logger.warning("%s: checkpoint %s skipped: %s", self.root, candidate.tag, problem)
        return None

    def problem(self, candidate: CheckpointSet) -> str | None:
        """Why the set is not complete, or None."""
        for part, files in candidate.parts.items():
            folder = self.root / part
            for name, size in files.items():
                path = folder / name
                if not path.is_file():
                    return f"incomplete: {path} is missing"
                if path.stat().st_size != size:
                    return f"incomplete: {path} has {path.stat().st_size} bytes, its manifest says {size}"
            try:
                owner = json.loads((folder / MARKER).read_bytes())["id"]
            except (OSError, ValueError, KeyError, TypeError):
                owner = None
            if owner != candidate.id:
                return f"mixed: {folder} belongs to another set"
        return None

    def _without_manifest(self) -> list[str]:
        """Tags that only folders know, in the roles' layout ROLE/_actor/TAG."""
        tags = {p.name for kind in ("_actor", "_critic") for p in self.root.glob(f"*/{kind}/*") if p.is_dir()}
        return sorted(tag for tag in tags if not (self.root / (tag + SUFFIX)).is_file())

    def start(self, state: dict[str, Any], flags: dict[str, Any]) -> CheckpointSet:
        """Mark the beginning of a run: until its first checkpoint, resuming means to start over from here."""
        with self._writing(START):
            self.root.mkdir(parents=True, exist_ok=True)
            return self._publish(CheckpointSet(START, self._sequence(), 0, state=state, flags=flags))

    def prepare(self, tag: str, parts: Iterable[str]) -> None:
        """Make way for a set: what is there under its tag, of another run or of a cut-off attempt, goes."""
        with self._writing(tag):
            self._unpublish(tag)
            for part in parts:
                if (self.root / part).exists():
                    shutil.rmtree(self.root / part)

    def commit(
        self,
        tag: str,
        step: int,
        parts: Iterable[str],
        *,
        metric: float | None = None,
        state: dict[str, Any] | None = None,
        flags: dict[str, Any] | None = None,
    ) -> CheckpointSet:
        """Declare the folders ``parts``, all written by now, a complete set; then let old sets go."""
        new = CheckpointSet(tag, self._sequence(), step, metric, {}, state or {}, flags or {})
        with self._writing(tag):
            for part in parts:
                folder = self.root / part
                if not folder.is_dir() or not any(folder.iterdir()):
                    raise CheckpointError(
                        f"--ckpt.path {self.root}: the driver does not see {folder}, which a model actor has written; "
                        "give a folder that all nodes share"
                    )
                (folder / MARKER).write_text(json.dumps({"id": new.id, "tag": tag}))
                new.parts[part] = {}
                for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                    _sync(path)
                    new.parts[part][str(path.relative_to(folder))] = path.stat().st_size
                _sync(folder)
            self._publish(new)
        self._retire(new)
        return new

    def _publish(self, new: CheckpointSet) -> CheckpointSet:
        path = self.root / (new.tag + SUFFIX)
        draft = path.with_suffix(".tmp")
        with draft.open("w") as file:
            json.dump(asdict(new), file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync(self.root)
        return new

    def _unpublish(self, tag: str) -> None:
        (self.root / (tag + SUFFIX)).unlink(missing_ok=True)
        if self.root.is_dir():
            _sync(self.root)

    def _sequence(self) -> int:
        return 1 + max((s.sequence for s in self.sets()), default=0)

    def _retire(self, new: CheckpointSet) -> None:
        """Remove whole sets beyond the limits, never ``new`` and never the newest best.

        Upstream's order: those without a metric first, then the worst, then the oldest.
        """
        sets = [s for s in self.sets() if s.tag != START]
        best = [s for s in sets if s.best]
        for old in best[:-1]:
            self._remove(old)
        regular = sorted(
            (s for s in sets if not s.best and s.tag != new.tag),
            key=lambda s: (s.metric is not None, s.metric or 0.0, s.sequence),
        )
        kept = max(self.max_num, 1) - (not new.best)
        total = sum(s.size for s in (*regular, *best[-1:])) + (0 if new.best else new.size)
        while regular and (len(regular) > kept or total > self.max_mem * 2**30):
            total -= regular[0].size
            self._remove(regular.pop(0))

    def _remove(self, old: CheckpointSet) -> None:
        self._unpublish(old.tag)
        for part in old.parts:
            shutil.rmtree(self.root / part, ignore_errors=True)
        logger.info("checkpoint %s removed (--ckpt.max_num, --ckpt.max_mem)", old.tag)

    def _writing(self, tag: str) -> _Writing:
        return _Writing(self, tag)


class _Writing:
    """Turns the operating system's errors into one that says what is left and what to do."""

    def __init__(self, folder: CheckpointFolder, tag: str) -> None:
        self.folder, self.tag = folder, tag

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(unwritten(self.folder, self.tag, str(error))) from error


def unwritten(folder: CheckpointFolder, tag: str, why: str) -> str:
    """The message about a set that could not be written."""
    left = [s.tag for s in folder.sets() if s.tag not in (START, tag)]
    there = folder.root
    while not there.is_dir() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free / 2**30
    return (
        f"--ckpt.path {folder.root}: checkpoint {tag} could not be written: {why} ({free:.2f} GiB free); complete and "
        f"untouched: {', '.join(left) or 'none'}; make room or name another folder, then go on with --ckpt.load_enable"
    )


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
