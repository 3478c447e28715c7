"""vLLM's own batch of requests: whatever joins, leaves and moves, each request is masked by its own allowed ids."""

from __future__ import annotations

import asyncio
import importlib.util
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("vllm") is None or importlib.util.find_spec("openrlhf") is None:
    pytest.skip("needs openrlhf and vllm", allow_module_level=True)

from openrlhf_gopo import platform

platform.activate()

import torch  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.import_utils import resolve_obj_by_qualname  # noqa: E402
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch  # noqa: E402

from openrlhf_gopo.runtime import engine_worker, restarts  # noqa: E402

pytestmark = pytest.mark.stack

VOCAB, ROWS = 8, 4
LABELS = st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=3).map(sorted)


class Batch:
    """Some requests in vLLM's batch, and what each may sample: None is everything."""

    def __init__(self, kind: type[InputBatch]) -> None:
        sizes = {"block_sizes": [1], "kernel_block_sizes": [1], "max_num_blocks_per_req": [16]}
        self.batch = kind(ROWS, 16, 16, torch.device("cpu"), VOCAB, **sizes)
        self.allowed: dict[str, list[int] | None] = {}
        self.count = 0

    def step(self, leave: list[int], join: list[list[int] | None], swap: tuple[int, int] | None = None) -> None:
        """What an engine does between two forward passes, in its order."""
        for name in [name for i, name in enumerate(list(self.allowed)) if i in leave]:
            self.batch.remove_request(name)
            del self.allowed[name]
        for allowed in join[: ROWS - len(self.allowed)]:
            name, self.count = str(self.count), self.count + 1
            params = SamplingParams(temperature=1.0, allowed_token_ids=allowed)
            self.batch.add_request(CachedRequestState(name, [1], [], params, None, ([0],), 0, []))
            self.allowed[name] = allowed
        self.batch.condense()
        if swap and max(swap) < len(self.allowed):
            self.batch.swap_states(*swap)
        self.batch.refresh_metadata()

    def wrong(self) -> dict[str, list[int]]:
        """Requests that may sample something else, and what."""
        mask = self.batch.sampling_metadata.allowed_token_ids_mask
        if mask is None:
            return {name: list(range(VOCAB)) for name, allowed in self.allowed.items() if allowed}
        rows = {name: (~mask[self.batch.req_id_to_index[name]]).nonzero().flatten().tolist() for name in self.allowed}
        return {name: row for name, row in rows.items() if row != (self.allowed[name] or list(range(VOCAB)))}


steps = st.lists(
    st.tuples(
        st.lists(st.integers(0, ROWS - 1), max_size=ROWS),
        st.lists(st.none() | LABELS, max_size=ROWS),
        st.none() | st.tuples(st.integers(0, ROWS - 1), st.integers(0, ROWS - 1)).filter(lambda p: p[0] != p[1]),
    ),
    max_size=8,
)


@given(steps)
def test_every_request_is_masked_by_its_own_allowed_ids(steps) -> None:
    batch = Batch(InputBatch)
    for leave, join, swap in steps:
        batch.step(leave, join, swap)
        assert not batch.wrong()


class Unmended(InputBatch):
    """vLLM's, as it comes."""

    add_request = InputBatch.add_request.__wrapped__
    swap_states = InputBatch.swap_states.__wrapped__


def moved_and_refilled(kind: type[InputBatch]) -> dict[str, list[int]]:
    """A reply ends in row 0, so the label of row 1 moves there; another reply takes row 1."""
    batch = Batch(kind)
    batch.step([], [None, [2, 3]])
    batch.step([0], [])
    batch.step([], [None])
    return batch.wrong()


def swapped(kind: type[InputBatch]) -> dict[str, list[int]]:
    batch = Batch(kind)
    batch.step([], [[1], [2, 3]], (0, 1))
    return batch.wrong()


def test_vllm_needs_it() -> None:
    """The day this fails vLLM keeps its masks itself, and ``keep_masks`` can go."""
    assert moved_and_refilled(Unmended) == {"2": [2, 3]}
    assert swapped(Unmended) == {"0": [2, 3]}
    assert moved_and_refilled(InputBatch) == swapped(InputBatch) == {}


def test_upstreams_weight_sync_is_in_it() -> None:
    """vLLM refuses an extension with a name that its worker has, so nothing may be added lightly."""
    added = {name for name in vars(engine_worker.EngineWorker) if not name.startswith("__")}
    assert added == set()
    assert callable(engine_worker.EngineWorker.update_weight)


def test_the_rollout_actor_starts_its_engine_with_it(monkeypatch) -> None:
    """Upstream's ``__init__``, which starts the engine, is the end of what is ours: it is listened to, not run."""
    (upstream,) = restarts._RolloutActor.__bases__
    given = {}

    async def listen(self, *args, **kwargs):
        given.update(kwargs)

    monkeypatch.setattr(upstream, "__init__", listen)
    context = SimpleNamespace(was_current_actor_reconstructed=False)
    monkeypatch.setattr(restarts.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(restarts, "end_spawned_with_this_process", lambda: None)  # pytest is no actor
    actor = restarts.rollout_actor(0, "fp32").__ray_metadata__.modified_class
    asyncio.run(actor.__init__(object.__new__(actor), worker_extension_cls="upstream's"))
    assert resolve_obj_by_qualname(given["worker_extension_cls"]) is engine_worker.EngineWorker
    assert given["dtype"] == "float32"
