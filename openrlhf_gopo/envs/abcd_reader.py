"""Reads ABCD (arXiv 2104.00783, MIT) in the layout its authors publish. Knows files and fields, no dialogue logic.

guidelines.json                {flow: {"description", "subflows": {title: {"actions": [{"button", "text"}]}}}}
kb.json                        {subflow: [required action]}
ontology.json                  {"intents": {"subflows": {flow: [subflow]}}, "actions": {kind: {action: [slot]}}}
abcd_v1.1.json, the same .gz   {"train": [dialogue], "dev": [...], "test": [...]}, or, where there is none,
dialogues*.json, else abcd_sample.json   [dialogue]

A flow's subflows stand in the same order in the guidelines and in the ontology: that is how a title finds its subflow.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import capwords
from typing import Any

from openrlhf_gopo.envs.reading import as_object, folder, get, parse, shorten, split_of, texts, unpacked
from openrlhf_gopo.errors import DataError

LAYOUT = (
    "point --gopo.data at the data folder of a clone of the ABCD repository: guidelines.json, kb.json, ontology.json "
    "and dialogues"
)
# Buttons of the guidelines whose name does not spell the action's.
BUTTONS = {
    "notify-internal-team": "notify-team", "membership-privileges": "membership", "enter-detail": "enter-details",
    "select-answer": "select-faq",
}  # fmt: skip
OPTIONAL = re.compile(r"^\W*option\b|\b(?:optional|if|alternatively)\b", re.I)
END = "End Conversation"  # the button after which a guideline goes on for some customers only
KEYS = ("names", "amounts")  # of a scenario's product
SPLITS = {"train": "train", "dev": "heldout", "test": "heldout"}


@dataclass(frozen=True)
class Flow:
    """One department: ``required`` actions by subflow, in order; the guidelines' titles and texts.

    ``optional``: by subflow, the actions that its guideline makes depend on the case: "if", "option", "optional", after
    a step that may end the chat, or only mentioned in another step.
    """

    id: str
    description: str
    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, frozenset[str]]
    titles: Mapping[str, str]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Manual:
    """The flows by id; every action's slots; and its kind: kb_query, interaction or faq_policy."""

    flows: Mapping[str, Flow]
    slots: Mapping[str, tuple[str, ...]]
    kinds: Mapping[str, str]


@dataclass(frozen=True)
class Event:
    """``speaker`` is customer, agent or action; an action has its name and the values that the agent entered."""

    speaker: str
    text: str
    action: str = ""
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """One human dialogue. ``values``: what the scenario says of the customer, by ontology slot."""

    id: str
    flow: str
    subflow: str
    values: Mapping[str, str]
    events: tuple[Event, ...]
    split: str


def read(data: str | None) -> tuple[Manual, list[Record]]:
    """The manual and the dialogues in file order.

    Raises:
        ConfigError: ``data`` is None.
        DataError: the folder or a file is missing, or a record is malformed; names file, record and field.
    """
    root = folder("abcd", data, LAYOUT)
    manual = _manual(root)
    records: dict[str, Record] = {}
    for value, where, split in _documents(root):
        record = _record(value, where, split, manual)
        if record.id in records:
            raise DataError(f"{where}:convo_id: {record.id} occurs twice in {data}; keep one of the two records")
        records[record.id] = record
    if not records:
        raise DataError(f"--gopo.data {data}: no dialogue in it; {LAYOUT}")
    return manual, list(records.values())


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; {LAYOUT}")
    return as_object(parse(path.read_bytes(), str(path)), str(path))


def _manual(root: Path) -> Manual:
    where = f"{root / 'ontology.json'}:1"
    ontology, kb, guidelines = (_object(root / f"{name}.json") for name in ("ontology", "kb", "guidelines"))
    slots: dict[str, tuple[str, ...]] = {}
    kinds: dict[str, str] = {}
    for kind, actions in get(ontology, "actions", dict, where).items():
        for action in get(ontology["actions"], kind, dict, where, "actions."):
            slots[action] = tuple(texts(actions, action, where, f"actions.{kind}."))
            kinds[action] = kind
    flows: dict[str, Flow] = {}
    named = get(get(ontology, "intents", dict, where), "subflows", dict, where, "intents.")
    for flow in named:
        flows[flow] = _flow(root, flow, texts(named, flow, where, "intents.subflows."), kb, guidelines, kinds)
    return Manual(flows, slots, kinds)


def _flow(
    root: Path,
    flow: str,
    subflows: list[str],
    kb: Mapping[str, Any],
    guidelines: Mapping[str, Any],
    kinds: Mapping[str, str],
) -> Flow:
    where, kb_where = f"{root / 'guidelines.json'}:1", f"{root / 'kb.json'}:1"
    titles = {re.sub(r"\W", "_", title.lower()): title for title in guidelines}
    title = titles.get(flow, flow)
    entry = get(guidelines, title, dict, where)
    written = get(entry, "subflows", dict, where, f"{title}.")
    if len(written) != len(subflows):
        raise DataError(
            f"{where}:{title}.subflows: {len(written)} subflows, ontology.json has {len(subflows)}; restore it"
        )
    required, optional, said = {}, {}, dict[str, str]()
    for subflow, (name, body) in zip(subflows, written.items(), strict=True):
        required[subflow] = tuple(texts(kb, subflow, kb_where))
        for index, action in enumerate(required[subflow]):
            if action not in kinds:
                raise DataError(f"{kb_where}:{subflow}[{index}]: {action!r} is no action of ontology.json; restore it")
        at = f"{where}:{title}.subflows.{name}.actions"
        steps = [(_action(step, at, kinds), step) for step in get(body, "actions", list, at)]
        end = next((index for index, (_, step) in enumerate(steps) if step["button"] == END), len(steps))
        other = {action: _sentences(step, at) for action, step in steps}
        sure = [(action, step) for action, step in steps[:end] if not OPTIONAL.search(step["text"])]
        certain = {action: _sentences(step, at) for action, step in sure}
        optional[subflow] = frozenset(required[subflow]) - set(certain)
        said = {**other, **said, **certain}
    names = dict(zip(subflows, written, strict=True))
    return Flow(
        flow,
        str(entry.get("description", "")),
        required,
        optional,
        names,
        {action: text for action, text in said.items() if action},
    )


