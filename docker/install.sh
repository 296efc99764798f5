#!/bin/sh
# The images' build: makes the environment VENV that serves, with the pinned versions, from the tree in the current
# folder. The Dockerfile and docker/rehearse.py both run it. Usage: install.sh cpu|gpu VENV
set -eu
extra=$1 venv=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT="$PWD/constraints.txt"

# pip and the build backend stay in an environment of their own: what serves needs neither.
python3 -m venv "$work/build"
"$work/build/bin/pip" install -q hatchling
"$work/build/bin/pip" wheel -q --no-deps --no-build-isolation --wheel-dir "$work/dist" .

python3 -m venv --without-pip "$venv"
wheel=$(echo "$work"/dist/*.whl)
"$work/build/bin/pip" --python "$venv/bin/python" install -q --only-binary :all: "$wheel[$extra,grpc]"
