#!/usr/bin/env bash
# Two 7B policies on one node of 8 GPUs: four play while four learn. README.md beside this file.
set -x

RESPONDER_MODEL=${RESPONDER_MODEL:-Qwen/Qwen2.5-7B-Instruct}
EXPERT_MODEL=${EXPERT_MODEL:-Qwen/Qwen2.5-7B-Instruct}
OUT=${OUT:-runs/async_partial}

python3 -m openrlhf.cli.train_gopo \
   --gopo.env shop \
   --gopo.reply_max_tokens 128 \
   --gopo.expert_reward tse=1 \
   --gopo.responder_reward tse=0.5,gre=1 \
   --gopo.eval_goals 256 \
   --gopo.version_switch turn \
   --gopo.gpu_memory_gb 80 \
   --train.async_enable \
   --train.partial_rollout_enable \
   --train.async_queue_size 1 \
   --algo.advantage.is_correction_level token \
   --actor.model_name_or_path "$RESPONDER_MODEL" \
   --expert.model_name_or_path "$EXPERT_MODEL" \
   --actor.num_nodes 1 \
   --actor.num_gpus_per_node 2 \
   --ref.num_nodes 1 \
   --ref.num_gpus_per_node 2 \
   --ref.offload \
   --train.colocate_actor_ref \
   --vllm.num_engines 2 \
   --vllm.tensor_parallel_size 1 \
   --vllm.gpu_memory_utilization 0.9 \
   --vllm.enable_prefix_caching \
   --vllm.sync_backend nccl \
   --ds.zero_stage 3 \
   --ds.packing_samples \
   --ds.attn_implementation flash_attention_2 \
   --actor.gradient_checkpointing_enable \
   --actor.adam.lr 5e-7 \
   --expert.adam.lr 1e-6 \
   --algo.advantage.estimator reinforce_baseline \
   --algo.kl.init_coef 1e-3 \
   --rollout.batch_size 64 \
   --rollout.n_samples_per_prompt 8 \
   --rollout.micro_batch_size 8 \
   --train.batch_size 256 \
   --train.micro_batch_size 4 \
   --train.num_episodes 2 \
   --data.max_len 4096 \
   --eval.steps 20 \
   --eval.n_samples_per_prompt 1 \
   --eval.temperature 1.0 \
   --ckpt.save_steps 20 \
   --ckpt.max_num 2 \
   --ckpt.path "$OUT/ckpt" \
   --ckpt.output_dir "$OUT" \
   --logger.tensorboard_dir "$OUT/tensorboard" \
   "$@"
