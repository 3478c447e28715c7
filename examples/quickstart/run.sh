#!/usr/bin/env bash
# From nothing to a trained two-level policy on a laptop without a GPU: installs, builds a small model, warm-starts it on
# imperfect demonstrations with OpenRLHF's train_sft, trains GOPO on `shop`, and evaluates held-out goals before and after.
# Settings, as environment variables: OUT (results), VENV, SEED, STEPS (GOPO updates; 0: the warm start alone).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${OUT:-runs/quickstart}
VENV=${VENV:-.venv}
SEED=${SEED:-0}
STEPS=${STEPS:-16}
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
began=$SECONDS
trap 'jobs -p | xargs -r kill 2>/dev/null || true' EXIT

say() { printf '\n\033[1m[%3d s] %s\033[0m\n' $((SECONDS - began)) "$*"; }

# $1: log name; the rest: a command. Its output goes to the log, the progress bar of the last line to the screen.
logged() {
    local log="$OUT/$1.log"
    shift
    "$@" >"$log" 2>&1 || { tail -n 30 "$log"; echo "failed; the whole log: $log"; exit 1; }
}

# $1: name; $2: model; $3: data; the rest: further flags.
warm_start() {
    logged "$1" "$VENV/bin/python" -m openrlhf_gopo.platform openrlhf.cli.train_sft \
        --model.model_name_or_path "$2" --data.dataset "$3" --ckpt.output_dir "$OUT/$1" \
        --data.input_key messages --data.multiturn --data.apply_chat_template --data.max_len 1280 \
        --train.max_epochs 1 --train.seed "$SEED" "${@:4}"
}

say "1/5 install into $VENV"
logged install bash examples/quickstart/install.sh "$VENV"

say "2/5 build an untrained model of 2.6 M parameters and 4800 demonstrations of an imperfect script"
logged model "$VENV/bin/python" examples/quickstart/build_model.py \
    --env shop --hidden 256 --layers 3 --copies 6400 --seed "$SEED" --out "$OUT/untrained"
logged demonstrations "$VENV/bin/python" -m openrlhf_gopo.cli.export_sft --env shop --tokenizer "$OUT/untrained" \
    --dialogues 4800 --skill 0.7 --slip 0 --names_only --repeats 12 --seed "$SEED" --out "$OUT/demos"

say "3/5 warm start of the expert on its choices (OpenRLHF's train_sft; progress in $OUT/warm_*.log)
4/5 beside it, warm start of the responder: copying tokens, single replies, whole dialogues"
export OMP_NUM_THREADS=$((($(nproc) + 1) / 2)) # half of the cores each, as they run side by side
warm_start warm_expert "$OUT/untrained" "$OUT/demos/expert.jsonl" \
    --train.batch_size 8 --train.micro_batch_size 4 --adam.lr 1e-3 --data.max_samples 2400 &
expert=$!
warm_start warm_copies "$OUT/untrained" "$OUT/untrained/copies.jsonl" \
    --train.batch_size 32 --train.micro_batch_size 32 --adam.lr 2e-3
warm_start warm_replies "$OUT/warm_copies" "$OUT/demos/replies.jsonl" \
    --train.batch_size 16 --train.micro_batch_size 16 --adam.lr 2e-3 --data.max_samples 16000
warm_start warm_responder "$OUT/warm_replies" "$OUT/demos/responder.jsonl" \
    --train.batch_size 8 --train.micro_batch_size 4 --adam.lr 1e-3 --data.max_samples 1000
wait "$expert"
unset OMP_NUM_THREADS
touch "$OUT/warmed"
if [[ "$STEPS" == 0 ]]; then exit 0; fi

say "5/5 GOPO: expert and responder learn from $STEPS x 64 dialogues"
"$VENV/bin/python" -m openrlhf.cli.train_gopo \
    --gopo.env shop \
    --gopo.names_only \
    --gopo.common_random_numbers \
    --gopo.reply_max_tokens 32 \
    --gopo.expert_credit group=1,q=1 \
    --gopo.expert_steps 16 \
    --gopo.expert_passes 2 \
    --gopo.credit turn \
    --actor.model_name_or_path "$OUT/warm_responder" \
    --expert.model_name_or_path "$OUT/warm_expert" \
    --actor.adam.lr 1e-4 \
    --expert.adam.lr 3e-4 \
    --actor.lr_warmup_ratio 0 \
    --algo.advantage.estimator group_norm \
    --rollout.batch_size 8 \
    --rollout.n_samples_per_prompt 8 \
    --rollout.micro_batch_size 2 \
    --train.batch_size 32 \
    --train.micro_batch_size 2 \
    --train.seed "$SEED" \
    --data.max_samples $((8 * STEPS)) \
    --data.max_len 1280 \
    --vllm.enable_prefix_caching \
    --eval.steps 4 \
    --eval.temperature 1.0 \
    --eval.n_samples_per_prompt 1 \
    --gopo.eval_goals 200 \
    --ckpt.path "$OUT/checkpoints" \
    --ckpt.output_dir "$OUT" \
    "$@"
say "done; open $OUT/results/transcripts.html"
