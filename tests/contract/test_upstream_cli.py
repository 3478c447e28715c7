"""Upstream's flags and validation as this project reads them, against upstream's module really being run."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.runtime.upstream.cli import UpstreamCli

pytest.importorskip("openrlhf")

FLAGS = [
    *["--actor.model_name_or_path", "some/model", "--train.agent_func_path", "agent.py", "--vllm.num_engines", "2"],
    *["--algo.advantage.estimator", "group_norm", "--rollout.n_samples_per_prompt", "4", "--actor.adam.lr", "3e-6"],
    *["--algo.advantage.is_correction_threshold", "2.0", "--actor.num_gpus_per_node", "1"],
]

# Runs the module as `python -m` would, and stops at the first thing that train(args) does.
RUN_UPSTREAM = """
import argparse, json, runpy, sys
from openrlhf_gopo import platform
platform.activate()
import ray

flat, nested = {}, {}
parse = argparse.ArgumentParser.parse_args

def parse_args(self, *args):
    namespace = parse(self, *args)
    flat.update(json.loads(json.dumps(vars(namespace))))  # now: validation changes a list in place
    return namespace

def is_initialized():
    nested.update(tree(sys._getframe(1).f_locals["args"]))
    raise SystemExit

def tree(x):
    return {k: tree(v) for k, v in vars(x).items()} if hasattr(x, "__dict__") else x

argparse.ArgumentParser.parse_args = parse_args
ray.is_initialized = is_initialized
try:
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)
except SystemExit:
    pass
with open(sys.argv[1].removeprefix("--ckpt.path="), "w") as file:
    json.dump([flat, nested], file)
"""


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict, dict]:
    """The command line, and upstream's flat and validated namespaces for it."""
    out = tmp_path_factory.mktemp("upstream") / "namespaces.json"
    argv = [f"--ckpt.path={out}", *FLAGS]
    subprocess.run([sys.executable, "-c", RUN_UPSTREAM, *argv], check=True, capture_output=True, timeout=180)
    flat, nested = json.loads(out.read_text())
    return argv, flat, nested


def test_the_parser_gives_what_upstream_gives(upstream: tuple[list[str], dict, dict]) -> None:
    argv, flat, _ = upstream
    ours = jsonable(vars(UpstreamCli.load().parser.parse_args(argv)))
    clock = "logger.wandb.run_name"  # contains the minute
    assert ours.keys() == flat.keys()
    assert {k: v for k, v in ours.items() if k != clock} == {k: v for k, v in flat.items() if k != clock}
    assert len(ours) > 150


def test_validation_gives_what_upstream_gives(upstream: tuple[list[str], dict, dict]) -> None:
    argv, _, nested = upstream
    cli = UpstreamCli.load()
    ours = jsonable(tree(cli.validate(cli.parser.parse_args(argv))))
    ours["logger"]["wandb"]["run_name"] = nested["logger"]["wandb"]["run_name"]
    assert ours == nested
    assert ours["reward"]["remote_url"] == ["agent"]
    assert ours["actor"]["eps_clip_low_high"] == [0.2, 0.2]


def test_the_heavy_stack_is_not_imported() -> None:
    code = (
        "import sys; from openrlhf_gopo.runtime.upstream.cli import UpstreamCli\n"
        "cli = UpstreamCli.load(); cli.validate(cli.parser.parse_args(['--reward.remote_url', 'x']))\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_flags_of_train_dpo_are_read_the_same_way() -> None:
    cli = UpstreamCli.load(module="openrlhf.cli.train_dpo")
    args = cli.validate(cli.parser.parse_args(["--model.model_name_or_path", "m", "--adam.lr", "3e-6"]))
    assert (args.ref.model_name_or_path, args.adam.lr, args.model.beta) == ("m", 3e-6, 0.1)
    with pytest.raises(ConfigError, match="packing_samples must be enabled when using ring attention"):
        cli.validate(cli.parser.parse_args(["--ds.ring_attn_size", "2"]))
    with pytest.raises(ConfigError, match="no_such_module is not installed"):
        UpstreamCli.load(module="openrlhf.cli.no_such_module")


def test_every_parser_is_fresh_and_the_flat_namespace_stays_as_it_is() -> None:
    cli = UpstreamCli.load()
    parser = cli.parser
    parser.add_argument("--gopo.env")
    flat = parser.parse_args([*FLAGS, "--gopo.env", "shop"])
    before = dict(vars(flat))
    nested = cli.validate(flat)
    assert nested.gopo.env == "shop"
    assert vars(flat) == before
    assert flat.__dict__["algo.advantage.is_correction_threshold"] == [2.0]  # upstream inserts into its copy
    with pytest.raises(SystemExit):
        cli.parser.parse_args(["--gopo.env", "shop"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algo.advantage.estimator", "rloo", "--rollout.n_samples_per_prompt", "1"], "rloo requires n_samples"),
        (["--train.partial_rollout_enable"], "--train.partial_rollout_enable requires --train.async_enable"),
        (["--rollout.vllm_generate_batch_size", "2048"], "requires --train.async_enable"),
    ],
)
def test_what_upstream_refuses_is_a_config_error_with_its_message(flags: list[str], message: str) -> None:
    cli = UpstreamCli.load()
    with pytest.raises(ConfigError, match=message):
        cli.validate(cli.parser.parse_args(["--reward.remote_url", "x", *flags]))


def test_a_flag_that_upstream_needs_and_misses_is_named() -> None:
    cli = UpstreamCli.load()
    with pytest.raises(ConfigError, match=r"args\.reward\.model_name_or_path"):
        cli.validate(cli.parser.parse_args([]))  # gae without any reward


def test_checks_survive_python_dash_o() -> None:
    code = (
        "from openrlhf_gopo.runtime.upstream.cli import UpstreamCli\n"
        "cli = UpstreamCli.load()\n"
        "cli.validate(cli.parser.parse_args(['--reward.remote_url', 'x', '--train.partial_rollout_enable']))"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=60)
    assert "ConfigError" in done.stderr


GOOD = """
import argparse
import heavy_stack_that_is_not_installed
DEFAULT = 3
def train(args): ...
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--a.b", default=DEFAULT)
    args = parser.parse_args()
    from openrlhf.utils.config import hierarchize
    args = hierarchize(args)
    train(args)
"""


def test_only_what_the_block_needs_is_executed(tmp_path: Path) -> None:
    cli = UpstreamCli.load(write(tmp_path, GOOD))
    assert cli.validate(cli.parser.parse_args([])).a.b == 3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('if __name__ == "__main__":', "def main():"),
        ("args = parser.parse_args()", "args, rest = parser.parse_known_args()"),
        ("    train(args)\n", "    train(args)\n    print()\n"),
        ("parser = argparse.ArgumentParser()", "parser = make_parser()"),
    ],
)
def test_another_layout_is_refused_with_both_versions(tmp_path: Path, old: str, new: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=r"found openrlhf \S+, this plugin knows 0\.11\.2"):
        UpstreamCli.load(write(tmp_path, GOOD.replace(old, new)))


def write(folder: Path, source: str) -> Path:
    path = folder / "train_ppo_ray.py"
    path.write_text(source)
    return path


def tree(namespace: object) -> object:
    return {k: tree(v) for k, v in vars(namespace).items()} if hasattr(namespace, "__dict__") else namespace


def jsonable(value: object) -> dict:
    assert not isinstance(value, argparse.Namespace)
    return json.loads(json.dumps(value))
