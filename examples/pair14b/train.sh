#!/usr/bin/env bash
# A 14B expert and a 14B responder, from chat models to a trained pair on one node of 8 GPUs: demonstrations, a warm start
# of each role, GOPO. README.md beside this file.
set -euo pipefail

MODEL=${MODEL:-Qwen/Qwen2.5-14B-Instruct}
export OUT=${OUT:-runs/pair14b}
here=$(dirname "${BASH_SOURCE[0]}")
gopo="$here/../node8_colocated/train.sh"

# A dry run checks the last step, with the models that the first two start from.
case " $* " in *" --gopo.dry_run "*)
    RESPONDER_MODEL=$MODEL EXPERT_MODEL=$MODEL exec bash "$gopo" --gopo.gpu_memory_gb 80 "$@" ;;
esac

# Dialogues of an imperfect script, in the prompts of the rollout.
python3 -m openrlhf_gopo.cli.export_sft \
   --env shop \
   --tokenizer "$MODEL" \
   --dialogues 4000 \
   --skill 0.7 \
   --out "$OUT/sft"

# The expert must learn the labels; a chat model already writes replies, so the responder gets one short pass.
for role in expert responder; do
   deepspeed --module openrlhf.cli.train_sft \
      --model.model_name_or_path "$MODEL" \
      --data.dataset "$OUT/sft/$role.jsonl" \
      --data.input_key messages \
      --data.multiturn \
      --data.apply_chat_template \
      --data.max_len 4096 \
      --data.max_samples "$([[ $role == expert ]] && echo 4000 || echo 1000)" \
      --train.batch_size 64 \
      --train.micro_batch_size 2 \
      --train.max_epochs 1 \
      --ds.zero_stage 3 \
      --ds.packing_samples \
      --ds.attn_implementation flash_attention_2 \
      --model.gradient_checkpointing_enable \
      --adam.lr 5e-6 \
      --ckpt.output_dir "$OUT/warm_$role"
done

RESPONDER_MODEL=$OUT/warm_responder EXPERT_MODEL=$OUT/warm_expert bash "$gopo" --gopo.gpu_memory_gb 80 "$@"
