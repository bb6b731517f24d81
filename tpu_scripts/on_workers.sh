#!/usr/bin/env bash
# Runs one of the scripts of worker/ on every host of a slice: state.sh, log.sh, stop.sh, guard.sh, upload_logs.sh.
USAGE="usage: on_workers.sh --name=NAME --zone=ZONE [--worker=all] [--project=ID] [--api=tpu|compute] [--dry-run] --
         SCRIPT RUN [ARGUMENT ...]
       on_workers.sh --name=t1 --zone=us-east5-a -- state.sh r1
       on_workers.sh --name=t1 --zone=us-east5-a --worker=0 -- log.sh r1 1 0"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OWN=" worker | "
WORKER=all
parse "$@"
((${#REST[@]} > 1)) || refuse "no script and run: give them after --"
[[ "${REST[0]}" == [a-z]*.sh && "${REST[0]}" != */* && -f "$SCRIPTS/worker/${REST[0]}" ]] \
  || refuse "there is no ${REST[0]} in tpu_scripts/worker"
on_workers "$WORKER" bash "$REMOTE/worker/${REST[0]}" "${REST[@]:1}"
