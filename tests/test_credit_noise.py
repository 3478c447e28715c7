"""examples/shop_cpu/credit_noise.py: its gradients are autograd's, and its table is what the products say."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openrlhf_gopo.evaluation.records import append_trajectory
from openrlhf_gopo.platform.media import hide_what_cuda_builds_break
from openrlhf_gopo.types import Goal, Stream, Trajectory, Turn

FOLDER = Path(__file__).parents[1] / "examples" / "shop_cpu"
ALLOWED = [[5, 6, 7], [6, 8]]


@pytest.fixture
def noise(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("credit_noise")


@pytest.fixture
def model():
    hide_what_cuda_builds_break()
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=12, **sizes)).eval()


def played(goal: str, completed: list[tuple[str, ...]], labels: list[int]) -> Trajectory:
    """A dialogue of two decisions with a forced turn between them, which has no span and no credit of its own."""
    turns = [
        Turn("hi", ("a", "b"), "a", "reply", completed=completed[0], engagement=0.5, on_task=True),
        Turn("so", ("c",), "c", "reply", completed=completed[1], engagement=0.5, on_task=True, forced=True),
        Turn("ok", ("b", "c"), "b", "reply", completed=completed[2], engagement=0.5, on_task=True),
    ]
    tokens = [1, 2, 3, labels[0], 4, 9, labels[1]]
    stream = Stream(tokens, spans=[(3, 4), (6, 7)], logprobs=[0.0] * 7, allowed=ALLOWED)
    return Trajectory(Goal(goal, "refund", "", {"x": 0.4, "y": 0.6}), 0, 0, turns, streams={"expert": stream})


def test_the_gradient_is_that_of_the_output_layer(noise, model):
    trajectory = played("g", [(), (), ()], [6, 8])
    scores, hidden = noise.scored(model, trajectory)
    logits = model(torch.tensor([trajectory.streams["expert"].tokens])).logits[0]
    chosen = [logits[at, ids].log_softmax(0)[ids.index(z)] for at, ids, z in zip((2, 5), ALLOWED, (6, 8), strict=True)]
    (2.0 * chosen[0] - 3.0 * chosen[1]).backward()
    advantages = torch.tensor([2.0, -3.0], dtype=torch.float64)
    gradient = (scores * advantages[:, None]).T @ hidden
    assert torch.allclose(gradient, model.lm_head.weight.grad.double(), atol=1e-6)
    assert gradient.abs().sum() > 0.1


def test_a_batch_holds_decisions_and_not_forced_turns(noise, model):
    won = played("g", [("x",), (), ("y",)], [6, 8])
    lost = played("g", [(), ("x",), ()], [5, 6])
    batch = noise.batch_of(model, [won, lost, played("other", [(), (), ()], [5, 6])])
    assert batch.counts == [2, 2, 2]
    assert [group.tolist() for group in batch.groups] == [[0, 1], [2]]
    # Before the last decision: turn 2, 0.4 done after turn 0 or in the forced turn, engagement 0.5.
    row = [1.0, 2.0, 4.0, 0.4, 0.8, 0.5, 0.2]
    assert batch.states[1].tolist() == pytest.approx(row)
    assert batch.states[3].tolist() == pytest.approx(row)
    assert batch.states[5].tolist() == pytest.approx([1.0, 2.0, 4.0, 0.0, 0.0, 0.5, 0.0])
    # tse: both engaged half on task in every turn. R of won: 0.4 x 0.75, the same, 1 x 0.75: 0.3, 0, 0.45; of lost: 0,
    # 0.3, 0. Decisions at turns 0 and 2: to go 0.75 and 0.45 against 0.3 and 0, nothing against nobody.
    assert batch.returns.tolist() == pytest.approx([0.75, 0.3, 0.0])
    assert batch.earned.tolist() == pytest.approx([0.3, 0.45, 0.3, 0.0, 0.0, 0.0])
    assert batch.against_group.tolist() == pytest.approx([0.45, 0.45, -0.45, -0.45, 0.0, 0.0])
    credit = noise.credits(batch, torch.zeros(6, dtype=torch.float64))
    # One pair: its winner's decisions +1, its loser's -1, none elsewhere; root mean square sqrt(4/6).
    unit = 1.5**0.5
    assert credit["preference"].tolist() == pytest.approx([unit, unit, -unit, -unit, 0.0, 0.0])
    for name in ("returns to go", "fit, lambda 1"):
        assert float(credit[name].pow(2).mean()) == pytest.approx(1.0)


def test_signal_and_direction_by_hand(noise):
    # The fit: (1, 0) and (1, 2): distinct <.,.> = 1, same (1 + 5) / 2 = 3. Preference: (0, 2) and (2, 2):
    # distinct 4, same (4 + 8) / 2 = 6; across, (0,2).(1,2) = 4 and (2,2).(1,0) = 2: mean 3, over sqrt(4 * 1) = 1.5.
    gradients = {
        "preference": torch.tensor([[0.0, 2.0], [2.0, 2.0]]),
        noise.UNBIASED: torch.tensor([[1.0, 0.0], [1.0, 2.0]]),
    }
    found = noise.agreement(gradients)
    assert found[noise.UNBIASED] == pytest.approx((1 / 3, 1.0))
    assert found["preference"] == pytest.approx((2 / 3, 1.5))


def test_a_fit_to_other_batches_finds_what_is_linear(noise, model):
    batch = noise.batch_of(model, [played("g", [("x",), (), ("y",)], [6, 8]), played("g", [(), (), ()], [5, 6])])
    truth = torch.tensor([0.3, 0.1, 0.0, -0.5, 0.0, 0.2, 0.0], dtype=torch.float64)
    torch.manual_seed(1)
    states = torch.randn(4000, 7, dtype=torch.float64)
    other = noise.Batch([1] * 4000, [], states[:, 0], states @ truth, states[:, 0], states, states, states)
    assert torch.allclose(noise.values_of(batch, [other]), batch.states @ truth, atol=1e-3)


def test_noise_that_hides_the_gradient_has_no_direction(noise):
    # The two batches point apart: <.,.> of distinct ones is -1.
    gradients = {noise.UNBIASED: torch.tensor([[1.0, 0.0], [-1.0, 1.0]])}
    signal, direction = noise.agreement(gradients)[noise.UNBIASED]
    assert signal == pytest.approx(-1 / 1.5)
    assert direction != direction  # NaN


def test_without_runs_it_says_what_to_run_first(noise, tmp_path):
    with pytest.raises(SystemExit, match="no two finished two-level runs of one seed; run study"):
        noise.read_batches(tmp_path)


def test_the_table_of_a_study(noise, model, tmp_path):
    """Two runs of one seed whose first updates are the same: no noise, so every signal is 1."""
    model.save_pretrained(tmp_path / "models" / "warm_expert")
    for variant in ("gopo", "gopo_critic_alone"):
        results = tmp_path / f"{variant}_16updates_lr3e-4_1e-4_seed3" / "results"
        results.mkdir(parents=True)
        for completed, labels in ((("x",), [6, 8]), ((), [5, 6])):
            append_trajectory(results / "trajectories.jsonl", played("g", [completed, (), ()], labels))
        (results / "table.csv").write_text("")
    script = [sys.executable, str(FOLDER / "credit_noise.py"), "--out", str(tmp_path)]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed]
    assert cells[0] == ["credit", "seed 3: 2 batches", "signal", "direction"]
    assert [row[0] for row in cells[2:5]] == ["preference", "returns to go", "preference + returns to go"]
    assert [row[1:3] for row in cells[2:]] == [["1.00", "1.00"]] * 7
    assert [row[3] for row in cells[2:] if row[0] == noise.UNBIASED] == ["1.00"]
