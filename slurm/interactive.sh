#!/bin/bash
# The same run in an interactive allocation: its output's end is this command's end. salloc's options first,
# then `--`, then the overrides.
#
#     slurm/interactive.sh --nodes=2 --cpus-per-task=2 -- +experiment=pretrain_tiny cluster.processes_per_node=2
set -euo pipefail

options=()
while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
(($# > 1)) || {
    printf 'usage: slurm/interactive.sh [SALLOC OPTIONS] -- OVERRIDE…\n' >&2
    exit 2
}
shift

HPCDL_PYTHON=${HPCDL_PYTHON:-python3}
template=$("$HPCDL_PYTHON" -m hpcdl.launch.template)
export HPCDL_PYTHON
exec salloc --job-name=hpcdl-interactive --ntasks-per-node=1 "${options[@]}" bash "$template" "$@"
