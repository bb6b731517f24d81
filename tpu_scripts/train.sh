#!/usr/bin/env bash
# Runs the same `jaxft train` on every worker; the same command goes on after an interruption.
USAGE="usage: train.sh --name=NAME --zone=ZONE [--project=ID] [--dry-run] --
         --config=configs/NAME.py [--config.a.b=value ...]"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
((${#REST[@]})) || refuse "no arguments for jaxft train: give them after --"
printf -v arguments ' %q' "${REST[@]}"
# JAX finds out on a TPU slice which process it is and who its coordinator is.
on_all_workers "cd ~/jaxft && .venv/bin/jaxft train$arguments"
