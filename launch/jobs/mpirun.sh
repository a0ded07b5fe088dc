#!/bin/bash
# Trains with Open MPI. mpirun starts the ranks (on other hosts through ssh, which must not ask for a password),
# and they agree through MPI on an address that all of them reach; mpi4py is needed for that. Every host has to see
# the folders of Python, the configuration, the data and the run.
#
#     bash THIS_FILE

set -euo pipefail
cd @WORKDIR@

PYTHON=@PYTHON@
# An mpirun that came with pip stands beside Python.
PATH=$(dirname "$PYTHON"):$PATH

options=(
    -n @RANKS@
    --map-by ppr:@RANKS_PER_NODE@:node
    --host "@HOSTS@"
    # The ranks of a host share its cores out among themselves.
    --bind-to none
    # More ranks than cores is slow, but allowed.
    --oversubscribe
)
if [ "$(id -u)" -eq 0 ]; then
    options+=(--allow-run-as-root)
fi

# To name the meeting point yourself, set MASTER_ADDR and MASTER_PORT and add: -x MASTER_ADDR -x MASTER_PORT
exec mpirun "${options[@]}" "$PYTHON" -m wastenot.launch.train @ARGUMENTS@
