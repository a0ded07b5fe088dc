#!/bin/bash
# Trains with MPICH or Intel MPI. mpiexec starts the ranks (on other hosts through ssh, which must not ask for a
# password), and they agree through MPI on an address that all of them reach; mpi4py is needed for that. Every host
# has to see the folders of Python, the configuration, the data and the run.
#
#     bash THIS_FILE

set -euo pipefail
cd @WORKDIR@

PYTHON=@PYTHON@
# An mpiexec that came with pip stands beside Python.
PATH=$(dirname "$PYTHON"):$PATH

options=(
    -n @RANKS@
    -ppn @RANKS_PER_NODE@
    -hosts @HOSTS@
)
# Intel's would bind ranks to cores; the ranks of a host share its cores out among themselves.
export I_MPI_PIN=off
# mpi4py takes the first MPI that it finds: let it be the one of this mpiexec.
library=$(dirname "$(dirname "$(command -v mpiexec)")")/lib/libmpi.so.12
if [ -e "$library" ]; then
    export MPI4PY_LIBMPI=${MPI4PY_LIBMPI:-$library}
fi

# To name the meeting point yourself, set MASTER_ADDR and MASTER_PORT: mpiexec hands them on.
exec mpiexec "${options[@]}" "$PYTHON" -m wastenot.launch.train @ARGUMENTS@
