"""The bookkeeping of ``GuidedDialogue``, on the README's own example; and environments of other packages by name."""

import re
from pathlib import Path

import pytest

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.envs.checker import check_env
from openrlhf_gopo.errors import ConfigError, DialogueError, SopError
from openrlhf_gopo.types import StopReason

ROOT = Path(__file__).parents[2]
FILES = {name: ROOT / "examples" / "custom_env" / f"coffee.{name}" for name in ("yaml", "py")}


@pytest.fixture
def env():
    return load_environment(f"{FILES['py']}:Coffee")


@pytest.fixture
def order(env):
    goal = next(goal for goal in env.goals("train") if goal.id == "large-latte")
    return env.start(goal, seed=0)


def test_the_readme_shows_the_example_as_it_is_in_40_lines():
    section = (ROOT / "README.md").read_text().split("## Bring your own environment")[1]
    blocks = dict(re.findall(r"```(yaml|python)\n(.*?)```", section, re.DOTALL))
    shown = blocks["yaml"] + blocks["python"]
    assert shown == FILES["yaml"].read_text() + FILES["py"].read_text()
    assert sum(bool(line.strip()) for line in shown.splitlines()) <= 40


def test_it_keeps_the_contract(env):
    check_env(env)


def test_a_dialogue_to_its_end(order):
    assert order.opening.allowed == ("ask_drink", "ask_size")
    drink = order.step("ask_drink", "What would you like?")
    assert (drink.completed, drink.on_task, drink.next.user) == (("drink",), True, "latte")
    assert drink.next.allowed == ("ask_size", "serve")
    order.step("ask_size", "How large?")
    served = order.step("serve", "Your latte.")
    assert (served.completed, served.stop, served.next) == (("serve",), StopReason.COMPLETED, None)
    with pytest.raises(DialogueError, match="goal large-latte: step\\('serve'\\) after the dialogue ended"):
        order.step("serve", "Again.")


def test_an_end_with_open_subgoals_is_closed(order):
    order.step("ask_drink", "What would you like?")
    assert order.step("serve", "Your latte.").stop is StopReason.CLOSED


@pytest.mark.parametrize("reply", ["", "   "])
def test_a_reply_that_says_nothing_achieves_nothing(order, reply):
    confused = order.step("ask_drink", reply)
    assert (confused.completed, confused.on_task, confused.stop, confused.engagement) == ((), False, None, 0.1)
    assert (order.history, order.known) == (["ask_drink"], set())
    assert confused.next.allowed == ("ask_drink", "ask_size")


def test_a_terminal_strategy_ends_the_dialogue_understood_or_not(order):
    order.step("ask_drink", "What would you like?")
    order.step("ask_size", "How large?")
    ended = order.step("serve", "Your tea.")
    assert (ended.completed, ended.stop, ended.next) == ((), StopReason.CLOSED, None)


def test_a_subgoal_is_completed_once(order):
    assert order.answer("again", completed=("drink",)).completed == ("drink",)
    again = order.answer("again", completed=("drink",))
    assert (again.completed, again.on_task) == ((), False)


def test_what_the_sop_forbids_is_an_error(order):
    with pytest.raises(SopError, match="goal large-latte: 'serve' is not allowed now: it needs the facts drink"):
        order.step("serve", "Your latte.")
    order.step("ask_size", "How large?")
    with pytest.raises(SopError, match="of no use once the facts size are known"):
        order.step("ask_size", "How large?")


def test_data_that_nobody_reads_is_an_error():
    with pytest.raises(ConfigError, match=r"--gopo\.data x: the environment coffee reads no data; leave the flag out"):
        load_environment(f"{FILES['py']}:Coffee", "x")


def test_an_environment_of_another_package(tmp_path, monkeypatch):
    """As pip leaves it: modules on the path and an entry point in the package's metadata."""
    (tmp_path / "coffee_stand.py").write_text(FILES["py"].read_text())
    (tmp_path / "coffee.yaml").write_text(FILES["yaml"].read_text())
    info = tmp_path / "coffee_stand-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coffee-stand\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[openrlhf_gopo.envs]\nstand = coffee_stand:Coffee\n")
    monkeypatch.syspath_prepend(tmp_path)
    env = load_environment("stand")
    assert type(env).__module__ == "coffee_stand"
    check_env(env)
    with pytest.raises(ConfigError, match=r"no such environment; choose one of .*shop, stand, star"):
        load_environment("stall")
