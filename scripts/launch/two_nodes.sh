#!/bin/bash
# One run on two machines (or N) without a scheduler. The same line on each of them, at about the same time:
#
#   NODE0=10.0.0.1 scripts/launch/two_nodes.sh RECIPE [--output DIR] [section.key=value ...]
#
# NODE0 is the address of the first machine, as the others reach it; project and --output are on a shared disk.
# NODES (2), PROCESSES a node (gpu: as many as GPUs) and PORT (29500, and the next) can be set too: PROCESSES=4 on two
# nodes for the recipes of 8 processes, whose batch norm sees an eighth of a batch. A run that was stopped, or a machine
# that went away and came back, goes on with the same line. docs/clusters.md explains it.
set -eu
if [ $# -eq 0 ] || [ -z "${NODE0:-}" ]; then
    echo "usage: NODE0=ADDRESS two_nodes.sh RECIPE [--output DIR] [section.key=value ...]" >&2
    exit 2
fi
export PET_NNODES="${NODES:-2}" PET_MAX_RESTARTS=3
export PET_RDZV_BACKEND=c10d PET_RDZV_ENDPOINT="$NODE0:${PORT:-29500}" PET_RDZV_ID="$(basename "$1" .yaml)"
exec scripts/launch/train_and_evaluate.sh "$@"
