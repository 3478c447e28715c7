"""The command ``python -m openrlhf_gopo.cli.sop`` as a user types it, with good and bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_gopo.envs import shop_catalogue
from openrlhf_gopo.sop.schema import json_schema

SHOP = Path(shop_catalogue.__file__).with_name("shop_sop.yaml")
ROOT = Path(__file__).parents[2]
COFFEE = f"{ROOT / 'examples' / 'custom_env' / 'coffee.py'}:Coffee"
FIXTURE = ROOT / "tests" / "envs" / "star_fixture"
STUCK = """\
name: stuck
strategies:
  - {id: ask, name: ask, description: ask, asks: [id]}
  - {id: end, name: end, description: end}
rules:
  - {strategy: ask, without_facts: [id]}
  - {strategy: end, requires_facts: [paid]}
terminal: [end]
"""


def run(*arguments, stdin="", env=None):
    command = [sys.executable, "-m", "openrlhf_gopo.cli.sop", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, cwd=ROOT, env=env)


def refused(*arguments, **options):
    done = run(*arguments, **options)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def stuck(tmp_path):
    path = tmp_path / "stuck.yaml"
    path.write_text(STUCK)
    return path


def test_a_clean_sop_is_summed_up():
    for name in ("shop", SHOP):
        done = run(name)
        assert done.returncode == 0, done.stderr
        assert f"shop ({SHOP}): 26 strategies, 3 parts" in done.stdout
        assert "shop, part 'orders': 14 strategies, 15 rules, ends with close: no findings" in done.stdout
        notes = [line for line in done.stdout.splitlines() if line.startswith("note, if questions stay unanswered: ")]
        assert [line.split(": ")[2] for line in notes] == ["dead end", "dead end"]


def test_findings_are_named_and_set_the_exit_status(stuck):
    done = run(stuck)
    assert done.returncode == 1
    message = "dead end: stuck: after the opening with id known, no rule leaves a strategy"
    assert f"{stuck}:7: {message}" in done.stdout


def test_a_search_that_gave_up_says_so():
    done = run("shop", "--part", "payment", "--limit", 5)
    assert "the search stopped at 5 states and may have missed some; raise --limit" in done.stdout


def test_an_environment_with_data():
    done = run("star", "--data", FIXTURE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", ends with goodbye: no findings" in done.stdout


def test_an_environment_of_ones_own():
    done = run(COFFEE)
    assert done.returncode == 0, done.stderr
    assert "coffee: 3 strategies, 3 rules, ends with serve: no findings" in done.stdout


def test_an_environment_that_shows_no_sop(tmp_path):
    path = tmp_path / "silent.py"
    path.write_text("from openrlhf_gopo.envs.shop import Shop\nclass Silent(Shop):\n    procedure = None\n")
    assert "this environment shows no SOP: override its method procedures, or name" in refused(f"{path}:Silent")


def test_one_part(stuck):
    done = run("shop", "--part", "presale")
    assert "part 'presale'" in done.stdout
    assert "part 'orders'" not in done.stdout
    assert "--part sales: no such part; choose one of presale, orders, payment" in refused("shop", "--part", "sales")
    assert "choose one of stuck" in refused(stuck, "--part", "sales")


def test_the_schema_is_published():
    done = run("--schema")
    assert json.loads(done.stdout) == json_schema()


def test_a_walk_through_a_pipe():
    commands = "+need +mood\nclose\n99\nnonsense\n\nrecommend\n+budget\n8\nclose\n"
    done = run("shop", "--part", "presale", "--walk", stdin=commands)
    assert done.returncode == 0, done.stderr
    for line in (
        "turn 1, facts: none",
        "   - close comes after invite_to_buy",
        "   - recommend needs the facts need",
        "> need is known",
        "+mood: no rule looks at such a fact; choose from address, budget,",
        "turn 1, facts: need\n",
        "> close comes after invite_to_buy",
        "> '99': number or id: use the strategy",
        "> 'nonsense': number or id: use the strategy",
        "> used recommend",
        "   - ask_budget is of no use once the facts budget are known",
        "> used close\n\nThe walk: recommend, invite_to_buy, close. Facts: budget, need.",
    ):
        assert line in done.stdout
    assert "it asks: +need gives the answer" in run("shop", "--part", "presale", "--walk", stdin="clarify\nq\nx").stdout


def test_a_walk_into_a_dead_end(stuck):
    done = run(stuck, "--walk", stdin="1\n+id\n1\n")
    assert "dead end: the rules forbid everything; only ending the dialogue is left\n   1 end: end" in done.stdout
    assert "The walk: ask, end. Facts: id." in done.stdout


def test_graphviz_source_needs_no_program(tmp_path):
    done = run("shop", "--graph", tmp_path / "shop.dot", env=os.environ | {"PATH": ""})
    assert done.returncode == 0, done.stderr
    source = (tmp_path / "shop.dot").read_text()
    assert '"orders/explain_policy" -> "orders/give_refund"\n' in source
    assert '"presale/compare" -> "presale/invite_to_buy" [style=dashed]' in source
    assert '"orders/look_up_order" -> "orders/close"\n' in source  # mandatory
    assert source.count("peripheries=2") == 3


def test_a_picture_without_the_program(tmp_path):
    error = refused("shop", "--graph", tmp_path / "shop.svg", env=os.environ | {"PATH": ""})
    assert "the program dot, which draws pictures, is not on the PATH; install Graphviz" in error
    assert f"or --graph {tmp_path / 'shop.dot'}" in error
    assert not (tmp_path / "shop.svg").exists()


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs the program dot")
@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_picture(tmp_path, suffix, start):
    done = run("shop", "--graph", tmp_path / f"shop.{suffix}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"shop.{suffix}").read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name an SOP file or an environment, or --schema"),
        (("nothing.yaml",), "sop: error: nothing.yaml: cannot be read: No such file or directory"),
        (("shopp",), "no such environment; choose one of abcd, multiwoz, shop, star"),
        (("shop", "--walk"), "--walk: walk one of several; add --part with one of presale, orders, payment"),
        (("shop", "--graph", "shop.jpeg"), "--graph shop.jpeg: choose a name that ends in .svg, .png, .pdf, .dot, .gv"),
        (("shop", "--graph", "no/such/folder.dot"), "--graph no/such/folder.dot: cannot be written: No such file"),
        (("shop", "--limit", "0"), "--limit 0: give a number of states of 1 or more"),
        ((SHOP, "--data", "x"), "--data x: an SOP file needs none; leave it out"),
    ],
)
def test_what_cannot_work_is_one_line(arguments, message):
    assert message in refused(*arguments)


def test_a_bad_file_is_named_by_line(stuck):
    stuck.write_text(STUCK.replace("requires_facts", "needs").replace("without_facts: [id]", "max_uses: none"))
    error = refused(stuck)
    assert f"{stuck}:6: rules.0.max_uses: 'none': not a whole number" in error
    assert f"{stuck}:7: rules.1.needs: ['paid']: no such field; choose one of strategy, requires_facts," in error
