"""One rollout's updates of the expert give the same weights however they are spread: over ZeRO stages, data-parallel
ranks and micro-batches, and the weights of a plain torch loop in float64 that knows none of them.

Weights can be compared because Adam's eps is 1 here: its first step is lr g / (|g| + 1), as smooth in g as SGD's, where
eps = 1e-8 would make it the sign of g, and rounding noise decides that. Gradient clipping is off, except in a
case of its own: it would hide a gradient that is wrong by a factor.
"""

from __future__ import annotations

import functools
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from openrlhf_gopo import platform
from openrlhf_gopo.core.categorical import PAD, pad_allowed

SCRIPT = str(Path(__file__).with_name("parallel_script.py"))
DEADLINE = 240.0  # seconds for all cases of one number of ranks; two idle cores need about 15
LABELS = list(range(3, 9))
TAU, ENTROPY, EPOCHS, LR = 0.7, 0.05, 2, 0.1
# Of each dialogue; groups of four. One without decisions is what a quarantined dialogue looks like.
LENGTHS = [14, 9, 17, 11, 23, 12, 16, 10]
DECISIONS = {"mixed": [2, 1, 3, 0, 5, 2, 4, 1], "idle": [0, 0, 0, 0, 5, 2, 4, 1]}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not platform.is_cpu(), reason="there is a GPU")]


def case(
    stage: int, micro: int, dialogues: str = "mixed", dtype: str = "fp32", dynamic: int = 0, **actor: str
) -> dict[str, Any]:
    """What parallel_script.py needs for one run; ``actor``: further flags of that section."""
    common = {
        "ds.zero_stage": str(stage),
        "train.batch_size": "8",
        "train.micro_batch_size": str(micro),
        "train.max_epochs": str(EPOCHS),
        "rollout.n_samples_per_prompt": "4",
        "rollout.temperature": str(TAU),
        "actor.entropy_coef": str(ENTROPY),
        "actor.adam.lr": str(LR),
        "actor.adam.eps": "1",
        "actor.lr_scheduler": "constant",
        "actor.lr_warmup_ratio": "0",
        "actor.max_norm": "0",
        "gopo.expert_credit": "group=1",  # the advantages are given; q would add a term of its own
    }
    own = {f"actor.{name}": value for name, value in actor.items()}
    flags = {f"--{name}": value for name, value in (common | own).items()}
    return {"flags": flags, "dialogues": dialogues, "dtype": dtype, "dynamic": dynamic}


STAGES, MICRO = (0, 2, 3), {1: (1, 2, 4, 8), 2: (1, 4)}
GRID = [(ranks, stage, micro) for ranks in MICRO for stage in STAGES for micro in MICRO[ranks]]
CASES: dict[int, dict[str, Any]] = {ranks: {} for ranks in MICRO}
for ranks, stage, micro in GRID:
    CASES[ranks][f"zero {stage} micro {micro}"] = case(stage, micro)
for stage in STAGES:
    CASES[2][f"zero {stage} idle"] = case(stage, 2, "idle")
for stage in (2, 3):
    CASES[2][f"zero {stage} clipped"] = case(stage, 2, max_norm="1")
    CASES[2][f"zero {stage} bf16"] = case(stage, 2, dtype="bf16")
    CASES[2][f"zero {stage} dynamic"] = case(stage, 1, dynamic=40)
Q = "--gopo.expert_credit", "q=3,group=1"
Q_GRID = [(1, 0, 8, "mixed"), (1, 2, 2, "mixed"), (2, 2, 1, "mixed"), (2, 3, 2, "mixed"), (2, 3, 2, "idle")]
for ranks, stage, micro, name in [*Q_GRID, (1, 2, 4, "idle")]:
    CASES[ranks][f"q {stage} {micro} {name}"] = case(stage, micro, name)
    CASES[ranks][f"q {stage} {micro} {name}"]["flags"] |= dict([Q])
