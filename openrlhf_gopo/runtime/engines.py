"""OpenRLHF's vLLM rollout actors without training groups around them, for evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from openrlhf_gopo.rollout.engine import Generate, Generation, Sampling
from openrlhf_gopo.runtime import agent, cluster, launch

PREFIX = 256  # tokens that decide on the engine: they reach beyond the catalogue, to where goals begin to differ


class Engines:
    """vLLM engines by model, started when first asked for.

    Args:
        args: upstream's nested namespace with ``vllm``, ``train`` and ``data``.
        models: the most that one policy needs at once.
    """

    def __init__(self, args: SimpleNamespace, models: int) -> None:
        self.args, self.gpus = args, models * args.vllm.num_engines * args.vllm.tensor_parallel_size
        self._actors: dict[str, list] = {}
        self._bundles: dict[str, Any] = {}  # ours to give back: upstream's own placement group outlives its actors

    def start(self, models: Sequence[str]) -> None:
        """Have engines of exactly ``models``: others are ended, for there may be no memory for both."""
        self.end(besides=models)
        cluster.init_ray(self.gpus)
        for model in models:
            if model not in self._actors:
                self._bundles[model] = launch.placement(
                    self.args.vllm.num_engines * self.args.vllm.tensor_parallel_size
                )
                self._actors[model] = launch.engines(self.args, model, self._bundles[model])
        ray.get([a.get_num_unfinished_requests.remote() for actors in self._actors.values() for a in actors])

    def end(self, besides: Sequence[str] = ()) -> None:
        """End the engines of all models but these."""
        for model in [model for model in self._actors if model not in besides]:
            for actor in self._actors.pop(model):
                ray.kill(actor)
            remove_placement_group(self._bundles.pop(model))

    def generate(self, model: str) -> Generate:
        """Continues prompts by ``model``; the turns of a dialogue stay on one engine, where their prefix is cached."""
        actors = [agent.remote(actor) for actor in self._actors[model]]

        async def generate(tokens: list[int], sampling: Sampling) -> list[Generation]:
            return await actors[hash(tuple(tokens[:PREFIX])) % len(actors)](tokens, sampling)

        return generate
