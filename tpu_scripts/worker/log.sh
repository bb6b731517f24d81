#!/usr/bin/env bash
# Prints a part of an attempt's log, from a byte on: what is new since the last look.
USAGE="usage: log.sh RUN ATTEMPT OFFSET [BYTES=1000000]
exit code: 0 also if there is nothing new, or no log yet; 2 refused"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# >= 3 && $# <= 4)) || usage
check_run "$1"
check_attempt "$2"
OFFSET="$3" BYTES="${4:-1000000}"
[[ "$OFFSET" =~ ^[0-9]+$ && "$BYTES" =~ ^[0-9]+$ ]] || refuse "OFFSET is '$OFFSET' and BYTES '$BYTES', not whole numbers"
file="$ROOT/runs/$1/attempts/$2/log"
[[ -f "$file" ]] || exit "$DONE"
# `head` ends before `tail` has written all, which is no failure.
{ tail -c "+$((OFFSET + 1))" "$file" || true; } | head -c "$BYTES"
