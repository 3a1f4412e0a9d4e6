#!/bin/bash
# One node's part of a run; the launch files start it on every node, in the project's folder:
#
#   scripts/launch/train_and_evaluate.sh RECIPE [--output DIR] [section.key=value ...]
#
# A new run begins with a dry run. Then train.py trains, or goes on, to the end, and eval.py writes the row eval.json
# into the run folder. PROCESSES is the number of processes of this node (default: its GPUs); torchrun reads its other
# options from the environment: PET_NNODES, PET_RDZV_BACKEND, PET_RDZV_ENDPOINT, PET_RDZV_ID, PET_MAX_RESTARTS.
# After a signal the file `requeue` in the run folder says that the same command goes on.
set -u
recipe=$1
folder=$("$(dirname "$0")/run_folder.sh" "$@")

# torchrun waits this long for step and save before it kills. (torch 2.11 ignores it: 30 s.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
# Without it a surviving torchrun (2.14) does not tell a node that comes back where the store is.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# A signal goes on to torchrun, once: `set -m` gives it a process group of its own, so that neither a terminal nor Slurm,
# which signal whole groups, sends it too. Bash runs a trap only while it waits for a background process.
set -m
child=
stopped=
for name in USR1 TERM INT HUP QUIT; do
    # shellcheck disable=SC2064
    trap "stopped=yes; [ -n \"\$child\" ] && kill -$name \"\$child\" 2>/dev/null" "$name"
done

under_torchrun() {
    torchrun --nproc_per_node="${PROCESSES:-gpu}" --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" # a signal ends the wait, not torchrun
    done
    wait "$child"
    code=$?
    if [ -n "$stopped" ] && [ ! -e "$folder/eval.json" ]; then
        mkdir -p "$folder" && touch "$folder/requeue"
        exit 1
    fi
    [ "$code" -eq 0 ] || exit "$code"
}

# The next port, so that the processes of one torchrun never meet those of the one before.
other_port=()
if [ -n "${PET_RDZV_ENDPOINT:-}" ]; then
    other_port=(--rdzv_endpoint="${PET_RDZV_ENDPOINT%:*}:$((${PET_RDZV_ENDPOINT##*:} + 1))")
fi

# A wrong key or path, or a batch that does not fit, ends here: training would be started --max_restarts times again.
if [ ! -e "$folder/config.yaml" ]; then
    under_torchrun --max_restarts=0 ${other_port[@]+"${other_port[@]}"} train.py --dry-run --config "$@"
fi
under_torchrun train.py --config "$recipe" --resume auto "${@:2}"
if [ ! -e "$folder/eval.json" ]; then
    under_torchrun --max_restarts=0 ${other_port[@]+"${other_port[@]}"} eval.py --checkpoint "$folder"
fi
