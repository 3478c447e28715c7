"""examples/shop_cpu/study.py: every run it would start is a valid one, and its table says what the runs did."""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.evaluation.records import append_trajectory
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def study():
    file = Path(__file__).parents[1] / "examples" / "shop_cpu" / "study.py"
    spec = importlib.util.spec_from_file_location("study", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def args(tmp_path):
    return Namespace(models=tmp_path / "models", out=tmp_path / "out", seeds=[0, 1], updates=16, goals=6)


@pytest.mark.stack
def test_every_variant_is_a_run_that_the_checks_accept(study, args):
    pytest.importorskip("openrlhf")
    from openrlhf_gopo.cli import train_gopo
    from openrlhf_gopo.runtime import checks

    for model in ("warm_responder", "warm_expert"):
        (args.models / model).mkdir(parents=True)
    for variant in study.VARIANTS:
        for rates in (study.rates_of(variant), *study.GRID[1 if "single level" in variant else 2]):
            flags = study.command(variant, rates, 3, args.out / "run", args)
            assert flags[1:3] == ["-m", "openrlhf.cli.train_gopo"]
            parsed, config = train_gopo.parse(flags[3:])
            checks.check_flags(parsed, config)
            assert (config.policy == "single_level") == ("single level" in variant)
            assert (parsed.actor.adam.lr, parsed.expert.adam.lr) == (float(rates[-1]), float(rates[0]))
            assert parsed.train.seed == 3


def test_the_table_says_what_the_runs_did(study, args, capsys):
    """Two seeds of one policy, from a script that chooses at random to one that chooses well."""
    env = load_environment("shop")
    goals, gains = env.goals("heldout")[: args.goals], []
    for seed in args.seeds:
        out = study.folder(args, "GOPO", seed, study.rates_of("GOPO"))
        (out / "results" / "eval").mkdir(parents=True)
        means = []
        for step, skill in ((0, 0.0), (16, 1.0)):
            played = [play(env, goal, 0, seed, ScriptedPolicy(skill, slip=0.0)) for goal in goals]
            for trajectory in played:
                append_trajectory(out / "results" / "eval" / f"step_{step:05d}.jsonl", trajectory)
            means.append(sum(t.rewards["tse"] for t in played) / len(played))
        study.done(out).write_text("")
        gains.append(means[1] - means[0])
    study.write(args)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| GOPO |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "2"
    assert "nan" not in row
    assert cells[4].startswith(f"{sum(gains) / 2:+.1f} [")
    assert cells[5] == ", ".join(f"{gain:+.1f}" for gain in gains)
    assert (args.out / "study.png").stat().st_size > 10_000
    assert (args.out / "study.md").read_text().splitlines()[5] == row


def test_an_interval_over_seeds(study):
    # mean 3, s = 1, t(0.975; 2) = 4.303, half width 4.303 / sqrt(3) = 2.484
    mean, low, high = study.interval([2.0, 3.0, 4.0])
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - 2.484, 3.0 + 2.484), abs=1e-3)


def test_a_study_without_runs_is_a_short_error(study, args):
    args.out.mkdir()
    with pytest.raises(SystemExit, match="no finished run there"):
        study.write(args)


def test_models_that_are_not_there_are_named(study, args):
    with pytest.raises(SystemExit, match=r"no single_level.jsonl there; run examples/quickstart/run.sh with OUT="):
        study.warm_single(args)
