"""What playing a policy took: tokens of local models, requests and tokens of endpoints, time, and a price."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from openrlhf_gopo.endpoint import Endpoint, Usage
from openrlhf_gopo.errors import DataError
from openrlhf_gopo.evaluation.endpoint import Prices
from openrlhf_gopo.evaluation.tables import markdown, write_text
from openrlhf_gopo.types import Trajectory

NAME = "usage.json"
HEADER = (
    *("policy", "dialogues", "sampled tokens", "context tokens", "requests", "prompt tokens", "completion tokens"),
    *("answers from cache", "minutes", "cost"),
)


def add_usage(folder: Path, endpoints: Iterable[Endpoint], seconds: float) -> None:
    """Add to ``folder``/usage.json, which sums over the runs of a resumed evaluation."""
    found = read_usage(folder)
    for endpoint in endpoints:
        for name, value in asdict(endpoint.usage).items():
            found[name] += value
    found["seconds"] += seconds
    write_text(folder / NAME, json.dumps(found) + "\n")


def read_usage(folder: Path) -> dict[str, float]:
    """The fields of ``Usage``, and ``seconds``; 0 where nothing was played.

    Raises:
        DataError: the file is no JSON.
    """
    path = folder / NAME
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); delete it, it holds sums of tokens and time only") from error
    return asdict(Usage()) | {"seconds": 0.0} | found


def cost_table(rows: Mapping[str, tuple[Sequence[Trajectory], Path]], prices: Prices | None) -> str:
    """Markdown: per policy its dialogues and folder. Sampled and context tokens are those of local models' streams;
    tokens of failed dialogues count too, as far as they were written."""
    cells = []
    for name, (trajectories, folder) in rows.items():
        streams = [stream for trajectory in trajectories for stream in trajectory.streams.values()]
        sampled = sum(end - start for stream in streams for start, end in stream.spans)
        context = sum(len(stream.tokens) for stream in streams) - sampled
        used = read_usage(folder)
        usage = Usage(**{field: int(used[field]) for field in asdict(Usage())})
        counts = (len(trajectories), sampled, context, usage.requests, usage.prompt_tokens, usage.completion_tokens)
        cost = f"{prices.of(usage):.2f}" if prices and usage.requests else "-"
        numbers = (f"{count:,}" for count in (*counts, usage.cached))
        cells.append([name, *numbers, f"{used['seconds'] / 60:.1f}", cost])
    return markdown((list(HEADER), cells))
