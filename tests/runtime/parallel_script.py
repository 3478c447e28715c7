"""Run by test_parallel.py, once per data-parallel rank: DeepSpeed's ranks need processes of their own.

The expert is the class that Ray would host, built, fed and trained through upstream's own calls.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from openrlhf_gopo import platform

platform.activate()

import deepspeed  # noqa: E402
import torch  # noqa: E402
from openrlhf.models import Actor  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.utils import get_strategy  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

from openrlhf_gopo.cli import train_gopo  # noqa: E402
from openrlhf_gopo.config import EXPERT  # noqa: E402
from openrlhf_gopo.runtime.actors import RolePolicyActor  # noqa: E402
from openrlhf_gopo.runtime.roles import role_args  # noqa: E402

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def main(folder: str, cases: str) -> None:
    """Every case on every rank, in one order; rank 0 writes what came out, or the error of a rank that is alone."""
    results: dict[str, Any] = {}
    for name, case in json.loads(cases).items():
        print(f"case {name}", flush=True)  # the last one printed is the one that hangs
        try:
            results[name] = run(folder, **case)
        except Exception as error:
            if WORLD > 1:  # the other ranks wait for this one: end the job
                raise
            results[name] = repr(error)
    if RANK == 0:
        torch.save(results, Path(folder, f"ranks{WORLD}.pt"))


def run(folder: str, flags: dict[str, str], dialogues: str, dtype: str, dynamic: int) -> dict[str, Any]:
    """One rollout's updates of the expert on this rank's share of the dialogues.

    Returns:
        ``weights``: parameters by name. ``status``: upstream's metrics. ``parity``: see ``parity``.
    """
    everything = torch.load(Path(folder, "dialogues.pt"))[dialogues]
    size = len(everything) // WORLD
    mine = everything[RANK * size : (RANK + 1) * size]
    expert = build(folder, flags, dtype, dynamic)
    apart = parity(expert, mine)
    for dialogue in mine:
        expert.append(experience(dialogue))
    status = expert.fit(kl_ctl=0.0)
    model = expert.actor.model
    weights = {}
    for name, parameter in model.module.named_parameters():
        # One by one: of several, DeepSpeed 0.19.6 waits for the last alone, and Gloo may finish that one first.
        with deepspeed.zero.GatheredParameters([parameter], enabled=expert.strategy.stage == 3):
            weights[name] = parameter.detach().clone()
    model.destroy()
    return {"weights": weights, "status": status, "parity": apart}


def build(folder: str, flags: dict[str, str], dtype: str, dynamic: int) -> Any:
    """The Ray actor's plain class, without Ray. ``dynamic``: tokens of a dynamic micro-batch, 0 for fixed ones."""
    needed = {"--gopo.env": "shop", "--actor.model_name_or_path": folder, "--algo.advantage.estimator": "group_norm"}
    words = [word for name, value in (needed | flags).items() for word in (name, *value.split())]
    args, config = train_gopo.parse(words)
    args.ds.param_dtype = dtype
    if dynamic:  # as a flag it implies packing, which needs CUDA; the accumulation is the same without
        args.train.dynamic_batch_enable, args.train.max_tokens_per_gpu, args.rollout.batch_size = True, dynamic, 2
    strategy = partitioned(get_strategy(role_args(args, EXPERT, config)))
    cls = RolePolicyActor.__ray_metadata__.modified_class
    expert = cls(WORLD, RANK, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    expert.init_model_from_pretrained(strategy, folder, max_steps=10, vllm_engines=None)
    if strategy.stage == 3:
        assert not any(p.numel() for p in expert.actor.model.parameters())
    return expert


def partitioned(strategy: Any) -> Any:
    """ZeRO-3 leaves parameters below 100,000 elements whole, which are all of a tiny model; here it leaves none."""
    configure = strategy.get_ds_train_config

    def get(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = configure(*args, **kwargs)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    strategy.get_ds_train_config = get
    return strategy


def experience(dialogue: dict[str, torch.Tensor]) -> Experience:
    """One dialogue as upstream's buffer takes it; see test_parallel.py for the tensors."""
    rows = {name: tensor.unsqueeze(0) for name, tensor in dialogue.items()}
    return Experience(
        sequences=rows["tokens"],
        attention_mask=torch.ones_like(rows["tokens"]),
        action_mask=rows["mask"],
        action_log_probs=rows["sampled"],
        rollout_log_probs=rows["sampled"],
        advantages=rows["advantages"],
        mm_train_inputs=[{name: dialogue[name] for name in ("allowed", "togo")}],
        total_length=torch.tensor([float(rows["tokens"].shape[1])]),
        info={},
    )


def parity(expert: Any, dialogues: list[dict[str, torch.Tensor]]) -> float:
    """Largest |difference| over the ranks of the logits at decisions: the head on those alone, and on everything."""
    sequences, mask = (pad_sequence([d[name] for d in dialogues], batch_first=True) for name in ("tokens", "mask"))
    attention = pad_sequence([torch.ones_like(d["tokens"]) for d in dialogues], batch_first=True)
    heads: list[torch.Tensor] = []
    # A copy: upstream divides the logits by the temperature in place.
    hook = expert.actor.model.module.lm_head.register_forward_hook(lambda _m, _a, output: heads.append(output.clone()))
    expert.forward(sequences, mask, attention, mm_train_inputs_list=[[{"allowed": d["allowed"]}] for d in dialogues])
    with torch.no_grad():
        Actor.forward(expert.actor, sequences, mask, attention)
    hook.remove()
    kept, full = heads
    assert kept.shape == (1, int(mask.sum()), full.shape[2])  # of an expert that was never asked: nothing
    apart = (kept[0] - full[:, :-1][mask.bool()]).abs()
    return expert.strategy.all_reduce(float(apart.max()) if len(apart) else 0.0, op="max")


if __name__ == "__main__":
    main(*sys.argv[1:])
