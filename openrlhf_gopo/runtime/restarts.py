"""A rollout actor that dies starts again, gets the weights of now, and plays its dialogues once more.

Ray starts a dead actor's process again behind the same handle and repeats the calls marked below
(``max_restarts``, ``max_task_retries``). The new process holds the weights that its model began with: it lets nothing
through until the driver has put it back into the weight-sync group and sent what the other engines have.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor
from openrlhf.utils.logging_utils import init_logger
from ray.exceptions import ActorUnavailableError, RayError
from vllm.v1.engine.exceptions import EngineDeadError

from openrlhf_gopo.platform import end_spawned_with_this_process, is_cpu
from openrlhf_gopo.runtime.roles import Role

POLL = 1.0  # seconds
WORKER = "openrlhf_gopo.runtime.engine_worker.EngineWorker"  # in place of the class that it inherits from
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # --ds.param_dtype in vLLM's words

logger = init_logger(__name__)


class _RolloutActor(RolloutRayActor.__ray_metadata__.modified_class):
    """Upstream's, which shares its fate with its vLLM engine and knows whether it has the weights of now."""

    dtype = "bfloat16"  # upstream's own, whatever --ds.param_dtype says

    async def __init__(self, *args: Any, **kwargs: Any) -> None:
        end_spawned_with_this_process()
        kwargs["dtype"] = self.dtype
        kwargs["worker_extension_cls"] = WORKER
        if kwargs.get("full_determinism") and is_cpu():
            # Upstream asks vLLM for batch invariance, which its CPU kernels lack: sums hang on who else is in a batch.
            kwargs["max_num_seqs"] = 1
        await super().__init__(*args, **kwargs)
        self._current = asyncio.Event()
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            self._current.set()

    async def is_current(self) -> bool:
        """False in a process that was started again and has not been admitted."""
        await self._alive(self.llm.check_health())
        return self._current.is_set()

    async def until_death(self) -> None:
        """A call that fails when this process dies, and never returns."""
        await asyncio.Event().wait()

    async def admit(self) -> None:
        """The engine has the weights of now: let dialogues through."""
        self._current.set()

    @ray.method(max_task_retries=-1)
    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's; waits for the weights of now."""
        await self._current.wait()
        return await self._alive(super().generate(*args, **kwargs))

    @ray.method(max_task_retries=-1)
    async def generate_responses(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's; waits for the weights of now."""
        await self._current.wait()
        return await super().generate_responses(*args, **kwargs)

    @staticmethod
    async def _alive(call: Any) -> Any:
        """An actor without its engine is of no use: it ends too, so that Ray starts both again."""
        try:
            return await call
        except EngineDeadError:
            print("the vLLM engine of this rollout actor died, and the actor with it", file=sys.stderr, flush=True)
            os._exit(1)


def rollout_actor(restarts: int, param_dtype: str) -> Any:
    """The actor class; Ray starts one that dies ``restarts`` times again. ``param_dtype``: of the trainer's weights,
    which the engine receives and must hold alike: bf16, fp16 or fp32."""
    members = {"dtype": DTYPES[param_dtype], "__module__": __name__}
    return ray.remote(max_restarts=restarts)(type(_RolloutActor.__name__, (_RolloutActor,), members))


class Restarts:
    """Brings rollout actors that were started again up to date.

    Args:
        roles: the run's; two with the same engines (``--gopo.sharing shared``) count once.
    """

    def __init__(self, roles: Mapping[str, Role]) -> None:
        self.roles = {id(role.actor): role for role in roles.values()}.values()
        self._count = 0

    def await_started(self) -> None:
        """Wait for actors that are being started again, whoever's they are."""
        for role in self.roles:
            _current(role.engines)

    def take_count(self) -> int:
        """How many actors were admitted again since the last call."""
        count, self._count = self._count, 0
        return count

    @contextlib.contextmanager
    def mending(self) -> Iterator[None]:
        """Within, engines are awake and policies idle: an actor that is started again gets their weights at once."""
        over = threading.Event()
        thread = threading.Thread(target=self._mend_until, args=(over,), name="gopo-restarts", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextlib.contextmanager
    def rejoined(self, role: Role) -> Iterator[None]:
        """Around a sync of ``role``'s weights: actors that were started again since the last one take part in it."""
        restarted = [engine for engine, current in _current(role.engines) if not current]
        if restarted:
            ray.get(role.actor.async_run_method(method_name="reconnect_engines"))
        yield
        ray.get([engine.admit.remote() for engine in restarted])
        if restarted:
            self._count += len(restarted)
            logger.warning(
                f"{len(restarted)} of the {role.name}'s {len(role.engines)} rollout actors died, started again and got "
                "the weights of now; the dialogues that they had are played again"
            )

    def _mend_until(self, over: threading.Event) -> None:
        while not over.wait(POLL):
            for role in self.roles:
                asked = [engine.is_current.remote() for engine in role.engines]
                if any(_answer(ref) is False for ref in asked):
                    self._mend(role)

    def _mend(self, role: Role) -> None:
        try:
            with self.rejoined(role):
                ray.get(role.actor.async_run_method(method_name="broadcast_to_vllm"))
        except RayError:
            # Dialogues would wait for ever: without these actors their calls fail, and the run ends with the reason.
            logger.exception(f"the {role.name}'s rollout actors that started again could not get its weights")
            for engine in role.engines:
                ray.kill(engine)


def _answer(ref: Any) -> bool | None:
    """None of an actor that is being started, or is dead for good, which whoever waits for its dialogues will see."""
    try:
        return ray.get(ref)
    except RayError:
        return None


def _current(engines: Sequence[Any]) -> list[tuple[Any, bool]]:
    """Each actor with whether it has the weights of now; waits while one is being started again.

    Raises:
        ActorDiedError, OutOfMemoryError: one died once too often.
    """
    answers: list[tuple[Any, bool]] = []
    asked = [(engine, engine.is_current.remote()) for engine in engines]
    while asked:
        engine, ref = asked.pop(0)
        try:
            answers.append((engine, ray.get(ref)))
        except ActorUnavailableError:
            time.sleep(POLL)
            asked.append((engine, engine.is_current.remote()))
    return answers
