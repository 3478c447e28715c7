"""What has to agree between a checkpoint and the run that goes on from it: the flags, and the log files."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openrlhf_gopo.config import GopoConfig
from openrlhf_gopo.errors import ConfigError

LOGS = ("trajectories.jsonl", "metrics.jsonl")

# With another value the checkpoint does not fit the models, or its data position another batch arithmetic.
BREAKING = {
    *(f"gopo.{name}" for name in ("env", "data", "policy", "sharing", "labels", "names_only", "expert_mode")),
    *("rollout.batch_size", "rollout.n_samples_per_prompt", "rollout.vllm_generate_batch_size", "train.batch_size"),
    *("data.max_samples", "ds.zero_stage", "ds.param_dtype", "ds.load_in_4bit", "ds.tensor_parallel_size"),
    *("ds.lora.rank", "ds.lora.alpha", "ds.lora.target_modules"),
}
BREAKING_OF_GROUP = ("model_name_or_path", "optim", "ranks")
# Where the run stands and what it prints.
NEUTRAL = re.compile(r"ckpt\.|logger\.|local_rank|gopo\.(worker_logs|dry_run|results_dir)|.*\.ranks$|.*use_wandb")
# May hold a key, or much text that may.
UNRECORDED = {"logger.wandb.key"} | {
    f"gopo.{name}.{field}" for name in ("llm", "judge") for field in ("extra_body", "api_key_env")
}

logger = logging.getLogger(__name__)


def recorded_flags(args: SimpleNamespace, config: GopoConfig) -> dict[str, Any]:
    """Every flag by name, with values that JSON can hold; ``GROUP.ranks`` is nodes x GPUs of a group. No secrets."""
    flat = dict(_flat(args, "")) | {f"gopo.{name}": value for name, value in _flat(asdict(config), "")}
    groups = {"actor": args.actor}
    if config.own_expert:
        groups["expert"] = args.expert
    if args.critic.model_name_or_path or config.expert_has_critic:
        groups["critic"] = args.critic
    flat = {n: v for n, v in flat.items() if n.split(".")[0] not in {"expert", "critic"} - groups.keys()}
    flat |= {f"{name}.ranks": group.num_nodes * group.num_gpus_per_node for name, group in groups.items()}
    for name in ("gopo.user", "gopo.reward"):
        if flat.get(name):
            flat[name] = re.sub(r"(?<=//)[^/@,]*@|\?[^,]*", "", flat[name])
    return {name: value for name, value in sorted(flat.items()) if name not in UNRECORDED}


def _flat(values: Any, prefix: str) -> list[tuple[str, Any]]:
    found = []
    for name, value in (values if isinstance(values, Mapping) else vars(values)).items():
        if isinstance(value, (SimpleNamespace, Mapping)):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, _plain(value)))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def check_flags(saved: Mapping[str, Any], now: Mapping[str, Any], tag: str) -> list[str]:
    """Compare the flags of a checkpoint with those of the run that wants to go on from it, field by field.

    Returns:
        A notice per flag that changed and may.

    Raises:
        ConfigError: flags changed that may not; names all of them.
    """
    names = [n for n in sorted({*saved, *now}) if saved.get(n) != now.get(n) and n not in UNRECORDED]
    breaking = [n for n in names if n in BREAKING or (n.split(".")[-1] in BREAKING_OF_GROUP and n.count(".") == 1)]
    if breaking:
        changed = "; ".join(f"--{n} was {saved.get(n)}, is {now.get(n)}" for n in breaking)
        raise ConfigError(
            f"--ckpt.load_enable: checkpoint {tag} does not fit: {changed}; give the old values, or start a new run "
            "with another --ckpt.path and without --ckpt.load_enable"
        )
    return [f"--{n} was {saved.get(n)}, is {now.get(n)}" for n in names if not NEUTRAL.match(n)]


def log_offsets(results: Path) -> dict[str, Any]:
    """How far the logs are written, in bytes, and where they are."""
    sizes = {name: path.stat().st_size for name in LOGS if (path := results / name).is_file()}
    return {"results": str(results.resolve()), **dict.fromkeys(LOGS, 0), **sizes}


def cut_logs(results: Path, offsets: Mapping[str, Any]) -> list[str]:
    """Take what the logs hold of steps after the checkpoint out of them, into ``NAME.lost.jsonl`` beside them.

    These steps are done again; what they showed the first time is kept apart, so that nothing stands twice. A line cut
    off by the kill is dropped. Running it again after a kill changes nothing.

    Returns:
        A notice per log that was cut.
    """
    notices = []
    for name in LOGS:
        path, offset = results / name, offsets.get(name, 0)
        if offsets.get("results") != str(results.resolve()):
            return [
                f"{results}: not the folder of the checkpoint ({offsets.get('results')}); its logs stay as they are"
            ]
        size = path.stat().st_size if path.is_file() else 0
        if size < offset:
            notices.append(f"{path}: {size} bytes, the checkpoint knew {offset}; left as it is")
        if size <= offset:
            continue
        with path.open("rb") as file:
            file.seek(offset)
            lines = [line for line in file.read().splitlines(keepends=True) if _whole(line)]
        lost = path.with_suffix(".lost.jsonl")
        _append_once(lost, b"".join(lines))
        with path.open("rb+") as file:
            file.truncate(offset)
            os.fsync(file.fileno())
        notices.append(f"{path}: {len(lines)} lines of steps that are done again went to {lost.name}")
    return notices


def _whole(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _append_once(path: Path, text: bytes) -> None:
    """Append unless it is there already: a kill may fall between this and the cut."""
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - len(text), 0))
        if file.read() != text:
            file.write(text)
        file.flush()
        os.fsync(file.fileno())
