"""The policies of an evaluation by name, as ``--policy NAME=SPEC`` gives them.

pair:EXPERT,RESPONDER     two halves; each is one of
                          PATH                    a local Hugging Face model, through vLLM
                          endpoint:MODEL@URL      a model behind an OpenAI-compatible API
                          scripted[:SKILL]        a script that sees the hidden goal; random: its skill 0
                          vote:FILE               experts only: similar decisions in the training dialogues of FILE,
                                                  a trajectories.jsonl, vote; vote_q: ranked by a learned Q
                          memento:FILE:HALF       experts only: HALF, a model or an endpoint, which reads similar
                                                  dialogues of FILE, that ended well and ill, before it decides
endpoint:MODEL@URL        one remote model as both halves
single:PATH               one local model as --gopo.policy single_level trains it
scripted[:SKILL], random  the script as both halves
human, human:FILE         the human dialogues the goals were made from, or logs in the format of cli.logs: scored

Local models and votes are played at every one of --temperatures, others once. vote, vote_q and memento add --rounds of
training dialogues of their own to those of FILE before held-out goals are played.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf

from openrlhf_gopo.endpoint.client import checked_url
from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.evaluation.decoding import decoding_name, row_name
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy

KINDS = ("pair", "single", "endpoint", "scripted", "random", "human")
HALVES = ("model", "endpoint", "scripted", "random", "vote", "vote_q")
SCRIPTS = ("scripted", "random")
VOTES = ("vote", "vote_q")
CASES = (*VOTES, "memento")  # experts with a case memory


@dataclass(frozen=True)
class Half:
    """``kind`` is one of ``HALVES``; ``value`` is what follows: a path, MODEL@URL, a skill.

    ``cases``: the dialogues whose decisions vote, or which are shown to it (memento); None without a case memory.
    """

    kind: str
    value: str = ""
    cases: str | None = None

    def script(self) -> ScriptedPolicy:
        """The script of a ``scripted`` or ``random`` half; it makes no slips.

        Raises:
            ConfigError: the skill is no probability.
        """
        if self.kind == "random":
            return ScriptedPolicy(0.0, slip=0.0)
        try:
            return ScriptedPolicy(float(self.value or 1.0), slip=0.0)
        except ValueError:
            raise ConfigError(f"--policy scripted:{self.value}: the skill is no number; give one in [0, 1]") from None


@dataclass(frozen=True)
class Contender:
    """One row of an evaluation. ``kind``: pair, single or human; of a single both halves are the same model.

    ``expert`` and ``responder`` are None for human dialogues; ``file`` is their log, if they have one of their own.
    ``temperature``: of its decoding, 0 is greedy; None where nothing is decoded at a temperature of ours.
    """

    name: str
    spec: str
    kind: str
    expert: Half | None = None
    responder: Half | None = None
    file: str | None = None
    temperature: float | None = None

    @property
    def row(self) -> str:
        """The name of its row: of all that ``decoded`` made of a policy, each has another."""
        return row_name(self.name, self.temperature)

    @property
    def models(self) -> tuple[str, ...]:
        """Paths of the local models, each once."""
        halves = (half for half in (self.expert, self.responder) if half is not None)
        return tuple(dict.fromkeys(half.value for half in halves if half.kind == "model"))

    @property
    def folder(self) -> str:
        """The name of its policy's folder on disk."""
        return re.sub(r"[^\w.-]+", "_", self.name).strip("._") or "policy"


def parse_contenders(texts: Iterable[str]) -> list[Contender]:
    """``NAME=SPEC`` or ``SPEC`` alone, in order.

    Raises:
        ConfigError: not such a text, or two of one name.
    """
    found: dict[str, Contender] = {}
    for text in texts:
        contender = _contender(text)
        folder = contender.folder
        if folder in found:
            raise ConfigError(
                f"--policy {text}: named like {found[folder].spec!r}; give them different names, as in NAME={text}"
            )
        found[folder] = contender
    if not found:
        raise ConfigError("--policy: give at least one, as in --policy after=pair:runs/expert,runs/responder")
    return list(found.values())


def decoded(contenders: Iterable[Contender], temperatures: Sequence[float]) -> list[Contender]:
    """Each policy once per temperature, if it samples anything at one; once otherwise."""
    found = []
    for contender in contenders:
        halves = (contender.expert, contender.responder)
        samples = any(half is not None and half.kind in ("model", *VOTES) for half in halves)
        found += [replace(contender, temperature=one) for one in (temperatures if samples else [None])]
    return found


def parse_temperatures(text: str) -> list[float]:
    """``--temperatures``, in order.

    Raises:
        ConfigError: not such a list.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(map(decoding_name, found))) < len(found) or not all(0 <= one < inf for one in found):
        raise ConfigError(f"--temperatures {text}: give different numbers of 0 or more, as in 1,0; 0 is greedy")
    return found


def _contender(text: str) -> Contender:
    named = re.match(r"([^=:,@]+)=", text)
    name, spec = (named[1].strip(), text[named.end() :]) if named else (text, text)
    kind, _, value = spec.partition(":")
    if kind not in KINDS or (kind in ("pair", "single", "endpoint")) > bool(value):
        raise ConfigError(
            f"--policy {text}: give [NAME=]pair:EXPERT,RESPONDER, single:PATH, endpoint:MODEL@URL, scripted:SKILL, "
            "random, human or human:FILE"
        )
    if kind == "human":
        return Contender(name, spec, "human", file=value or None)
    if kind == "single":
        half = Half("model", value)
        return Contender(name, spec, "single", half, half)
    if kind == "pair":
        halves = [_half(text, part.strip()) for part in value.split(",")]
        if len(halves) != 2:
            raise ConfigError(f"--policy {text}: a pair has two halves, as in pair:EXPERT,RESPONDER")
        if halves[1].cases is not None:
            raise ConfigError(f"--policy {text}: a case memory decides, it writes no replies; give another responder")
        return Contender(name, spec, "pair", halves[0], halves[1])
    half = _half(text, spec)
    return Contender(name, spec, "pair", half, half)


def _half(text: str, part: str) -> Half:
    kind, _, value = part.partition(":")
    if kind in CASES:
        cases, _, inner = value.partition(":")
        if not cases or bool(inner) != (kind == "memento"):
            raise ConfigError(f"--policy {text}: half {part!r}: give vote:FILE, vote_q:FILE or memento:FILE:HALF")
        if kind in VOTES:
            return Half(kind, cases=cases)
        asked = _half(text, inner)
        if asked.kind not in ("model", "endpoint"):
            raise ConfigError(f"--policy {text}: memento is for a model or an endpoint, {inner!r} reads no cases")
        return replace(asked, cases=cases)
    half = Half(kind, value) if kind in HALVES[1:] else Half("model", part)
    place = re.fullmatch(r"(.+?)@(\w+://.+)", value) if half.kind == "endpoint" else None
    if not part or (half.kind == "endpoint" and place is None):
        raise ConfigError(f"--policy {text}: half {part!r}: give a path, endpoint:MODEL@URL, scripted:SKILL or random")
    if place is not None:  # here already: what it holds beside a place may be secret, and specs are kept
        checked_url("--policy endpoint", place[1], place[2])
    if half.kind in SCRIPTS:
        half.script()
    return half
