# Sourced by the other scripts: options that all of them share, and a `run` that can also only print.
# Each script sets USAGE before it calls parse; what is no option ends up in the array REST.

set -euo pipefail

NAME="" ZONE="" PROJECT="" QUEUED=false DRY_RUN=false
REST=()

refuse() {
  echo "$(basename "$0"): $1" >&2
  echo "$USAGE" >&2
  exit 2
}

# A script's own option, `own_option NAME VALUE`, returns 1 for one that it does not have.
own_option() { return 1; }

parse() {
  while (($#)); do
    case "$1" in
      --name=*) NAME="${1#*=}" ;;
      --zone=*) ZONE="${1#*=}" ;;
      --project=*) PROJECT="${1#*=}" ;;
      --queued) QUEUED=true ;;
      --dry-run) DRY_RUN=true ;;
      -h | --help) echo "$USAGE"; exit 0 ;;
      --) shift; REST=("$@"); break ;;
      --*)
        local flag="${1%%=*}" value=""
        [[ "$1" == *=* ]] && value="${1#*=}"
        own_option "$flag" "$value" || refuse "unknown option $1"
        ;;
      *) refuse "unknown argument $1" ;;
    esac
    shift
  done
  [[ -n "$NAME" ]] || refuse "--name is missing"
  [[ -n "$ZONE" ]] || refuse "--zone is missing"
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

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --command="$1"
}
