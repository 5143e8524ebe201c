#!/bin/sh
# Everything that needs a GPU, on a machine with one: the tests, then for how long a save stops training.
#
#   tests/gpu/run.sh [--wheels DIR] [--out DIR] [--limit SECONDS] [--dry-run]
#
# --wheels DIR   wheels of what the machine's Python may lack (tests/gpu/wheels.sh gathers them); only what is missing
#                is installed, into a folder of its own. Also: WHEELS=DIR
# --out DIR      where gpu.txt, gpu.json and gpu.log go. Also: OUT=DIR. Default: runs/gpu
# --limit N      seconds in all (default 470); each part has a limit of its own, too
# --dry-run      the same on the CPU with tiny sizes: does this script itself work?
# PYTHON is the Python to run with. Ends with 0 where every part has passed.
set -eu
cd "$(dirname "$0")/../.."
: "${PYTHON:=python3}" "${WHEELS:=}" "${OUT:=runs/gpu}"
limit=470 dry=
while [ $# -gt 0 ]; do
    case $1 in
        --wheels) WHEELS=$2; shift 2 ;;
        --out) OUT=$2; shift 2 ;;
        --limit) limit=$2; shift 2 ;;
        --dry-run) dry=--dry-run; shift ;;
        *) echo "$0: $1 is not known; see its first lines" >&2; exit 2 ;;
    esac
done
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "$WHEELS" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    missing=$("$PYTHON" tests/gpu/missing.py "$WHEELS")
    if [ -n "$missing" ]; then
        echo "$missing" | xargs "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site"
    fi
    PYTHONPATH=$PYTHONPATH:$site
fi
# Kernels of cuBLAS that give the same bits each time; NCCL without a network; no compiling in threads of its own.
export PYTHONPATH PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 NCCL_SOCKET_IFNAME=lo TORCHINDUCTOR_COMPILE_THREADS=1
status=0
"$PYTHON" -m tests.gpu.parts --out "$OUT" --limit "$limit" $dry || status=$?
exit $status
