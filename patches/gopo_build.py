"""The build backend: setuptools, plus our modules inside ``openrlhf`` for editable installs too.

A plain wheel carries ``openrlhf/cli/train_gopo.py`` and its like as ordinary files. An editable wheel of setuptools
only carries an import finder, and that finder does not reach modules two levels inside a package that another
distribution owns (``openrlhf.trainer.ppo_utils``). These modules are re-exports of three lines that never change, so an
editable wheel simply carries them as files as well.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - a backend is its hooks

PATCHES = Path(__file__).parent


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    files = {path.relative_to(PATCHES).as_posix(): path.read_bytes() for path in PATCHES.glob("openrlhf/**/*.py")}
    _add(Path(wheel_directory, name), files)
    return name


def _add(wheel: Path, files: dict[str, bytes]) -> None:
    """Rewrite ``wheel`` with ``files`` in it and in its RECORD, so that pip also removes them on uninstall."""
    with zipfile.ZipFile(wheel) as old:
        content = {info.filename: old.read(info) for info in old.infolist()}
    record = next(name for name in content if name.endswith(".dist-info/RECORD"))
    content[record] = "".join(_record_line(*item) for item in files.items()).encode() + content[record]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in {**files, **content}.items():
            new.writestr(name, data)


def _record_line(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    return f"{name},sha256={digest},{len(data)}\n"
