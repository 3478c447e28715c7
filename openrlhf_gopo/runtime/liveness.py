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
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError

from openrlhf_gopo.errors import WorkerError
from openrlhf_gopo.runtime.roles import Role

GRACE = 60.0  # seconds that the run has to fail by itself: a collective whose peer died may never return
PING = 1.0
EXIT = 3
DEATHS = (RayActorError, OutOfMemoryError)  # the second: of every call, once Ray killed the actor for memory

logger = init_logger(__name__)


def pings_of(roles: Mapping[str, Role]) -> dict[str, Any]:
    """Of every actor of the run a method to ping, by a name for people; with sharing a group appears once."""
    found: dict[str, Any] = {}
    for name, role in reversed(roles.items()):
        groups = {"policy": role.actor, "reference": role.reference, "critic": role.critic}
        for kind, group in groups.items():
            for rank, handle in enumerate(group._actor_handlers if group is not None else []):
                found.setdefault(handle._actor_id, (f"the {name}'s {kind} actor, rank {rank}", handle.__ray_ready__))
        for number, handle in enumerate(role.engines or []):
            found.setdefault(handle._actor_id, (f"the {name}'s rollout actor {number}", handle.is_current))
    return dict(found.values())


@contextlib.contextmanager
def watched(roles: Mapping[str, Role], checkpoints: str) -> Iterator[None]:
    """Within: a death of one of the roles' processes becomes a WorkerError that names it.

    Raises:
        WorkerError: at the end of the block, in place of what Ray raised. If the block does not end within ``GRACE``
            seconds of a death, the process ends with the same message and status ``EXIT``.
    """
    pings, over = pings_of(roles), threading.Event()
    threading.Thread(target=_watch, args=(pings, over, checkpoints), daemon=True).start()
    try:
        yield
    except RayError as error:
        dead = _dead(pings)
        if dead:
            raise WorkerError(_message(dead, checkpoints)) from error
        raise
    finally:
        over.set()


def _message(dead: Mapping[str, Exception], checkpoints: str) -> str:
    if any(isinstance(error, OutOfMemoryError) for error in dead.values()):
        why = "Ray killed it because the machine's memory was full"
    else:
        why = "killed, out of memory, or crashed: see its log in Ray's session folder, or give --gopo.worker_logs"
    return (
        f"{'; '.join(dead)} died during the run ({why}); the checkpoints in --ckpt.path {checkpoints} are whole: the "
        "same command with --ckpt.load_enable goes on from the newest"
    )


def _watch(pings: Mapping[str, Any], over: threading.Event, checkpoints: str) -> None:
    """A call waits in a busy actor's queue, and fails as soon as the actor is dead for good."""
    calls = {ping.remote(): name for name, ping in pings.items()}
    while not over.wait(PING):
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        for ref in done:
            name = calls.pop(ref)
            try:
                ray.get(ref)
            except ActorUnavailableError:  # being started again, or about to be found dead
                pass
            except DEATHS as error:
                if not over.wait(GRACE):
                    print(f"train_gopo: error: {_message({name: error}, checkpoints)}", file=sys.stderr, flush=True)
                    os._exit(EXIT)
                return
            except RayError:
                return
            calls[pings[name].remote()] = name


def _dead(pings: Mapping[str, Any]) -> dict[str, Exception]:
    calls = {ping.remote(): name for name, ping in pings.items()}
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=5)
    return {calls[ref]: error for ref in done if (error := _death(ref))}


def _death(ref: Any) -> Exception | None:
    try:
        ray.get(ref, timeout=0)
    except DEATHS as error:
        return error
    return None
