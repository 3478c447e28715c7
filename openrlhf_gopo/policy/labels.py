"""Strategy labels: each is exactly one token, so that one decoded token is one decision."""

from __future__ import annotations

import string
from itertools import product
from typing import Any

from openrlhf_gopo.errors import ConfigError

_SINGLE = string.ascii_uppercase + string.ascii_lowercase + string.digits
_CANDIDATES = (*_SINGLE, *("".join(p) for p in product(string.ascii_uppercase, repeat=2)))


def choose_labels(tokenizer: Any, count: int, given: str | None = None) -> dict[str, int]:
    """``count`` labels and their token ids, in catalogue order; from ``--gopo.labels`` or A-Z, a-z, 0-9, AA-ZZ.

    Raises:
        ConfigError: too few labels, a label that is not one token, or two labels with the same token.
    """
    if given is None:
        labels = {text: ids[0] for text in _CANDIDATES if len(ids := _ids(tokenizer, text)) == 1}
        if len(labels) < count:
            raise ConfigError(
                f"--gopo.labels: {tokenizer.name_or_path} has {len(labels)} single-token labels, the catalogue needs "
                f"{count}; give {count} comma-separated texts that are one token each"
            )
    else:
        labels = {}
        for text in given.split(","):
            ids = _ids(tokenizer, text)
            if len(ids) != 1:
                pieces = tokenizer.convert_ids_to_tokens(ids)
                raise ConfigError(f"--gopo.labels {text!r}: it is {len(ids)} tokens {pieces}, not one; replace it")
            labels[text] = ids[0]
        if len(labels) < count or len(set(labels.values())) < len(labels):
            raise ConfigError(
                f"--gopo.labels {given}: {len(set(labels.values()))} distinct tokens, the catalogue needs {count}"
            )
    return dict(list(labels.items())[:count])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
