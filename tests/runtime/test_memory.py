"""The dry run's memory estimate, against autograd's own tensors, DeepSpeed's own processes, and users' reports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from openrlhf_gopo import platform
from openrlhf_gopo.cli import train_gopo
from openrlhf_gopo.runtime import memory
from openrlhf_gopo.runtime.memory import GIB, Gpu, Part, Shape

SCRIPT = str(Path(__file__).with_name("memory_script.py"))
BASE = {"num_attention_heads": 8, "tie_word_embeddings": True}


def saved_bytes(config: LlamaConfig | Qwen2Config, tokens: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps for the backward pass of one forward, less the parameters."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors stay alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(1, tokens, dtype=torch.long), logits_to_keep=1)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def shape_of(config: LlamaConfig | Qwen2Config, folder: Path) -> Shape:
    config.save_pretrained(folder)
    shape = Shape.read(str(folder))
    assert shape is not None
    return shape


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cls", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize(("mlp", "kv"), [(512, 8), (384, 2)])
def test_activations_are_what_autograd_keeps(cls, mlp, kv, checkpointing, tmp_path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": mlp, "num_key_value_heads": kv, **BASE}
    few, many = (cls(num_hidden_layers=layers, **sizes) for layers in (2, 6))
    measured = saved_bytes(many, 256, checkpointing) - saved_bytes(few, 256, checkpointing)
    estimates = [shape_of(c, tmp_path).activations(256, 0, checkpointing) for c in (many, few)]
    assert estimates[0] - estimates[1] == pytest.approx(measured, rel=0.03)


@pytest.mark.slow
@pytest.mark.stack
@pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU")
@pytest.mark.parametrize(("stage", "rank"), [(2, 0), (3, 0), (2, 8)])
def test_states_are_what_a_trainers_process_grows_by(stage, rank, tmp_path) -> None:
    from tokenizers import Tokenizer, models

    raw = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
    )
    grown, estimates = [], []
    for layers in (2, 14):
        folder = tmp_path / str(layers)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=layers,
            num_key_value_heads=8,
            **BASE,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        raw.save_pretrained(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = os.environ | {"OPENRLHF_GOPO_CPU": "1", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, SCRIPT, str(folder), str(stage), str(rank), str(port)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        grown.append(int(done.stdout.splitlines()[-1]))
        args, _ = parse(folder, f"--ds.zero_stage {stage} --ds.lora.rank {rank}", cpu="1")
        shape = Shape.read(str(folder))
        estimates.append(held(memory._trainer(args, args.actor, shape, "expert", 0, 0)))
    # Seen: 542 MB where 617 were estimated (ZeRO-2), 701 of 617 (ZeRO-3), 97 of 92 (LoRA).
    assert grown[1] - grown[0] == pytest.approx(estimates[1] - estimates[0], rel=0.17)


def held(part: Part) -> float:
    return part.weights + part.states


def parse(folder: object, flags: str = "", cpu: str = "0"):
    before = os.environ.get("OPENRLHF_GOPO_CPU")
    os.environ["OPENRLHF_GOPO_CPU"] = cpu
    try:
        needed = ["--gopo.env", "shop", "--vllm.num_engines", "1", "--algo.advantage.estimator", "group_norm"]
        needed += ["--rollout.n_samples_per_prompt", "2"]
        return train_gopo.parse([*needed, "--actor.model_name_or_path", str(folder), *flags.split()])
    finally:
        if before is None:
            del os.environ["OPENRLHF_GOPO_CPU"]
        else:
            os.environ["OPENRLHF_GOPO_CPU"] = before


def test_parameters_are_counted_without_weights(tmp_path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape = shape_of(LlamaConfig(vocab_size=100, num_hidden_layers=1, tie_word_embeddings=True, **sizes), tmp_path)
    # embedding 100 x 8, attention 4 x 8 x 8, MLP 3 x 8 x 16, norms 3 x 8
    assert shape.parameters == 800 + 256 + 384 + 24
    assert (shape.layers, shape.hidden, shape.keys, shape.mlp, shape.vocabulary) == (1, 8, 8, 16, 100)
    lora = {"rank": 4, "target_modules": "all-linear"}
    assert shape.adapters(SimpleNamespace(**lora)) == 4 * (4 * 16 + 3 * 24)  # not the head
    assert shape.adapters(SimpleNamespace(**lora | {"target_modules": ["q_proj", "v_proj"]})) == 4 * 2 * 16


N = 13_016_028_160  # CodeLlama-13b
LLAMA_13B = Shape(N, layers=40, hidden=5120, keys=5120, mlp=13_824, vocabulary=32_016)


@pytest.mark.parametrize(
    ("flags", "bytes_each", "reference"),
    [
        ("--ds.zero_stage 0", 16, 2),
        ("--ds.zero_stage 1", 4 + 12 / 4, 2),
        ("--ds.zero_stage 2", 2 + 14 / 4, 2),
        ("--ds.zero_stage 3", 16 / 4, 2 / 4),
        ("--ds.zero_stage 3 --ds.adam_offload", 4 / 4, 2 / 4),
        ("--ds.zero_stage 3 --ref.offload", 16 / 4, 0),
        ("--ds.zero_stage 2 --ds.tensor_parallel_size 2", (2 + 14 / 2) / 2, 2 / 2),
    ],
)
def test_states_by_zero_stage(flags, bytes_each, reference) -> None:
    found = placed(f"--actor.num_gpus_per_node 4 --ref.num_gpus_per_node 4 {flags}")
    assert held(found["responder"].parts[0]) == pytest.approx(bytes_each * N)
    assert held(found["responder's reference"].parts[0]) == pytest.approx(reference * N)
    assert list(found) == [
        f"{role}{part}" for role in ("expert", "responder") for part in ("", "'s reference", "'s engine")
    ]


def placed(flags: str) -> dict[str, Gpu]:
    """The GPUs of a run with two 13B models, by name; micro-batches of 1,000 tokens, a tenth of them actions."""
    args, config = parse("codellama", f"--rollout.batch_size 64 --train.batch_size 64 {flags}")
    both = ("expert", "responder")
    shapes, tokens, share = (dict.fromkeys(both, value) for value in (LLAMA_13B, 1000, 0.1))
    return {gpu.name: gpu for gpu in memory.gpus(args, config, shapes, tokens, share)}


def test_the_peak_is_the_worse_of_learning_and_playing() -> None:
    roles = [Part("a", weights=2, states=10, learning=4), Part("b", weights=1, states=8, learning=7)]
    parts = [*roles, Part("reference", weights=3), Part("engine a", engine=5), Part("engine b", engine=6)]
    constant = 5 * memory.CONTEXT + 6
    assert Gpu("all", parts).peak == constant + 18 + 7 + 11  # nothing ever leaves
    assert Gpu("all", parts, engines_leave=True).peak == constant + 18 + 11  # playing
    assert Gpu("all", parts, states_leave=True).peak == constant + 15 + 11  # b learns alone
    assert Gpu("all", parts, states_leave=True, engines_leave=True).peak == constant + 15


def test_states_that_the_host_holds_do_not_leave() -> None:
    ranks = "--actor.num_gpus_per_node 4 --ref.num_gpus_per_node 4 --vllm.num_engines 4 --train.colocate_all"
    ranks += " --vllm.gpu_memory_utilization 0.3 --ds.zero_stage 3 --ds.enable_sleep"
    (gpu,), (offloaded,) = placed(ranks).values(), placed(f"{ranks} --ds.adam_offload").values()
    assert gpu.states_leave
    assert not offloaded.states_leave


def test_placements() -> None:
    ranks = "--actor.num_gpus_per_node 4 --ref.num_gpus_per_node 4 --vllm.num_engines 4 --gopo.gpu_memory_gb 80"
    together = placed(f"{ranks} --train.colocate_all --vllm.gpu_memory_utilization 0.3")
    (gpu,) = together.values()
    assert [part.name.split("'s ")[-1] for part in gpu.parts[:3]] == ["expert", "reference", "engine"]
    assert [part.name.split("'s ")[-1] for part in gpu.parts[3:]] == ["responder", "reference", "engine"]
    assert gpu.parts[2].engine == 0.3 * 80 * GIB
    beside = placed(f"{ranks} --train.colocate_actor_ref")
    assert list(beside) == [
        "expert with its reference",
        "expert's engine",
        "responder with its reference",
        "responder's engine",
    ]


def test_what_users_of_openrlhf_report() -> None:
    # OpenRLHF's issue 277: PPO of CodeLlama-13b, ZeRO-2, checkpointing, 4 GPUs of 80 GB: out of memory.
    four = "--actor.num_gpus_per_node 4 --ref.num_gpus_per_node 4 --actor.gradient_checkpointing_enable"
    policy = placed(f"{four} --ds.zero_stage 2 --train.colocate_actor_ref")["responder with its reference"]
    assert 80 * GIB < policy.peak < 100 * GIB
    # OpenRLHF's README: 7B models on several GPUs of 24 GB with Adam on the host.
    args, _ = parse("llama", "--actor.num_gpus_per_node 4 --ds.zero_stage 3 --ds.adam_offload --rollout.batch_size 64")
    seven = Shape(6_738_415_616, 32, 4096, 4096, 11_008, 32_000)
    args.actor.gradient_checkpointing_enable = True
    trainer = memory._trainer(args, args.actor, seven, "responder", 2048, 0.5)
    assert held(trainer) + trainer.learning + memory.CONTEXT < 24 * GIB
    args.ds.zero_stage = 2
    args.ds.adam_offload = False
    assert held(memory._trainer(args, args.actor, seven, "responder", 2048, 0.5)) > 24 * GIB


def test_the_report_says_whether_it_fits(tmp_path) -> None:
    config = LlamaConfig(vocab_size=32_000, hidden_size=2048, num_hidden_layers=4, num_key_value_heads=8, **BASE)
    config.save_pretrained(tmp_path)
    lengths, share = {"expert": 500, "responder": 500}, {"expert": 0.01, "responder": 0.3}

    def report(gb: str) -> str:
        return "\n".join(memory.report(*parse(tmp_path, f"--actor.num_gpus_per_node 1 {gb}"), lengths, share))

    assert "fit" not in report("").lower()
    assert report("--gopo.gpu_memory_gb 80").count("fits --gopo.gpu_memory_gb 80") == 6
    small = report("--gopo.gpu_memory_gb 1")
    assert "expert: " in small
    assert "DOES NOT FIT --gopo.gpu_memory_gb 1" in small
    assert "raise --vllm.gpu_memory_utilization or --vllm.tensor_parallel_size" in report(
        "--gopo.gpu_memory_gb 8 --vllm.gpu_memory_utilization 0.05"
    )
    assert "expert's engine needs" in (
        own := report("--gopo.gpu_memory_gb 8 --gopo.expert_gpu_memory_utilization 0.05")
    )
    assert "raise --gopo.expert_gpu_memory_utilization or" in own
