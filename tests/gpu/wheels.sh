#!/bin/sh
# Gather the wheels that run.sh may need on a machine without a network: tests/gpu/wheels.sh DIR
#
# What is pinned by constraints.txt and pure Python, and the compiled ones that are small, for Python 3.12 on Linux
# x86-64. torch and what is compiled with it is not among them: it is on the machine. Nor is datasets: the tests do not
# need it, and transformers imports one that is there, whether or not it fits. PIP is the pip to ask with.
set -eu
cd "$(dirname "$0")/../.."
[ $# = 1 ] || { echo "usage: tests/gpu/wheels.sh DIR" >&2; exit 2; }
: "${PIP:=python3 -m pip}"

PURE="accelerate fsspec huggingface_hub pytest pytest-timeout rich tqdm transformers typer"
COMPILED="isal psutil safetensors tokenizers xxhash"
# Needed by those, and not pinned: the newest will do.
BESIDE="annotated-doc anyio certifi click filelock h11 hf-xet httpcore2 httpx2 idna iniconfig markdown-it-py mdurl
    packaging pluggy pygments pyyaml regex shellingham typing-extensions"

pinned() { for name in "$@"; do sed -n "s/^\($name==[^; ]*\).*/\1/p" constraints.txt | grep . || { echo "$name: not pinned in constraints.txt" >&2; exit 1; }; done; }

mkdir -p "$1"
# shellcheck disable=SC2086
$PIP download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform linux_x86_64 \
    --dest "$1" $(pinned $PURE $COMPILED) $BESIDE
du -sh "$1"
