"""Installing and removing this package beside a really installed OpenRLHF: no file of OpenRLHF changes.

Each test has a virtual environment of its own. OpenRLHF's files are in it, with their record; everything else comes
from the environment that runs the tests, through a ``.pth`` file. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sysconfig
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from setuptools.config.setupcfg import read_configuration

ROOT = Path(__file__).parents[2]
OURS = [
    "cli/eval_gopo.py",
    "cli/train_gopo.py",
    "cli/train_gopo_offline.py",
    "trainer/gopo_trainer.py",
    "trainer/ppo_utils/gopo_experience_maker.py",
]
IMPORTS = """
import importlib.util, sys
import openrlhf.cli, openrlhf.trainer
import openrlhf_gopo
for name in ("eval_gopo", "train_gopo", "train_gopo_offline"):
    assert importlib.util.find_spec("openrlhf.cli." + name), name
for name in ("openrlhf.trainer.gopo_trainer",):
    assert importlib.util.find_spec(name), name
# openrlhf.trainer.ppo_utils imports torch: look for our module in it without importing it
package = importlib.util.find_spec("openrlhf.trainer.ppo_utils")
from importlib.machinery import PathFinder
spec = PathFinder.find_spec("openrlhf.trainer.ppo_utils.gopo_experience_maker", package.submodule_search_locations)
assert spec and spec.origin.startswith(sys.prefix), spec
print(openrlhf_gopo.__file__)
"""


def test_setup_cfg_lists_every_package() -> None:
    """``find:`` cannot be used, because some of our modules live in another package's name space."""
    listed = read_configuration(ROOT / "setup.cfg")["options"]["packages"]
    folders = {path.parent for top in ("openrlhf_gopo", "patches/openrlhf") for path in ROOT.glob(f"{top}/**/*.py")}
    names = {".".join(f.relative_to(ROOT).parts).removeprefix("patches.") for f in folders}
    assert sorted(listed) == sorted(names)


def test_only_new_modules_are_added_to_openrlhf() -> None:
    """The wheel would overwrite a file of OpenRLHF of the same name, and an ``__init__.py`` above all."""
    added = [path.relative_to(ROOT / "patches/openrlhf").as_posix() for path in ROOT.glob("patches/openrlhf/**/*.py")]
    assert sorted(added) == sorted(OURS)
    assert not set(added) & {path.removeprefix("openrlhf/") for path in _recorded("openrlhf") if path not in _ours()}


@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_install_and_uninstall(tmp_path: Path, editable: bool) -> None:
    python, site = _environment(tmp_path / "venv")
    before = _hashes(site / "openrlhf")
    source = ROOT if editable else _copy(tmp_path / "source")  # a plain build writes into the source folder
    _pip(python, "install", "--no-deps", "--no-build-isolation", *(["-e"] if editable else []), str(source))

    after = _hashes(site / "openrlhf")
    assert {path: after[path] for path in before} == before
    assert sorted(after.keys() - before.keys()) == sorted(OURS)
    where = subprocess.run([python, "-c", IMPORTS], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(ROOT if editable else site)
    if not editable:
        assert _data_files(site / "openrlhf_gopo") == _data_files(ROOT / "openrlhf_gopo")

    _pip(python, "uninstall", "-y", "openrlhf-gopo")
    assert _hashes(site / "openrlhf") == before
    assert not (site / "openrlhf_gopo").exists()
    subprocess.run([python, "-c", "import openrlhf.cli, openrlhf.trainer"], check=True, cwd=tmp_path)


def _environment(folder: Path) -> tuple[str, Path]:
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    _copy_openrlhf(site)
    (site / "~stack.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after the environment's own packages
    return str(folder / "bin" / "python"), site


def _copy_openrlhf(site: Path) -> None:
    for name in _recorded("openrlhf"):
        source = Path(str(distribution("openrlhf").locate_file(name)))
        if name.startswith("openrlhf") and name not in _ours() and "__pycache__" not in name and source.is_file():
            target = site / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _recorded(name: str) -> list[str]:
    try:
        return [path.as_posix() for path in distribution(name).files or []]
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")


def _ours() -> set[str]:
    return {f"openrlhf/{name}" for name in OURS}


def _copy(folder: Path) -> Path:
    skip = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info", "runs")
    for name in ("openrlhf_gopo", "patches"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    return folder


def _pip(python: str, *args: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def _hashes(package: Path) -> dict[str, str]:
    return {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _data_files(package: Path) -> list[str]:
    files = (path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    return sorted(path.relative_to(package).as_posix() for path in files)
