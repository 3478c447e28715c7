#!/usr/bin/env bash
#SBATCH --job-name=gopo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
# A Ray cluster on the nodes of one SLURM job, and a recipe submitted to it. README.md beside this file.
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
RECIPE=${RECIPE:-examples/two_nodes/train.sh}

# A dry run needs no cluster, nor SLURM.
case " $* " in *" --gopo.dry_run "*) exec bash "$RECIPE" "$@" ;; esac

mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?start this with sbatch}")
head=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a head node
dashboard=$((port + 1))
trap 'jobs -p | xargs -r kill 2>/dev/null || true' EXIT

# $1: a node; the rest: flags of `ray start`. It runs until the job ends.
ray_on() {
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" \
        ray start "${@:2}" --num-gpus "${SLURM_GPUS_ON_NODE:-8}" --block &
}

ray_on "$head" --head --node-ip-address="$head" --port="$port" \
    --dashboard-host=0.0.0.0 --dashboard-port="$dashboard"
for node in "${nodes[@]:1}"; do ray_on "$node" --address="$head:$port"; done

export RAY_DASHBOARD="http://$head:$dashboard"
for _ in $(seq 60); do
    started=$(RAY_ADDRESS="$head:$port" timeout 20 python3 -c \
        'import ray; ray.init(log_to_driver=False); print(sum(n["Alive"] for n in ray.nodes()))' 2>/dev/null | tail -n 1) || started=0
    [[ "$started" == "${#nodes[@]}" ]] && break
    sleep 5
done
[[ "$started" == "${#nodes[@]}" ]] || { echo "only $started of ${#nodes[@]} nodes joined Ray"; exit 1; }

bash "$RECIPE" "$@"
