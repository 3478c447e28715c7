#!/usr/bin/env bash
# GOPO on STAR's human task dialogues on a machine without a GPU. README.md beside this file.
set -x

DATA=${DATA:?a clone of the STAR repository: the folder with tasks/, apis/ and dialogues}
MODEL=${MODEL:?a chat model that was warm-started on STAR, see README.md}
OUT=${OUT:-runs/star_cpu}

python3 -m openrlhf.cli.train_gopo \
   --gopo.env star \
   --gopo.data "$DATA" \
   --gopo.reply_max_tokens 48 \
   --gopo.expert_reward tse=1 \
   --gopo.responder_reward tse=0.5,gre=1 \
   --gopo.eval_goals 100 \
   --actor.model_name_or_path "$MODEL" \
   --actor.adam.lr 1e-4 \
   --actor.lr_warmup_ratio 0 \
   --expert.adam.lr 5e-4 \
   --algo.advantage.estimator group_norm \
   --algo.kl.init_coef 0.01 \
   --rollout.batch_size 8 \
   --rollout.n_samples_per_prompt 8 \
   --rollout.micro_batch_size 4 \
   --train.batch_size 32 \
   --train.micro_batch_size 4 \
   --train.num_episodes 1 \
   --data.max_len 2048 \
   --vllm.num_engines 1 \
   --vllm.enable_prefix_caching \
   --vllm.enforce_eager \
   --eval.steps 24 \
   --eval.n_samples_per_prompt 1 \
   --eval.temperature 1.0 \
   --ckpt.save_steps 24 \
   --ckpt.max_num 2 \
   --ckpt.path "$OUT/ckpt" \
   --ckpt.output_dir "$OUT" \
   --logger.tensorboard_dir "$OUT/tensorboard" \
   "$@"
