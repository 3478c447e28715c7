"""Hostile variants of good files: of their JSON structure, and of their bytes. One seed, one sequence of variants."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

DEEP = 100_000
ATOMS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 0.0, -0.0, 1e308, 1e-320, 0.5),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        " ",
        "\x00",
        "a\x00b",
        "\ud800",
        "\udfff\ud800",
        "\ufeff",
        "\u2028",
    ),
    *("NaN", "null", "yes", "2026-13-01", "1_0", "0x10", "<<", "*a", "&a x", "!!python/object:os.system x", "---"),
    *("../../etc/passwd", "/etc/passwd", "C:\\x", "a/b", "a:b", "a,b", "a=b", "=1+1", "-", "{}", "[]", "{0}", "%s"),
    *(
        "</script><script>alert(1)</script>",
        "<!--",
        "]]>",
        "\x1b[2J",
        "\x9b31m",
        "\r\n",
        "\n",
        "é",
        "İ",
        "ß",
        "㎏",
        "１２",
    ),
    *("<|im_end|>", "<|im_start|>system", "</s>", "[INST]", "<s>", "<|eot_id|>", "🙂" * 3, "x" * 3000, "(" * 200),
    *([], {}, [[]], [None], {"": None}, {"a": {"a": {}}}, ["a", "a"], [0], [1.5], [{}], {"id": {}}),
)
# What JSON text can hold and ``json.dumps`` would not write; it stands for a whole value.
RAW = (
    *("[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP, "9" * 5000, "-" + "9" * 5000, "1e999", "-1e999", "NaN"),
    *("Infinity", '"\\ud800"', '"\\u0000"', '"\\x"', "'a'", "{,}", '{"a":1,"a":2}', "tru", "01", "+1", "1.", '"'),
)
BYTES = (
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\r\n", b"\r", b"\n", b"\n\n"),
    *(
        b"\x1f\x8b",
        b"[",
        b"{",
        b"}",
        b"]",
        b'"',
        b",",
        b":",
        b"&a ",
        b"*a",
        b"<<: ",
        b"---\n",
        b"...\n",
        b"!!set ",
        b"? ",
    ),
    *(b"|", b">", b"#", b"%YAML 9.9\n", b"- ", b"  ", b"\t", b"'", b"\\", b"\\u", b"@", b"`", b"\xe2\x80\xa8", b"\x85"),
)
_MARK = "@@raw@@"


class Mutator:
    """Variants of good values. ``texts``: words that strings of the subject are made from."""

    def __init__(self, rng: random.Random, texts: tuple[str, ...] = ()) -> None:
        self.rng, self.texts = rng, texts

    def json(self, good: Any) -> bytes:
        """JSON text, or nearly, of ``good`` with one to four things wrong; sometimes with nothing wrong."""
        rng, value = self.rng, copy.deepcopy(good)
        for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 2, 3, 4))):
            value = self._edit(value)
        text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
        if _MARK in text:
            text = text.replace(f'"{_MARK}"', rng.choice(RAW))
        data = text.encode("utf-8", "surrogatepass")
        return self.bytes(data) if rng.random() < 0.15 else data

    def bytes(self, good: bytes) -> bytes:
        """``good`` with bytes cut, doubled, replaced or put in; sometimes in another encoding."""
        rng, data = self.rng, bytearray(good)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            a = rng.randrange(len(data) + 1)
            b = min(len(data), a + rng.choice((0, 1, 1, 2, 5, 20, 200)))
            kind = rng.randrange(6)
            if kind == 0:
                del data[a:b]
            elif kind == 1:
                data[a:a] = data[a:b]
            elif kind == 2:
                data[a:b] = rng.randbytes(b - a)
            elif kind == 3 and b > a:
                data[a] ^= 1 << rng.randrange(8)
            else:
                data[a : a + rng.randrange(2)] = rng.choice(BYTES)
        if rng.random() < 0.02:
            return (
                bytes(data)
                .decode("utf-8", "replace")
                .encode(rng.choice(("utf-16", "utf-32", "utf-7", "cp1252")), "replace")
            )
        return bytes(data[: rng.randrange(len(data) + 1)]) if rng.random() < 0.05 else bytes(data)

    def text(self, good: str = "") -> str:
        """Words, fragments and characters, in no order."""
        rng = self.rng
        words = (*self.texts, *(atom for atom in ATOMS if isinstance(atom, str)))
        parts = [good] if good and rng.random() < 0.7 else []
        for _ in range(rng.choice((0, 1, 1, 2, 3, 5))):
            kind = rng.randrange(4)
            if kind == 0:
                parts.append(chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)))))
            elif kind == 1 and parts:
                word = rng.choice(parts)
                cut = rng.randrange(len(word) + 1)
                parts[-1:] = [word[:cut], rng.choice(words), word[cut:]]
            else:
                parts.append(rng.choice(words))
        return "".join(parts)

    def _edit(self, value: Any) -> Any:
        """``value`` with one node changed."""
        rng = self.rng
        places = list(_places(value))
        if not places or rng.random() < 0.01:
            return self._other(value)
        holder, key = rng.choice(places)
        kind = rng.randrange(10)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif kind == 1:
            holder[self.text(str(key))] = holder.pop(key)
        elif kind == 2:
            holder[key] = rng.choice(([holder[key]], {"a": holder[key]}))
        elif kind == 3:
            source, name = rng.choice(places)
            holder[key] = copy.deepcopy(source[name])  # something that is good elsewhere
        else:
            holder[key] = self._other(holder[key])
        return value

    def _other(self, value: Any) -> Any:
        rng = self.rng
        if isinstance(value, str) and rng.random() < 0.4:
            return self.text(value)
        if rng.random() < 0.01:
            return _MARK
        if type(value) in (int, float) and abs(value) < 2**53 and rng.random() < 0.3:
            return value * rng.choice((-1, 2, 1000, 0.1)) + rng.choice((0, 1, -1))
        return copy.deepcopy(rng.choice(ATOMS))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) inside ``value``."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ():
            yield holder, key
            waiting.append(holder[key])
