"""Trainer -> vLLM weight sync without NCCL: Gloo carries the tensors, vLLM reloads them when the last has come."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

CONNECT_TIMEOUT = timedelta(minutes=5)
BROADCAST_TIMEOUT = timedelta(minutes=30)


class GlooBroadcaster:
    """A group of its own beside torch's default group, with the one call that OpenRLHF 0.11.2 makes on vLLM's
    ``PyNcclCommunicator``."""

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        from torch import distributed

        store = distributed.TCPStore(host, port, world_size, is_master=rank == 0, timeout=CONNECT_TIMEOUT)
        prefixed = distributed.PrefixStore("openrlhf_gopo_weights", store)
        self.rank = rank
        self.group: Any = distributed.ProcessGroupGloo(prefixed, rank, world_size, BROADCAST_TIMEOUT)

    def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
        from torch import distributed

        options = distributed.BroadcastOptions()
        options.rootRank = src
        options.rootTensor = 0
        data = tensor.detach().contiguous() if self.rank == src else tensor
        self.group.broadcast([data], options).wait()


def send_over_gloo(module: Any) -> None:
    """Patch of ``openrlhf.utils.distributed_util``, used by the trainer's rank 0 and by the engines."""

    def stateless_init_process_group(
        master_address: str, master_port: int, rank: int, world_size: int, device: Any
    ) -> GlooBroadcaster:
        return GlooBroadcaster(master_address, master_port, rank, world_size)

    module.stateless_init_process_group = stateless_init_process_group


def reload_on_last_tensor(module: Any) -> None:
    """Patch of ``openrlhf.trainer.ray.vllm_worker_wrap``, inside the engine."""
    module.WorkerWrap.update_weight = update_weight


def update_weight(self: Any, name: str, dtype: Any, shape: Any, empty_cache: bool = False) -> None:
    """Receive one tensor; at the last of a sync, which upstream marks with ``empty_cache``, reload them all.

    vLLM packs linear weights for the CPU and drops the originals, so a tensor cannot be copied into place alone.
    """
    import torch

    if self._model_update_with_ray:
        raise RuntimeError("--vllm.sync_with_ray does not work without CUDA: remove the flag")
    if dtype != self.model_config.dtype:
        raise RuntimeError(f"{name}: trainer sends {dtype}, engine holds {self.model_config.dtype}")
    weight = torch.empty(shape, dtype=dtype)
    self._model_update_group.broadcast(weight, src=0)
    pending = self.__dict__.setdefault("_openrlhf_gopo_pending", {})
    pending[name] = weight  # by name: a sync that broke off half-way leaves nothing behind
    if not empty_cache:
        return
    self.model_runner.reload_weights(weights_iterator=iter(pending.items()))
    pending.clear()
    repack_tied_heads(self.model_runner.model)


def repack_tied_heads(model: Any) -> None:
    """Pack the output heads that share their weight with the input embedding once more.

    No tensor of a checkpoint is called after a tied head, so vLLM 0.29.0's reload skips it; its packed copy would keep
    the old weights while the embedding has the new ones, and sample from a mixture of both.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = {layer.weight.data_ptr() for layer in layers if not isinstance(layer, ParallelLMHead)}
    for layer in layers:
        if isinstance(layer, ParallelLMHead) and layer.weight.data_ptr() in embeddings:
            layer.quant_method.process_weights_after_loading(layer)
