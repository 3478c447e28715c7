"""examples/shop_cpu/study.py: every run it would start is a valid one, and its table says what the runs did."""

import importlib
import json
from argparse import Namespace
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.evaluation.records import append_trajectory
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play

pytest.importorskip("scipy")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "shop_cpu")
    return importlib.import_module("study")


@pytest.fixture
def report(study):
    return importlib.import_module("study_report")


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
        (args.out / "models_seed3" / model).mkdir(parents=True)
    for variant in study.VARIANTS:
        for rates in (study.rates_of(variant), *study.GRID[1 if "single level" in variant else 2]):
            flags = study.command(variant, rates, 3, args.out / "run", args)
            assert flags[1:3] == ["-m", "openrlhf.cli.train_gopo"]
            parsed, config = train_gopo.parse(flags[3:])
            checks.check_flags(parsed, config)
            assert (config.policy == "single_level") == ("single level" in variant)
            assert (parsed.actor.adam.lr, parsed.expert.adam.lr) == (float(rates[-1]), float(rates[0]))
            assert parsed.train.seed == 3


def warm_started(args, *seeds):
    for models in (args.out / f"models_seed{seed}" for seed in seeds):
        (models / "warm_single").mkdir(parents=True)
        for marker in (models / "warmed", models / "warm_single" / "config.json"):
            marker.write_text("")


@pytest.fixture
def finished(study, args):
    """What two seeds of GOPO leave, from a script that chooses at random to one that chooses well; the gains."""
    env = load_environment("shop")
    goals, gains = env.goals("heldout")[: args.goals], []
    warm_started(args, *args.seeds)
    for seed in args.seeds:
        out = args.out / f"gopo_16updates_lr3e-4_1e-4_seed{seed}"
        (out / "results" / "eval").mkdir(parents=True)
        means = []
        for step, skill in ((0, 0.0), (16, 1.0)):
            played = [play(env, goal, 0, seed, ScriptedPolicy(skill, slip=0.0)) for goal in goals]
            for trajectory in played:
                for decoding in ("step", "greedy"):
                    append_trajectory(out / "results" / "eval" / f"{decoding}_{step:05d}.jsonl", trajectory)
            means.append(sum(t.rewards["tse"] for t in played) / len(played))
        update = {"rollout/tse": means[1], "expert/sampler_mismatch": 5e-7}
        (out / "results" / "metrics.jsonl").write_text(json.dumps(update) + "\n")
        study.done(out).write_text("")
        gains.append(means[1] - means[0])
    return gains


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def row(variant, seed, after, before=30.0):
    means = {"success": 0.6, "esndcg": 0.5, "gre": 0.9}
    starts = {"tse_before": before, "success_before": 0.3, "esndcg_before": 0.4, "gre_before": 0.8}
    sampled = {"tse": after, **means, **starts}
    return {"variant": variant, "seed": seed, **sampled, **{greedy(name): value for name, value in sampled.items()}}


def greedy(name):
    return name.replace("_before", "_greedy_before") if "_before" in name else f"{name}_greedy"


def test_the_table_says_what_the_runs_did(study, args, finished):
    study.study(args)
    text = args.record.with_suffix(".md").read_text()
    start, gopo = (cells_of(line) for line in text.splitlines()[5:7])
    runs = json.loads(args.record.read_text())["runs"]
    assert start[:2] == ["warm start, two levels", "2"]
    assert start[6] == ", ".join(f"{run['tse_before']:.1f}" for run in runs)
    assert gopo[:2] == ["GOPO", "2"]
    assert gopo[3].startswith(f"{sum(finished) / 2:+.1f} [")
    assert gopo[4] == ""
    assert gopo[6] == ", ".join(f"{run['tse']:.1f}" for run in runs)
    assert "nan" not in text
    assert args.record.with_suffix(".png").stat().st_size > 10_000


def test_a_run_whose_engine_computed_another_policy_is_not_recorded(study, args, finished):
    log = args.out / "gopo_16updates_lr3e-4_1e-4_seed1" / "results" / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"rollout/tse": 30.0, "expert/sampler_mismatch": 0.021}) + "\n")
    args.seeds = [1]
    with pytest.raises(SystemExit, match=r"seed1: sampler_mismatch 0\.02 is above"):
        study.study(args)
    assert not args.record.exists()


