#!/usr/bin/env bash
# Creates a slice of the Cloud TPU API, at once or through its queue, or one host of Compute Engine.
USAGE="usage: create_tpu_vm.sh --name=NAME --zone=ZONE --type=v6e-8 --version=v2-alpha-tpuv6e
         [--project=ID] [--spot] [--queued] [--dry-run] [-- OPTIONS OF GCLOUD]
       create_tpu_vm.sh --api=compute --name=NAME --zone=ZONE --type=ct6e-standard-4t
         --version=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --hours=H [--spot] ...
--version: the runtime version, or the image family. --queued: asks in the queue, and waits until the slice is there.
--hours: Google deletes the instance after so long. Behind --: such as --network=N, --service-account=S, --reserved,
or --node-count=2 --node-prefix=NAME of a queued request for two slices."
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OWN=" type version hours | spot queued "
TYPE="" VERSION="" HOURS="" SPOT=false QUEUED=false
parse "$@"
[[ -n "$TYPE" ]] || refuse "--type is missing: an accelerator type such as v6e-8, or a machine type such as ct6e-standard-4t"
[[ -n "$VERSION" ]] || refuse "--version is missing: the runtime version of that accelerator type, or the image family"
# `jaxft pod list` finds what has this label.
LABEL="--labels=jaxft-run=$NAME"

create_instance() {
  $QUEUED && refuse "--queued is for --api=tpu"
  [[ "$HOURS" =~ ^[1-9][0-9]*$ ]] || refuse "--hours='$HOURS' is not a whole number from 1"
  local model=()
  ! $SPOT || model=(--provisioning-model=SPOT)
  run gcloud compute instances create "$NAME" "${WHERE[@]}" --machine-type="$TYPE" --image-family="$VERSION" \
    --image-project=ubuntu-os-accelerator-images --maintenance-policy=TERMINATE --scopes=cloud-platform \
    --boot-disk-size=200GB "--max-run-duration=${HOURS}h" --instance-termination-action=DELETE "$LABEL" \
    ${model[@]+"${model[@]}"} ${REST[@]+"${REST[@]}"}
}

# The state is asked for until it says that the slice is there, or never will be.
wait_until_active() {
  local state="" before=""
  local ask=(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" "--format=value(state.state)")
  if $DRY_RUN; then
    run "${ask[@]}"
    return
  fi
  while true; do
    state="$("${ask[@]}")"
    [[ "$state" == "$before" ]] || echo "$NAME: $state"
    before="$state"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        echo "the request ended as $state: see gcloud compute tpus queued-resources describe $NAME ${WHERE[*]}," \
          "delete it with delete_tpu_vm.sh --name=$NAME ${WHERE[*]}, and try again or in another zone" >&2
        exit 1
        ;;
    esac
    sleep "${JAXFT_POLL:-30}"
  done
}

if [[ "$API" == compute ]]; then
  create_instance
  exit 0
fi
[[ -z "$HOURS" ]] || refuse "--hours is for --api=compute; on a slice of the Cloud TPU API, setup_workers.sh --hours=$HOURS starts a watchdog"
options=(--accelerator-type="$TYPE" --scopes=https://www.googleapis.com/auth/cloud-platform "$LABEL")
! $SPOT || options+=(--spot)
options+=(${REST[@]+"${REST[@]}"})
if $QUEUED; then
  node=(--node-id="$NAME")
  [[ " ${REST[*]-} " != *" --node-count"* ]] || node=()
  run gcloud compute tpus queued-resources create "$NAME" ${node[@]+"${node[@]}"} "${WHERE[@]}" \
    --runtime-version="$VERSION" "${options[@]}" --async
  wait_until_active
else
  run gcloud compute tpus tpu-vm create "$NAME" "${WHERE[@]}" --version="$VERSION" "${options[@]}"
fi