CASES[2]["per dialogue"] = case(3, 2, loss_agg_mode="seq-mean-token-mean")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tied head, a tokenizer that nobody asks, and the dialogues."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("expert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=48, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({"<pad>": 0, "hello": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<pad>").save_pretrained(folder)
    torch.save({name: dialogues(folder, counts) for name, counts in DECISIONS.items()}, folder / "dialogues.pt")
    return folder


def dialogues(folder: Path, counts: list[int]) -> list[dict[str, torch.Tensor]]:
    """Per dialogue of S tokens and T decisions: tokens (S,), allowed (T, L), togo (T,), and mask, sampled, advantages
    (S-1,).

    The sampler's log-probabilities are the model's and noise, so that some ratios are clipped from the first step on.
    """
    generator = torch.Generator().manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    result = []
    for length, count in zip(LENGTHS, counts, strict=True):
        tokens = torch.randint(LABELS[-1] + 1, 48, (length,), generator=generator)
        places = torch.randperm(length - 1, generator=generator)[:count].sort().values
        rows = [torch.randperm(len(LABELS), generator=generator)[: 2 + i % 4].tolist() for i in range(count)]
        allowed = pad_allowed([[LABELS[i] for i in row] for row in rows], width=len(LABELS))
        tokens[places + 1] = allowed[:, 0]
        mask = torch.zeros(length - 1, dtype=torch.long).index_fill(0, places, 1)
        togo = allowed[:, 0].float() - 5 + torch.randn(count, generator=generator)
        dialogue = {"tokens": tokens, "allowed": allowed, "mask": mask, "togo": togo}
        with torch.no_grad():
            logprobs, _ = decisions(model, dialogue)
        noise = torch.tensor([0.0, 0.4, -0.4, 0.1])[torch.randint(4, (count,), generator=generator)]
        for name, values in (
            ("sampled", logprobs + noise),
            ("advantages", 3 * torch.randn(count, generator=generator)),
        ):
            dialogue[name] = torch.zeros(length - 1).index_copy(0, places, values.float())
        result.append(dialogue)
    return result


def decisions(model: LlamaForCausalLM, dialogue: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of each decision, (T,), from the logits of all positions and nothing of ours."""
    logits = model(dialogue["tokens"].unsqueeze(0)).logits[0, :-1] / TAU
    logprobs, entropies = [], []
    for place, allowed in zip(dialogue["mask"].nonzero().flatten(), dialogue["allowed"], strict=True):
        chances = logits[place, allowed[allowed != PAD]].log_softmax(-1)
        logprobs.append(chances[0])  # the chosen label stands first
        entropies.append(-(chances.exp() * chances).sum())
    if not logprobs:
        return logits.new_zeros(0), logits.new_zeros(0)
    return torch.stack(logprobs), torch.stack(entropies)


def plain(
    folder: Path, name: str = "mixed", dtype: str = "fp32", *, max_norm: float = 0.0, per_dialogue: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    """The same updates by autograd on the whole batch: start and end weights, and the last gradient's norm."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    model = model.double()
    batch = torch.load(folder / "dialogues.pt")[name]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
    asked = [d for d in batch if d["mask"].any()]
    total = sum(int(d["mask"].sum()) for d in asked)
    for _ in range(EPOCHS):
        loss = torch.zeros((), dtype=torch.float64)
        for dialogue in asked:
            mask = dialogue["mask"] == 1
            logprobs, entropies = decisions(model, dialogue)
            ratios, advantages = (logprobs - dialogue["sampled"][mask]).exp(), dialogue["advantages"][mask].double()
            gains = torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
            share = len(asked) * len(gains) if per_dialogue else total
            # Upstream's entropy bonus is a mean over tokens in either mode.
            loss = loss - gains.sum() / share - ENTROPY * entropies.sum() / total
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
        optimizer.step()
    return start, {name: p.detach() for name, p in model.named_parameters()}, float(norm)


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[int, dict[str, Any]]:
    """By number of ranks and case: what parallel_script.py returns."""
    for ranks, cases in CASES.items():
        launch(ranks, str(folder), json.dumps(cases))
    return {ranks: torch.load(folder / f"ranks{ranks}.pt") for ranks in CASES}


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[..., Any]:
    """``plain`` on the folder; each variant is computed once."""
    return functools.cache(functools.partial(plain, folder))


def launch(ranks: int, *args: str) -> None:
    """All ranks of one job; one that fails or a hang ends them all."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    logs = [Path(args[0], f"rank{rank}of{ranks}.log") for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, SCRIPT, *args],
                        env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": "0"},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        started = time.monotonic()
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() - started > DEADLINE:
                break
            time.sleep(0.1)
        codes = [p.poll() for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * ranks, "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs)


def error(weights: dict[str, torch.Tensor], start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> float:
    """|w - end| / |end - start| in the maximum norm over all weights."""
    assert weights.keys() == end.keys()
    wrong = max(float((weights[name].double() - end[name]).abs().max()) for name in end)
    return wrong / max(float((end[name] - start[name]).abs().max()) for name in end)


@pytest.mark.parametrize(("ranks", "stage", "micro"), GRID)
def test_stages_ranks_and_micro_batches_give_the_plain_step(trained, expected, ranks, stage, micro):
    result = trained[ranks][f"zero {stage} micro {micro}"]
    assert not isinstance(result, str), result
    start, end, norm = expected()
    assert error(result["weights"], start, end) < 1e-5
    if stage:  # without ZeRO and clipping DeepSpeed measures no norm
        assert result["status"]["actor_grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_any_decision_takes_part_in_the_step(trained, expected, stage):
    start, end, _ = expected("idle")
    assert error(trained[2][f"zero {stage} idle"]["weights"], start, end) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_clipping_sees_the_gradient_of_all_ranks(trained, expected, stage):
    result = trained[2][f"zero {stage} clipped"]
    start, end, norm = expected(max_norm=1.0)
    assert error(result["weights"], start, end) < 2e-5
    assert result["status"]["actor_grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_mean_over_dialogues_counts_only_those_with_decisions(trained, expected):
    start, end, _ = expected(per_dialogue=True)
    assert error(trained[2]["per dialogue"]["weights"], start, end) < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_in_bf16_the_step_is_the_same_up_to_its_noise(trained, expected, stage):
    """Not stage 0: there DeepSpeed starts Adam's bias correction one step late."""
    start, end, _ = expected(dtype="bf16")
    assert error(trained[2][f"zero {stage} bf16"]["weights"], start, end) < 0.1


@pytest.mark.parametrize("stage", [2, 3])
def test_dynamic_micro_batches_give_the_plain_step(trained, expected, stage):
    start, end, _ = expected()
    assert error(trained[2][f"zero {stage} dynamic"]["weights"], start, end) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_the_head_on_decisions_gives_the_logits_of_the_whole_head(trained, stage):
    assert trained[2][f"zero {stage} micro 4"]["parity"] < 1e-5  # ranks with other decisions
    assert trained[2][f"zero {stage} idle"]["parity"] < 1e-5  # and one without


@pytest.mark.parametrize(("ranks", "stage", "micro", "name"), Q_GRID)
def test_every_rank_learns_from_one_q_of_all_of_them(trained, expected, ranks, stage, micro, name):
    """``tests/runtime/test_q_credit.py`` says what the step is; here it is the same however it is spread."""
    result = trained[ranks][f"q {stage} {micro} {name}"]
    assert not isinstance(result, str), result
    start, without, _ = expected(name)
    whole = trained[1]["q 2 4 idle" if name == "idle" else "q 2 2 mixed"]
    end = {key: value.double() for key, value in whole["weights"].items()}
    assert error(end, start, without) > 0.01
    assert error(result["weights"], start, end) < 1e-4
    for metric in ("q_loss", "q_fit_r2"):
        assert result["status"][metric] == pytest.approx(whole["status"][metric], rel=1e-3, abs=1e-6)


def test_metrics_are_numbers_although_a_micro_batch_has_no_decision(trained):
    for name in ("zero 2 micro 1", "zero 3 micro 1", "zero 2 idle", "zero 3 idle"):
        status = trained[2][name]["status"]
        assert not [key for key, value in status.items() if math.isnan(value)], name
