"""Upstream's ``train_dpo.train(args)`` for logged dialogues: strategy, model, data, checkpoint, trainer."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openrlhf.utils import get_strategy, get_tokenizer

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.runtime.models import RoleActor
from openrlhf_gopo.runtime.offline.config import OfflineConfig
from openrlhf_gopo.runtime.offline.data import Chunks, Logs, Sample
from openrlhf_gopo.runtime.offline.evaluation import table
from openrlhf_gopo.runtime.offline.trainer import OfflineTrainer, position_of


def train(args: SimpleNamespace, config: OfflineConfig, logs: Logs, results: Path) -> None:
    """Train one role on ``--data.dataset``, judge it on ``--eval.dataset`` before, during and after, and save it.

    Raises:
        ConfigError: the data is too small for one optimizer step, or a checkpoint is of other data.
        DataError: the logs cannot be used.
    """
    samples, census = logs.training(args.data.dataset)
    heldout = {}
    for path in (args.eval.dataset or "").split(",") if args.eval.dataset else ():
        heldout[Path(path).stem], left = logs.heldout(path)
        census.update({f"{Path(path).stem}: {reason}": count for reason, count in left.items()})
    chunks = Chunks(samples, config.group_size, args.train.seed)

    strategy = get_strategy(args)
    strategy.setup_distributed()
    strategy.print(describe(samples, chunks, census))
    per_rank = args.train.batch_size // config.group_size // strategy.world_size
    loader = strategy.setup_dataloader(chunks, per_rank, False, True, list)
    steps = len(loader)
    if not steps:
        raise ConfigError(
            f"--train.batch_size {args.train.batch_size}: {len(samples)} dialogues in {len(chunks)} chunks of at most "
            f"{config.group_size} do not fill one step of {per_rank * strategy.world_size} chunks; lower it"
        )
    model, optimizer, scheduler, tokenizer = _model(args, strategy, steps)
    results.mkdir(parents=True, exist_ok=True)
    trainer = OfflineTrainer(
        config=config,
        results=results,
        model=model,
        ref_model=None,
        strategy=strategy,
        tokenizer=tokenizer,
        optim=optimizer,
        train_dataloader=loader,
        eval_dataloader=heldout,
        scheduler=scheduler,
        max_norm=args.max_norm,
        max_epochs=args.train.max_epochs,
        save_hf_ckpt=args.ckpt.save_hf,
        disable_ds_ckpt=args.ckpt.disable_ds,
    )
    trainer.fit(args, _resumed(args, strategy, model, chunks), steps)
    if heldout:
        if trainer.judged_at != (last := steps * args.train.max_epochs):
            trainer.evaluate(heldout, last)
        told = table(trainer.before, trainer.after)
        strategy.print(told)
        if strategy.is_rank_0():
            (results / "heldout.md").write_text(told + "\n", encoding="utf-8")
    strategy.save_model(model, tokenizer, args.ckpt.output_dir)


def describe(samples: list[Sample], chunks: Chunks, census: Counter[str]) -> str:
    """What is learnt from, and what was left out."""
    actions = sum(len(sample.unit) for sample in samples)
    lines = [
        f"{len(samples)} dialogues in {len(chunks.groups)} groups, {len(chunks)} chunks of at most {chunks.size} an "
        f"epoch; {actions} actions to learn from"
    ]
    return "\n".join([*lines, *(f"  {reason}: {count}" for reason, count in sorted(census.items()))])


def _model(args: SimpleNamespace, strategy: Any, steps: int) -> tuple[Any, Any, Any, Any]:
    """The model with its optimizer and schedule, and the tokenizer, as upstream's train_dpo builds them."""
    model = RoleActor(
        args.model.model_name_or_path,
        attn_implementation=args.ds.attn_implementation,
        experts_implementation=args.ds.experts_implementation,
        param_dtype=args.ds.param_dtype,
        load_in_4bit=args.ds.load_in_4bit,
        lora_rank=args.ds.lora.rank,
        lora_alpha=args.ds.lora.alpha,
        lora_dropout=args.ds.lora.dropout,
        target_modules=args.ds.lora.target_modules,
        ds_config=strategy.get_ds_train_config(),
        packing_samples=args.ds.packing_samples,
        use_liger_kernel=args.ds.use_liger_kernel,
    )
    fast = not args.data.disable_fast_tokenizer
    tokenizer = get_tokenizer(args.model.model_name_or_path, model.model, "right", strategy, use_fast=fast)
    if args.model.gradient_checkpointing_enable:
        reentrant = {"use_reentrant": args.model.gradient_checkpointing_reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
    names = ("optim", "lr_scheduler", "lr_warmup_ratio", "min_lr_ratio", "max_norm")
    schedule = {name: getattr(args, name) for name in names}
    schedule |= {"muon": vars(args.muon), "adam": vars(args.adam)}
    schedule["scheduler_steps"] = math.ceil(args.train.max_epochs * steps)
    return (*strategy.prepare((model, schedule)), tokenizer)


def _resumed(args: SimpleNamespace, strategy: Any, model: Any, chunks: Chunks) -> int:
    """``consumed_samples`` of the checkpoint that was loaded, 0 without one."""
    if not (args.ckpt.load_enable and os.path.exists(args.ckpt.path)):
        return 0
    where, states = strategy.load_ckpt(model.model, args.ckpt.path)
    if where is None:
        return 0
    for name, value in position_of(chunks, args).items():
        if states[name] != value:
            raise ConfigError(
                f"--ckpt.path {args.ckpt.path}: saved with {name} {states[name]}, this run has {value}, and so another "
                "place in the data; use the same data and flags, or a new --ckpt.path"
            )
    strategy.print(f"goes on from {where}, {states['consumed_samples']} dialogues consumed")
    return states["consumed_samples"]
