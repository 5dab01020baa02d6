#!/usr/bin/env bash
# Trains on a Cloud TPU slice that is asked for as a queued resource, and asks again when the slice is taken away.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: launch/tpu_vm.sh create|train|status|logs|delete NAME --zone ZONE [options] [-- training arguments]

  create   ask for the TPU and wait until it is there
  train    create it if needed, install, train on all workers; after a preemption, begin again, until the run ends
  status   print the state of the queued resource
  logs     follow the training's log (--worker 0 unless told)
  delete   give the TPU back

  --zone ZONE         e.g. us-east5-b
  --project PROJECT   otherwise gcloud's default
  --type TYPE         accelerator type, e.g. v6e-16 (create, train)
  --runtime VERSION   TPU software version, e.g. v2-alpha-tpuv6e (create, train)
  --spot              cheaper, may be preempted
  --ref REF           copy this git commit; otherwise the working tree without ignored files
  --setup COMMAND     run on every worker before training, e.g. to mount the file system of the working directory
  --worker N          whose log to follow
  --poll SECONDS      between two looks at the state (60)
  --dry-run           print the commands, run none

train ends with the training's exit code: 0 done, 2 error of the user, 3 diverged, 1 anything else. It does not delete
the TPU. Interrupting it does not stop the training; the same command attaches to it again.
USAGE
}

fail() { echo "tpu_vm.sh: $*" >&2; exit 2; }

[[ "${1:-}" == -h || "${1:-}" == --help ]] && { usage; exit 0; }
[[ $# -ge 2 && "$2" != -* ]] || { usage >&2; exit 2; }
action=$1 name=$2
shift 2
zone='' project='' type='' runtime='' ref='' setup='' worker=0 poll=60 spot='' dry='' folder=''
trap '[[ -z $folder ]] || rm -r "$folder"' EXIT
while [[ $# -gt 0 ]]; do
  case $1 in
    --spot) spot=1; shift; continue ;;
    --dry-run) dry=1; shift; continue ;;
    --) shift; break ;;
    --zone | --project | --type | --runtime | --ref | --setup | --worker | --poll)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2 ;;
    *) fail "unknown option $1; training arguments come after --" ;;
  esac
done
[[ -n $zone ]] || fail "--zone is missing"
place=(--zone "$zone" --quiet)
[[ -z $project ]] || place+=(--project "$project")

call() {
  if [[ -n $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all() { call gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command "$1"; }
# Nothing where there is no such queued resource; any other failure of gcloud ends the script.
state() {
  local found
  found=$(gcloud compute tpus queued-resources list "${place[@]}" --filter "name~/$name\$" --format 'value(state.state)') ||
    return 1
  echo "$found"
}
remove() { call gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force; }

create() {
  [[ -n $type && -n $runtime ]] || fail "--type and --runtime are needed to create a TPU"
  call gcloud compute tpus queued-resources create "$name" --node-id "$name" "${place[@]}" \
    --accelerator-type "$type" --runtime-version "$runtime" ${spot:+--spot}
}

# Returns when the slice is there, having asked for it as often as needed.
obtain() {
  local now
  if [[ -n $dry ]]; then create; return; fi
  while true; do
    now=$(state) || exit 1
    case $now in
      ACTIVE) return ;;
      '') create || exit 1 ;;
      SUSPENDED) remove || exit 1 ;;
      FAILED)
        gcloud compute tpus queued-resources describe "$name" "${place[@]}" >&2 || true
        echo "tpu_vm.sh: the request for $name failed; delete it before the next try" >&2
        exit 1 ;;
      *) echo "$name: $now" >&2; sleep "$poll" ;;
    esac
  done
}

# Each worker prints ssl_jax-end=CODE, =running or =none. The process id tells a run from one that died with its VM.
look() {
  # shellcheck disable=SC2016  # expanded on the workers
  on_all 'if [ -f ssl_jax.end ]; then echo "ssl_jax-end=$(cat ssl_jax.end)"
elif [ -f ssl_jax.pid ] && kill -0 "$(cat ssl_jax.pid)"; then echo ssl_jax-end=running
else echo ssl_jax-end=none; fi'
}

