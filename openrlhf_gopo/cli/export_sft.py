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

from openrlhf_gopo.config import EXPERT, RESPONDER
from openrlhf_gopo.envs import Environment, load_environment
from openrlhf_gopo.errors import GopoError
from openrlhf_gopo.evaluation.scripted import demonstrations
from openrlhf_gopo.policy import prompts
from openrlhf_gopo.policy.labels import choose_labels
from openrlhf_gopo.types import Trajectory

Messages = list[dict[str, str]]


def messages(trajectory: Trajectory, env: Environment, labels: list[str]) -> dict[str, Messages]:
    """One dialogue as each role's conversation: what it reads as user messages, what it does as assistant messages."""
    catalogue = env.catalogue(trajectory.goal)
    by_id = {s.id: (label, s) for s, label in zip(catalogue, labels, strict=False)}
    context = trajectory.goal.context
    expert = [_message("system", prompts.expert_system(labels[: len(catalogue)], catalogue, context))]
    responder = [_message("system", prompts.responder_system(context))]
    previous: str | None = None
    for turn in trajectory.turns:
        label, strategy = by_id[turn.strategy]
        expert += [_message("user", prompts.expert_turn(previous, turn.user)), _message("assistant", label)]
        responder += [
            _message("user", prompts.responder_turn(turn.user, strategy, turn.briefing)),
            _message("assistant", turn.reply),
        ]
        previous = turn.reply
    return {EXPERT: expert, RESPONDER: responder}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def export(env: Environment, labels: list[str], count: int, skill: float, seed: int) -> Iterator[dict[str, Messages]]:
    """``count`` dialogues of the imperfect script (see ``evaluation.scripted``) as conversations of both roles."""
    for trajectory in demonstrations(env, count, skill, seed):
        if trajectory.turns:
            yield messages(trajectory, env, labels)


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="python -m openrlhf_gopo.cli.export_sft", description=__doc__)
    parser.add_argument("--env", required=True, help="as --gopo.env of train_gopo")
    parser.add_argument("--data", default=None, help="as --gopo.data of train_gopo")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face model or folder; decides the labels")
    parser.add_argument("--labels", default=None, help="as --gopo.labels of train_gopo")
    parser.add_argument("--dialogues", type=int, default=1000)
    parser.add_argument("--skill", type=float, default=0.5, help="probability that the script picks the best strategy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for expert.jsonl, responder.jsonl, both.jsonl")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Write expert.jsonl, responder.jsonl, and both.jsonl (their union, for one base model of both roles)."""
    args = build_parser().parse_args(argv)
    try:
        _export(args)
    except GopoError as error:
        print(f"export_sft: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _export(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    env = load_environment(args.env, args.data)
    labels = list(choose_labels(AutoTokenizer.from_pretrained(args.tokenizer), env.catalogue_size(), args.labels))
    args.out.mkdir(parents=True, exist_ok=True)
    files = {name: (args.out / f"{name}.jsonl").open("w") for name in (EXPERT, RESPONDER, "both")}
    for conversations in export(env, labels, args.dialogues, args.skill, args.seed):
        for role, conversation in conversations.items():
            line = json.dumps({"messages": conversation}) + "\n"
            files[role].write(line)
            files["both"].write(line)
    for file in files.values():
        file.close()
    print(f"{args.dialogues} dialogues of {env.name} -> {args.out}/expert.jsonl, responder.jsonl, both.jsonl")


if __name__ == "__main__":
    main()
