#!/usr/bin/env bash
# Deletes a TPU VM and its disks; with --queued the queued resource together with its node.
USAGE="usage: delete_tpu_vm.sh --name=NAME --zone=ZONE [--project=ID] [--queued] [--dry-run]"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
if $QUEUED; then
  run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
else
  run gcloud compute tpus tpu-vm delete "$NAME" "${WHERE[@]}" --quiet
fi
