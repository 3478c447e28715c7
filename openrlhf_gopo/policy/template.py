"""A chat template cut into its constant pieces, so that streams grow by appending tokens and never re-tokenise.

Control tokens come from the template alone. Text (a customer's words, tool results, replies) is data: no literal of a
special or added token inside it can become that token.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from openrlhf_gopo.errors import StreamError

_MARKS = ("qSYSTEMq", "qUSERONEq", "qREPLYONEq", "qUSERTWOq", "qREPLYTWOq", "qUSERTHREEq")


class ChatTemplate:
    """The pieces of ``tokenizer``'s chat template.

    Attributes:
        stop_token: id that ends an assistant message; the engine stops on it and it is part of the action.

    Raises:
        StreamError: no template, or one whose output for earlier messages changes as the dialogue grows.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise StreamError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; use a chat model, or set "
                "chat_template in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        # Single characters (a newline, say) are ordinary text even when they were added to the vocabulary.
        added = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if len(str(t)) > 1}
        self._control = {*added.values(), *tokenizer.all_special_ids}
        literals = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._literal = re.compile("(?=" + "|".join(map(re.escape, literals)) + ")") if literals else None
        begin, to_user, to_reply, to_next = self._pieces()
        self._begin, self._to_user = self._encode(begin), self._encode(to_user)
        self._to_reply, self._to_next = self._encode(to_reply), self._encode(to_next)
        self.stop_token = self._to_next[0]
        if self.stop_token not in self._control:
            raise StreamError(
                f"{tokenizer.name_or_path}: the chat template ends an assistant message with plain text {to_next!r}; "
                "an end-of-turn token is needed, or a reply has no end"
            )

    def begin(self, system: str) -> list[int]:
        """Tokens up to the place where the first user message goes."""
        return [*self._begin, *self.text(system), *self._to_user]

    def user(self, text: str) -> list[int]:
        """A user message and the start of the assistant's."""
        return [*self.text(text), *self._to_reply]

    def close(self, last_token: int) -> list[int]:
        """What follows an assistant message that ended with ``last_token``, up to the next user message."""
        return self._to_next[1:] if last_token == self.stop_token else list(self._to_next)

    def text(self, text: str) -> list[int]:
        """Tokenise data. Every literal of a control token is cut after its first character, so none can match.

        Raises:
            StreamError: the tokenizer still yields a control token (its normaliser maps the text to one).
        """
        cuts = [m.start() + 1 for m in self._literal.finditer(text)] if self._literal else []
        ids = [i for a, b in pairwise([0, *cuts, len(text)]) for i in self._encode(text[a:b])]
        control = self._control.intersection(ids)
        if control:
            names = self.tokenizer.convert_ids_to_tokens(sorted(control))
            raise StreamError(f"text tokenises to the control tokens {names}: {text[:80]!r}")
        return ids

    def decode(self, tokens: list[int]) -> str:
        """The text of sampled tokens, control tokens left out."""
        return self.tokenizer.decode([t for t in tokens if t not in self._control]).strip()

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
        )

    def _pieces(self) -> tuple[str, str, str, str]:
        """(before the system text, before the first user text, before a reply, from a reply to the next user text)."""
        roles = ("system", "user", "assistant", "user", "assistant", "user")
        messages = [{"role": r, "content": m} for r, m in zip(roles, _MARKS, strict=True)]
        try:
            full = self._render(messages)
            marks = _MARKS
        except Exception:  # jinja's raise_exception: some templates know no system role
            messages[1]["content"] = f"{_MARKS[0]}\n\n{_MARKS[1]}"
            messages, marks = messages[1:], _MARKS
            full = self._render(messages)
        pieces = re.split("|".join(marks), full)
        again = re.findall("|".join(marks), full)
        grows = all(full.startswith(self._render(messages[:n])) for n in range(1, len(messages)))
        if (
            again != list(marks)
            or not grows
            or pieces[2] != pieces[4]
            or pieces[4] != pieces[6]
            or pieces[3] != pieces[5]
        ):
            raise StreamError(
                f"{self.tokenizer.name_or_path}: the chat template rewrites earlier messages as the dialogue grows "
                "(templates that strip thinking do), so a stream cannot be append-only; use a template whose output "
                "for a message does not depend on later ones"
            )
        return pieces[0], pieces[1], pieces[2], pieces[3]
