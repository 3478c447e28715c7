"""Offline GOPO on OpenRLHF's DeepSpeed strategy: upstream's DPO trainer with trajectories of any number in place of
pairs of texts.

One optimizer step has whole chunks of dialogues. Their log-probabilities come first, without graph; from these the
coefficient of every action (see ``core.offline``); then each micro-batch is back-propagated alone. So the gradient is
that of the written loss whatever the micro-batch, and memory is that of one micro-batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from openrlhf.trainer.dpo_trainer import DPOTrainer
from openrlhf.utils.utils import zero_pad_sequences
from tqdm import tqdm

from openrlhf_gopo.config import EXPERT
from openrlhf_gopo.core.offline import action_coefficients
from openrlhf_gopo.evaluation.records import append_line
from openrlhf_gopo.runtime.models import RoleActor
from openrlhf_gopo.runtime.offline.config import OfflineConfig
from openrlhf_gopo.runtime.offline.data import Chunks, Sample, units
from openrlhf_gopo.runtime.offline.evaluation import Values, compared, judge, ranks_of

Scores = tuple[torch.Tensor, torch.Tensor | None]


def position_of(chunks: Chunks, args: Any) -> dict[str, int]:
    """What must be the same when a run goes on, or a number of steps means another place in the data."""
    return {
        "dialogues": len(chunks.samples),
        "gopo.offline.group_size": chunks.size,
        "train.batch_size": args.train.batch_size,
        "train.seed": args.train.seed,
    }


class OfflineTrainer(DPOTrainer):
    """Upstream's loggers, checkpoints and schedule around our step.

    Args:
        upstream: the keyword arguments of ``DPOTrainer``; its ``ref_model`` is None, the reference being the model as
            it is when the trainer is built: its log-probabilities are computed here, once.
        train_dataloader (in ``upstream``): batches are lists of chunks, one optimizer step of this rank each.
        eval_dataloader (in ``upstream``): name -> held-out dialogues.
        results: folder for metrics.jsonl and heldout.jsonl.
    """

    def __init__(self, *, config: OfflineConfig, results: Path, **upstream: Any) -> None:
        super().__init__(**upstream)
        self.config, self.results = config, results
        self.micro = self.args.train.micro_batch_size
        self.chunks: Chunks = self.train_dataloader.dataset
        self.before: dict[str, Values] = {}
        self.after: dict[str, Values] = {}
        for sample, (logprobs, _) in zip(self.chunks.samples, self._everywhere(self.chunks.samples), strict=True):
            sample.reference = logprobs
        self.evaluate(self.eval_dataloader)

    def fit(self, args: Any, consumed_samples: int = 0, num_update_steps_per_epoch: int | None = None) -> None:
        """Train from optimizer step ``consumed_samples / train.batch_size`` to the last; upstream's meaning of both."""
        steps = num_update_steps_per_epoch or len(self.train_dataloader)
        if args.eval.steps == -1:
            args.eval.steps = steps
        if args.ckpt.save_steps == -1:
            args.ckpt.save_steps = float("inf")
        step = consumed_samples // args.train.batch_size
        per_step = self.train_dataloader.batch_size * self.strategy.world_size  # chunks
        for epoch in range(step // steps, self.epochs):
            self.chunks.set_epoch(epoch)
            self.train_dataloader.sampler.set_epoch(epoch, consumed_samples=step % steps * per_step)
            self.model.train()
            bar = tqdm(
                self.train_dataloader, desc=f"epoch {epoch + 1}/{self.epochs}", disable=not self.strategy.is_rank_0()
            )
            for chunks in bar:
                logs = self.training_step(chunks)
                step += 1
                bar.set_postfix({name: round(logs[name], 4) for name in ("loss", "pref_accuracy")})
                self._record("metrics.jsonl", {"step": step, "epoch": epoch, **logs})
                state = {"consumed_samples": step * args.train.batch_size, **position_of(self.chunks, args)}
                self.save_logs_and_checkpoints(args, step, bar, logs, state)
        if self._wandb is not None and self.strategy.is_rank_0():
            self._wandb.finish()
        if self._tensorboard is not None and self.strategy.is_rank_0():
            self._tensorboard.close()

    def training_step(self, chunks: Sequence[Sequence[Sample]]) -> dict[str, float]:
        """One optimizer step on this rank's ``chunks``; the metrics of all ranks."""
        samples = [sample for chunk in chunks for sample in chunk]
        pref, sft, metrics = self._coefficients(chunks, samples)
        sizes = [len(sample.unit) for sample in samples]
        rows = list(zip(samples, pref.split(sizes), sft.split(sizes), strict=True))
        passes, zero = self.strategy.accumulated_gradient, torch.zeros_like(pref[: sizes[0]])
        rows += [(samples[0], zero, zero)] * (passes * self.micro - len(rows))  # every rank makes as many passes
        said = 0.0
        for start in range(0, len(rows), self.micro):
            batch, of_pref, of_sft = zip(*rows[start : start + self.micro], strict=True)
            logprobs = self.logprobs(batch)
            p, s = (torch.cat(parts).to(logprobs) for parts in (of_pref, of_sft))
            said -= float((s * logprobs.detach()).sum())
            # DeepSpeed takes the mean over passes and ranks, and L is a sum over both.
            loss = -((p + s) * logprobs).sum() * passes * self.strategy.world_size
            self.strategy.backward(loss, self.model, self.optimizer)
            self.strategy.optimizer_step(self.optimizer, self.model, self.scheduler)
        metrics["sft_loss"] = self.strategy.all_reduce(said, op="sum") / (self.config.imitation or 1.0)
        metrics["loss"] = self.config.preference * metrics["pref_loss"] + self.config.imitation * metrics["sft_loss"]
        metrics["lr"], metrics["grad_norm"] = self.scheduler.get_last_lr()[0], self.strategy.get_grad_norm(self.model)
        return metrics

    def evaluate(self, eval_dataloader: Mapping[str, Sequence[Sample]], steps: int = 0) -> None:
        """Judge the held-out dialogues (see ``offline_eval``) and write them to heldout.jsonl. Step 0 is the reference,
        which later steps are compared with, dialogue by dialogue."""
        self.judged_at = steps
        for name, samples in eval_dataloader.items():
            scores = self._everywhere(samples, ranks=self.config.role == EXPERT)
            if name not in self.before:
                for sample, (logprobs, _) in zip(samples, scores, strict=True):
                    sample.reference = logprobs
            values = judge(samples, scores)
            self.before.setdefault(name, values)
            self.after[name] = values
            told = {"step": steps, "set": name, **compared(self.before[name], values)}
            self._record("heldout.jsonl", told)
            for metric, (mean, *_) in told["metrics"].items():
                if self._wandb is not None and self.strategy.is_rank_0():
                    self._wandb.log({f"eval/{name}/{metric}": mean, "eval/global_step": steps})
                elif self._tensorboard is not None:
                    self._tensorboard.add_scalar(f"eval/{name}/{metric}", mean, steps)

    def _coefficients(
        self, chunks: Sequence[Sequence[Sample]], samples: Sequence[Sample]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """-dL/d log pi of every action of ``samples`` in both parts, L over the chunks of all ranks; their metrics."""
        reference = torch.cat([sample.reference for sample in samples])
        now = torch.cat([now for now, _ in self._scored(samples)]) if self.config.preference else reference
        options = {
            "pref_coef": self.config.preference,
            "sft_coef": self.config.imitation,
            "beta": self.config.pref.beta,
        }
        pref, sft, own = action_coefficients(now, reference, units(chunks), **options)
        of_pref, of_sft = (self._share(own[name]) for name in ("pref_pairs", "sft_terms"))
        metrics = {"pref_loss": own["pref_loss"] * of_pref}
        metrics |= {name: own[name] * of_pref for name in ("pref_accuracy", "pref_margin", "pref_return_gap")}
        metrics |= {name: own[name] for name in ("pref_pairs", "pref_groups_without_spread")}
        return pref * of_pref, sft * of_sft, self.strategy.all_reduce(metrics, op="sum")

    def _share(self, own: float) -> float:
        """This rank's share of a count over all ranks; of nothing at all an equal one."""
        everywhere = self.strategy.all_reduce(own, op="sum")
        return own / everywhere if everywhere else 1.0 / self.strategy.world_size

    def logprobs(self, batch: Sequence[Sample], **options: Any) -> Any:
        """log pi of the actions of ``batch`` at the current parameters, (N,), and what ``options`` ask of the model."""
        device = next(self.model.parameters()).device
        tokens = zero_pad_sequences([s.tokens for s in batch], "right", self.tokenizer.pad_token_id, stack=True)
        mask = zero_pad_sequences([s.mask for s in batch], "right", stack=True).to(device)
        attention = zero_pad_sequences([torch.ones_like(s.tokens) for s in batch], "right", stack=True)
        model: RoleActor = self.model
        with model.choosing([{"allowed": s.allowed} for s in batch]):
            found = model(tokens.to(device), mask, attention.to(device), **options)
        if options:
            return found[0][mask], found[1]
        return found[mask]

    @torch.no_grad()
    def _scored(self, samples: Sequence[Sample], ranks: bool = False) -> Iterator[Scores]:
        """Of each sample log pi of its actions and, of decisions with ``ranks``, their rank; on the CPU."""
        self.model.eval()
        for start in range(0, len(samples), self.micro):
            batch = samples[start : start + self.micro]
            sizes = [len(sample.unit) for sample in batch]
            if ranks:
                logprobs, output = self.logprobs(batch, return_output=True)
                found = (
                    ranks_of(output["logits"][0], torch.cat([s.allowed for s in batch]), logprobs).cpu().split(sizes)
                )
            else:
                logprobs, found = self.logprobs(batch), [None] * len(batch)
            yield from zip(logprobs.float().cpu().split(sizes), found, strict=True)
        self.model.train()

    def _everywhere(self, samples: Sequence[Sample], ranks: bool = False) -> list[Scores]:
        """``_scored`` in order, each rank doing an equal share."""
        world, rank = self.strategy.world_size, dist.get_rank()
        rounds = -(-len(samples) // world)
        mine = [samples[i % len(samples)] for i in range(rank, rounds * world, world)]
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, list(self._scored(mine, ranks)))
        return [shares[i % world][i // world] for i in range(len(samples))]

    def _record(self, file: str, values: Mapping[str, Any]) -> None:
        if self.strategy.is_rank_0():
            append_line(self.results / file, json.dumps(values).encode("ascii") + b"\n")
