#!/bin/bash
# One run on two machines (or N) without a scheduler. The same line on each of them, at about the same time:
#
#   NODE0=10.0.0.1 scripts/launch/two_nodes.sh RECIPE [--output DIR] [section.key=value ...]
#
# NODE0 is the address of the first machine, as the others reach it; project and --output are on a shared disk.
# NODES (2), PROCESSES a node (gpu: as many as GPUs) and PORT (29500) can be set too: PROCESSES=4 on two nodes for the
# recipes of 8 processes, whose batch norm sees an eighth of a batch. A run that was stopped, or a
# machine that went away and came back, goes on with the same line. docs/clusters.md explains it.
set -eu
if [ $# -eq 0 ] || [ -z "${NODE0:-}" ]; then
    echo "usage: NODE0=ADDRESS two_nodes.sh RECIPE [--output DIR] [section.key=value ...]" >&2
    exit 2
fi
recipe=$1
shift
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}" # seconds for step and save
# Without it a surviving torchrun (2.14) does not tell a machine that comes back where the store is.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# A wrong key or path ends here: torchrun would start it --max_restarts times again.
python train.py --check --config "$recipe" --resume auto "$@"
exec torchrun \
    --nnodes="${NODES:-2}" --nproc_per_node="${PROCESSES:-gpu}" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_endpoint="$NODE0:${PORT:-29500}" --rdzv_id="$(basename "$recipe" .yaml)" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    train.py --config "$recipe" --resume auto "$@"
