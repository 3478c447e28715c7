"""Notices that a process of the run died, says which, and ends a run that would wait for it for ever."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from openrlhf.utils.logging_utils import init_logger
from ray.exceptions import RayActorError, RayError

from openrlhf_gopo.errors import WorkerError
from openrlhf_gopo.runtime.roles import Role

GRACE = 60.0  # seconds that the run has to fail by itself: a collective whose peer died may never return
PING = 1.0
EXIT = 3

logger = init_logger(__name__)


def actors_of(roles: Mapping[str, Role]) -> dict[str, Any]:
    """Every actor handle of the run by a name for people; with sharing a group appears once."""
    found: dict[str, Any] = {}
    for name, role in reversed(roles.items()):
        groups = {"policy": role.actor, "reference": role.reference, "critic": role.critic}
        for kind, group in groups.items():
            for rank, handle in enumerate(group._actor_handlers if group is not None else []):
                found.setdefault(handle._actor_id, (f"the {name}'s {kind} actor, rank {rank}", handle))
        for number, handle in enumerate(role.engines or []):
            found.setdefault(handle._actor_id, (f"the {name}'s rollout actor {number}", handle))
    return dict(found.values())


@contextlib.contextmanager
def watched(roles: Mapping[str, Role], checkpoints: str) -> Iterator[None]:
    """Within: a death of one of the roles' processes becomes a WorkerError that names it.

    Raises:
        WorkerError: at the end of the block, in place of what Ray raised. If the block does not end within ``GRACE``
            seconds of a death, the process ends with the same message and status ``EXIT``.
    """
    actors, over = actors_of(roles), threading.Event()
    threading.Thread(target=_watch, args=(actors, over, checkpoints), daemon=True).start()
    try:
        yield
    except RayError as error:
        dead = _dead(actors) or _without_engine(actors)
        if dead:
            raise WorkerError(_message(dead, checkpoints)) from error
        raise
    finally:
        over.set()


def _message(dead: list[str], checkpoints: str) -> str:
    return (
        f"{'; '.join(dead)} died during the run (killed, out of memory, or crashed: see its log in Ray's session "
        f"folder, or give --gopo.worker_logs); the checkpoints in --ckpt.path {checkpoints} are whole: the same "
        "command with --ckpt.load_enable goes on from the newest"
    )


def _watch(actors: Mapping[str, Any], over: threading.Event, checkpoints: str) -> None:
    """A call waits in a busy actor's queue, and fails as soon as the actor is dead."""
    pings = {handle.__ray_ready__.remote(): name for name, handle in actors.items()}
    while not over.wait(PING):
        done, _ = ray.wait(list(pings), num_returns=len(pings), timeout=0)
        for ref in done:
            name = pings.pop(ref)
            try:
                ray.get(ref)
            except RayActorError:
                if not over.wait(GRACE):
                    print(f"train_gopo: error: {_message([name], checkpoints)}", file=sys.stderr, flush=True)
                    os._exit(EXIT)
                return
            except RayError:
                return
            pings[actors[name].__ray_ready__.remote()] = name


def _dead(actors: Mapping[str, Any]) -> list[str]:
    pings = {handle.__ray_ready__.remote(): name for name, handle in actors.items()}
    done, _ = ray.wait(list(pings), num_returns=len(pings), timeout=5)
    return [pings[ref] for ref in done if _fails(ref, RayActorError)]


def _without_engine(actors: Mapping[str, Any]) -> list[str]:
    """Rollout actors that live on after vLLM's own process died below them: any call to it fails."""
    engines = {name: handle for name, handle in actors.items() if "rollout" in name}
    calls = {handle.reset_prefix_cache.remote(): name for name, handle in engines.items()}
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=10)
    return [f"the vLLM engine of {calls[ref]}" for ref in done if _fails(ref, RayError)]


def _fails(ref: Any, kind: type[Exception]) -> bool:
    try:
        ray.get(ref, timeout=0)
    except kind:
        return True
    return False
