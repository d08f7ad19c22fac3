#!/bin/sh
# Makes .venv beside pyproject.toml with everything that the demo and the tests need; called by `make`.
# Does nothing when .venv was made here from the present pyproject.toml and constraints.txt.
set -eu
cd "$(dirname "$0")/.."

EXTRAS='rlds,convert,plots,fast,serve,gcs,oracles,dev'
STATE=.venv/.vla_setup # holds the key once the set-up is complete, "begun" before; a .venv without it is not ours
KEY="$(cat pyproject.toml constraints.txt | cksum) $EXTRAS $(pwd)" # scripts in a venv hold its path: no moving

fail() {
    printf 'set-up: %s\n' "$*" >&2
    exit 1
}

state="$(cat "$STATE" 2>/dev/null || true)"
healthy=no
if [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then healthy=yes; fi
if [ "$state" = "$KEY" ] && [ $healthy = yes ]; then exit 0; fi

if [ -d .venv ] && [ -z "$state" ] && [ -n "$(ls -A .venv)" ]; then
    fail "$(pwd)/.venv exists and was not made by \`make\`: move it away, and run again."
fi

# A finished environment whose requirements changed is updated; one cut short, moved or broken is made anew.
case "$state" in
*"$EXTRAS $(pwd)") remake=$([ $healthy = yes ] || echo yes) ;;
*) remake=yes ;;
esac
if [ -n "$remake" ] && [ -d .venv ]; then
    # The state file last: cut short here, the rest is still known to be ours.
    find .venv -mindepth 1 -maxdepth 1 ! -name "${STATE#.venv/}" -exec rm -rf {} +
    rm -rf .venv
fi

if [ ! -d .venv ]; then
    chosen='' found='' without_venv=''
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3; do
        # Run it: a shim of pyenv exists for versions that are not active, and fails.
        version="$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
        found="$found${found:+, }$candidate is $version"
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            chosen="$candidate"
            break
        fi
        without_venv="${without_venv:-$version}"
    done
    if [ -z "$chosen" ] && [ -n "$without_venv" ]; then
        fail "Python $without_venv lacks the modules venv and ensurepip: on Debian or Ubuntu, apt install python$without_venv-venv."
    elif [ -z "$chosen" ]; then
        fail "Python 3.11 or later is needed (found: ${found:-none}): install one, or name it with make PYTHON=/path/to/python3.12."
    fi
    if [ -n "${PYTHON:-}" ] && [ "$chosen" != "$PYTHON" ]; then
        printf 'set-up: PYTHON=%s does not run, is older than 3.11 or lacks venv; taking %s.\n' "$PYTHON" "$chosen"
    fi
    printf 'set-up: making .venv with %s (Python %s)\n' "$chosen" "$version"
    mkdir .venv
    echo begun >"$STATE"
    "$chosen" -m venv .venv || fail "$chosen -m venv failed (see above): on Debian or Ubuntu, apt install python$version-venv."
fi

printf 'set-up: installing the packages of constraints.txt; the first time this takes minutes\n'
echo begun >"$STATE"
log=.venv/setup.log
if ! .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$EXTRAS]" >"$log" 2>&1; then
    grep -v '^WARNING' "$log" | tail -n 20 >&2 || true
    version="$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    if grep -Eqi 'NewConnectionError|Failed to establish|Connection refused|name resolution|NameResolution|Max retries|ConnectTimeout|Read timed out|ProxyError|SSLError' "$log"; then
        fail "pip could not reach the package index: check the network, or PIP_INDEX_URL and the proxy (log: $log)."
    elif grep -q 'from versions: none' "$log"; then
        fail "pip found no version at all of a package: its index cannot be reached (check the network, PIP_INDEX_URL, the proxy) or has none for Python $version (tested: 3.11, 3.12). Log: $log."
    elif grep -Eqi 'No matching distribution|ResolutionImpossible|conflicting dependencies' "$log"; then
        fail "pip found no packages that fit constraints.txt on Python $version (tested: 3.11, 3.12 on Linux x86-64): use one of those with make PYTHON=..., or an index that has these versions (log: $log)."
    else
        fail "pip install failed on Python $version: the reason is above, all of it in $log."
    fi
fi
printf '%s\n' "$KEY" >"$STATE"
