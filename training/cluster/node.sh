#!/bin/bash
# One node's part of a training run, started once on every node by slurm.sh or kubernetes.yaml: copies the images to the
# node's disk, starts `accelerate launch`, and sees to it that the run is saved when the cluster wants the node back.
# The arguments are those of training/train_vae.py. Ends with 75 if it was asked to stop: start it again to go on.
#
# Environment, the same on all nodes:
#   NODES, PROCESSES_PER_NODE   how many there are; a process for each GPU
#   MAIN_HOST, MAIN_PORT        where the first node can be reached by the others
#   NODE_DISK                   a folder on the node's own disk, for images and caches; kept, it is used again
#   ARCHIVES                    a folder of .tar or .zip files on shared storage: read from NODE_DISK, if it is set
set -euo pipefail
: "${NODES:?}" "${PROCESSES_PER_NODE:?}" "${MAIN_HOST:?}" "${MAIN_PORT:?}" "${NODE_DISK:?}"
rank=${SLURM_NODEID:-${JOB_COMPLETION_INDEX:?number of this node, from 0}}

asked= launcher=
stop() {
    asked=1
    trap '' USR1 TERM INT # one is enough: a second would end the processes before they have saved
    [ -n "$launcher" ] || exit 75
    # to those that train, since their launcher would die of SIGUSR1, and gives them but 30 seconds after SIGTERM
    local processes
    processes=$(cat /proc/"$launcher"/task/*/children 2>/dev/null) || true
    # shellcheck disable=SC2086  # several
    kill -USR1 ${processes:-"$launcher"} 2>/dev/null || true
}
trap stop USR1 TERM INT

# of what is downloaded or compiled, unless it is said where: nodes that share such a folder wait for each other
export HF_HOME=${HF_HOME:-$NODE_DISK/huggingface}
export TORCH_HOME=${TORCH_HOME:-$NODE_DISK/torch}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$NODE_DISK/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$NODE_DISK/triton}

if [ -n "${ARCHIVES:-}" ]; then
    mkdir -p "$NODE_DISK/images"
    for archive in "$ARCHIVES"/*.tar "$ARCHIVES"/*.zip; do
        copy=$NODE_DISK/images/${archive##*/}
        [ -e "$archive" ] && [ ! -e "$copy" ] || continue
        cp "$archive" "$copy.partial" && mv "$copy.partial" "$copy" # never a part of one
    done
    set -- "$@" --data.name folder --data.root "$NODE_DISK/images"
fi

accelerate launch --config_file training/configs/accelerate/ddp.yaml \
    --num_machines "$NODES" --num_processes $((NODES * PROCESSES_PER_NODE)) --machine_rank "$rank" \
    --main_process_ip "$MAIN_HOST" --main_process_port "$MAIN_PORT" \
    training/train_vae.py "$@" &
launcher=$!
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ended the wait, not the launcher
    code=0
    wait "$launcher" || code=$?
done
[ "$code" = 0 ] || [ -z "$asked" ] || exit 75
exit "$code"
