#!/usr/bin/env bash
# Runs a training command again as long as it ends preempted (exit code 75), so that a machine that is taken away and
# comes back, or a scheduler that sends SIGTERM before its time limit, costs no work.
# Usage: launch/until_done.sh --config configs/quickstart.yaml [--workdir DIR] …
set -uo pipefail

stop=
trap 'stop=1; kill -TERM "$child" 2>/dev/null' TERM INT

while true; do
  python -m ssl_jax.train "$@" &
  child=$!
  wait "$child"
  code=$?
  # A signal that this script was sent ends its wait early: wait for the checkpoint, then stop too.
  [[ -n "$stop" ]] && { wait "$child"; exit $?; }
  [[ $code -eq 75 ]] || exit $code
  echo "preempted; going on" >&2
  sleep 1
done