install_and_start() {
  local root archive arguments
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  [[ -n $folder ]] || folder=$(mktemp -d)
  archive=$folder/ssl_jax.tar.gz
  if [[ -n $ref ]]; then
    call git -C "$root" archive --format tar.gz -o "$archive" "$ref" || return 2
  elif [[ -z $dry ]]; then
    (cd "$root" && git ls-files -z --cached --others --exclude-standard |
      tar --null --ignore-failed-read -czf "$archive" -T -) || return 2
  fi
  call gcloud compute tpus tpu-vm scp "$archive" "$name:ssl_jax.tar.gz" "${place[@]}" --worker=all || return 1
  # The images have Python 3.10, so uv brings its own.
  on_all 'set -e; rm -rf ssl_jax; mkdir ssl_jax; tar -xzf ssl_jax.tar.gz -C ssl_jax
python3 -m pip install --quiet --user uv; ~/.local/bin/uv venv --quiet --clear --python 3.12 venv
~/.local/bin/uv pip install --quiet --python venv/bin/python -c ssl_jax/constraints.txt -e "./ssl_jax[tpu]"' || return 1
  [[ -z $setup ]] || on_all "$setup" || return 1
  printf -v arguments '%q ' "$@"
  printf -v arguments '%q' "launch/until_done.sh $arguments; echo \$? > ~/ssl_jax.end"
  on_all "rm -f ssl_jax.end; cd ssl_jax; export PATH=\$HOME/venv/bin:\$PATH
nohup setsid bash -c $arguments > ~/ssl_jax.log 2>&1 < /dev/null & echo \$! > ~/ssl_jax.pid"
}

# Returns when the training is over (its code in `end`) or the slice is lost (end=lost).
follow() {
  local seen misses=0 now
  while true; do
    now=$(state) || now=unknown
    case $now in
      ACTIVE | unknown) ;;
      *) end=lost; return ;;
    esac
    if seen=$(look) && seen=$(grep -o 'ssl_jax-end=[a-z0-9]*' <<<"$seen"); then
      misses=0
      # One worker's error is the run's: the others may wait for it for ever.
      for end in 2 3; do grep -qx "ssl_jax-end=$end" <<<"$seen" && return; done
      # Told to stop before its time: its peers may have failed over that. It starts again here or on a new slice.
      grep -qx 'ssl_jax-end=75' <<<"$seen" && { end=none; return; }
      grep -qvxE 'ssl_jax-end=(0|running|none)' <<<"$seen" && { end=1; return; }
      grep -qx 'ssl_jax-end=none' <<<"$seen" && { end=none; return; }
      grep -qx 'ssl_jax-end=running' <<<"$seen" || { end=0; return; }
    elif ((++misses >= 5)); then
      # The state lags behind a preemption, so workers that stay out of reach count as lost.
      end=lost
      return
    fi
    sleep "$poll"
  done
}

train() {
  local end=none tries=0
  [[ $# -gt 0 ]] || fail "training arguments are missing: -- --config C --workdir W"
  if [[ -n $dry ]]; then obtain; install_and_start "$@"; look; return; fi
  # A run that is going on is attached to; one that ended is begun again, as its command would be by hand.
  if [[ $(state) == ACTIVE ]] && look | grep -q 'ssl_jax-end=running'; then follow; fi
  while true; do
    case $end in
      lost)
        echo "$name was taken away; asking again" >&2
        if [[ -n $(state) ]]; then remove || exit 1; fi ;;
      none) ;;
      *) return "$end" ;;
    esac
    obtain
    if install_and_start "$@"; then
      tries=0
      follow
    else
      ((++tries < 3)) || { echo "tpu_vm.sh: $name cannot be set up" >&2; exit 1; }
      end=none
      sleep "$poll"
    fi
  done
}

case $action in
  create) obtain ;;
  train) train "$@" ;;
  status) call gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format 'value(state.state)' ;;
  logs) call gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$worker" --command 'tail -n 100 -F ssl_jax.log' ;;
  delete) remove ;;
  *) usage >&2; exit 2 ;;
esac
