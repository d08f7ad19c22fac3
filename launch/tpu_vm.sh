#!/usr/bin/env bash
# A Cloud TPU slice of bare VMs, through a queued resource. One step at a time:
#
#   export PROJECT=... ZONE=us-west4-a NAME=vla-64 TPU_TYPE=v5litepod-64 RUNTIME=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh create              request the slice and wait until it is there (SPOT=1: preemptible and cheaper);
#                                        one that is there stays, one that was taken away or failed is requested anew
#   launch/tpu_vm.sh install             this commit, with its constraints, on every worker
#   CONFIG=configs/oxe_3b.py:size=300m,chips=v5e-64 WORKDIR=gs://BUCKET/runs/a VLA_DATA_ROOT=gs://BUCKET/oxe launch/tpu_vm.sh run
#   launch/tpu_vm.sh stop                SIGTERM to the run on every worker: it saves a checkpoint and ends
#   launch/tpu_vm.sh delete              give the slice back; it costs money until then
#
# `run` holds an ssh connection to every worker: call it inside tmux or screen.
# shellcheck disable=SC2016  # what stands in single quotes is for the workers' shells
set -eu
: "${PROJECT:?the Google Cloud project}" "${ZONE:?the zone, such as us-west4-a}" "${NAME:?a name for the slice}"
where=(--project="$PROJECT" --zone="$ZONE")

on_all_workers() { gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --batch-size=all --command="$1"; }

case "${1-}" in
create)
    requested='' missed=0 why="$(mktemp)"
    trap 'rm -f "$why"' EXIT
    while :; do
        # What cannot be described is not there; if something else is wrong, `create` says what.
        state="$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>"$why")" || state=''
        [ -z "$state" ] || missed=0
        echo "$(date +%T) $NAME is ${state:-not there}"
        case "$state:$requested" in
        ACTIVE:*) break ;;
        FAILED:1 | SUSPENDED:1) echo "tpu_vm.sh: no slice. Try again, or another zone or type." >&2 && exit 1 ;;
        :1) # one answer that did not come: ask again, but not for ever
            cat "$why" >&2
            missed=$((missed + 1))
            [ "$missed" -lt 10 ] || exit 1
            ;;
        FAILED: | SUSPENDED: | :)
            [ -z "$state" ] || gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
            gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
                --accelerator-type="${TPU_TYPE:-v5litepod-64}" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" \
                ${SPOT:+--spot}
            requested=1
            continue
            ;;
        esac
        sleep 30 # also while one is being taken away (SUSPENDING) or deleted
    done
    ;;
install)
    # The working tree's commit, not its uncommitted changes: what runs can be named afterwards.
    archive="$(mktemp -d)/vla_jax.tar.gz"
    git -C "$(dirname "$0")/.." archive --format=tar.gz -o "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME":vla_jax.tar.gz "${where[@]}" --worker=all --batch-size=all
    # The TPU images come with Python 3.10, which is too old: uv brings its own 3.12.
    on_all_workers 'set -e; rm -rf vla_jax && mkdir vla_jax && tar -xzf vla_jax.tar.gz -C vla_jax && cd vla_jax
        python3 -m pip install -q --user uv && python3 -m uv venv -q --clear --python 3.12 .venv
        python3 -m uv pip install -q --python .venv/bin/python -c constraints.txt -e ".[tpu,gcs]"'
    ;;
run)
    : "${CONFIG:?configs/NAME.py}" "${WORKDIR:?gs://BUCKET/path, or a folder on storage that every worker has mounted}"
    # A TPU VM's environment does not say that there are other workers; "auto" has jax ask the metadata server.
    on_all_workers "$(printf 'CONFIG=%q WORKDIR=%q; export VLA_DATA_ROOT=%q; ' "$CONFIG" "$WORKDIR" "${VLA_DATA_ROOT:-}")"'cd vla_jax && echo $$ >run.pid &&
        export VLA_COORDINATOR=auto PATH="$PWD/.venv/bin:$PATH" && . launch/xla_flags.sh &&
        exec vla-jax train --config="$CONFIG" --workdir="$WORKDIR"'
    ;;
stop) on_all_workers 'kill -TERM "$(cat vla_jax/run.pid)"' ;;
delete) gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet ;;
*)
    echo "tpu_vm.sh: say create, install, run, stop or delete, not '${1-}' (see the top of this file)" >&2
    exit 2
    ;;
esac
