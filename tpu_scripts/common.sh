# shellcheck shell=bash
# Sourced by the other scripts: the options that all of them share, and a `run` that can also only print.
# Each script sets USAGE and OWN before it calls parse, and finds the values of its options in variables of their names
# in upper case. What stands behind -- ends up in the array REST.

set -euo pipefail

REST=() WHERE=()
DRY_RUN=false API=tpu PROJECT="" NAME="" ZONE=""
# shellcheck disable=SC2034 # for the other scripts
SCRIPTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck disable=SC2034
REMOTE=jaxft-pod # the folder on every host, in the home folder of whom gcloud logs in as

refuse() {
  echo "$(basename "$0"): $1" >&2
  echo "$USAGE" >&2
  exit 2
}

# parse ARGUMENT...: --option=value or --option value. OWN names the options of the script that take a value, and after
# a | those that do not, each with a space before and behind it.
parse() {
  local option value name valued="${OWN%%|*} name zone project api " switches="${OWN#*|} dry-run "
  while (($#)); do
    case "$1" in
      -h | --help) echo "$USAGE"; exit 0 ;;
      --) shift; REST=("$@"); break ;;
      --*) ;;
      *) refuse "unknown argument $1" ;;
    esac
    option="${1%%=*}"
    name="${option#--}"
    if [[ "$switches" == *" $name "* ]]; then
      [[ "$1" == "$option" ]] || refuse "$option takes no value"
      value=true
    elif [[ "$valued" == *" $name "* ]]; then
      if [[ "$1" != *=* ]]; then
        (($# > 1)) || refuse "$option needs a value"
        shift
        value="$1"
      else
        value="${1#*=}"
      fi
    else
      refuse "unknown option $1"
    fi
    # Bash 3.2 of macOS has no other way to upper case.
    printf -v "$(printf '%s' "$name" | tr 'a-z-' 'A-Z_')" '%s' "$value"
    shift
  done
  [[ -n "$NAME" ]] || refuse "--name is missing"
  [[ -n "$ZONE" ]] || refuse "--zone is missing"
  [[ "$API" == tpu || "$API" == compute ]] || refuse "--api=$API is neither tpu nor compute"
  WHERE=("--zone=$ZONE")
  [[ -z "$PROJECT" ]] || WHERE+=("--project=$PROJECT")
}

# Runs a command; with --dry-run prints it instead, quoted so that it can be pasted.
run() {
  if $DRY_RUN; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# The run of this slice on its hosts, which names folders there.
check_run() {
  [[ "$1" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || refuse "--run='$1' is not a name of lower-case letters, digits and -"
}

# on_workers WHICH WORD...: a command on every host, or on the one of that number. An instance of Compute Engine is one.
on_workers() {
  local which="$1" command
  shift
  printf -v command '%q ' "$@"
  if [[ "$API" == compute ]]; then
    run gcloud compute ssh "$NAME" "${WHERE[@]}" --command="${command% }"
  else
    run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" "--worker=$which" --command="${command% }"
  fi
}

copy_to_workers() {
  if [[ "$API" == compute ]]; then
    run gcloud compute scp "$1" "$NAME:$2" "${WHERE[@]}"
  else
    run gcloud compute tpus tpu-vm scp "$1" "$NAME:$2" "${WHERE[@]}" --worker=all
  fi
}
