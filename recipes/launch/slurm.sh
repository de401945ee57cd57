#!/usr/bin/env bash
# Several nodes under SLURM, for longer than a job may last: shortly before its end, or when it is pre-empted, the
# training saves its state, the job queues itself again, and goes on from there.
#
#   sbatch --nodes 4 recipes/launch/slurm.sh RUN_DIR RECIPE [options of the recipe]
#   sbatch --nodes 4 recipes/launch/slurm.sh /shared/runs/xl recipes/imagenet256_pixel.py --train.shard
#
#SBATCH --job-name=itarflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# To this script alone, five minutes before the end: time for the last step and the save.
#SBATCH --signal=B:USR1@300
set -uo pipefail

run_dir=$1 recipe=$2
shift 2
gpus=${SLURM_GPUS_ON_NODE:-8}
resume=()
if [[ -e $run_dir/recipe.json ]]; then resume=(--resume); fi
address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# To the training processes themselves, the children of the launcher: were the launcher told, it would give them thirty
# seconds and then kill them. Where that can't be done, it has to do.
stopping=false
stop() {
    stopping=true
    # shellcheck disable=SC2016
    srun --overlap --nodes="$SLURM_NNODES" --ntasks-per-node=1 bash -c '
        pkill -TERM -P "$(pgrep -d , -f "^[^ ]*python[^ ]* [^ ]*accelerate launch .*$1")"
    ' stop "$recipe" || kill -TERM "$training"
}
trap stop USR1 TERM

# SLURM_NODEID is that of each node: it is not to be expanded here.
# shellcheck disable=SC2016
srun bash -c '
    exec accelerate launch --multi_gpu --num_machines "$SLURM_NNODES" --num_processes "$1" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$2" --main_process_port 29500 --mixed_precision no "${@:3}"
' launch $((gpus * SLURM_NNODES)) "$address" "$recipe" --run-dir "$run_dir" ${resume[@]+"${resume[@]}"} "$@" &
training=$!
status=0
while kill -0 "$training" 2> /dev/null; do
    wait "$training"
    status=$?
done

if $stopping; then
    echo "Stopped by a signal; the job queues itself again and goes on with --resume."
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
