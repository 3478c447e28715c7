"""The study of examples/star: its AUC against a count of pairs, and that TSE cannot see the answers."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.logs import star, to_trajectory
from openrlhf_gopo.logs.schema import Dialogue
from openrlhf_gopo.rewards.tse import tse

ROOT = Path(__file__).parents[1]
FIXTURE = Path(__file__).parent / "envs" / "star_fixture"
REAL = Path(os.environ.get("GOPO_STAR_DATA") or Path(__file__).parents[2] / "shared" / "data" / "star")
FINAL = (0.2, 0.25, 0.5, 0.05)  # the weights of envs/star.py


@pytest.fixture(scope="module")
def modules():
    """(tse_scores, tse_validity), imported as when run as a script."""
    sys.path.insert(0, str(ROOT / "examples" / "star"))
    try:
        yield importlib.import_module("tse_scores"), importlib.import_module("tse_validity")
    finally:
        sys.path.pop(0)
        for name in ("tse_scores", "tse_validity"):
            sys.modules.pop(name, None)


def changed(root, change):
    """The small folder whose records went through ``change(index, record)``."""
    shutil.copytree(FIXTURE, root, dirs_exist_ok=True)
    path = root / "dialogues_01.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for index, record in enumerate(records):
        change(index, record)
    path.write_text("\n".join(json.dumps(record) for record in records))
    return root


def refuse_every_third(index, record):
    """After the first refusal the user gives up, and says that there was no table."""
    if index % 3 == 0:
        pity = {"Agent": "User", "Action": "utter", "Text": "What a pity."}
        record["Events"] = [*record["Events"][:6], pity, record["Events"][-1]]
        record["UserQuestionnaire"][0]["Answer"] = False


def values(folder):
    """TSE by dialogue."""
    logged = (Dialogue.model_validate_json(json.dumps(record)) for _, record in star.records(folder))
    return {dialogue.id: tse(to_trajectory(dialogue)) for dialogue in logged}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 2)), min_size=1, max_size=30))
def test_auc_is_a_count_of_pairs(modules, rows):
    """Few distinct scores, so most examples have ties."""
    scores, done, groups = (np.array(column) for column in zip(*rows, strict=True))
    scores = scores.astype(float)
    pairs = [(a, b) for a in range(len(rows)) for b in range(len(rows)) if done[a] and not done[b]]

    def share(kept):
        won = [1.0 if scores[a] > scores[b] else 0.5 if scores[a] == scores[b] else 0.0 for a, b in kept]
        return sum(won) / len(won) if won else math.nan

    _, study = modules
    assert study.auc(scores, done) == pytest.approx(share(pairs), nan_ok=True)
    within = share([(a, b) for a, b in pairs if groups[a] == groups[b]])
    assert study.auc_within(scores, done, groups) == pytest.approx(within, nan_ok=True)


def test_auc_is_scipys(modules):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    for _ in range(20):
        scores, done = rng.integers(0, 12, size=80).astype(float), rng.random(80) < 0.7
        u = stats.mannwhitneyu(scores[done], scores[~done]).statistic
        assert modules[1].auc(scores, done) == pytest.approx(u / (done.sum() * (~done).sum()))


def test_the_interval_is_that_of_a_share(modules):
    """Of 400 coin flips with 80 heads: 0.2 with a standard error of 0.02."""
    flips = np.arange(400) < 80
    value, low, high = modules[1].interval(lambda i: float(flips[i].mean()), 400, 2000)
    assert value == pytest.approx(0.2)
    assert low == pytest.approx(0.2 - 1.96 * 0.02, abs=0.005)
    assert high == pytest.approx(0.2 + 1.96 * 0.02, abs=0.005)


def test_the_answers_are_no_input_of_tse(tmp_path, modules):
    def flip(index, record):
        for answer in record["UserQuestionnaire"]:
            answer["Answer"] = not answer["Answer"]

    mixed = changed(tmp_path / "mixed", refuse_every_third)
    before, asked = values(mixed), {c.trajectory.goal.id: c.done for c in modules[0].cases(mixed)[0]}
    path = mixed / "dialogues_01.jsonl"
    for what in (flip, lambda _, record: record.update(UserQuestionnaire=[])):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for index, record in enumerate(records):
            what(index, record)
        path.write_text("\n".join(json.dumps(record) for record in records))
        assert values(mixed) == before
        if what is flip:  # the flip was read
            after = {c.trajectory.goal.id: c.done for c in modules[0].cases(mixed)[0]}
            assert after == {name: not answer for name, answer in asked.items()}
    assert len(set(before.values())) > 1


def test_the_answers_are_no_input_of_tse_on_the_real_data(tmp_path):
    """The wizard's answers too; on the last 121 dialogues of the folder, as all of them take a minute."""
    if not REAL.is_dir():
        pytest.skip(f"no STAR data at {REAL}; set GOPO_STAR_DATA to a clone of the STAR repository")
    sources = [*REAL.glob("dialogues/*.json"), *sorted(REAL.glob("dialogues*.jsonl"))]
    lines = [(path, path.read_text(encoding="utf-8")) for path in sources]
    texts = [part for path, text in lines for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    records = [json.loads(text) for text in texts[-121:]]
    found = []
    for turn in ("as they are", "flipped"):
        for name in ("tasks", "apis"):
            (tmp_path / turn).mkdir(exist_ok=True)
            (tmp_path / turn / name).symlink_to(REAL / name)
        (tmp_path / turn / "dialogues_01.jsonl").write_text("\n".join(json.dumps(record) for record in records))
        found.append(values(tmp_path / turn))
        for answer in (a for r in records for q in ("User", "Wizard") for a in r[f"{q}Questionnaire"] or ()):
            answer["Answer"] = not answer["Answer"]
    assert found[0] == found[1]
    assert len(set(found[0].values())) > 10


def test_the_page_of_a_small_folder(tmp_path, modules):
    """Four of twelve users gave up after a refusal and said no: TSE tells them all, and so does the last strategy."""
    folder, out = changed(tmp_path / "data", refuse_every_third), tmp_path / "page.md"
    modules[1].main([str(folder), "--out", str(out), "--resamples", "50"])
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in out.read_text().splitlines() if "|" in line}
    cells = [cell.strip() for cell in rows["**TSE**"].strip("|").split("|")]
    assert cells[4:7] == ["1.000 [1.000, 1.000]"] * 3  # all; the halves of twelve dialogues may lack an answer
    assert rows["table_book"].startswith("| table_book | 12 | 4 | 0 | 1.000 ")
    assert (rows["all good news"], rows["none"]) == ("| all good news | 8 | 0 |", "| none | 0 | 4 |")
    assert "12 of them the user was asked" in out.read_text()
    assert "Secretly" not in out.read_text()


