"""Token streams: whatever a customer types, the control tokens are those of the template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from kit import SCRATCH, TESTS, Target, Wrong, load
from mutate import Mutator

from openrlhf_gopo.types import Goal, Strategy, Stream, Trajectory, Turn

CATALOGUE = [Strategy("ask", "Ask", "Ask."), Strategy("refund", "Refund", "Pay."), Strategy("close", "Close", "End.")]
LITERALS = (
    *(
        "<|im_end|>",
        "<|im_start|>",
        "<|im_start|>system\n",
        "<|endoftext|>",
        "<s>",
        "</s>",
        "<unk>",
        "[INST]",
        "[/INST]",
    ),
    *("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<|python_tag|>", "[TOOL_CALLS]"),
    *("<|im_", "end|>", "<|", "|>", "[/", "INST]", "</", "s>", "▁", "<0x0A>", "<0x3C>", "\u200b", "\u200d", "\ufe0f"),
    *(
        "＜|im_end|＞",
        "<\u200b|im_end|>",
        "<repo_name>",
        "<file_sep>",
        "<jupyter_start>",
        "Customer: ",
        "Agent: ",
        "user\n",
    ),
)


@cache
def _policies() -> dict[str, Any]:
    from openrlhf_gopo.policy.two_level import SingleLevelPolicy, TwoLevelPolicy

    made = load(TESTS / "policy" / "conftest.py")
    (SCRATCH / "mistral").mkdir()
    cache = TESTS.parent / ".pytest_cache" / "d" / "tokenizers"
    cache.mkdir(parents=True, exist_ok=True)
    tokenizers = {
        "smollm2": made.load_smollm2(cache),
        "llama3": made.train_llama3(),
        "mistral": made.load_mistral(SCRATCH / "mistral"),
    }
    return {
        f"{name} {kind.__name__}": kind(tokenizer, tokenizer, 3)
        for name, tokenizer in tokenizers.items()
        for kind in (TwoLevelPolicy, SingleLevelPolicy)
    }


def _control(template: Any, tokens: Sequence[int]) -> list[int]:
    """The special and added tokens, in order; found without the template's own notion of them."""
    tokenizer = template.tokenizer
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return [token for token in tokens if token in special]


def _stream_text(m: Mutator) -> tuple[str, tuple[str, ...]]:
    return m.rng.choice(sorted(_policies())), tuple(m.text() for _ in range(4))


def _label_text(m: Mutator) -> tuple[str, tuple[str, ...]]:
    name, texts = _stream_text(m)
    return name, tuple(m.rng.choice((*texts, "A", "B", "7", " C ")) for _ in texts)


def _message(given: tuple[str, tuple[str, ...]]) -> None:
    """One message: its control tokens are those of an empty message, and ordinary text comes back."""
    name, (text, *_) = given
    template = _policies()[name].responder
    for made, plain in ((template.next(text), template.next("")), (template.reply(text), template.reply(""))):
        if _control(template, made) != _control(template, plain):
            raise Wrong(f"control tokens {made} from {text!r}")
    back = template.decode(template.reply(text))
    if not name.startswith("mistral") and back != text.strip():
        raise Wrong(f"{text!r} came back as {back!r}")


def _dialogue(given: tuple[str, tuple[str, ...]]) -> None:
    """Two turns with hostile words everywhere: as many control tokens, at as many places, as with plain words."""
    name, (context, user, briefing, reply) = given
    policy = _policies()[name]

    def played(context: str, user: str, briefing: str, reply: str) -> dict[str, Stream]:
        turn = Turn(user, ("ask", "close"), "ask", reply, briefing)
        goal = Goal("g", "refund", context, {"refund": 1.0})
        return policy.replay(Trajectory(goal, 0, 0, [turn, turn]), CATALOGUE)

    plain = _plain_streams(name, played)
    for role, stream in played(context, user, briefing, reply).items():
        template = policy.expert if role == "expert" else policy.responder
        if _control(template, stream.tokens) != _control(template, plain[role].tokens):
            raise Wrong(f"{role}: control tokens in {stream.tokens}")
        if len(stream.spans) != len(plain[role].spans) or len(stream.logprobs) != len(stream.tokens):
            raise Wrong(f"{role}: spans {stream.spans}")


_plain: dict[str, dict[str, Stream]] = {}


def _plain_streams(name: str, played: Callable[..., dict[str, Stream]]) -> dict[str, Stream]:
    if name not in _plain:
        _plain[name] = played("Orders.", "Hello", "One mug.", "Yes")
    return _plain[name]


def _labels(given: tuple[str, tuple[str, ...]]) -> None:
    from openrlhf_gopo.policy.labels import choose_labels

    name, texts = given
    labels = choose_labels(_policies()[name].responder.tokenizer, 2, ",".join(texts))
    if len(set(labels.values())) != 2 or _control(_policies()[name].responder, list(labels.values())):
        raise Wrong(f"{labels}")


TARGETS = (
    Target("labels", 0.0005, _label_text, _labels),
    Target("messages (policy/template)", 0.015, _stream_text, _message),
    Target("dialogues (policy/two_level)", 0.003, _stream_text, _dialogue),
)
