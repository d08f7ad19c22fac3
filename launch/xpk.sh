#!/usr/bin/env bash
# The same as jobset.yaml through xpk, for clusters that xpk made (`pip install xpk`; image from launch/Dockerfile).
#
#   CLUSTER=... PROJECT=... ZONE=... IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/vla-jax:TAG \
#       CONFIG=configs/oxe_3b.py:size=300m,chips=v5e-64 WORKDIR=gs://BUCKET/runs/a VLA_DATA_ROOT=gs://BUCKET/oxe launch/xpk.sh [more options of xpk workload create]
#
# xpk (1.16.0) restarts after the exit codes 42 and 127 to 255 and those named here; any other ends the workload for good, such as 2,
# an error of the user's. 1: an error of ours; 75: stopped on request and saved, which counts as a restart here; 124: hung;
# 134: aborted by jax because another host is lost; 137 and 143: killed.
set -eu
: "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${IMAGE:?}" "${CONFIG:?configs/NAME.py}" "${WORKDIR:?gs://BUCKET/path, or a folder on storage that the pods have mounted}"

# The quotes keep $CONFIG for the pod's shell, which has it from --env.
# shellcheck disable=SC2016
exec xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --workload="${NAME:-vla}" --tpu-type="${TPU_TYPE:-v5litepod-64}" --num-slices="${SLICES:-1}" \
    --max-restarts="${VLA_MAX_RESTARTS:-100}" --restart-on-exit-codes=1,75,124,134,137,143 \
    --termination-grace-period-seconds=300 --docker-image="$IMAGE" \
    --env VLA_RESUMABLE_EXIT=75 --env CONFIG="$CONFIG" --env WORKDIR="$WORKDIR" --env VLA_DATA_ROOT="${VLA_DATA_ROOT:-}" \
    --command='. launch/xla_flags.sh && vla-jax train --config="$CONFIG" --workdir="$WORKDIR"' "$@"
