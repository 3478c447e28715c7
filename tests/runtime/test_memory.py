"""The dry run's memory estimate, against autograd's own tensors, DeepSpeed's own processes, and users' reports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

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
        args, config_ = parse(folder, f"--ds.zero_stage {stage} --ds.lora.rank {rank}", cpu="1")
        shape = Shape.read(str(folder))
        estimates.append(memory._trainer(args, args.actor, shape, "expert", 0, 0).states)
    print(grown, estimates)
    assert grown[1] - grown[0] == pytest.approx(estimates[1] - estimates[0], rel=0.15)


def parse(folder: object, flags: str = "", cpu: str = "0"):
    before = os.environ.get("OPENRLHF_GOPO_CPU")
    os.environ["OPENRLHF_GOPO_CPU"] = cpu
    try:
        needed = "--gopo.env shop --algo.advantage.estimator group_norm --vllm.num_engines 1"
        return train_gopo.parse([*needed.split(), "--actor.model_name_or_path", str(folder), *flags.split()])
    finally:
        if before is None:
            del os.environ["OPENRLHF_GOPO_CPU"]
        else:
            os.environ["OPENRLHF_GOPO_CPU"] = before
