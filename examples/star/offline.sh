#!/usr/bin/env bash
# From STAR's human dialogues to an expert and a responder, without a rollout: logs, warm start, offline GOPO, and how
# well the models agree with dialogues and tasks that were held out. CPU, or one GPU.
# usage: offline.sh STAR_FOLDER   (a clone of the STAR repository)
# Settings, as environment variables: OUT (results), PYTHON, SEED; MODEL (a chat model to start from; default: a small
# untrained one is built, of HIDDEN and LAYERS); WARM and WARM_LR (imitation), EPOCHS and LR (offline GOPO); EVERY (n:
# every n-th dialogue of each part only); MICRO (dialogues that are back-propagated at once).
set -euo pipefail
DATA=$(realpath "${1:?usage: offline.sh STAR_FOLDER}")
OUT=${OUT:-runs/star_offline}
PYTHON=${PYTHON:-python}
SEED=${SEED:-0}
WARM=${WARM:-4}
WARM_LR=${WARM_LR:-2e-3}
EPOCHS=${EPOCHS:-2}
LR=${LR:-3e-4}
MODEL=${MODEL:-}
EVERY=${EVERY:-1}
MICRO=${MICRO:-8}
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$OUT"

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# $1: role; $2: model; the rest: further flags.
warm_start() {
    "$PYTHON" -m openrlhf_gopo.platform openrlhf.cli.train_sft \
        --model.model_name_or_path "$2" --data.dataset "$OUT/demos/$1.jsonl" --ckpt.output_dir "$OUT/warm_$1" \
        --data.input_key messages --data.multiturn --data.apply_chat_template --data.max_len 2048 \
        --train.batch_size 8 --train.micro_batch_size "$MICRO" \
        --train.max_epochs "$WARM" --train.seed "$SEED" --adam.lr "$WARM_LR" "${@:3}"
}

# $1: role; the rest: further flags.
learn() {
    "$PYTHON" -m openrlhf.cli.train_gopo_offline \
        --gopo.env star --gopo.data "$DATA" --gopo.names_only --gopo.offline.role "$1" \
        --model.model_name_or_path "$OUT/warm_$1" \
        --data.dataset "$OUT/logs/train.jsonl" \
        --eval.dataset "$OUT/logs/dialogues.jsonl,$OUT/logs/tasks.jsonl" \
        --data.max_len 2048 --train.batch_size 32 --train.micro_batch_size "$MICRO" \
        --train.max_epochs "$EPOCHS" --train.seed "$SEED" \
        --ckpt.output_dir "$OUT/$1" --ckpt.path "$OUT/checkpoints_$1" "${@:2}"
}

say "1/4 the human dialogues as logs, whole tasks and some dialogues held out"
"$PYTHON" -m openrlhf_gopo.cli.logs convert star "$DATA" --played --out "$OUT/played.jsonl"
"$PYTHON" examples/star/split.py "$OUT/played.jsonl" "$OUT/logs"
sed -i -n "1~${EVERY}p" "$OUT"/logs/*.jsonl

say "2/4 the model to start from, and demonstrations for it"
if [[ -z $MODEL ]]; then
    MODEL=$OUT/untrained
    "$PYTHON" examples/quickstart/build_model.py --env star --data "$DATA" --seed "$SEED" --max_len 3072 \
        --hidden "${HIDDEN:-192}" --layers "${LAYERS:-3}" --out "$MODEL"
fi
"$PYTHON" -m openrlhf_gopo.cli.export_sft --env star --data "$DATA" --tokenizer "$MODEL" --names_only \
    --logs "$OUT/logs/train.jsonl" --out "$OUT/demos"

say "3/4 warm start of both roles (OpenRLHF's train_sft)"
warm_start expert "$MODEL"
warm_start responder "$MODEL"

say "4/4 offline GOPO: the expert from preferences, the responder from the better dialogues"
learn expert --adam.lr "$LR" --gopo.offline.sft_coef 0.2 --gopo.pref.weights mean
learn responder --adam.lr "$LR"
say "tables: $OUT/expert/results/heldout.md, $OUT/responder/results/heldout.md"
