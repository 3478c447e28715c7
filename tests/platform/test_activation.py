"""The switch, the import hook and the flags: nothing here needs the training stack."""

from __future__ import annotations

import argparse
import multiprocessing.spawn
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from openrlhf_gopo import platform
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.platform import dtype, environment, flash_attn, imports
from openrlhf_gopo.platform.cuda import CpuDevice
from openrlhf_gopo.platform.environment import SWITCH


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A torch that sees a GPU, and no switch."""
    torch = ModuleType("torch")
    torch.cuda = SimpleNamespace(is_available=lambda: True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(platform, "_active", False)
    return torch


def test_with_a_gpu_nothing_happens(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "install", lambda *args: pytest.fail("hooks installed"))
    monkeypatch.setattr(environment, "apply", lambda: pytest.fail("environment changed"))
    platform.activate()
    platform.activate_in_engine()
    assert not platform.is_cpu()
    assert platform.ray_runtime_env() == {}


@pytest.mark.parametrize("asked", [True, False])
def test_an_engine_ends_with_a_parent_that_is_killed_if_the_parent_asked_for_it(tmp_path: Path, asked: bool) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, os, sys, time\n"
        "from openrlhf_gopo import platform\n"
        "def engine():\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    if sys.argv[1:]:\n"
        "        platform.end_spawned_with_this_process()\n"
        "    multiprocessing.get_context('spawn').Process(target=engine).start()\n"
        "    time.sleep(60)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != SWITCH}
    parent = subprocess.Popen([sys.executable, script, *["ask"] * asked], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    try:
        if asked:
            engine.wait(timeout=30)
        else:
            with pytest.raises(psutil.TimeoutExpired):
                engine.wait(timeout=1)
    finally:
        if engine.is_running():
            engine.kill()


def test_the_switch_overrides_the_detection(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    assert platform.is_cpu()
    cuda.cuda.is_available = lambda: False
    monkeypatch.setenv(SWITCH, "0")
    assert not platform.is_cpu()
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(ConfigError, match=f"{SWITCH}=yes"):
        platform.is_cpu()


def test_a_head_node_without_gpu_does_not_decide_for_the_cluster(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.cuda.is_available = lambda: False
    assert platform.is_cpu()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not platform.is_cpu()


def test_what_the_user_set_wins_and_reaches_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    monkeypatch.delenv("KMP_BLOCKTIME", raising=False)
    for name in environment.defaults():
        monkeypatch.setenv(name, environment.current()[name])  # so that monkeypatch restores it
    environment.apply()
    variables = platform.ray_runtime_env()["env_vars"]
    assert variables["OMP_NUM_THREADS"] == "7"
    assert variables["KMP_BLOCKTIME"] == "0"
    assert variables[SWITCH] == "1"
    assert environment.os.environ["VLLM_PLUGINS"] == "theirs,openrlhf_gopo_cpu"
    assert "HF_HUB_OFFLINE" not in variables


def test_the_device_is_cpu_and_formats_as_an_index() -> None:
    device = CpuDevice("cpu")
    assert device == "cpu"
    assert f"cuda:{device}" == "cuda:0"


def test_patches_run_after_the_import_and_contexts_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gopo_early", "gopo_late"):
        (tmp_path / f"{name}.py").write_text(
            "import gopo_only_inside\nvalue = 1\n" if "late" in name else "value = 1\n"
        )
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    import gopo_early  # type: ignore[import-not-found]

    class Inside:
        def __enter__(self) -> None:
            sys.modules["gopo_only_inside"] = ModuleType("gopo_only_inside")

        def __exit__(self, *error: object) -> None:
            del sys.modules["gopo_only_inside"]

    def double(module: ModuleType) -> None:
        module.value *= 2  # type: ignore[attr-defined]

    imports.install({"gopo_early": double, "gopo_late": double}, {"gopo_late": Inside})
    assert gopo_early.value == 2
    import gopo_late  # type: ignore[import-not-found]

    assert gopo_late.value == 2
    assert "gopo_only_inside" not in sys.modules


def test_flash_attn_is_there_only_while_the_module_that_needs_it_is_imported() -> None:
    if flash_attn.importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    pytest.importorskip("einops")
    with flash_attn.stand_ins():
        from flash_attn.bert_padding import unpad_input  # type: ignore[import-not-found]
    with pytest.raises(RuntimeError, match=r"--ds\.packing_samples"):
        unpad_input()
    assert flash_attn.importlib.util.find_spec("flash_attn") is None


def test_spawned_children_activate_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    spawn = SimpleNamespace(
        get_preparation_data=multiprocessing.spawn.get_preparation_data,
        get_command_line=multiprocessing.spawn.get_command_line,
    )
    platform.children.activate_spawned(spawn)
    sent = pickle.dumps(spawn.get_preparation_data("child")["openrlhf_gopo.activate"])
    monkeypatch.setattr(platform, "activate", lambda: calls.append(1))
    pickle.loads(sent)
    assert calls == [1]


@pytest.mark.parametrize(
    ("flag", "value", "remedy"),
    [
        ("ds.packing_samples", True, "remove it"),
        ("ds.ring_attn_size", 2, "use 1"),
        ("ds.attn_implementation", "flash_attention_2", "use sdpa"),
        ("vllm.enable_sleep", True, "remove it"),
    ],
)
def test_flags_that_need_cuda_are_refused(flag: str, value: object, remedy: str) -> None:
    section, _, name = flag.partition(".")
    with pytest.raises(ConfigError, match=f"--{flag} {value}.*{remedy}"):
        platform.check_flags(SimpleNamespace(**{section: SimpleNamespace(**{name: value})}))


def test_the_defaults_pass_the_check() -> None:
    sections: dict[str, SimpleNamespace] = {}
    for flag, value in platform.FLAG_DEFAULTS.items():
        section, _, name = flag.partition(".")
        setattr(sections.setdefault(section, SimpleNamespace()), name, value)
    platform.check_flags(SimpleNamespace(**sections, train=SimpleNamespace(colocate_all=True)))


@pytest.mark.parametrize(
    ("lines", "fastest"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx512f avx512_vnni", "fp32"),
        ("flags\t\t: fpu avx512f avx512_bf16", "bf16"),
        ("Features\t: fp asimd bf16", "bf16"),
        ("Features\t: fp asimd", "fp32"),
        ("processor\t: 0", "fp32"),
    ],
)
def test_models_are_float32_where_bfloat16_would_be_emulated(lines: str, fastest: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(lines)
    assert dtype.fastest(tmp_path / "cpuinfo") == fastest
    assert dtype.fastest(tmp_path / "none") == "fp32"


def upstream_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ds.param_dtype", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--vllm.num_engines", default=8, type=int)
    return parser


@pytest.mark.parametrize("fastest", ["bf16", "fp32"])
def test_parsers_get_the_platforms_defaults_and_take_fp32(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr(dtype, "fastest", lambda: fastest)
    parser = upstream_parser()
    platform.adapt_flags(parser)
    assert vars(parser.parse_args([])) == {"ds.param_dtype": fastest, "vllm.num_engines": 1}
    assert vars(parser.parse_args(["--ds.param_dtype", "fp32"]))["ds.param_dtype"] == "fp32"
    monkeypatch.setenv(SWITCH, "0")
    parser = upstream_parser()
    platform.adapt_flags(parser)
    assert vars(parser.parse_args([])) == {"ds.param_dtype": "bf16", "vllm.num_engines": 8}
    with pytest.raises(SystemExit):
        parser.parse_args(["--ds.param_dtype", "fp32"])


def test_the_module_runner_gives_a_job_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import argparse, os, sys\n"
        "assert __name__ == '__main__'\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--flag')\n"
        "parser.add_argument('--ds.attn_implementation', default='flash_attention_2')\n"
        "assert vars(parser.parse_args()) == {'flag': '1', 'ds.attn_implementation': 'sdpa'}\n"
        "print(sys.argv[1:], os.environ['RANK'], os.environ['WORLD_SIZE'], int(os.environ['MASTER_PORT']) > 0)\n"
    )
    command = [sys.executable, "-m", "openrlhf_gopo.platform", "program", "--flag", "1"]
    env = os.environ | {SWITCH: "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout.strip() == "['--flag', '1'] 0 1 True", done.stderr
    usage = subprocess.run(command[:3], capture_output=True, text=True, timeout=60)
    assert usage.returncode != 0
    assert "MODULE" in usage.stderr


FIRST_CALLS = """
import os, sys
sys.argv[1:] and __import__("openrlhf_gopo.platform").platform.activate()
import torch
torch.set_num_threads(1)  # forks must not inherit threads
angles = torch.arange(320000) * 3e-3
exact = torch.tensor([__import__("math").cos(x) for x in angles.tolist()])
wrong = 0
for _ in range(200):
    if (fork := os.fork()) == 0:
        torch.set_num_threads(2)
        os._exit(not torch.allclose(angles.cos(), exact, rtol=0, atol=1e-6))
    wrong += os.waitpid(fork, 0)[1] != 0
print(wrong)
"""


def test_two_threads_may_call_a_function_of_mkl_first() -> None:
    """Without activation some 4 of 200 processes are wrong, with MKL 2024.2 and two cores."""
    env = os.environ | {SWITCH: "1"}
    command = [sys.executable, "-W", "ignore", "-c", FIRST_CALLS, "activated"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.split() == ["0"], done.stderr
