"""``python -m openrlhf_gopo.cli.export_sft``: demonstrations as chat messages for OpenRLHF's ``train_sft``.

Both roles' streams are written in the words of the rollout's own prompts, so a model that was warm-started on them sees
nothing new when GOPO starts. The dialogues are an imperfect script's, or with ``--logs`` your own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from openrlhf_gopo import platform
from openrlhf_gopo.cli.terminal import say
from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.envs import Environment, load_environment
from openrlhf_gopo.errors import ConfigError, DataError, GopoError
from openrlhf_gopo.evaluation.scripted import SLIP, demonstrations
from openrlhf_gopo.logs import read, to_trajectory
from openrlhf_gopo.logs.check import fits
from openrlhf_gopo.policy import prompts
from openrlhf_gopo.policy.labels import choose_labels
from openrlhf_gopo.policy.template import ChatTemplate
from openrlhf_gopo.types import Trajectory

Messages = list[dict[str, str]]
SINGLE_LEVEL = "single_level"
FILES = (EXPERT, RESPONDER, SINGLE_LEVEL, "both", "replies")
SCRIPT = {"dialogues": 1000, "skill": 0.5, "slip": SLIP, "seed": 0}  # defaults of the flags that steer the script


def messages(
    trajectory: Trajectory, env: Environment, labels: list[str], names_only: bool = False
) -> dict[str, Messages]:
    """One dialogue as the conversation of each role, and of one model that plays both: what it reads as user messages,
    what it does as assistant messages."""
    catalogue = env.catalogue(trajectory.goal)
    by_id = {s.id: (label, s) for s, label in zip(catalogue, labels, strict=False)}
    context = trajectory.goal.context
    system = prompts.expert_system(labels[: len(catalogue)], catalogue, context, names_only=names_only)
    expert = [_message("system", system)]
    responder = [_message("system", prompts.responder_system(context))]
    system = prompts.single_system(labels[: len(catalogue)], catalogue, context, names_only=names_only)
    single = [_message("system", system)]
    previous: str | None = None
    for turn in trajectory.turns:
        label, strategy = by_id[turn.strategy]
        expert += [_message("user", prompts.expert_turn(previous, turn.user)), _message("assistant", label)]
        responder += [
            _message("user", prompts.responder_turn(turn.user, strategy, turn.briefing)),
            _message("assistant", turn.reply),
        ]
        single += [
            _message("user", prompts.single_turn(turn.user)),
            _message("assistant", label),
            _message("user", prompts.single_order(strategy, turn.briefing)),
            _message("assistant", turn.reply),
        ]
        previous = turn.reply
    return {EXPERT: expert, RESPONDER: responder, SINGLE_LEVEL: single}


def single_turns(conversation: Messages) -> Iterator[Messages]:
    """Each exchange as a conversation of its own: short sequences, on which a small model soon learns to copy facts."""
    exchanges = [m for m in conversation if m["role"] != "system"]
    yield from (exchanges[i : i + 2] for i in range(0, len(exchanges), 2))


class Repeats:
    """Lets each exchange through a few times: the strategies that state facts, which differ from dialogue to dialogue,
    then outweigh those that say the same few sentences every time.

    Args:
        most: times that the same order (strategy and briefing) and reply are let through; None: always.
    """

    def __init__(self, most: int | None) -> None:
        self.most, self.seen = most, Counter[tuple[str, str]]()

    def allow(self, exchange: Messages) -> bool:
        """Whether this (user message, reply) is one of the first ``most`` of its kind."""
        key = (exchange[0]["content"].splitlines()[-1], exchange[1]["content"])
        self.seen[key] += 1
        return self.most is None or self.seen[key] <= self.most


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def export(
    env: Environment,
    labels: list[str],
    count: int,
    skill: float,
    seed: int,
    *,
    slip: float = SLIP,
    names_only: bool = False,
) -> Iterator[dict[str, Messages]]:
    """``count`` dialogues of the imperfect script (see ``evaluation.scripted``) as conversations of both roles."""
    for trajectory in demonstrations(env, count, skill, seed, slip):
        if trajectory.turns:
            yield messages(trajectory, env, labels, names_only)


def logged(env: Environment, file: Path, template: ChatTemplate, census: Counter[str]) -> Iterator[Trajectory]:
    """The dialogues of ``file`` that a warm start may imitate, as far as it may; ``census`` counts the rest.

    Left out: dialogues about held-out goals of ``env``, and those with a text that spells a control token, which would
    be that token in training and plain text in a rollout. A dialogue ends before its first turn without a strategy.

    Raises:
        DataError: the file breaks the schema, names an intent or strategy that ``env`` does not have, or holds nothing
            to imitate.
    """
    used = False
    heldout = {goal.id for goal in env.goals("heldout")}
    for _, dialogue in read(file, fits(env)):
        trajectory = to_trajectory(dialogue)
        labelled = [bool(turn.strategy) for turn in trajectory.turns]
        if not all(labelled):
            trajectory.turns = trajectory.turns[: labelled.index(False)]
        texts = [t for turn in trajectory.turns for t in (turn.user, turn.briefing, turn.reply)]
        if trajectory.goal.id in heldout:
            census["left out: held-out goal"] += 1
        elif not trajectory.turns:
            census["left out: first turn without a strategy"] += 1
        elif any(map(template.spells_control, [trajectory.goal.context, *texts])):
            census["left out: control token in a text"] += 1
        else:
            if not all(labelled):
                census["cut before a turn without a strategy"] += 1
            used = True
            yield trajectory
    if not used:
        told = "; ".join(f"{reason}: {count}" for reason, count in census.items())
        raise DataError(f"--logs {file}: nothing to imitate ({told}); give labelled dialogues about training goals")


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="python -m openrlhf_gopo.cli.export_sft", description=__doc__)
    parser.add_argument("--env", required=True, help="as --gopo.env of train_gopo")
    parser.add_argument("--data", default=None, help="as --gopo.data of train_gopo")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face model or folder; decides the labels")
    parser.add_argument("--labels", default=None, help="as --gopo.labels of train_gopo")
    parser.add_argument("--names_only", action="store_true", help="as --gopo.names_only of train_gopo")
    parser.add_argument(
        "--repeats",
        type=int,
        help="times that replies.jsonl holds the same reply to the same strategy and briefing, so that replies which "
        "state facts outweigh the few that never change; default: as often as they occur",
    )
    parser.add_argument(
        "--logs", type=Path, default=None, help="logged dialogues (see cli.logs) in place of the script"
    )
    script = parser.add_argument_group("the script, not with --logs")
    script.add_argument("--dialogues", type=int, help="default: 1000")
    script.add_argument("--skill", type=float, help="probability that the script picks the best strategy; default: 0.5")
    script.add_argument(
        "--slip", type=float, help=f"probability that a reply belongs to another strategy; default: {SLIP}"
    )
    script.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .jsonl files")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write expert.jsonl, responder.jsonl, single_level.jsonl (one model that does both), both.jsonl (the union of the
    first two) and replies.jsonl (one reply each)."""
    args = build_parser().parse_args(argv)
    try:
        _export(args)
    except GopoError as error:
        print(f"export_sft: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _export(args: argparse.Namespace) -> None:
    given = [name for name in SCRIPT if getattr(args, name) is not None]
    if args.logs is not None and given:
        raise ConfigError(f"--{given[0]} {getattr(args, given[0])}: steers the script; leave it out with --logs")
    if args.repeats is not None and args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats}: give 1 or more")
    if args.dialogues is not None and args.dialogues < 1:
        raise ConfigError(f"--dialogues {args.dialogues}: give 1 or more")
    platform.activate()  # before transformers is imported
    from openrlhf_gopo.runtime.requests import load_tokenizer

    env = load_environment(args.env, args.data)
    tokenizer = load_tokenizer("--tokenizer", args.tokenizer)
    labels = list(choose_labels(tokenizer, env.catalogue_size(), args.labels))
    census: Counter[str] = Counter()
    if args.logs is None:
        script = {name: default if name not in given else getattr(args, name) for name, default in SCRIPT.items()}
        count, skill, seed = int(script["dialogues"]), script["skill"], int(script["seed"])
        played = export(env, labels, count, skill, seed, slip=script["slip"], names_only=args.names_only)
    else:
        usable = logged(env, args.logs, ChatTemplate(tokenizer), census)
        played = (messages(trajectory, env, labels, args.names_only) for trajectory in usable)
    written = _write(played, args.out, Repeats(args.repeats))
    print(f"{written} dialogues of {env.name} -> {args.out}/" + "{" + ",".join(FILES) + "}.jsonl")
    for reason, count in census.items():
        say(f"{reason}: {count}")


def _write(played: Iterator[dict[str, Messages]], out: Path, repeats: Repeats) -> int:
    """Write ``FILES`` as the dialogues come, under their names once all are there; the number of dialogues."""
    out.mkdir(parents=True, exist_ok=True)
    parts = {name: out / f"{name}.jsonl.part" for name in FILES}
    written = 0
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context(part.open("w", encoding="utf-8")) for name, part in parts.items()}
            for conversations in played:
                for role, conversation in conversations.items():
                    _line(files[role], conversation)
                for role in (EXPERT, RESPONDER):
                    _line(files["both"], conversations[role])
                for turn in filter(repeats.allow, single_turns(conversations[RESPONDER])):
                    _line(files["replies"], turn)
                written += 1
        for name, part in parts.items():
            part.replace(out / f"{name}.jsonl")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return written


def _line(file: TextIO, conversation: Messages) -> None:
    file.write(json.dumps({"messages": conversation}) + "\n")


if __name__ == "__main__":
    main()
