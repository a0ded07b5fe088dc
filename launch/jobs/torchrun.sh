#!/bin/bash
# Trains with torchrun: run this same file on every host (here @NODES@), in any order. Their agents meet, number the
# ranks and watch them: when one fails all start again, and go on from the newest checkpoint. Every host has to see
# the folders of Python, the configuration, the data and the run.
#
#     bash THIS_FILE

set -euo pipefail
cd @WORKDIR@

PYTHON=@PYTHON@

options=(
    --nnodes=@NODES@
    --nproc-per-node=@RANKS_PER_NODE@
    --max-restarts=3
    --rdzv-id=@NAME@
    # The agents meet on the first host, which all of them have to reach under this name (port 0: any, on one host).
    --rdzv-backend=c10d
    --rdzv-endpoint=@FIRST_HOST@:@PORT@
)

exec "$PYTHON" -m torch.distributed.run "${options[@]}" -m wastenot.launch.train @ARGUMENTS@