def _sentences(step: Any, where: str) -> str:
    """A guideline's text and the lines below it; each is a sentence, whether or not it ends as one."""
    below = texts(step, "subtext", where) if "subtext" in step else ()
    lines = [line.strip() for line in (step["text"], *below) if line.strip()]
    return " ".join(line if line.endswith((".", ":", "?", "!")) else f"{line}." for line in lines)


def _action(step: Any, where: str, kinds: Mapping[str, str]) -> str:
    """The action behind a button of the guidelines; "" when the step is communication."""
    get(step, "text", str, where)
    name = re.sub(r"\W+", "-", get(step, "button", str, where).lower()).strip("-")
    name = f"search-{name}" if f"search-{name}" in kinds else BUTTONS.get(name, name)
    return name if name in kinds else ""


def _documents(root: Path) -> Iterator[tuple[Any, str, str]]:
    """Every dialogue, where it stands, and its split ("" where the file knows none)."""
    full = [path for path in (root / "abcd_v1.1.json", root / "abcd_v1.1.json.gz") if path.is_file()]
    for path in full[:1] or sorted(root.glob("dialogues*.json")) or sorted(root.glob("abcd_sample.json")):
        value = parse(_gunzipped(path) if path.suffix == ".gz" else path.read_bytes(), str(path))
        parts = value if isinstance(value, dict) else {"": value}
        for part in parts:
            for index, dialogue in enumerate(get(parts, part, list, f"{path}:1")):
                yield dialogue, f"{path}:1:{part}[{index}]", SPLITS.get(part, "")


def _gunzipped(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return unpacked(file.read, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); fetch it again") from error


def _record(value: Any, where: str, split: str, manual: Manual) -> Record:
    id_ = str(get(value, "convo_id", (int, str), where, ""))
    where = f"{where} (convo_id {id_})"
    scenario = get(value, "scenario", dict, where)
    flow = get(scenario, "flow", str, where, "scenario.")
    said, labelled = get(value, "original", list, where), get(value, "delexed", list, where)
    if len(said) != len(labelled) or not said:
        raise DataError(f"{where}:delexed: {len(labelled)} turns, original has {len(said)}; restore the record")
    events = [_event(*pair, where, index, manual) for index, pair in enumerate(zip(said, labelled, strict=True))]
    subflow = labelled[0]["targets"][0]
    if not isinstance(subflow, str) or flow not in manual.flows or subflow not in manual.flows[flow].required:
        raise DataError(f"{where}:delexed[0].targets[0]: {subflow!r} is no subflow of {flow!r} in ontology.json")
    return Record(id_, flow, subflow, _values(scenario, where), tuple(events), split or split_of(id_))


def _event(spoken: Any, labelled: Any, where: str, index: int, manual: Manual) -> Event:
    if not (isinstance(spoken, list) and len(spoken) == 2 and all(isinstance(part, str) for part in spoken)):
        raise DataError(f"{where}:original[{index}]: expected [speaker, text], got {spoken!r:.200}; restore the record")
    targets = get(labelled, "targets", list, where, f"delexed[{index}].")
    if len(targets) < 4 or not isinstance(targets[3], list):
        raise DataError(f"{where}:delexed[{index}].targets: expected five labels, got {targets!r:.200}")
    speaker, text = spoken
    if speaker not in ("customer", "agent", "action"):
        raise DataError(f"{where}:original[{index}][0]: {speaker!r} is neither customer, agent nor action")
    if speaker == "action" and (not isinstance(targets[2], str) or targets[2] not in manual.slots):
        raise DataError(f"{where}:delexed[{index}].targets[2]: unknown action {targets[2]!r}; ontology.json lists them")
    action = targets[2] if speaker == "action" else ""
    return Event(speaker, shorten(text), action, tuple(map(str, targets[3])))


def _values(scenario: Mapping[str, Any], where: str) -> dict[str, str]:
    """The scenario by ontology slot, written as a customer would."""
    personal, order = (get(scenario, key, dict, where, "scenario.") for key in ("personal", "order"))
    product = get(scenario, "product", dict, where, "scenario.") if scenario.get("product") else {}
    names, amounts = (get(product, key, list, where, "scenario.product.") if product.get(key) else [] for key in KEYS)
    raw = {**personal, **order, "membership_level": personal.get("member_level")}
    raw |= {"shipping_option": order.get("shipping_status"), "product": next(iter(names), None)}
    raw["amount"] = next(iter(amounts), None)
    return {slot: write(str(raw[slot])) for slot, write in WRITTEN.items() if raw.get(slot) not in (None, "")}


def _title(value: str) -> str:
    return capwords(value.replace("_", " "))


WRITTEN: dict[str, Callable[[str], str]] = {
    **dict.fromkeys(("customer_name", "street_address", "full_address", "product"), _title),
    **dict.fromkeys(("account_id",), str.upper),
    **dict.fromkeys(("order_id", "zip_code", "username", "email", "phone", "pin_number", "security_answer"), str.strip),
    **dict.fromkeys(("membership_level", "shipping_option", "payment_method", "amount", "purchase_date"), str.strip),
}
