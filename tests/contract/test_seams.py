"""What this project relies on inside OpenRLHF 0.11.2. A failure here names the seam that a new version has moved."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from openrlhf_gopo import platform

pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(importlib.util.find_spec("openrlhf") is None, reason="openrlhf is not installed"),
]

# Ray forbids inheriting from a decorated class; the plain one is inside (DESIGN, section 9).
DECORATED = [
    "openrlhf.trainer.ppo_trainer:PPOTrainer",
    "openrlhf.trainer.ray.launcher:ReferenceModelActor",
    "openrlhf.trainer.ray.launcher:RewardModelActor",
    "openrlhf.trainer.ray.ppo_actor:PolicyModelActor",
    "openrlhf.trainer.ray.ppo_critic:CriticModelActor",
    "openrlhf.trainer.ray.vllm_engine:RolloutRayActor",
]
PLAIN = [
    "openrlhf.models:Actor",
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer",
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker",
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator",
    "openrlhf.trainer.ray.launcher:BaseModelActor",
    "openrlhf.trainer.ray.launcher:RayActorGroup",
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer",
    "openrlhf.utils.agent:AgentExecutorBase",
]
# Looked up by name in these modules while a constructor of upstream's runs, so that a substitute takes effect.
NAMESPACES = {
    "openrlhf.trainer.ppo_trainer": ["RemoteExperienceMaker", "SamplesGenerator", "prepare_datasets"],
    "openrlhf.trainer.ray.launcher": ["Actor"],
    "openrlhf.trainer.ray.ppo_actor": ["Actor", "ActorPPOTrainer", "PolicyLoss", "stateless_init_process_group"],
    "openrlhf.trainer.ray.vllm_engine": ["RolloutRayActor", "batch_vllm_engine_call"],
    "openrlhf.utils.deepspeed.deepspeed": ["init_device_mesh"],
}
GROUPS = "actor_model_group critic_model_group reward_model_group"
SIGNATURES = {
    "openrlhf.models:Actor.forward": (
        "self sequences action_mask attention_mask return_output allgather_logits return_logprobs ring_attn_group "
        "packed_seq_lens return_entropy **mm_inputs"
    ),
    "openrlhf.models:PolicyLoss.forward": (
        "self log_probs old_log_probs advantages action_mask rollout_log_probs dp_size batch_num_tokens "
        "global_batch_size"
    ),
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.__init__": (
        f"self strategy {GROUPS} reference_model_group vllm_engines tokenizer"
    ),
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer._compute_rollout_stats": "self experiences",
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.broadcast_to_vllm": "self",
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.fit": "self global_step",
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.ppo_train": "self global_steps",
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer._detect_eval_metric_key": "self eval_metrics",
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.train_step": "self rollout_samples global_step",
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.__init__": (
        f"self {GROUPS} initial_model_group kl_controller strategy tokenizer **kwargs"
    ),
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker._dispatch_forward": (
        "self group sync_condition **kwargs"
    ),
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker._flatten_results": "self refs duplicate_factor",
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.compute_advantages_and_returns": (
        "self experiences"
    ),
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_advantages_and_returns": (
        "self values rewards action_mask gamma lambd"
    ),
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_cumulative_returns": (
        "self rewards action_mask gamma"
    ),
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.make_experience": "self samples_list",
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.make_experience_batch": "self rollout_samples",
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.split_rollout_samples": "self rollout_samples",
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator.__init__": (
        "self strategy prompts_dataloader eval_dataloader tokenizer vllm_engines"
    ),
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._dispatch_prompts_to_vllm": (
        "self prompts labels images **generate_kwargs"
    ),
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._generate_vllm": (
        "self dataloader_iter num_prompts dynamic_filtering **generate_kwargs"
    ),
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._process_response_into_experience": (
        "self response **generate_kwargs"
    ),
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator.generate_eval_samples": "self **generate_kwargs",
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator.generate_samples": "self **generate_kwargs",
    "openrlhf.trainer.ray.launcher:RayActorGroup.__init__": (
        "self num_nodes num_gpus_per_node ray_actor_type pg num_gpus_per_actor duplicate_actors resources "
        "num_resources_per_node"
    ),
    "openrlhf.trainer.ray.launcher:RayActorGroup.async_init_model_from_pretrained": "self *args **kwargs",
    "openrlhf.trainer.ray.launcher:RayActorGroup.async_run_method": "self method_name *args **kwargs",
    "openrlhf.trainer.ray.launcher:RayActorGroup.async_run_method_batch": "self method_name **kwargs",
    "openrlhf.trainer.ray.launcher:RayActorGroup.async_save_model": "self",
    "openrlhf.trainer.ray.launcher:ReferenceModelActor.forward": (
        "self sequences action_mask attention_mask return_output packed_seq_lens mm_train_inputs_list"
    ),
    "openrlhf.trainer.ray.launcher:ReferenceModelActor.init_model_from_pretrained": "self strategy pretrain",
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer._init_vllm_sync_group": "self backend",
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.broadcast_to_vllm": "self",
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.ppo_train": "self kl_ctl",
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step": "self experience kl_ctl step loss_batch_info",
    "openrlhf.trainer.ray.ppo_actor:PolicyModelActor.forward": (
        "self sequences action_mask attention_mask packed_seq_lens mm_train_inputs_list"
    ),
    "openrlhf.trainer.ray.ppo_actor:PolicyModelActor.init_model_from_pretrained": (
        "self strategy pretrain max_steps vllm_engines"
    ),
    "openrlhf.trainer.ray.ppo_actor:PolicyModelActor.save_checkpoint": (
        "self tag client_states metric_value metric_key"
    ),
    "openrlhf.trainer.ray.ppo_critic:CriticModelActor.init_model_from_pretrained": "self strategy pretrain max_steps",
    "openrlhf.trainer.ray.ppo_critic:CriticModelActor.save_checkpoint": "self tag metric_value metric_key",
    "openrlhf.trainer.ray.vllm_engine:RolloutRayActor.generate": (
        "self prompt_token_ids sampling_params multi_modal_data"
    ),
    "openrlhf.trainer.ray.vllm_engine:RolloutRayActor.generate_responses": (
        "self prompt label sampling_params max_length hf_tokenizer num_samples images"
    ),
    "openrlhf.trainer.ray.vllm_engine:batch_vllm_engine_call": "engines method_name *args rank_0_only **kwargs",
    "openrlhf.trainer.ray.vllm_engine:create_vllm_engines": (
        "num_engines tensor_parallel_size pretrain seed full_determinism enable_prefix_caching enforce_eager "
        "max_model_len shared_pg gpu_memory_utilization vllm_enable_sleep logprobs_mode agent_func_path remote_rm_url "
        "max_images_per_prompt"
    ),
    "openrlhf.trainer.ray.vllm_worker_wrap:WorkerWrap.init_process_group": (
        "self master_address master_port rank_offset world_size group_name backend use_ray"
    ),
    "openrlhf.trainer.ray.vllm_worker_wrap:WorkerWrap.update_weight": "self name dtype shape empty_cache",
    "openrlhf.utils.agent:AgentExecutorBase.execute": (
        "self prompt label sampling_params max_length hf_tokenizer llm_engine images"
    ),
    "openrlhf.utils.deepspeed:DeepspeedStrategy.all_reduce": "self data op",
    "openrlhf.utils.deepspeed:DeepspeedStrategy.get_ds_train_config": "self optim_dict max_norm",
    "openrlhf.utils.deepspeed:DeepspeedStrategy.get_ds_eval_config": "self offload",
    "openrlhf.utils.deepspeed:DeepspeedStrategy.load_ckpt": (
        "self model load_dir tag load_module_strict load_optimizer_states load_lr_scheduler_states load_module_only"
    ),
    "openrlhf.utils.deepspeed:DeepspeedStrategy.moving_average": "self model model_ema beta device",
    "openrlhf.utils.deepspeed:DeepspeedStrategy.prepare": "self *args",
    "openrlhf.utils.deepspeed:DeepspeedStrategy.save_ckpt": (
        "self model save_dir tag max_num max_mem client_state save_latest metric_value metric_key"
    ),
    "openrlhf.utils.deepspeed:DeepspeedStrategy.save_model": "self model tokenizer output_dir **kwargs",
    "openrlhf.utils.deepspeed:DeepspeedStrategy.setup_dataloader": (
        "self replay_buffer batch_size pin_memory shuffle collate_fn drop_last sampler consumed_samples num_workers"
    ),
    "openrlhf.utils.deepspeed:DeepspeedStrategy.setup_distributed": "self timeout",
    "openrlhf.utils.distributed_util:stateless_init_process_group": (
        "master_address master_port rank world_size device"
    ),
    "openrlhf.utils.vlm_utils:merge_mm_train_inputs": "mm_train_inputs_list device",
    "openrlhf.utils:get_strategy": "args",
    "openrlhf.utils:get_tokenizer": "pretrain model padding_side strategy use_fast",
}
EXPERIENCE = (
    "sequences attention_mask action_mask action_log_probs base_action_log_probs rollout_log_probs values returns "
    "advantages kl rewards scores response_length truncated total_length index prompts labels images mm_train_inputs "
    "info"
)


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


@pytest.mark.parametrize("module", NAMESPACES)
def test_the_name_is_a_global_of_its_module(module: str) -> None:
    assert set(NAMESPACES[module]) <= vars(importlib.import_module(module)).keys()


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
