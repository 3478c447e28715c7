"""How well a model agrees with logged dialogues: values per dialogue, and their means with bootstrap intervals.

``log_likelihood``: mean log pi of a dialogue's decisions (the expert; nats) or reply tokens (the responder).
``top1``, ``top3``: share of decisions where the logged strategy is the most likely allowed one, or among three;
``chance``: mean of 1/|A|, what guessing gives as top1. ``pref_accuracy``: over the pairs that a dialogue is in, how
often the better one has the larger m (ties count half: it is 0.5 before training); ``likelihood_accuracy``: how often
it has the larger mean log pi, which needs no training. Intervals are over dialogues; those of the accuracies are
too narrow by what the dialogues of a pair share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from openrlhf_gopo.core.categorical import PAD, masked_categorical_logprobs
from openrlhf_gopo.core.preference import preference_pairs, trajectory_log_ratio
from openrlhf_gopo.evaluation.summary import bootstrap
from openrlhf_gopo.runtime.offline.data import Sample, units

Values = dict[str, dict[int, float]]  # metric -> index of the dialogue -> value


def ranks_of(logits: torch.Tensor, allowed: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The rank of each chosen label among the allowed ones, 1 the most likely: (N, V), (N, L), log pi (N,) -> (N,)."""
    everything, _ = masked_categorical_logprobs(logits, allowed.to(logits.device))
    return (everything > chosen.unsqueeze(-1)).sum(dim=-1) + 1


def judge(samples: Sequence[Sample], scored: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> Values:
    """The metrics above of each dialogue; ``scored``: log pi of its actions, and ranks of decisions."""
    values: Values = defaultdict(dict)
    for index, (sample, (logprobs, ranks)) in enumerate(zip(samples, scored, strict=True)):
        values["log_likelihood"][index] = float(logprobs.mean())
        if ranks is not None:
            values["top1"][index] = float((ranks <= 1).float().mean())
            values["top3"][index] = float((ranks <= 3).float().mean())
            values["chance"][index] = float((1 / (sample.allowed != PAD).sum(dim=-1)).mean())
    _judge_pairs(samples, [logprobs.double() for logprobs, _ in scored], values)
    return dict(values)


def _judge_pairs(samples: Sequence[Sample], logprobs: list[torch.Tensor], values: Values) -> None:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.group].append(index)
    names = ("pref_accuracy", "likelihood_accuracy")
    won: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in names}
    for members in groups.values():
        found = units([[samples[i] for i in members]])
        dialogue = [i for i in members for _ in samples[i].keys]
        count = len(found.returns)
        now = torch.cat([logprobs[i] for i in members])
        reference = torch.cat([samples[i].reference for i in members]).double()  # type: ignore[misc]
        lengths = torch.bincount(found.owner, minlength=count).double()
        m = (
            trajectory_log_ratio(now, reference, found.owner, found.weights, count),
            now.new_zeros(count).index_add(0, found.owner, now) / lengths,
        )
        for group in found.groups:
            pairs = preference_pairs(found.returns[group])
            for winner, loser in group[pairs].tolist():
                for name, score in zip(names, m, strict=True):
                    right = 0.5 * float(score[winner] == score[loser]) + float(score[winner] > score[loser])
                    won[name][dialogue[winner]].append(right)
                    won[name][dialogue[loser]].append(right)
    for name, by_dialogue in won.items():
        if by_dialogue:
            values[name] = {index: sum(right) / len(right) for index, right in by_dialogue.items()}


def compared(before: Values, after: Values) -> dict[str, Any]:
    """Each metric and its change, dialogue by dialogue, as [mean, low, high]: 95% bootstrap over dialogues."""

    def interval(values: Mapping[int, float]) -> list[float]:
        found = bootstrap(list(values.values()))
        return [found.mean, found.low, found.high]

    change = {name: {i: value - before[name][i] for i, value in of.items()} for name, of in after.items()}
    return {
        "dialogues": len(after["log_likelihood"]),
        "metrics": {name: interval(of) for name, of in after.items()},
        "change": {name: interval(of) for name, of in change.items()},
    }


def table(before: Mapping[str, Values], after: Mapping[str, Values]) -> str:
    """The held-out dialogues before and after training, as Markdown."""
    lines = ["| held-out set | dialogues | metric | before | after | change |", "|---|---|---|---|---|---|"]
    for name, values in after.items():
        first, last = compared(before[name], before[name]), compared(before[name], values)
        for metric in values:
            cells = [_cell(first["metrics"][metric]), _cell(last["metrics"][metric]), _cell(last["change"][metric])]
            lines.append(f"| {name} | {len(values[metric])} | {metric} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(interval: Sequence[float]) -> str:
    mean, low, high = interval
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
