"""What nobody may slip in: code out of data, paths out of data, commands to a terminal. See also users/test_key.py."""

from __future__ import annotations

import ast
import gzip
import io
import json
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from openrlhf_gopo.cli import logs, sop
from openrlhf_gopo.cli.sop_walk import walk
from openrlhf_gopo.envs import load_environment, reading
from openrlhf_gopo.errors import DataError, DialogueError, GopoError, visible
from openrlhf_gopo.evaluation.records import append_trajectory, read_trajectories
from openrlhf_gopo.evaluation.report import write_results
from openrlhf_gopo.rewards.joint import score
from openrlhf_gopo.sop import Sop, load_sop
from openrlhf_gopo.types import Goal, StopReason, Strategy, Trajectory, Turn

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "envs"

# -- code ----------------------------------------------------------------------------------------------------------

# What can run what it reads -> where it may stand, how often, and why.
ALLOWED = {
    ("openrlhf_gopo/envs/checker.py", "pickle.loads"): (1, "of what it has just dumped itself: goals must travel"),
    ("openrlhf_gopo/envs/shop_texts.py", "yaml.load"): (1, "with a subclass of SafeLoader, of a file of this package"),
    ("openrlhf_gopo/runtime/upstream/cli.py", "exec"): (
        1,
        "upstream's installed module, which the run executes anyway",
    ),
    ("openrlhf_gopo/runtime/upstream/cli.py", "runpy.run_path"): (1, "the same"),
    ("openrlhf_gopo/runtime/upstream/cli.py", "compile"): (1, "the same"),
    ("openrlhf_gopo/platform/__main__.py", "runpy.run_module"): (1, "the program that the user names"),
    # Over a socket in a folder of this user's alone (mode 700).
    ("openrlhf_gopo/platform/forks.py", "runpy.run_path"): (1, "the worker script that Ray names"),
    # Both come over a socket in a folder that is this user's alone.
    ("openrlhf_gopo/platform/forks.py", "exec"): (1, "the line that multiprocessing starts a child with"),
    ("openrlhf_gopo/plugins.py", "spec.loader.exec_module"): (1, "path/to/file.py:Class, named by the user"),
    ("openrlhf_gopo/platform/imports.py", "loader.exec_module"): (0, "wraps the import of upstream's modules"),
    # Upstream loads the same paths of --actor.model_name_or_path with it, so a run trusts them in any case, and a dry
    # run that did not would refuse models that train.
    ("openrlhf_gopo/runtime/requests.py", "trust_remote_code"): (1, "a model that the user names, as upstream does"),
    ("openrlhf_gopo/runtime/memory.py", "trust_remote_code"): (2, "the same"),
}
CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    ),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "dill.loads", "joblib.load"),
    *("torch.load", "torch.hub.load", "numpy.load", "np.load", "cloudpickle.loads", "ray.cloudpickle.loads"),
    *("runpy.run_path", "runpy.run_module", "tarfile.open", "shutil.unpack_archive", "archive.extractall"),
    "archive.extract",
}


