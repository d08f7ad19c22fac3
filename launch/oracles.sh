#!/bin/sh
# Programs that read what is made here, each with the versions it wants in an environment of its own under .oracles/: openpi's pins, LeRobot (Python
# 3.12: PYTHON312 names one), and SkyPilot, xpk and JobSet's API. Tests look for them there (tests/lively.py), and are skipped without.
set -eu
cd "$(dirname "$0")/.."

make() { # make NAME PYTHON PACKAGES...: an environment once, in full or not at all
    at=.oracles/$1
    python=$2
    shift 2
    if [ -x "$at/bin/python" ] && [ -e "$at/complete" ]; then return; fi
    rm -rf "$at"
    "$python" -m venv "$at"
    "$at/bin/python" -m pip install -q --disable-pip-version-check "$@"
    touch "$at/complete"
}

found=
for candidate in ${PYTHON312:+"$PYTHON312"} python3.12 "$HOME"/.pyenv/versions/3.12.*/bin/python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then
        found=$candidate
        break
    fi
done

make launchers .venv/bin/python skypilot==0.14.1 xpk==1.16.0 kubeflow-trainer-api==2.3.0
make openpi .venv/bin/python 'jax[cpu]==0.5.3' flax==0.10.2 orbax-checkpoint==0.11.13
if [ -n "$found" ]; then
    make lerobot "$found" 'lerobot[pi]==0.6.1' sentencepiece==0.2.3 protobuf==7.36.2  # which transformers reads the tokenizer with
else
    echo "no Python 3.12 was found for LeRobot: PYTHON312=/path/to/python3.12 names one" >&2
    exit 1
fi
