"""LoRA on the way to vLLM: base + adapter, under the base model's names.

OpenRLHF 0.11.2 broadcasts ``named_parameters()`` (ppo_actor.py:477): under PEFT's names, which vLLM does not know,
and base and adapter apart. Here upstream's own loop, whatever its transport, reads a view of the model. The trained
parameters are only read: to merge and unmerge them in place would round a bf16 base anew in every step.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from openrlhf_gopo.errors import ConfigError


class MergedWeight:
    """One parameter of the base model; its ``data`` has the adapter's delta added. Shape and dtype are the parameter's.

    Args:
        parameter: of the base model, (out, in) where ``layer`` is given.
        layer: the LoRA layer that adapts it, if any.
    """

    def __init__(self, parameter: nn.Parameter, layer: LoraLayer | None) -> None:
        self.parameter, self.layer = parameter, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parameter, name)

    @property
    def sources(self) -> list[nn.Parameter]:
        """What must be whole on this rank while ``data`` is read."""
        return [self.parameter, *(adapter_parameters(self.layer) if self.layer else ())]

    @property
    def data(self) -> torch.Tensor:
        """base + alpha/rank B A in a new tensor, as PEFT would merge it; the parameter itself without a layer."""
        merged = self.parameter.data
        if self.layer is not None:
            with torch.no_grad():
                for adapter in self.layer.active_adapters:
                    merged = merged + self.layer.get_delta_weight(adapter)
        return merged.to(self.parameter.dtype)


class MergedModel:
    """What upstream's ``broadcast_to_vllm`` asks of a model, answered with merged weights."""

    def __init__(self, model: PeftModel) -> None:
        self.weights = merged_weights(model)

    def named_parameters(self) -> list[tuple[str, MergedWeight]]:
        return list(self.weights.items())

    @staticmethod
    def gathered(weights: list[MergedWeight], enabled: bool = True) -> Any:
        """For ``deepspeed.zero.GatheredParameters`` (ppo_actor.py:472): under ZeRO-3 the adapter's shards too."""
        return deepspeed.zero.GatheredParameters([p for w in weights for p in w.sources], enabled=enabled)


def merged_weights(model: PeftModel) -> dict[str, MergedWeight]:
    """Every parameter of the base model, under the name that it has without PEFT.

    Raises:
        ConfigError: an adapter on a weight that another module uses too, unadapted (a tied head): no merged tensor has
            the values of both.
    """
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    adapters = {id(p) for layer in layers.values() for p in adapter_parameters(layer)}
    weights: dict[str, MergedWeight] = {}
    users: dict[int, list[str]] = {}
    adapted: dict[str, nn.Parameter] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if id(parameter) in adapters:
            continue
        place, _, leaf = name.rpartition(".base_layer.")
        layer = layers.get(place) if leaf == "weight" else None  # upstream adapts no bias (actor.py:186)
        clean = f"{place}.{leaf}" if place in layers else name
        if layer is not None:
            adapted[place] = parameter
        users.setdefault(id(parameter), []).append(clean)
        if len(users[id(parameter)]) == 1:
            weights[clean] = MergedWeight(parameter, layer)
    for place, parameter in adapted.items():
        if len(users[id(parameter)]) > 1:
            raise ConfigError(
                f"--ds.lora.target_modules: {place} shares its weight ({', '.join(users[id(parameter)])}), so vLLM "
                "cannot hold it adapted in one place and not in the other; leave it out"
            )
    return weights


def adapter_parameters(layer: LoraLayer) -> list[nn.Parameter]:
    """The low-rank factors of one layer."""
    return [p for name in layer.adapter_layer_names for p in getattr(layer, name).parameters()]
