"""What vLLM's workers import: upstream's weight sync, and label masks that stay with their requests.

vLLM 0.29.0's V1 model runner (the only one on CPU) keeps the ``allowed_token_ids`` of its batch as rows of one mask.
Rows move when a batch is condensed or reordered, and two of these moves leave a mask where it does not belong:

- the row that a request was moved from keeps its mask, and the next request there, if it allows everything, is sampled
  under it (vllm-project/vllm#43894);
- ``swap_states`` assigns row views, so both rows end with one mask (vllm-project/vllm#48419).

An engine that samples labels and words for one model (``--gopo.policy single_level``, ``--gopo.sharing shared``, a
plan) would write replies out of labels.
"""

from __future__ import annotations

import functools
from typing import Any

from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap
from vllm.v1.worker.gpu_input_batch import InputBatch


class EngineWorker(WorkerWrap):
    """Upstream's extension of vLLM's worker, whose import mends the masks first."""


def keep_masks(batch: type[InputBatch]) -> None:
    """Mend the class: a row of ``allowed_token_ids_mask_cpu_tensor`` (max_num_reqs, vocab) bool, where True forbids a
    token, is that of the request in this row. Changes nothing in a version that does so itself."""
    add_request, swap_states = batch.add_request, batch.swap_states

    @functools.wraps(add_request)
    def add(self: InputBatch, request: Any) -> int:
        row, sampling = add_request(self, request), request.sampling_params
        masks = self.allowed_token_ids_mask_cpu_tensor
        if masks is not None and sampling is not None and not sampling.allowed_token_ids:
            masks[row] = False
        return row

    @functools.wraps(swap_states)
    def swap(self: InputBatch, i1: int, i2: int) -> None:
        masks = self.allowed_token_ids_mask_cpu_tensor
        first = None if masks is None else masks[i1].clone()
        swap_states(self, i1, i2)
        if first is not None:
            masks[i2] = first

    batch.add_request, batch.swap_states = add, swap


keep_masks(InputBatch)
