#!/bin/sh
# Trains on 2 processes. Kill it anywhere and run it again: it resumes.
#
#     ACCELERATE_USE_CPU=true sh examples/trainer_ddp.sh [--output-dir DIR] [--max-steps N]
#
# PROCESSES sets another number. Without ACCELERATE_USE_CPU, each process uses a GPU.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m accelerate.commands.launch \
    --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0 \
    --num_processes "${PROCESSES:-2}" "$here/trainer_ddp.py" "$@"