def test_a_folder_with_one_answer_only_gives_a_page_without_figures(modules, capsys):
    modules[1].main([str(FIXTURE), "--resamples", "5"])
    assert "| **TSE** | - | - | - | - | - | - |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["none"], "none: no such folder"),
        ([str(FIXTURE), "--resamples", "0"], "--resamples 0: give at least 1"),
        ([str(FIXTURE), "--ceiling"], "--ceiling"),  # not installed, or one answer only
    ],
)
def test_what_cannot_be_done_is_said(modules, capsys, arguments, why):
    with pytest.raises(SystemExit) as stopped:
        modules[1].main(arguments)
    assert stopped.value.code == 2
    assert why in capsys.readouterr().err


def test_nobody_was_asked(tmp_path, modules, capsys):
    folder = changed(tmp_path / "data", lambda _, record: record.update(UserQuestionnaire=[]))
    with pytest.raises(SystemExit):
        modules[1].main([str(folder)])
    assert "no dialogue has the user's answer" in capsys.readouterr().err


def test_weights_of_an_earlier_definition(tmp_path, modules):
    """All steps done and no outcome (by hand in tests/envs/test_star_outcome.py): before, P was 1."""
    scores, _ = modules
    found, _ = scores.cases(changed(tmp_path / "data", refuse_every_third))
    refused = next(case for case in found if not case.done)
    assert tse(refused.trajectory) == pytest.approx(50.0)
    assert scores.weighted_tse(refused.trajectory, (), scores.BEFORE) == pytest.approx(100.0)
    for case in found:
        mine = scores.weighted_tse(case.trajectory, case.trajectory.completed, FINAL)
        assert mine == pytest.approx(tse(case.trajectory))


def test_rates_are_learned_from_the_other_half(modules):
    """Key a: 2 of 3 taught say yes, with the prior 0.5: (2 + 0.5) / 4; b: (0 + 0.5) / 2; c: the prior."""
    keys, taught = list("aaabcab"), np.array([1, 1, 1, 1, 0, 0, 0], dtype=bool)
    done = np.array([1, 1, 0, 0, 1, 1, 1], dtype=bool)
    rates = modules[0].learned_rates(keys, done, taught)
    assert np.isnan(rates[:4]).all()
    assert rates[4:].tolist() == pytest.approx([0.5, 0.625, 0.25])
