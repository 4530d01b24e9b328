#!/usr/bin/env bash
# Serves a model repository on the default ports and prints a first request once it is ready.
#
#   scripts/run.sh BINARY REPOSITORY [serve flags…]
#
# SIGINT and SIGTERM go to the gateway, which drains; its exit code is this script's.
set -euo pipefail

binary=$1 repository=$2
shift 2
url=http://127.0.0.1:8000
# Generous: models are tried in a child process first, on a machine that may be slow.
ready_within_s=120

# Job control gives the gateway its own process group, so that a ^C at the terminal reaches it once, from the trap.
set -m
"$binary" serve --model-repository "$repository" "$@" &
server=$!
set +m
trap 'kill -TERM "$server" 2>/dev/null || true' TERM
trap 'kill -INT "$server" 2>/dev/null || true' INT

# Asks with bash alone: curl may not be installed.
ready() {
    exec 3<>/dev/tcp/127.0.0.1/8000 || return 1
    printf 'GET /v2/health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n' >&3
    local status
    read -r -t 5 status <&3 || return 1
    exec 3>&-
    [[ $status == *" 200 "* ]]
}

deadline=$((SECONDS + ready_within_s))
until ready 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || break
    if ((SECONDS >= deadline)); then
        echo "not ready after ${ready_within_s} s; see the log above" >&2
        break
    fi
    sleep 0.05
done

# Another program may hold the port, and then the answer was its own.
if ready 2>/dev/null && kill -0 "$server" 2>/dev/null; then
    cat <<TEXT

Tidegate serves $repository at $url. In another terminal, from this directory:

  curl -s $url/v2/models/iris/infer -d '{"inputs":[{"name":"features","datatype":"FP32","shape":[1,4],"data":[5.1,3.5,1.4,0.2]}]}'

  $binary infer iris --random

TEXT
fi

# `wait` also returns when a trapped signal arrives: go on until the gateway itself has gone.
code=0
while :; do
    if wait "$server"; then code=0; else code=$?; fi
    kill -0 "$server" 2>/dev/null || break
done
exit "$code"
