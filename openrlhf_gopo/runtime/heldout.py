"""The evaluations of a training run: its held-out goals with the weights of now, sampled and greedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from openrlhf_gopo.envs import Environment
from openrlhf_gopo.evaluation.decoding import GREEDY
from openrlhf_gopo.evaluation.records import read_trajectories
from openrlhf_gopo.evaluation.references import add_reference_scores
from openrlhf_gopo.evaluation.summary import summarise
from openrlhf_gopo.evaluation.tables import write_text
from openrlhf_gopo.evaluation.transcript import as_text
from openrlhf_gopo.runtime.samples_generator import GOPOSamplesGenerator
from openrlhf_gopo.types import Trajectory

EXAMPLES = 8  # dialogues of an evaluation that are also written as text
INTERVALS = ("tse", "success")  # metrics whose 95% interval is logged too

Played = dict[float, list[Trajectory]]  # by temperature, --eval.temperature first


class HeldOut:
    """Plays the held-out goals at --eval.temperature, and on request greedily too.

    Args:
        args: upstream's nested namespace; ``args.eval`` is read.
        folder: for the dialogues: ``step_NNNNN`` at --eval.temperature, ``greedy_NNNNN`` for the greedy ones beside it.
    """

    def __init__(self, env: Environment, generator: GOPOSamplesGenerator, args: SimpleNamespace, folder: Path) -> None:
        self.env, self.generator, self.args, self.folder = env, generator, args, folder

    def play(self, step: int, *, both: bool, known: Played) -> Played:
        """New dialogues with the weights of now; ``both``: greedy ones too, unless --eval.temperature is 0.

        Decodings in ``known`` are left out: they have been played at this step already.
        """
        files = {one: self._file(step, one) for one in self._temperatures(both) if one not in known}
        if not files:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        played = self.generator.evaluate(files, self.args.eval.n_samples_per_prompt)
        for temperature, trajectories in played.items():
            add_reference_scores(self.env, trajectories)
            examples = "\n\n".join(map(as_text, trajectories[:EXAMPLES])) + "\n"
            write_text(files[temperature].with_suffix(".txt"), examples)
        return played

    def read(self, step: int, *, both: bool) -> Played:
        """What an earlier run of this training has played at ``step``; without the decodings whose file is gone."""
        found = {one: self._file(step, one) for one in self._temperatures(both)}
        played = {one: read_trajectories(path) for one, path in found.items() if path.is_file()}
        for trajectories in played.values():
            add_reference_scores(self.env, trajectories)
        return played

    def metrics(self, played: Mapping[float, Sequence[Trajectory]]) -> dict[str, float]:
        """``eval_*`` at --eval.temperature, ``eval_greedy_*`` for greedy dialogues beside it."""
        logs = {}
        for temperature, trajectories in played.items():
            prefix = "eval_" if temperature == self.args.eval.temperature else "eval_greedy_"
            summary = summarise(trajectories)
            logs |= {f"{prefix}{name}": interval.mean for name, interval in summary.metrics.items()}
            for name in INTERVALS:
                if (interval := summary.metrics.get(name)) is not None:
                    logs |= {f"{prefix}{name}_low": interval.low, f"{prefix}{name}_high": interval.high}
            logs[f"{prefix}failures"] = float(summary.failures)
        return logs

    def _temperatures(self, both: bool) -> list[float]:
        return list(dict.fromkeys([self.args.eval.temperature, *([GREEDY] if both else [])]))

    def _file(self, step: int, temperature: float) -> Path:
        name = "step" if temperature == self.args.eval.temperature else "greedy"
        return self.folder / f"{name}_{step:05d}.jsonl"
