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
    out = tmp_path / "out"
    return Namespace(
        out=out, record=out / "study.json", seeds=[0, 1], variants=["GOPO"], updates=16, goals=6, jobs=2, search=False
    )


@pytest.mark.stack
def test_every_variant_is_a_run_that_the_checks_accept(study, args):
    pytest.importorskip("openrlhf")
    from openrlhf_gopo.cli import train_gopo
    from openrlhf_gopo.runtime import checks

    for model in ("warm_responder", "warm_expert"):
        (args.out / "models" / model).mkdir(parents=True)
    for variant in study.VARIANTS:
        for rates in (study.rates_of(variant), *study.GRID[1 if "single level" in variant else 2]):
            flags = study.command(variant, rates, 3, args.out / "run", args)
            assert flags[1:3] == ["-m", "openrlhf.cli.train_gopo"]
            parsed, config = train_gopo.parse(flags[3:])
            checks.check_flags(parsed, config)
            assert (config.policy == "single_level") == ("single level" in variant)
            assert (parsed.actor.adam.lr, parsed.expert.adam.lr) == (float(rates[-1]), float(rates[0]))
            assert parsed.train.seed == 3


@pytest.fixture
def finished(study, args):
    """What two seeds of GOPO leave, from a script that chooses at random to one that chooses well; the gains."""
    env = load_environment("shop")
    goals, gains = env.goals("heldout")[: args.goals], []
    models = args.out / "models"
    (models / "warm_single").mkdir(parents=True)
    for marker in (models / "warmed", models / "warm_single" / "config.json"):
        marker.write_text("")
    for seed in args.seeds:
        out = args.out / f"gopo_lr3e-4_1e-4_seed{seed}"
        (out / "results" / "eval").mkdir(parents=True)
        means = []
        for step, skill in ((0, 0.0), (16, 1.0)):
            played = [play(env, goal, 0, seed, ScriptedPolicy(skill, slip=0.0)) for goal in goals]
            for trajectory in played:
                append_trajectory(out / "results" / "eval" / f"step_{step:05d}.jsonl", trajectory)
            means.append(sum(t.rewards["tse"] for t in played) / len(played))
        study.done(out).write_text("")
        gains.append(means[1] - means[0])
    return gains


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_says_what_the_runs_did(study, args, finished):
    study.study(args)
    row = args.record.with_suffix(".md").read_text().splitlines()[5]
    cells = cells_of(row)
    assert cells[:2] == ["GOPO", "2"]
    assert "nan" not in row
    assert cells[4].startswith(f"{sum(finished) / 2:+.1f} [")
    assert cells[5] == ", ".join(f"{gain:+.1f}" for gain in finished)
    assert cells[6] == ""
    assert args.record.with_suffix(".png").stat().st_size > 10_000


def test_what_the_record_holds_is_not_run_again(study, args, finished, monkeypatch):
    study.study(args)
    monkeypatch.setattr(study, "run", lambda name, *rest, **environment: pytest.fail(f"{name} was started"))
    before = args.record.read_text()
    study.study(args)
    assert args.record.read_text() == before


def test_rows_are_compared_with_gopo_seed_by_seed(study, args):
    def row(variant, seed, after):
        means = {"esndcg": 0.5, "gre": 0.9, "tse_before": 30.0}
        return {"variant": variant, "seed": seed, "tse": after, **means}

    gopo, grpo = (40.0, 46.0, 50.0), (38.0, 47.0, 46.0)  # minus GOPO's: -2, +1, -4
    rows = [row("GOPO", seed, after) for seed, after in enumerate(gopo)]
    rows += [row("GRPO, single level", seed, after) for seed, after in reversed(list(enumerate(grpo)))]
    study.write(args, [*rows, row("GRPO, single level", 9, 99.0)])  # a seed that GOPO lacks has no part in it
    first, second = args.record.with_suffix(".md").read_text().splitlines()[5:7]
    assert cells_of(first)[:2] == ["GRPO, single level", "4"]
    assert cells_of(first)[5] == "+8.0, +17.0, +16.0, +69.0"
    # mean -5/3, s = 2.517, half width 4.303 * 2.517 / sqrt(3) = 6.25
    assert cells_of(first)[6] == "-1.7 [-7.9, +4.6]"
    assert cells_of(second)[6] == ""


def test_a_record_of_other_sizes_is_not_added_to(study, args, finished):
    study.study(args)
    args.goals = 7
    with pytest.raises(SystemExit, match="made with --goals 6, not 7"):
        study.study(args)


def test_a_run_that_fails_names_its_log(study, tmp_path):
    out = tmp_path / "runs" / "one"
    with pytest.raises(SystemExit, match=r"one run: failed with status 3; see .*one.log"):
        study.run("one run", ["bash", "-c", "echo why; exit 3"], out, out / "done")
    assert out.with_name("one.log").read_text() == "why\n"


def test_an_interval_over_seeds(study):
    # mean 3, s = 1, t(0.975; 2) = 4.303, half width 4.303 / sqrt(3) = 2.484
    mean, low, high = study.interval([2.0, 3.0, 4.0])
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - 2.484, 3.0 + 2.484), abs=1e-3)
