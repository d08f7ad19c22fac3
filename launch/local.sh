#!/usr/bin/env bash
# N processes on this machine, connected as the machines of a cluster would be.
#
#   launch/local.sh -n 2 [-d DEVICES_PER_PROCESS] [--restarts COUNT] -- COMMAND OF vla-jax...
#   e.g. with CONFIG and WORKDIR set: vla-jax train --config="$CONFIG" --workdir="$WORKDIR" in two processes is
#   launch/local.sh -n 2 -- train --config="$CONFIG" --workdir="$WORKDIR"
#
# -d gives each process that many simulated CPU devices; without it each sees what jax finds (one CPU device, or every
# GPU: then also set CUDA_VISIBLE_DEVICES, or run one process). Lines are prefixed with the process's number. When one
# process fails, or on Ctrl-C or SIGTERM, the others get SIGTERM and, VLA_KILL_AFTER_S later, SIGKILL: by default 30 s,
# and 10 s after a failure, when those left can no longer finish a step.
# Exit code: 2 if any process ended with it, an error of the user's, whatever became of its peers; else the worst (largest)
# of those that ended by themselves. --restarts starts all of them again after a failure, but not after 2, which would
# only come again.
set -u

die() {
    echo "local.sh: $*" >&2
    exit 2
}

count='' devices='' restarts=0
while [ $# -gt 0 ]; do
    case "$1" in
    -n | -d | --restarts)
        [[ "${2-}" =~ ^[0-9]+$ ]] || die "$1 needs a whole number, not '${2-}'"
        case "$1" in -n) count=$2 ;; -d) devices=$2 ;; *) restarts=$2 ;; esac
        shift 2
        ;;
    --) shift && break ;;
    *) die "unknown option '$1'. Usage: local.sh -n N [-d DEVICES_PER_PROCESS] [--restarts COUNT] -- train ..." ;;
    esac
done
[ "${count:-0}" -gt 0 ] || die "-n, the number of processes, is missing or 0"
[ $# -gt 0 ] || die "nothing to run: put the command of vla-jax after --, such as -- train --config=... --workdir=..."
[ "$devices" != 0 ] || die "-d must be 1 or more"

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
program="$(command -v vla-jax || true)"
[ -n "$program" ] || program="$here/.venv/bin/vla-jax"
[ -x "$program" ] || die "vla-jax is neither on PATH nor at $program: run make setup, or activate its environment"

# The lines travel through named pipes, so that $! below is vla-jax itself: it gets the signals and gives the exit code.
pipes="$(mktemp -d)"
trap 'rm -rf "$pipes"' EXIT
stop='' # the signal that this script was sent
trap 'stop=INT' INT
trap 'stop=TERM' TERM

free_port() {
    # Below the range that the kernel hands out by itself (32768 and up on Linux).
    while :; do
        local port=$((20000 + RANDOM % 12000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break # nobody answers
    done
    echo "$port"
}

# Sets `worst`. Called with stderr at 3: at 2 bash itself would report every process that ends by a signal.
run_once() {
    local pids=() printers=() alive=() i code port still deadline='' killed=''
    port="$(free_port)"
    worst=0
    for ((i = 0; i < count; i++)); do
        rm -f "$pipes/$i" && mkfifo "$pipes/$i"
        # Ctrl-C reaches the whole terminal: the printers must outlive it to show the last lines.
        (trap '' INT TERM && exec sed -u "s/^/[$i] /" <"$pipes/$i") &
        printers+=($!)
        VLA_COORDINATOR="localhost:$port" VLA_NUM_PROCESSES="$count" VLA_PROCESS_ID="$i" \
            JAX_NUM_CPU_DEVICES="${devices:-${JAX_NUM_CPU_DEVICES:--1}}" \
            "$program" "$@" >"$pipes/$i" 2>&1 &
        pids+=($!)
        alive+=("$i")
    done
    while [ ${#alive[@]} -gt 0 ]; do
        still=()
        for i in "${alive[@]}"; do
            if kill -0 "${pids[i]}" 2>/dev/null; then
                still+=("$i")
                continue
            fi
            wait "${pids[i]}"
            code=$?
            # Once told to stop, a code says how it stopped, not what went wrong; but for 2, which no signal gives.
            if [ "$code" -eq 2 ] || { [ -z "$killed" ] && [ "$code" -ne 0 ]; }; then
                echo "local.sh: process $i of $count ended with exit code $code" >&3
                if [ "$worst" -ne 2 ] && { [ "$code" -eq 2 ] || [ "$code" -gt "$worst" ]; }; then worst=$code; fi
            fi
        done
        alive=(${still[@]+"${still[@]}"})
        if [ -n "$stop" ] || [ "$worst" -ne 0 ]; then
            # Two seconds first: after an error common to all, each prints its own message.
            if [ -z "$deadline" ]; then deadline=$((SECONDS + (${#stop} ? 0 : 2))); fi
            if [ "$SECONDS" -ge "$deadline" ] && [ "$killed" != KILL ]; then
                killed=${killed:+KILL}
                killed=${killed:-TERM}
                deadline=$((SECONDS + ${VLA_KILL_AFTER_S:-$((${#stop} ? 30 : 10))}))
                for i in ${alive[@]+"${alive[@]}"}; do kill "-$killed" "${pids[i]}" 2>/dev/null; done
            fi
        fi
        [ ${#alive[@]} -eq 0 ] || sleep 0.1
    done
    for i in "${printers[@]}"; do wait "$i"; done
}

for ((attempt = 0; ; attempt++)); do
    run_once "$@" 3>&2 2>/dev/null
    case "$stop" in INT) exit 130 ;; TERM) exit 143 ;; esac
    if [ "$worst" -eq 0 ] || [ "$worst" -eq 2 ] || [ "$attempt" -ge "$restarts" ]; then exit "$worst"; fi
    echo "local.sh: restart $((attempt + 1)) of $restarts" >&2
done
