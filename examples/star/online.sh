#!/usr/bin/env bash
# After offline.sh: its expert and responder go on learning from dialogues of their own, with STAR's users replayed, and
# every stage is evaluated on the same held-out goals. README: OFFLINE.md beside this file.
# usage: online.sh STAR_FOLDER [further flags of train_gopo]
# Settings, as environment variables: OUT (of offline.sh), PYTHON, SEED, STEPS (updates), GOALS (held out, evaluated).
set -euo pipefail
DATA=$(realpath "${1:?usage: online.sh STAR_FOLDER [FLAGS]}")
OUT=${OUT:-runs/star_offline}
PYTHON=${PYTHON:-python}
SEED=${SEED:-0}
STEPS=${STEPS:-16}
GOALS=${GOALS:-200}
shift
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1/2 online GOPO, $STEPS updates of 64 dialogues"
"$PYTHON" -m openrlhf.cli.train_gopo \
    --gopo.env star --gopo.data "$DATA" --gopo.names_only --gopo.common_random_numbers \
    --gopo.reply_max_tokens 48 --gopo.expert_reward tse=1,esndcg=1 --gopo.expert_credit group=1,q=1 \
    --expert.model_name_or_path "$OUT/expert" --actor.model_name_or_path "$OUT/responder" \
    --expert.adam.lr 3e-4 --actor.adam.lr 1e-4 --actor.lr_warmup_ratio 0 \
    --algo.advantage.estimator group_norm \
    --rollout.batch_size 8 --rollout.n_samples_per_prompt 8 --rollout.micro_batch_size 4 \
    --train.batch_size 32 --train.micro_batch_size 4 --train.seed "$SEED" \
    --data.max_samples $((8 * STEPS)) --data.max_len 3072 \
    --vllm.enable_prefix_caching --eval.steps -1 \
    --ckpt.path "$OUT/checkpoints_online" --ckpt.output_dir "$OUT/online" "$@"

say "2/2 every stage on the same $GOALS held-out goals"
"$PYTHON" -m openrlhf.cli.eval_gopo \
    --gopo.env star --gopo.data "$DATA" --gopo.names_only --gopo.reply_max_tokens 48 --data.max_len 3072 \
    --gopo.eval_goals "$GOALS" --vllm.enable_prefix_caching --out "$OUT/evaluation" \
    --policy "warm=pair:$OUT/warm_expert,$OUT/warm_responder" \
    --policy "offline=pair:$OUT/expert,$OUT/responder" \
    --policy "offline_expert=pair:$OUT/expert,$OUT/warm_responder" \
    --policy "online=pair:$OUT/online/expert,$OUT/online/responder" \
    --policy random --policy human
say "table: $OUT/evaluation/table.md"
