#!/usr/bin/env bash
# Two LoRA policies on one GPU of 24 GB. README.md beside this file.
set -x

RESPONDER_MODEL=${RESPONDER_MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
EXPERT_MODEL=${EXPERT_MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
OUT=${OUT:-runs/gpu24_lora}

python3 -m openrlhf.cli.train_gopo \
   --gopo.env shop \
   --gopo.reply_max_tokens 96 \
   --gopo.expert_reward tse=1,esndcg=1 \
   --gopo.expert_credit group=1,q=1 \
   --gopo.responder_reward tse=0.5,gre=1 \
   --gopo.common_random_numbers \
   --gopo.eval_goals 128 \
   --gopo.gpu_memory_gb 24 \
   --actor.model_name_or_path "$RESPONDER_MODEL" \
   --expert.model_name_or_path "$EXPERT_MODEL" \
   --actor.num_nodes 1 \
   --actor.num_gpus_per_node 1 \
   --ref.num_nodes 1 \
   --ref.num_gpus_per_node 1 \
   --ref.offload \
   --train.colocate_all \
   --vllm.num_engines 1 \
   --vllm.tensor_parallel_size 1 \
   --vllm.gpu_memory_utilization 0.22 \
   --vllm.enable_prefix_caching \
   --vllm.enable_sleep \
   --vllm.sync_backend nccl \
   --ds.enable_sleep \
   --ds.zero_stage 2 \
   --ds.lora.rank 32 \
   --ds.lora.alpha 64 \
   --ds.packing_samples \
   --ds.attn_implementation flash_attention_2 \
   --actor.gradient_checkpointing_enable \
   --actor.adam.lr 2e-5 \
   --expert.adam.lr 5e-5 \
   --algo.advantage.estimator group_norm \
   --algo.kl.init_coef 1e-3 \
   --rollout.batch_size 16 \
   --rollout.n_samples_per_prompt 8 \
   --rollout.micro_batch_size 4 \
   --train.batch_size 64 \
   --train.micro_batch_size 2 \
   --train.num_episodes 1 \
   --data.max_samples 4096 \
   --data.max_len 3072 \
   --eval.steps 16 \
   --eval.n_samples_per_prompt 1 \
   --eval.temperature 1.0 \
   --ckpt.save_steps 32 \
   --ckpt.max_num 2 \
   --ckpt.path "$OUT/ckpt" \
   --ckpt.output_dir "$OUT" \
   --logger.tensorboard_dir "$OUT/tensorboard" \
   "$@"
