#!/usr/bin/env bash
# Creates a TPU VM, or with --queued asks for one in the queue (it has the same name as its node then).
USAGE="usage: create_tpu_vm.sh --name=NAME --zone=ZONE --type=v5litepod-8 --version=v2-alpha-tpuv5-lite
         [--project=ID] [--spot] [--queued] [--dry-run]"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TYPE="" VERSION="" SPOT=()
own_option() {
  case "$1" in
    --type) TYPE="$2" ;;
    --version) VERSION="$2" ;;
    --spot) SPOT=(--spot) ;;
    *) return 1 ;;
  esac
}
parse "$@"
[[ -n "$TYPE" ]] || refuse "--type is missing: an accelerator type such as v5litepod-8"
[[ -n "$VERSION" ]] || refuse "--version is missing: the runtime version of that accelerator type"

if $QUEUED; then
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${WHERE[@]}" \
    --accelerator-type="$TYPE" --runtime-version="$VERSION" ${SPOT[@]+"${SPOT[@]}"}
  run gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" --format="value(state)"
else
  run gcloud compute tpus tpu-vm create "$NAME" "${WHERE[@]}" \
    --accelerator-type="$TYPE" --version="$VERSION" ${SPOT[@]+"${SPOT[@]}"}
fi
