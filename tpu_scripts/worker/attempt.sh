#!/usr/bin/env bash
# What start.sh leaves running: the leader of the attempt's group, which runs the command and writes its exit code.
USAGE="usage: attempt.sh RUN ATTEMPT -- COMMAND [ARGUMENT ...] (called by start.sh, which holds the lock on descriptor 9)"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# >= 4)) && [[ "$3" == -- ]] || usage
RUN="$1" FOLDER="$ROOT/runs/$1/attempts/$2"
shift 3
# A signal to the group is for the command; this process stays to write down how it ended. It ignores the signals: a
# trap would end bash's wait, and in bash 5.2 the exit code is then lost.
trap '' TERM HUP INT
record_pid "$FOLDER/pid"
exec 9>&-

cd "$ROOT/runs/$RUN/pack"
export PATH="$PWD/bin:$PATH"
if [[ -f "$ROOT/runs/$RUN/env" ]]; then
  # shellcheck disable=SC1090,SC1091
  source "$ROOT/runs/$RUN/env"
fi
umask 022
# Otherwise a program that writes to a file keeps its last lines to itself, and a healthy run would look like a hung one.
export PYTHONUNBUFFERED=1
code=0
env --default-signal=TERM,HUP,INT "$@" || code=$?
umask 077
note_activity "$RUN"
write "$FOLDER/exit" "$code"
