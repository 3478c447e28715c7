"""The contract with upstream (``runtime/upstream/contract.py``) against the objects of the installed packages.

A failure here names the seam that a new version has moved.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from openrlhf_gopo import platform
from openrlhf_gopo.runtime.upstream.cli import UpstreamCli
from openrlhf_gopo.runtime.upstream.contract import (
    CPU_NAMES,
    DECORATED,
    EXPERIENCE,
    FLAGS,
    NAMES,
    NAMESPACES,
    PLAIN,
    SIGNATURES,
    SUPPORTED,
    version,
)

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(importlib.util.find_spec("openrlhf") is None, reason="openrlhf is not installed"),
]


@pytest.fixture(scope="module", autouse=True)
def _stack() -> None:
    platform.activate()


@pytest.mark.parametrize("seam", DECORATED)
def test_the_plain_class_is_inside_the_decorated_one(seam: str) -> None:
    module, _, name = seam.partition(":")
    decorated = getattr(importlib.import_module(module), name)
    assert inspect.isclass(decorated.__ray_metadata__.modified_class)


@pytest.mark.parametrize("seam", PLAIN)
def test_can_be_inherited_from(seam: str) -> None:
    module, _, name = seam.partition(":")
    base = getattr(importlib.import_module(module), name)
    assert issubclass(type("Ours", (base,), {}), base)


@pytest.mark.parametrize("names", [NAMESPACES, NAMES, CPU_NAMES], ids=["substituted", "imported", "on CPU"])
def test_the_names_are_globals_of_their_modules(names: dict[str, list[str]]) -> None:
    for module, wanted in names.items():
        found = importlib.import_module(module)
        assert [name for name in wanted if not hasattr(found, name)] == [], module


def test_the_flags_are_upstreams() -> None:
    known = vars(UpstreamCli.load().parser.parse_args([]))
    assert [f for section, names in FLAGS.items() for n in names.split() if (f := f"{section}.{n}") not in known] == []


@pytest.mark.parametrize("package", SUPPORTED)
def test_the_installed_version_is_one_that_is_said_to_work(package: str) -> None:
    assert version(package) in SUPPORTED[package]


@pytest.mark.parametrize("seam", SIGNATURES)
def test_signature(seam: str) -> None:
    """New parameters with a default, at the end, break nobody; anything else must be looked at."""
    found, expected = signature(resolve(seam)), SIGNATURES[seam].split()
    assert found[: len(expected)] == expected


def test_experience_fields() -> None:
    experience = resolve("openrlhf.trainer.ppo_utils.experience:Experience")
    assert [field.name for field in dataclasses.fields(experience)] == EXPERIENCE.split()
    steps = [name for name in EXPERIENCE.split() if experience.is_step_tensor_field(name)]
    assert steps == EXPERIENCE.split()[:10]
    assert experience().mm_train_inputs == []


def test_mm_train_inputs_are_concatenated_along_dim_0_in_order() -> None:
    """The allowed labels of the expert's decisions travel this way."""
    torch = importlib.import_module("torch")
    merge = resolve("openrlhf.utils.vlm_utils:merge_mm_train_inputs")
    first, second = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6]])
    merged = merge([{"allowed": first}, None, {"allowed": second}], "cpu")
    assert merged["allowed"].tolist() == [[1, 2], [3, 4], [5, 6]]
    nested = merge([[{"allowed": first}], [None], [{"allowed": second}]], "cpu")
    assert nested["allowed"].equal(merged["allowed"])
    assert merge([None], "cpu") == {}


def test_mm_train_inputs_survive_split_and_make() -> None:
    """``append`` splits a batch into samples and ``collate_fn`` puts samples together again."""
    torch = importlib.import_module("torch")
    module = importlib.import_module("openrlhf.trainer.ppo_utils.experience")
    inputs = [{"allowed": torch.tensor([[1, 2]])}, {"allowed": torch.tensor([[3, 4], [5, 6]])}]
    batch = module.Experience(
        sequences=torch.arange(6).reshape(2, 3),
        attention_mask=torch.ones(2, 3, dtype=torch.long),
        action_mask=torch.ones(2, 2, dtype=torch.bool),
        mm_train_inputs=inputs,
        info={},
    )
    items = module.split_experience_batch(batch)
    assert len(items) == 2
    again = module.make_experience_batch(items)
    allowed = resolve("openrlhf.utils.vlm_utils:merge_mm_train_inputs")(again.mm_train_inputs, "cpu")["allowed"]
    assert allowed.tolist() == [[1, 2], [3, 4], [5, 6]]


def test_no_advantage_means_no_gradient_in_the_policy_loss() -> None:
    """Five results; a token outside the mask, or with advantage 0, contributes nothing."""
    torch = importlib.import_module("torch")
    loss_fn = resolve("openrlhf.models:PolicyLoss")(token_level_loss=True)
    now = torch.zeros(1, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    loss, *rest = loss_fn(now, torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 5.0]]), action_mask=mask)
    loss.backward()
    assert len(rest) == 4
    assert now.grad.tolist() == [[-1.0, 0.0, 0.0]]  # -advantage / number of action tokens


def test_the_last_tensor_of_a_sync_is_marked() -> None:
    """On CPU the engine reloads its weights when ``empty_cache`` is true."""
    source = inspect.getsource(resolve("openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.broadcast_to_vllm"))
    assert "empty_cache=count == num_params" in source


def test_hierarchize_nests_dots() -> None:
    hierarchize = resolve("openrlhf.utils.config:hierarchize")
    nested = hierarchize(SimpleNamespace(**{"actor.adam.lr": 1.0, "actor.optim": "adam", "use_ms": False}))
    assert (nested.actor.adam.lr, nested.actor.optim, nested.use_ms) == (1.0, "adam", False)


def resolve(seam: str) -> Any:
    """``module:Name.method``; a class that Ray has decorated is unwrapped."""
    module, _, path = seam.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(getattr(found, name), "__ray_metadata__", None) or getattr(found, name)
        found = getattr(found, "modified_class", found)
    return found


def signature(function: Any) -> list[str]:
    prefixes = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    return [prefixes.get(p.kind, "") + p.name for p in parameters if p.name != "_ray_trace_ctx"]
