"""LoRA: vLLM is sent base + adapter under the base model's names, and nothing that is trained is written to."""

import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from openrlhf_gopo import platform
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.runtime.lora import MergedModel, merged_weights
from openrlhf_gopo.runtime.models import RoleActor

SCRIPT = str(Path(__file__).with_name("lora_script.py"))
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def model(*, tied: bool = True) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=48, num_key_value_heads=1, tie_word_embeddings=tied, **SIZES))


def adapted(base: Qwen2ForCausalLM, target_modules) -> torch.nn.Module:
    """LoRA with factors that are not zero, in bf16 like the base."""
    peft = get_peft_model(base.to(torch.bfloat16), LoraConfig(r=4, lora_alpha=16, target_modules=target_modules))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32).mul(0.1).to(torch.bfloat16)
    return peft


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_pefts_own_merge_and_leave_the_model_alone(targets, tied):
    peft = adapted(model(tied=tied), targets)
    before = {name: p.clone() for name, p in peft.named_parameters()}
    sent = {name: w.data.clone() for name, w in MergedModel(peft).named_parameters()}
    assert all(before[name].equal(p) for name, p in peft.named_parameters())
    whole = dict(peft.merge_and_unload().named_parameters())
    assert sent.keys() == whole.keys()
    assert all(sent[name].equal(p) for name, p in whole.items())
    assert all(sent[name].dtype == torch.bfloat16 for name in sent)
    start = dict(model(tied=tied).to(torch.bfloat16).named_parameters())
    moved = {name.split(".")[-2] for name in sent if not sent[name].equal(start[name])}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert moved == (linear if targets == "all-linear" else set(targets))  # PEFT leaves the head out of all-linear


def test_an_adapted_embedding_is_merged_too():
    peft = adapted(model(tied=False), ["embed_tokens", "lm_head"])
    sent = {name: w.data.clone() for name, w in merged_weights(peft).items()}
    whole = dict(peft.merge_and_unload().named_parameters())
    assert all(sent[name].equal(p) for name, p in whole.items())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_half_of_a_tied_weight_is_refused(target):
    peft = adapted(model(tied=True), [target, "q_proj"])
    with pytest.raises(ConfigError, match=rf"--ds\.lora\.target_modules: \S*{target} shares its weight .* leave"):
        RoleActor(peft)


def test_upstreams_loop_still_gathers_and_reads_as_the_view_expects():
    source = inspect.getsource(ActorPPOTrainer.broadcast_to_vllm)
    assert "model = self.actor.model.module" in source
    assert "in model.named_parameters()" in source
    assert "deepspeed.zero.GatheredParameters([param], enabled=" in source


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("model")
    model().to(torch.bfloat16).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({"<pad>": 0, "hello": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<pad>").save_pretrained(folder)
    return folder


@pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_send_save_and_resume(stage, folder, tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(folder), str(tmp_path), str(stage)],
            env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0][-4000:] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # one that waits for a dead one would wait for an hour
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    result = json.loads((tmp_path / "result.json").read_text())
    moved, saved = result.pop("moved"), result.pop("saved")
    assert all(result.values()), result
    assert len(moved) == 2 * 7  # every linear layer, no embedding, norm or bias
    assert {"adapter_config.json", "config.json", "tokenizer.json"} <= set(saved)
    assert f"adapter_model.{'bin' if stage == 3 else 'safetensors'}" in saved