def test_a_warm_start_is_the_mean_of_what_its_runs_saw_of_it(report):
    runs = [row("GOPO", 0, 40.0, 28.0), row("GOPO", 1, 41.0, 31.0), row("GOPO, turns alone", 0, 42.0, 32.0)]
    rows = report.with_starts([*runs, row("GRPO, single level", 1, 43.0, 38.0)])
    starts = [(r["variant"], r["seed"], r["tse"], r["esndcg"], r["gre"]) for r in rows[:3]]
    assert starts == [
        ("warm start, single level", 1, 38.0, 0.4, 0.8),
        ("warm start, two levels", 0, 30.0, 0.4, 0.8),
        ("warm start, two levels", 1, 31.0, 0.4, 0.8),
    ]


def test_what_the_record_holds_is_not_run_again(study, args, finished, monkeypatch):
    study.study(args)
    monkeypatch.setattr(study, "run", lambda name, *rest, **environment: pytest.fail(f"{name} was started"))
    before = args.record.read_text()
    study.study(args)
    assert args.record.read_text() == before


def test_rows_are_compared_with_gopo_seed_by_seed(report):
    gopo, grpo = (40.0, 46.0, 50.0), (38.0, 47.0, 46.0)  # minus GOPO's: -2, +1, -4
    rows = [row("GRPO, single level", seed, after) for seed, after in enumerate(grpo)]
    rows += [row("GRPO, single level", 9, 99.0)]  # a seed that GOPO lacks has no part in it
    rows += [row("GOPO", seed, after) for seed, after in enumerate(gopo)]
    single, _pair, first, second = (cells_of(line) for line in report.table(report.with_starts(rows))[2:])
    # mean -5/3, s = 2.517, half width 4.303 * 2.517 / sqrt(3) = 6.25
    assert first[:2] + first[4:5] + first[6:7] == [
        *("GRPO, single level", "4", "-1.7 [-7.9, +4.6]", "38.0, 47.0, 46.0, 99.0")
    ]
    # 8, 17, 16, 69 above a warm start of 30: mean 27.5, s = 27.98, half width 3.182 * 27.98 / 2 = 44.5
    assert first[3] == "+27.5 [-17.0, +72.0]"
    assert (single[3], second[4]) == ("", "")


def test_the_search_takes_the_return_of_the_last_updates(study, args):
    warm_started(args, study.TUNING_SEED)
    for variant in study.SEARCHED:
        for rates in study.GRID[1 if "single level" in variant else 2]:
            name = variant.lower().replace(", ", "_").replace(" ", "_")
            out = args.out / f"{name}_8updates_lr{'_'.join(rates)}_seed100"
            (out / "results").mkdir(parents=True)
            good, same = float(rates == study.GRID[len(rates)][1]), {"responder/sampler_mismatch": 5e-7}
            steps = [{"rollout/tse": 90.0, "rollout/esndcg": 1.0, "rollout/gre": 1.0, **same}] * 6
            steps += [{"rollout/tse": 50.0 * good, "rollout/esndcg": 0.5, "rollout/gre": 0.8, **same}] * 2
            lines = [json.dumps(line) for step in steps for line in (step, {"eval_tse": 1.0})]
            (out / "results" / "metrics.jsonl").write_text("\n".join(lines))
            study.done(out).write_text("")
    study.search(args)
    rows = [cells_of(line) for line in args.record.with_suffix(".md").read_text().splitlines()[4:]]
    assert len(rows) == 9
    assert rows[0] == ["PPO, single level", "3e-5", "0.900"]
    assert rows[7] == ["GOPO", "3e-4, 1e-4", "**1.400**"]


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


def test_an_interval_over_seeds(report):
    # mean 3, s = 1, t(0.975; 2) = 4.303, half width 4.303 / sqrt(3) = 2.484
    mean, low, high = report.interval([2.0, 3.0, 4.0])
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - 2.484, 3.0 + 2.484), abs=1e-3)


def test_holm_corrects_for_the_number_of_rows(report):
    # t tests over three seeds: d = (1, 1.1, 0.9) has t = 17.3, p = 0.0033; (2, -1, 1) has t = 0.756, p = 0.529.
    found = report.holm({"a": [2.0, -1.0, 1.0], "b": [1.0, 1.1, 0.9], "c": [5.0]})
    assert found == pytest.approx({"b": 2 * 0.00332, "a": 0.5286}, abs=1e-3)
