#!/usr/bin/env bash
# GOPO on the environment `shop` on a machine without a GPU. README.md beside this file.
set -x

MODEL=${MODEL:?a warm-started responder, such as runs/quickstart/warm_responder of examples/quickstart}
EXPERT_MODEL=${EXPERT_MODEL:-$MODEL}
OUT=${OUT:-runs/shop_cpu}

python3 -m openrlhf.cli.train_gopo \
   --gopo.env shop \
   --gopo.names_only \
   --gopo.reply_max_tokens 32 \
   --gopo.expert_reward tse=1,esndcg=1 \
   --gopo.expert_credit group=1,q=1 \
   --gopo.responder_reward tse=0.5,gre=1 \
   --gopo.eval_goals 160 \
   --actor.model_name_or_path "$MODEL" \
   --expert.model_name_or_path "$EXPERT_MODEL" \
   --actor.adam.lr 1e-4 \
   --actor.lr_warmup_ratio 0 \
   --expert.adam.lr 3e-4 \
   --algo.advantage.estimator group_norm \
   --algo.kl.init_coef 0.01 \
   --rollout.batch_size 8 \
   --rollout.n_samples_per_prompt 8 \
   --rollout.micro_batch_size 8 \
   --train.batch_size 32 \
   --train.micro_batch_size 8 \
   --train.num_episodes 1 \
   --data.max_samples 800 \
   --data.max_len 1280 \
   --vllm.num_engines 1 \
   --vllm.enable_prefix_caching \
   --vllm.enforce_eager \
   --eval.steps 25 \
   --eval.n_samples_per_prompt 1 \
   --eval.temperature 1.0 \
   --ckpt.save_steps 50 \
   --ckpt.max_num 2 \
   --ckpt.path "$OUT/ckpt" \
   --ckpt.output_dir "$OUT" \
   --logger.tensorboard_dir "$OUT/tensorboard" \
   "$@"
