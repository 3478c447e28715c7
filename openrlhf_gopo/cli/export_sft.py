"""``python -m openrlhf_gopo.cli.export_sft``: demonstrations as chat messages for OpenRLHF's ``train_sft``.

Both roles' streams are written in the words of the rollout's own prompts, so a model that was warm-started on them sees
nothing new when GOPO starts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from openrlhf_gopo import platform
from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.envs import Environment, load_environment
from openrlhf_gopo.errors import GopoError
from openrlhf_gopo.evaluation.scripted import SLIP, demonstrations
from openrlhf_gopo.policy import prompts
from openrlhf_gopo.policy.labels import choose_labels
from openrlhf_gopo.types import Trajectory

Messages = list[dict[str, str]]
SINGLE_LEVEL = "single_level"


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


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="python -m openrlhf_gopo.cli.export_sft", description=__doc__)
    parser.add_argument("--env", required=True, help="as --gopo.env of train_gopo")
    parser.add_argument("--data", default=None, help="as --gopo.data of train_gopo")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face model or folder; decides the labels")
    parser.add_argument("--labels", default=None, help="as --gopo.labels of train_gopo")
    parser.add_argument("--names_only", action="store_true", help="as --gopo.names_only of train_gopo")
    parser.add_argument("--dialogues", type=int, default=1000)
    parser.add_argument("--skill", type=float, default=0.5, help="probability that the script picks the best strategy")
    parser.add_argument("--slip", type=float, default=SLIP, help="probability that a reply belongs to another strategy")
    parser.add_argument("--seed", type=int, default=0)
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
    platform.activate()  # before transformers is imported
    from transformers import AutoTokenizer

    env = load_environment(args.env, args.data)
    labels = list(choose_labels(AutoTokenizer.from_pretrained(args.tokenizer), env.catalogue_size(), args.labels))
    args.out.mkdir(parents=True, exist_ok=True)
    played = list(
        export(env, labels, args.dialogues, args.skill, args.seed, slip=args.slip, names_only=args.names_only)
    )
    sets = {role: [conversations[role] for conversations in played] for role in (EXPERT, RESPONDER, SINGLE_LEVEL)}
    sets["both"] = [conversations[role] for conversations in played for role in (EXPERT, RESPONDER)]
    sets["replies"] = [turn for conversation in sets[RESPONDER] for turn in single_turns(conversation)]
    for name, conversations in sets.items():
        lines = (json.dumps({"messages": conversation}) + "\n" for conversation in conversations)
        (args.out / f"{name}.jsonl").write_text("".join(lines))
    print(f"{len(played)} dialogues of {env.name} -> {args.out}/" + "{" + ",".join(sets) + "}.jsonl")


if __name__ == "__main__":
    main()
