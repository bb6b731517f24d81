#!/usr/bin/env bash
# Starts the same `jaxft train` on every host of a slice, detached, and returns. It is safe to repeat.
USAGE="usage: train.sh --name=NAME --zone=ZONE --run=RUN [--attempt=1] [--project=ID] [--api=tpu|compute] [--dry-run] --
         --config=configs/NAME.py [--config.a.b=value ...]
An attempt is started once. To go on after an interruption, give the next number."
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OWN=" run attempt | "
RUN="" ATTEMPT=1
parse "$@"
check_run "$RUN"
[[ "$ATTEMPT" =~ ^[1-9][0-9]*$ ]] || refuse "--attempt='$ATTEMPT' is not a number from 1"
((${#REST[@]})) || refuse "no arguments for jaxft train: give them after --"
# JAX finds out on a TPU slice which process it is and who its coordinator is.
on_workers all bash "$REMOTE/worker/start.sh" "$RUN" "$ATTEMPT" -- jaxft train --expect_platform=tpu "${REST[@]}"
