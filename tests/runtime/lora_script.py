"""Run by test_lora.py, once per rank: DeepSpeed's ranks need processes of their own.

One optimizer step of a LoRA policy, then what upstream's broadcast would send, what its save and its checkpoint hold.
Ray and the engines are recorders here; tests/e2e/test_lora.py has the real ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openrlhf_gopo import platform

platform.activate()

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed  # noqa: E402
from openrlhf.trainer.ray import ppo_actor  # noqa: E402
from openrlhf.utils import get_strategy  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from openrlhf_gopo.cli import train_gopo  # noqa: E402
from openrlhf_gopo.runtime.models import RoleActor, RolePPOTrainer, substituted  # noqa: E402


def main(model: str, folder: str, stage: str) -> None:
    flags = {
        "--ds.param_dtype": "bf16",  # on every machine
        "--gopo.env": "shop",
        "--actor.model_name_or_path": model,
        "--actor.adam.lr": "5e-2",
        "--ds.zero_stage": stage,
        "--ds.lora.rank": "4",
        "--train.batch_size": "2",
        "--train.micro_batch_size": "1",
        "--rollout.n_samples_per_prompt": "2",
        "--algo.advantage.estimator": "group_norm",
    }
    args, _ = train_gopo.parse([word for flag in flags.items() for word in flag])
    strategy = get_strategy(args)
    strategy.setup_distributed()
    trainer, tokenizer = build(strategy), AutoTokenizer.from_pretrained(model)
    untrained = sent(trainer)
    step(trainer)
    before = parameters(trainer)
    trained = sent(trainer)
    handed = handed_over(trainer)
    untouched = same(before, parameters(trainer))
    strategy.save_model(trainer.actor, tokenizer, f"{folder}/saved")
    strategy.save_ckpt(trainer.actor.model, f"{folder}/ckpt", "step1")
    step(trainer)
    further = sent(trainer)
    strategy.load_ckpt(trainer.actor.model, f"{folder}/ckpt")
    resumed = sent(trainer)
    step(trainer)
    again = sent(trainer)
    if strategy.is_rank_0():
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        start = dict(base.named_parameters())
        result = {
            "untrained is the base": same(untrained, start),
            "moved": sorted(name for name in start if not trained[name].equal(start[name])),
            # DeepSpeed casts the adapters that PEFT made in float32 to bf16, but not under ZeRO-3 (engine.py:1627).
            "trained is what was saved": same(trained, merged(model, f"{folder}/saved", float32=stage == "3")),
            "every rank hands over the same": [same(trained, tensors) for tensors in handed] == [True, True],
            "parameters untouched": untouched,
            "the next step moved on": not same(further, trained),
            "resumed is the checkpoint": same(resumed, trained),
            "the resumed optimizer steps alike": same(again, further),
            "saved": sorted(path.name for path in Path(folder, "saved").iterdir()),
        }
        Path(folder, "result.json").write_text(json.dumps(result))


def build(strategy: Any) -> RolePPOTrainer:
    """The policy as upstream's PolicyModelActor builds it, and as much of its trainer as a broadcast reads."""
    args, lora = strategy.args, strategy.args.ds.lora
    actor = RoleActor(
        args.actor.model_name_or_path,
        attn_implementation=args.ds.attn_implementation,
        lora_rank=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        ds_config=strategy.get_ds_train_config(),
    )
    optimizer = {
        "optim": "adam",
        "adam": vars(args.actor.adam),
        "lr_scheduler": "constant",
        "lr_warmup_ratio": 0.0,
        "max_norm": 1.0,
        "scheduler_steps": 10,
    }
    trainer = RolePPOTrainer.__new__(RolePPOTrainer)
    trainer.strategy, trainer.args, trainer.use_cuda_ipc = strategy, args, False
    trainer.actor, _, _ = strategy.prepare((actor, optimizer))
    return trainer


def step(trainer: RolePPOTrainer) -> None:
    """One optimizer step, the same on every rank and at every call."""
    tokens = torch.arange(3, 35).reshape(2, 16)
    mask = torch.ones(2, 15)
    logprobs = trainer.actor(tokens, mask, torch.ones_like(tokens))
    trainer.strategy.backward(-logprobs.mean(), trainer.actor, None)
    trainer.strategy.optimizer_step(None, trainer.actor, None)


def sent(trainer: RolePPOTrainer) -> dict[str, torch.Tensor]:
    """What upstream's loop announces and broadcasts, on rank 0."""
    names: list[str] = []
    tensors: dict[str, torch.Tensor] = {}

    def announce(name: str, dtype: torch.dtype, shape: torch.Size, empty_cache: bool) -> None:
        names.append(name)
        tensors[name] = torch.empty(shape, dtype=dtype)

    def broadcast(tensor: torch.Tensor, src: int, stream: Any) -> None:
        assert tensor.dtype == tensors[names[-1]].dtype
        assert tensor.shape == tensors[names[-1]].shape
        tensors[names[-1]].copy_(tensor)

    trainer.vllm_engines = [SimpleNamespace(update_weight=SimpleNamespace(remote=announce))]
    trainer._model_update_group = SimpleNamespace(broadcast=broadcast)
    with substituted(ppo_actor, ray=SimpleNamespace(get=list)):
        trainer.broadcast_to_vllm()
    return tensors


def handed_over(trainer: RolePPOTrainer) -> list[dict[str, torch.Tensor]]:
    """What upstream's CUDA IPC path hands to the engines, per rank. A handle of a CPU tensor is a copy."""
    tensors: list[dict[str, torch.Tensor]] = [{}, {}]

    def receive(name: str, ipc_handles: dict[int, tuple], **_: Any) -> None:
        for rank, (rebuild, arguments) in ipc_handles.items():
            tensors[rank][name] = rebuild(*arguments)

    trainer.use_cuda_ipc = True
    trainer.vllm_engines = [SimpleNamespace(update_weight_cuda_ipc=SimpleNamespace(remote=receive))]
    local = {"ray": SimpleNamespace(get=list), "get_physical_gpu_id": torch.distributed.get_rank}
    with substituted(ppo_actor, **local):
        trainer.broadcast_to_vllm()
    trainer.use_cuda_ipc = False
    return tensors


def parameters(trainer: RolePPOTrainer) -> dict[str, torch.Tensor]:
    """Copies of all parameters of the trained model, whole."""
    named = dict(trainer.actor.model.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def merged(model: str, adapter: str, *, float32: bool) -> dict[str, torch.Tensor]:
    """The saved adapter on the base, merged by PEFT itself."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    peft = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=float32)
    return dict(peft.merge_and_unload().named_parameters())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


if __name__ == "__main__":
    main(*sys.argv[1:])
