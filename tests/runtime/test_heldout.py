"""Evaluations within a run: which decodings are played when, their files and metrics, and what is read back."""

from types import SimpleNamespace

import pytest

pytest.importorskip("openrlhf")

from openrlhf_gopo.envs import load_environment
from openrlhf_gopo.evaluation.records import append_trajectory
from openrlhf_gopo.evaluation.scripted import ScriptedPolicy, play
from openrlhf_gopo.runtime.heldout import HeldOut

pytestmark = pytest.mark.stack
SKILL = {0.0: 1.0, 1.0: 0.0}  # greedy is the better one here


class Scripts:
    """A script where the engines would be: ``HeldOut`` asks it for dialogues by temperature."""

    def __init__(self, env):
        self.env, self.asked = env, []

    def evaluate(self, files, samples):
        self.asked.append(list(files))
        found = {}
        for temperature, path in files.items():
            goals = list(self.env.goals("heldout"))[:3]
            found[temperature] = [play(self.env, goal, 0, 1, ScriptedPolicy(SKILL[temperature])) for goal in goals]
            for trajectory in found[temperature]:
                append_trajectory(path, trajectory)
        return found


@pytest.fixture
def heldout(tmp_path):
    def build(temperature=1.0):
        env = load_environment("shop")
        args = SimpleNamespace(eval=SimpleNamespace(temperature=temperature, n_samples_per_prompt=1))
        return HeldOut(env, Scripts(env), args, tmp_path / "eval")

    return build


def test_both_decodings_in_one_go_with_files_and_metrics_of_their_own(heldout, tmp_path):
    own = heldout()
    played = own.play(0, both=True, known={})
    assert own.generator.asked == [[1.0, 0.0]]
    names = {path.name for path in (tmp_path / "eval").iterdir()}
    assert names == {f"{name}_00000.{kind}" for name in ("step", "greedy") for kind in ("jsonl", "txt")}
    logs = own.metrics(played)
    for metric in ("tse", "success", "esndcg", "gre", "tse_low", "tse_high", "success_low", "failures"):
        assert f"eval_{metric}" in logs
        assert f"eval_greedy_{metric}" in logs
    assert logs["eval_greedy_tse"] > logs["eval_tse"]
    assert own.metrics(own.read(0, both=True)) == logs


def test_evaluations_in_between_are_sampled_and_the_last_adds_what_it_lacks(heldout):
    own = heldout()
    known = own.play(4, both=False, known={})
    assert list(own.metrics(known)) == [name for name in own.metrics(known) if not name.startswith("eval_greedy")]
    assert list(own.play(4, both=True, known=known)) == [0.0]
    assert own.play(4, both=False, known=known) == {}
    assert own.generator.asked == [[1.0], [0.0]]
    assert list(own.read(4, both=False)) == [1.0]


def test_a_greedy_eval_temperature_leaves_one_decoding(heldout, tmp_path):
    own = heldout(temperature=0.0)
    played = own.play(0, both=True, known={})
    assert list(played) == [0.0]
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {"step_00000.jsonl", "step_00000.txt"}
    assert "eval_tse" in own.metrics(played)


def test_what_an_earlier_run_did_not_play_is_not_read(heldout):
    own = heldout()
    assert own.read(0, both=True) == {}
    own.play(0, both=False, known={})
    assert list(own.read(0, both=True)) == [1.0]
