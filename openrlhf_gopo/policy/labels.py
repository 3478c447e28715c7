"""Strategy labels: each is exactly one token, so that one decoded token is one decision."""

from __future__ import annotations

import string
from itertools import product
from typing import Any

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.policy.template import ChatTemplate

_SINGLE = string.ascii_uppercase + string.ascii_lowercase + string.digits
_CANDIDATES = (*_SINGLE, *("".join(p) for p in product(string.ascii_uppercase, repeat=2)))


def choose_labels(tokenizer: Any, count: int, given: str | None = None) -> dict[str, int]:
    """``count`` labels and their token ids, in catalogue order; from ``--gopo.labels`` or A-Z, a-z, 0-9, AA-ZZ.

    The id is that of the label as a whole assistant message: some tokenizers have another for a word in mid-sentence.

    Raises:
        ConfigError: fewer than ``count`` distinct tokens, or a given label that is not one token.
        StreamError: the tokenizer's chat template cannot be used.
    """
    template = ChatTemplate(tokenizer)
    labels: dict[str, int] = {}
    for text in _CANDIDATES if given is None else [label.strip() for label in given.split(",")]:
        token = template.label(text)
        if token is None and given is not None:
            ids = tokenizer.encode(text, add_special_tokens=False)
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise ConfigError(f"--gopo.labels {text!r}: it is {len(ids)} tokens {pieces}, not one; replace it")
        if token is not None and token not in labels.values():
            labels[text] = token
        if given is None and len(labels) == count:
            break
    if len(labels) < count:
        source = f"{tokenizer.name_or_path} has" if given is None else f"{given} gives"
        raise ConfigError(
            f"--gopo.labels: {source} {len(labels)} distinct single-token labels, the catalogue needs {count}; give "
            f"{count} comma-separated texts that are one token each"
        )
    return dict(list(labels.items())[:count])
