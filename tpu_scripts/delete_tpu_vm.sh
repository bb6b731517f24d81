#!/usr/bin/env bash
# Deletes a slice with its disks, and the queued resource that it came from, which would keep its name and its quota.
USAGE="usage: delete_tpu_vm.sh --name=NAME --zone=ZONE [--project=ID] [--api=tpu|compute] [--dry-run]"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OWN=" | "
parse "$@"
if [[ "$API" == compute ]]; then
  run gcloud compute instances delete "$NAME" "${WHERE[@]}" --quiet
  exit 0
fi
# Either may be there, and a description fails where one is not.
QUEUE=(gcloud compute tpus queued-resources) VM=(gcloud compute tpus tpu-vm)
if $DRY_RUN; then
  echo "# the queued resource $NAME, if there is one; else the TPU VM:"
  run "${QUEUE[@]}" delete "$NAME" "${WHERE[@]}" --force --quiet
  run "${VM[@]}" delete "$NAME" "${WHERE[@]}" --quiet
elif "${QUEUE[@]}" describe "$NAME" "${WHERE[@]}" --format="value(name)" > /dev/null 2>&1; then
  "${QUEUE[@]}" delete "$NAME" "${WHERE[@]}" --force --quiet
else
  "${VM[@]}" delete "$NAME" "${WHERE[@]}" --quiet
fi
