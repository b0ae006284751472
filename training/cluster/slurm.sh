#!/bin/bash
# Trains on 2 nodes with 8 GPUs each: `sbatch training/cluster/slurm.sh --config training/configs/kl-f8.yaml ...`, from
# the folder that holds training/, with the flags of training/train_vae.py. Ten minutes before its time is over the run is
# saved and the job put into the queue again, until the run is finished; not after an error. docs/scale.md says what to
# change.
#SBATCH --job-name=vae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# of the job, so that two jobs on a node stay apart; where TMPDIR is memory or small, name another disk of the node
export NODE_DISK=${NODE_DISK:-${TMPDIR:-/tmp}/vae-$SLURM_JOB_ID}
export NODES=$SLURM_JOB_NUM_NODES PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
MAIN_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_HOST MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000))

asked= step=
stop() {
    asked=1
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true # srun passes it on to node.sh, on every node
}
trap stop USR1 TERM

srun --kill-on-bad-exit=1 bash training/cluster/node.sh "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended the wait, not srun
    code=0
    wait "$step" || code=$?
done
if [ -n "$asked" ] && [ "$code" != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
