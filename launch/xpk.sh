#!/usr/bin/env bash
# The same as jobset.yaml through xpk, for clusters that xpk made (`pip install xpk`; image from launch/Dockerfile).
#
#   CLUSTER=... PROJECT=... ZONE=... IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/vla-jax:TAG \
#       CONFIG=configs/oxe_3b.py:size=300m,chips=v5e-64 WORKDIR=/mnt/bucket/runs/a VLA_DATA_ROOT=gs://BUCKET/oxe launch/xpk.sh [more options of xpk workload create]
#
# When one host is lost, jax aborts the processes on the others, which xpk takes for a failure of the user's code:
# hence --restart-on-user-code-failure. It also restarts after exit code 2; jobset.yaml does not.
set -eu
: "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${IMAGE:?}" "${CONFIG:?configs/NAME.py}" "${WORKDIR:?a folder on storage that all reach}"

# The quotes keep $CONFIG for the pod's shell, which has it from --env.
# shellcheck disable=SC2016
exec xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --workload="${NAME:-vla}" --tpu-type="${TPU_TYPE:-v5litepod-64}" --num-slices="${SLICES:-1}" \
    --max-restarts="${VLA_MAX_RESTARTS:-100}" --restart-on-user-code-failure \
    --termination-grace-period-seconds=300 --docker-image="$IMAGE" \
    --env VLA_RESUMABLE_EXIT=75 --env CONFIG="$CONFIG" --env WORKDIR="$WORKDIR" --env VLA_DATA_ROOT="${VLA_DATA_ROOT:-}" \
    --command='. launch/xla_flags.sh && vla-jax train --config="$CONFIG" --workdir="$WORKDIR"' "$@"
