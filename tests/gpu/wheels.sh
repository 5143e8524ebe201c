#!/bin/sh
# Gather the wheels that run.sh may need on a machine without a network: tests/gpu/wheels.sh DIR
#
# What is pinned by constraints.txt and pure Python, and the compiled ones that are small, for Python 3.12 on Linux
# x86-64. torch and what is compiled with it is not among them: it is on the machine. PIP is the pip to ask with.
set -eu
cd "$(dirname "$0")/../.."
[ $# = 1 ] || { echo "usage: tests/gpu/wheels.sh DIR" >&2; exit 2; }
: "${PIP:=python3 -m pip}"

PURE="accelerate datasets execnet fsspec huggingface_hub hypothesis peft pytest pytest-timeout rich tqdm transformers typer"
COMPILED="isal psutil safetensors tokenizers xxhash"
# Needed by those, and not pinned: the newest will do.
BESIDE="annotated-doc click dill filelock iniconfig markdown-it-py mdurl multiprocess packaging pluggy pygments regex
    shellingham sortedcontainers typing-extensions"

pinned() { for name in "$@"; do sed -n "s/^\($name==[^; ]*\).*/\1/p" constraints.txt | grep . || { echo "$name: not pinned in constraints.txt" >&2; exit 1; }; done; }

mkdir -p "$1"
# shellcheck disable=SC2086
$PIP download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform linux_x86_64 \
    --dest "$1" $(pinned $PURE $COMPILED) $BESIDE
du -sh "$1"
