"""SOP files: what is read, and the line, field, value and remedy of everything that is refused."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openrlhf_gopo.envs import shop_catalogue
from openrlhf_gopo.errors import DataError, GopoError, SopError
from openrlhf_gopo.sop import Part, Rule, Sop, load_sop
from openrlhf_gopo.sop.marked_yaml import MAX_BYTES
from openrlhf_gopo.sop.schema import PartModel, RuleModel, SopModel, StrategyModel, json_schema
from openrlhf_gopo.types import Strategy

DESK = """\
name: desk
facts: [id, mood]
strategies:
  - {id: greet, name: Greet, description: Say hello.}
  - {id: ask_id, name: Ask id, description: Ask for the id., asks: [id], gives: [form], does: [note]}
  - id: refund
    name: Refund
    description: Pay it back.
  - {id: close, name: Close, description: Say goodbye.}
rules:
  - {strategy: ask_id, without_facts: [id], max_uses: 2}
  - {strategy: refund, requires_facts: [id], after: [greet], not_after: [close]}
terminal: [close]
parts:
  - name: angry
    strategies: [ask_id, refund, greet, close]
    mandatory: [refund]
    rules:
      - {strategy: close, after_any: [greet, refund], no_repeat: true}
"""


def load(tmp_path, text):
    path = tmp_path / "desk.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_sop(path)


def refused(tmp_path, text, error=DataError):
    with pytest.raises(error) as caught:
        load(tmp_path, text)
    return str(caught.value).replace(f"{tmp_path}/", "")


# What is read


def test_a_file_gives_the_catalogue_and_the_sop(tmp_path):
    procedure = load(tmp_path, DESK)
    assert procedure.strategies[1] == Strategy("ask_id", "Ask id", "Ask for the id.", ("id",), ("form",), ("note",))
    assert procedure.sop == Sop(
        strategies=("greet", "ask_id", "refund", "close"),
        facts=("id", "mood"),
        rules=(
            Rule("ask_id", without_facts=("id",), max_uses=2),
            Rule("refund", requires_facts=("id",), after=("greet",), not_after=("close",)),
        ),
        terminal=("close",),
        parts=(
            Part(
                "angry",
                ("ask_id", "refund", "greet", "close"),
                (Rule("close", after_any=("greet", "refund"), no_repeat=True),),
                ("refund",),
            ),
        ),
    )
    assert procedure.sop.name == "desk"
    assert procedure.sop.part("angry").allowed(["greet"], {"id"}) == ("greet", "refund")


def test_it_knows_where_everything_stands(tmp_path):
    procedure = load(tmp_path, DESK)
    lines = {rule.strategy: procedure.locate(rule.at) for rule in procedure.sop.part("angry").rules}
    assert lines == {
        name: f"{tmp_path}/desk.yaml:{line}" for name, line in {"ask_id": 11, "refund": 12, "close": 19}.items()
    }
    assert procedure.locate(("strategies", "refund")).endswith("desk.yaml:6")
    assert procedure.locate(("strategies", 2, "description")).endswith("desk.yaml:8")
    assert procedure.locate(("rules", 1, "after", 0, "unheard of")).endswith("desk.yaml:12")


@pytest.mark.parametrize(
    ("model", "built"), [(StrategyModel, Strategy), (RuleModel, Rule), (PartModel, Part), (SopModel, Sop)]
)
def test_the_file_has_the_fields_of_the_dataclasses(model, built):
    fields = {field.name for field in dataclasses.fields(built)} - {"at"}
    assert set(model.model_fields) == fields
    required = {f.name for f in dataclasses.fields(built) if f.default is dataclasses.MISSING}
    named = {"name"} if model is SopModel else set()
    assert {name for name, field in model.model_fields.items() if field.is_required()} == required | named


def test_the_published_schema_describes_the_fields():
    schema = json_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["required"] == ["name", "strategies"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["RuleModel"]["properties"]["max_uses"]["anyOf"][0] == {"minimum": 1, "type": "integer"}


def test_the_published_schema_accepts_and_refuses(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    validator = jsonschema.Draft202012Validator(json_schema())
    shipped = Path(shop_catalogue.__file__).with_name("shop_sop.yaml")
    for text in (DESK, shipped.read_text(encoding="utf-8")):
        assert validator.is_valid(yaml.safe_load(text))
    assert not validator.is_valid(yaml.safe_load(DESK.replace("max_uses: 2", "max_uses: 0")))
    assert not validator.is_valid(yaml.safe_load(DESK.replace("terminal", "terminals")))


# What is refused


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # the form
        ("terminal:", "terminals:", "desk.yaml:13: terminals: ['close']: no such field; choose one of name,"),
        ("no_repeat:", "repeat:", "desk.yaml:19: parts.0.rules.0.repeat: True: no such field; choose one of st"),
        ("name: Refund", "title: Refund", "desk.yaml:6: strategies.2.name: missing; add it"),
        ("name: Refund", "title: Refund", "desk.yaml:7: strategies.2.title: 'Refund': no such field; choose"),
        ("name: Refund", "name: yes", "desk.yaml:7: strategies.2.name: True: not text; put it in quotes"),
        ("name: Refund", "name: 2026-01-31", "strategies.2.name: datetime.date(2026, 1, 31): not text; put"),
        ("name: Refund", "name: ' '", "desk.yaml:7: strategies.2.name: ' ': blank; write some text"),
        ("id: greet", "id: say hello", "strategies.0.id: 'say hello': not one word; leave out spaces and commas"),
        ("[id, mood]", "id", "desk.yaml:2: facts: 'id': not a list; write [one, another]"),
        ("max_uses: 2", "max_uses: 0", "desk.yaml:11: rules.0.max_uses: 0: Input should be greater than or equal to 1"),
        ("max_uses: 2", "max_uses: two", "desk.yaml:11: rules.0.max_uses: 'two': not a whole number"),
        ("no_repeat: true", "no_repeat: 1", "desk.yaml:19: parts.0.rules.0.no_repeat: 1: neither true nor false"),
        ("  - name: angry", "  - angry\n  - name: angry", "desk.yaml:15: parts.0: 'angry': not a mapping"),
        # the SOP
        ("after: [greet]", "after: [great]", "desk.yaml:12: rules.1.after.0: desk: the rule on 'refund', after, names "
         "the unknown strategy 'great'; known: greet, ask_id, refund, close"),
        ("strategy: refund", "strategy: pay", "desk.yaml:12: rules.1.strategy: desk: a rule names the unknown"),
        ("terminal: [close]", "terminal: [bye]", "desk.yaml:13: terminal.0: desk: terminal names the unknown"),
        ("mandatory: [refund]", "mandatory: [pay]", "desk.yaml:17: parts.0.mandatory.0: desk: part 'angry', mand"),
        ("requires_facts: [id]", "requires_facts: [di]", "desk.yaml:12: rules.1.requires_facts.0: desk: the rule on "
         "'refund' names the unknown fact 'di'; known: id, mood"),
        ("asks: [id]", "asks: [ID]", "desk.yaml:5: strategies.1.asks.0: 'ID': unknown fact; list it in facts (id"),
        ("not_after: [close]", "not_after: [greet]", "desk.yaml:12: rules.1.not_after: desk: the rule on 'refund' has "
         "'greet' in both after and not_after; drop one"),
        ("id: refund", "id: greet", "desk.yaml:6: strategies.2: desk: strategy 'greet' is listed twice"),
        ("after: [greet], not_after", "after: [close], after_any", "desk.yaml:12: rules.1: desk: 'refund' can"),
        ("strategies: [ask_id, refund,", "strategies: [ask_id,", "desk.yaml:15: parts.0: desk, part 'angry': mandatory "
         "names the unknown strategy 'refund'"),
        ("terminal: [close]", "terminal: [close]\nmandatory: [close]", "desk.yaml:14: mandatory.0: desk: 'close' is"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named_with_its_line_and_remedy(tmp_path, old, new, message):
    assert DESK.count(old) >= 1
    assert message in refused(tmp_path, DESK.replace(old, new, 1), GopoError)


def test_all_problems_are_named_at_once(tmp_path):
    form = refused(tmp_path, DESK.replace("name: Refund", "name: 1").replace("[id, mood]", "id"))
    assert [line.split(": ")[0] for line in form.splitlines()] == ["desk.yaml:7", "desk.yaml:2"]
    names = DESK.replace("asks: [id]", "asks: [x]").replace("after: [greet]", "after: [y, z]")
    assert [line.split(": ")[0] for line in refused(tmp_path, names, SopError).splitlines()] == [
        "desk.yaml:5",
        "desk.yaml:12",
        "desk.yaml:12",
    ]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "desk.yaml:1: empty; an SOP needs at least its name and strategies"),
        (b"# nothing\n---\n...\n", "desk.yaml:1: empty"),
        (b"\n\n", "desk.yaml:1: empty"),
        (BOMB.encode(), "desk.yaml:1: &a: anchors and aliases are refused; write the value out"),
        (b"name: x\nfacts: *all\n", "desk.yaml:2: *all: anchors and aliases are refused"),
        (b"name: &me [*me]\n", "desk.yaml:1: &me: anchors and aliases are refused"),
        (b"name: x\nterminal: !!python/object/apply:os.system [ls]\n", "desk.yaml:2: tag:yaml.org,2002:python/object"),
        (b"name: !word x\n", "desk.yaml:1: !word: tags are refused; write a plain value"),
        (b"name: x\nfacts: [a]\nname: y\n", "desk.yaml:3: name: given twice, first in line 1; keep one"),
        (b"name: x\n? [a, b]\n: c\n", "desk.yaml:2: sequence as a key: a field name is a word"),
        (b"name: x\n---\nname: y\n", "desk.yaml:2: '---': a second document; keep one SOP in a file"),
        (b"name: x\nfacts: [a\nrules: []\n", "desk.yaml:3: not valid YAML: while parsing a flow sequence"),
        (b"name: x\n\tfacts: [a]\n", "desk.yaml:2: not valid YAML: while scanning for the next token"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "desk.yaml:1: nested more than 20 levels deep"),
        (b"#" * (MAX_BYTES + 1), f"desk.yaml: larger than {MAX_BYTES} bytes"),
        ("name: caf\xe9\n".encode("latin-1"), "desk.yaml:1: byte 0xe9: not UTF-8; save the file as UTF-8"),
        ("name: x\n".encode("utf-16"), "desk.yaml:1: byte 0xff: not UTF-8; save the file as UTF-8"),
        (b"name: x\nfacts: [\x00]\n", "desk.yaml:2: character U+0000: not allowed in YAML; remove it"),
        (b"a: 1\nname: 2026-02-31\n", "desk.yaml:2: name: '2026-02-31': day is out of range for month; put it"),
        (b"- a\n- b\n", "desk.yaml:1: the file: ['a', 'b']: not a mapping; write field: value"),
        (b"just words\n", "desk.yaml:1: the file: 'just words': not a mapping"),
        (b"name: x\nstrategies: []\n", "desk.yaml:2: strategies: []: List should have at least 1 item"),
        (b"name: x\n<<: {facts: [a]}\n", "desk.yaml:2: <<: {'facts': ['a']}: no such field"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_plain_yaml_is_refused(tmp_path, content, message):
    assert message in refused(tmp_path, content)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"none.yaml: cannot be read: No such file"):
        load_sop(tmp_path / "none.yaml")
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        load_sop(tmp_path)


@settings(deadline=None)
@given(
    st.integers(0, len(DESK) - 1),
    st.integers(0, 8),
    st.one_of(
        st.sampled_from(["[", "{", "*a", "&a ", "!x ", "- ", ": ", "\n", "  ", "null", "0x", "é", "\x07"]),
        st.text(max_size=4),
    ),
)
def test_any_damage_is_read_or_refused_with_its_file(tmp_path_factory, start, length, new):
    path = tmp_path_factory.mktemp("damage") / "desk.yaml"
    path.write_text(DESK[:start] + new + DESK[start + length :], encoding="utf-8", errors="surrogatepass")
    message = ""
    try:
        load_sop(path)
    except GopoError as error:
        message = str(error)
    assert all(line.startswith(f"{path}:") for line in message.splitlines())
