#!/bin/sh
# Simulators into .venv, as tested together (docs/evaluation.md): the extra `sim`, then gym-pusht and robosuite without what they ask for, because
# that is opencv-python, whose files overwrite those of opencv-python-headless and want a screen's libraries.
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || sh launch/setup.sh
pip() { .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt "$@"; }
pip -e '.[sim]'
pip --no-deps gym-pusht robosuite
.venv/bin/python - <<'END'
import importlib.util
missing = [name for name in ("metaworld", "mujoco", "gym_pusht", "robosuite") if importlib.util.find_spec(name) is None]
assert not missing, missing
END
echo "simulators: metaworld, pusht, robosuite. Headless they need EGL (apt install libegl1 libegl-mesa0 libgl1-mesa-dri) or MUJOCO_GL=osmesa with libosmesa6."
