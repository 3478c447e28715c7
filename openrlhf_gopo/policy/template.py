"""A chat template cut into its constant pieces, so that streams grow by appending tokens and never re-tokenise.

Control tokens come from the template alone. Text (a customer's words, tool results, replies) is data: no literal of a
special or added token inside it can become that token.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import accumulate, pairwise
from typing import Any

from openrlhf_gopo.errors import StreamError

_MARKS = ("qSYSTEMq", "qUSERONEq", "qREPLYONEq", "qUSERTWOq", "qREPLYTWOq", "qUSERTHREEq")
_ROLES = ("system", "user", "assistant", "user", "assistant", "user")


class ChatTemplate:
    """The constant pieces of ``tokenizer``'s chat template.

    A message and the pieces around it are tokenised as one string, so that for ordinary text a stream equals the
    tokenised output of ``apply_chat_template``. Where a template takes no system message, or moves it, the system text
    opens the first user message.

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
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        special |= {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        # Single characters and runs of blanks are ordinary text even when they were added to the vocabulary.
        added = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if len(str(t).strip(" \t\r\n▁")) > 1}
        literals = added | special
        self._special, self._control = set(special.values()), set(literals.values())
        self._known: dict[tuple[str, str], Counter[int]] = {}
        longest_first = sorted(literals, key=len, reverse=True)
        self._literal = re.compile(f"(?=({'|'.join(map(re.escape, longest_first)) or '(?!)'}))")
        self._to_system, self._to_first, self._to_reply, self._blank, between = self._pieces()
        end = self._literal.match(between)
        if end is None:
            raise StreamError(
                f"{tokenizer.name_or_path}: the chat template ends an assistant message with plain text {between!r}; "
                "an end-of-turn token is needed, or a reply has no end"
            )
        self._stop = end[1]
        self._to_next = between.removeprefix(self._stop)
        self.stop_token: int = literals[self._stop]
        self._special.add(self.stop_token)

    def first(self, system: str, user: str) -> list[int]:
        """How a stream begins: the system message, the first user message, the start of the assistant's."""
        return self._tokens(self._to_system, system, self._to_first, user, self._to_reply, behind="")

    def next(self, user: str) -> list[int]:
        """What follows ``stop_token``: a user message and the start of the assistant's."""
        return self._tokens(self._to_next, user, self._to_reply)

    def label(self, text: str) -> int | None:
        """The token that alone is the assistant message ``text``, or None when it takes more than one."""
        whole = self._tokens(self._to_next, "", self._to_reply + self._blank, text, "")
        return whole[-1] if text and whole[:-1] == self.next("") else None

    def spells_control(self, text: str) -> bool:
        """Whether ``text`` spells a control token: plain text in a stream, the token itself to a chat template."""
        return self._literal.search(text) is not None

    def reply(self, text: str) -> list[int]:
        """The tokens of an assistant message that says ``text`` and ends."""
        return self._tokens("", text, self._stop)

    def decode(self, tokens: list[int]) -> str:
        """The text of sampled tokens, special tokens left out."""
        words = [t for t in tokens if t not in self._special]
        return self.tokenizer.decode(words, clean_up_tokenization_spaces=False).strip()

    def _tokens(self, *parts: str, behind: str | None = None) -> list[int]:
        """Tokenise template, data, template, ... as one text that stands behind the end of a message (or ``behind``).

        Every literal of a control token that is not the template's own is cut after its first character, so none of
        them can match.

        Raises:
            StreamError: the tokenizer still yields a control token (its normaliser maps the text to one, or it has no
                token for a byte), or the text has a lone surrogate.
        """
        text = "".join(parts)
        borders = [0, *accumulate(map(len, parts))]
        own = list(pairwise(borders))[::2]
        found = [(m.start(), m.end(1)) for m in self._literal.finditer(text)]
        cuts = [a + 1 for a, b in found if not any(start <= a and b <= end for start, end in own)]
        behind = self._stop if behind is None else behind
        ids: list[int] = []
        for a, b in pairwise([0, *cuts, len(text)]):
            ids += self._encode(text[a:b], self._stop if a else behind)
        self._check(text, ids, self._own("".join(parts[::2]), behind))
        return ids

    def _own(self, template: str, behind: str) -> Counter[int]:
        """The control tokens of ``template`` alone. There are few templates: each is tokenised once."""
        key = (template, behind)
        if key not in self._known:
            self._known[key] = Counter(i for i in self._encode(template, behind) if i in self._control)
        return self._known[key]

    def _encode(self, text: str, behind: str) -> list[int]:
        """The tokens of ``text`` where it follows ``behind``, "" or the stop token.

        SentencePiece puts a blank before what stands at the very start.
        """
        try:
            ids = self.tokenizer.encode(behind + text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:  # a lone surrogate
            raise StreamError(f"text that is not valid Unicode: {text[:80]!r}: {error}") from error
        return ids[1:] if behind else ids

    def _check(self, text: str, ids: list[int], own: Counter[int]) -> None:
        """The control tokens of ``ids`` must be ``own``, those of the template."""
        found = Counter(i for i in ids if i in self._control)
        if found != own:
            names = self.tokenizer.convert_ids_to_tokens(sorted((found - own) + (own - found)))
            raise StreamError(f"text tokenises to the control tokens {names}: {text[:80]!r}")

    def _pieces(self) -> tuple[str, str, str, str, str]:
        """What stands before the system text, the first user text and a reply; what a reply's own text may start with;
        what stands between a reply and the next user text."""
        messages = [{"role": r, "content": m} for r, m in zip(_ROLES, _MARKS, strict=True)]
        try:
            return self._cut(messages)
        except StreamError:
            return self._cut([{"role": "user", "content": f"{_MARKS[0]}\n\n{_MARKS[1]}"}, *messages[2:]])

    def _cut(self, messages: list[dict[str, str]]) -> tuple[str, str, str, str, str]:
        """The pieces of a rendered dialogue; each shorter one must render to a prefix of it."""
        name, marks = self.tokenizer.name_or_path, "|".join(_MARKS)
        try:
            *steps, full = (
                self.tokenizer.apply_chat_template(
                    messages[:n], tokenize=False, add_generation_prompt=last["role"] == "user"
                )
                for n, last in enumerate(messages, 1)
                if last["role"] != "system"
            )
        except Exception as error:  # jinja's errors, and whatever a template raises itself
            raise StreamError(f"{name}: the chat template cannot write a dialogue: {error}") from error
        if re.findall(marks, full) == list(_MARKS) and all(full.startswith(step) for step in steps):
            system, first, reply, between, reply2, between2, prompt = re.split(marks, full)
            blank = reply.removeprefix(prompt)
            if reply == reply2 == prompt + blank and not blank.strip() and between == between2:
                return system, first, prompt, blank, between
        raise StreamError(
            f"{name}: the chat template rewrites earlier messages as the dialogue grows (templates that strip thinking "
            "do), so a stream cannot be append-only; use a template whose output for a message does not depend on "
            "later ones"
        )