def dangerous(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        named = {k.arg: ast.unparse(k.value) for k in node.keywords}
        safe = name.endswith(".load") and named.get("weights_only") == "True"
        if name in CALLS and not safe:
            yield name
        if name.endswith(("loader.exec_module", ".extractall", ".unsafe_load")) and name not in CALLS:
            yield name
        if "trust_remote_code" in named and named["trust_remote_code"] != "False":
            yield "trust_remote_code"
        if named.get("shell") not in (None, "False"):
            yield "shell"


def test_nothing_runs_what_it_reads_but_for_a_reason() -> None:
    found: Counter[tuple[str, str]] = Counter()
    for top in ("openrlhf_gopo", "patches"):
        for path in ROOT.glob(f"{top}/**/*.py"):
            for name in dangerous(path.read_text(encoding="utf-8")):
                found[path.relative_to(ROOT).as_posix(), name] += 1
    assert {place: count for place, count in found.items() if count > ALLOWED.get(place, (0, ""))[0]} == {}


@pytest.mark.parametrize(
    "line",
    [
        *("eval(x)", "pickle.loads(b)", "torch.load(p)", "torch.load(p, weights_only=False)", "yaml.load(t, Loader=L)"),
        *("A.from_pretrained(p, trust_remote_code=True)", "subprocess.run(c, shell=True)", "z.extractall(d)"),
    ],
)
def test_the_search_finds(line: str) -> None:
    assert list(dangerous(line))


def test_the_search_lets_safe_loads_pass() -> None:
    assert not list(dangerous("torch.load(p, weights_only=True)\nyaml.safe_load(t)\nrun(c, shell=False)\n"))


def test_the_yaml_loader_of_the_shops_texts_is_a_safe_one() -> None:

    source = (ROOT / "openrlhf_gopo/envs/shop_texts.py").read_text(encoding="utf-8")
    assert set(re.findall(r"yaml\.(\w*Loader)|\"(\w*Loader)\"", source)) == {("SafeLoader", ""), ("", "CSafeLoader")}


# -- paths ---------------------------------------------------------------------------------------------------------

PATHS = [
    "../../escaped",
    "/tmp/escaped",
    "a/b",
    "..",
    "nul\x00byte",
    "con.txt:stream",
    "x" * 5000,
    "",
    "\ud800",
    "~",
    "$HOME",
]


def test_no_name_in_data_becomes_a_file_name(tmp_path: Path) -> None:
    results = tmp_path / "deep" / "results"
    told = []
    for name in PATHS:
        goal = Goal(name, name, name, {name: 1.0}, {name: name}, {name: name})
        turn = Turn(name, (name,), name, name, name, (name,), {name: 3}, {name: 1.0}, (name,), (), 0.5)
        told.append(Trajectory(goal, 0, 0, [turn], StopReason.CLOSED, error=name, user=name))
        told[-1].rewards = score(told[-1])
    written = write_results(results, {"before": told, "after": told})
    for one in told:
        append_trajectory(results / "trajectories.jsonl", one)
    assert [one.goal.id for one in read_trajectories(results / "trajectories.jsonl")] == PATHS
    files = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {*written.values(), results / "trajectories.jsonl"}


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "val.json/../../outside.json"])
def test_an_archive_is_read_by_its_own_name_and_nothing_is_unpacked(tmp_path: Path, name: str) -> None:
    here = tmp_path / "in" / "data"
    shutil.copytree(FIXTURES / "multiwoz_fixture", here)
    good = (here / "val.json").read_bytes()
    (here / "val.json").unlink()
    with zipfile.ZipFile(here / "val.json.zip", "w") as archive:
        archive.writestr(name, good)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=r"val\.json\.zip: not a zip file that holds val\.json"):
        load_environment("multiwoz", str(here))
    with zipfile.ZipFile(here / "val.json.zip", "w") as archive:
        archive.writestr(name, b"no")
        archive.writestr("val.json", good)
    assert load_environment("multiwoz", str(here)).goals("heldout") is not None
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_unpacks_to_gigabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_UNPACKED", 1_000_000)
    shutil.copytree(FIXTURES / "multiwoz_fixture", tmp_path / "multiwoz")
    shutil.copytree(FIXTURES / "abcd_fixture", tmp_path / "abcd")
    (tmp_path / "multiwoz" / "val.json").unlink()
    with zipfile.ZipFile(tmp_path / "multiwoz" / "val.json.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("val.json", b" " * 5_000_000)
    (tmp_path / "abcd" / "abcd_v1.1.json.gz").write_bytes(gzip.compress(b" " * 5_000_000))
    for name, file in (("multiwoz", "val.json.zip"), ("abcd", "abcd_v1.1.json.gz")):
        with pytest.raises(DataError, match=f"{file}: unpacks to more than 1000000 bytes"):
            load_environment(name, str(tmp_path / name))


@pytest.mark.parametrize("junk", [b"", b"PK\x03\x04", b"PK\x05\x06" + b"\xff" * 18, b"\x1f\x8b\x08\x00junk"])
def test_what_is_no_archive_is_refused(tmp_path: Path, junk: bytes) -> None:
    shutil.copytree(FIXTURES / "multiwoz_fixture", tmp_path / "multiwoz")
    shutil.copytree(FIXTURES / "abcd_fixture", tmp_path / "abcd")
    (tmp_path / "multiwoz" / "val.json").unlink()
    (tmp_path / "multiwoz" / "val.json.zip").write_bytes(junk)
    (tmp_path / "abcd" / "abcd_v1.1.json.gz").write_bytes(junk)
    for name, file in (("multiwoz", "val.json.zip"), ("abcd", "abcd_v1.1.json")):
        with pytest.raises(DataError, match=file):
            load_environment(name, str(tmp_path / name))


# -- terminals -----------------------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r\x7f\u202egnp.exe\u2066"


def harmless(text: str) -> bool:
    return not any((c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" or c in "\u202e\u2066" for c in text)


def test_visible() -> None:
    assert visible("é\n\t漢 🙂") == "é\n\t漢 🙂"
    assert visible("\x1b[31m\x9b\r\x00") == r"\x1b[31m\x9b\x0d\x00"
    assert visible("\u202e\ud800") == r"\u202e\ud800"
    assert harmless(visible(ESCAPES))
    assert not harmless(ESCAPES)


def test_an_error_as_text_holds_no_escapes() -> None:
    for kind in (DataError, DialogueError, GopoError):
        assert harmless(str(kind(f"line 1: {ESCAPES}")))
        assert str(kind(f"{ESCAPES}")) == visible(ESCAPES)


def test_logs_with_escapes_print_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turn = {"user": ESCAPES, "strategy": "a", "reply": ESCAPES, "completed": [ESCAPES]}
    goal = {"intent": "i", "context": ESCAPES, "subgoals": {"x": 1.0}, ESCAPES: 1}
    record = {
        "id": "1",
        "source": "s",
        "language": ESCAPES,
        "goal": goal,
        "turns": [turn],
        "outcome": {"stop": ESCAPES},
    }
    path = tmp_path / "l.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(SystemExit):
        logs.main(["validate", str(path)])
    shown = capsys.readouterr()
    assert "owned" in shown.out
    assert harmless(shown.out + shown.err)


def test_walking_prints_no_escapes() -> None:
    out = io.StringIO()
    strategies = [Strategy("a", "A", f"Say {ESCAPES}"), Strategy("b", "B", "End")]
    walk(Sop(("a", "b"), terminal=("b",)), strategies, io.StringIO(f"{ESCAPES}\n+{ESCAPES}\n1\nq\n"), out)
    assert "owned" in out.getvalue()
    assert harmless(out.getvalue())


@pytest.mark.parametrize("field", ["id", "name", "description"])
def test_an_sop_with_escapes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str) -> None:
    entry = {"id": "a", "name": "A", "description": "Do a."} | {field: "a\x1b[2Jb"}
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps({"name": "s", "strategies": [entry]}))  # JSON's escapes are YAML's
    with pytest.raises(DataError, match=rf"s\.yaml:1: strategies\.0\.{field}: .*control characters; leave them out"):
        load_sop(path)
    with pytest.raises(SystemExit):
        sop.main([str(path)])
    assert harmless(capsys.readouterr().err)
