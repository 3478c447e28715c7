"""How a policy that has probabilities is played: sampled at a temperature, or greedy, which is temperature 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from openrlhf_gopo.types import Trajectory

GREEDY = 0.0

# (policy or phase, temperature; None where there is none) -> its dialogues
Rows = Mapping[tuple[str, float | None], Sequence[Trajectory]]


def decoding_name(temperature: float) -> str:
    """What tables call a temperature.

    >>> [decoding_name(temperature) for temperature in (1.0, 0.0, 0.7)]
    ['sampled', 'greedy', 'sampled at 0.7']
    """
    if temperature == GREEDY:
        return "greedy"
    return "sampled" if temperature == 1.0 else f"sampled at {temperature:g}"


def row_name(policy: str, temperature: float | None) -> str:
    """The name of a policy's row at ``temperature``; None: of a policy that has none.

    >>> row_name("after training", 0.0), row_name("random", None)
    ('after training, greedy', 'random')
    """
    return policy if temperature is None else f"{policy}, {decoding_name(temperature)}"


def named(rows: Rows) -> tuple[dict[str, Sequence[Trajectory]], dict[str, str]]:
    """Dialogues by the name of their row, and the row that each is compared with.

    Rows of one decoding stand together. A row is compared with the first policy's at its own temperature. Where one of
    the two has no temperature, it is compared with the first policy's first row; else it has nothing to compare with.
    """
    temperatures = list(dict.fromkeys(temperature for _, temperature in rows if temperature is not None))
    order = sorted(rows, key=lambda key: 0 if key[1] is None else temperatures.index(key[1]))
    phases = {row_name(*key): rows[key] for key in order}
    compared: dict[str, str] = {}
    if not rows:
        return phases, compared
    first, leading = next(iter(rows))
    for policy, temperature in rows:
        if policy == first:
            continue
        if (first, temperature) in rows:
            compared[row_name(policy, temperature)] = row_name(first, temperature)
        elif temperature is None or leading is None:
            compared[row_name(policy, temperature)] = row_name(first, leading)
    return phases, compared
