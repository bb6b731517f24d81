#!/usr/bin/env bash
# Starts an attempt of a run on this host, detached, and returns. It is safe to repeat: an attempt starts once.
USAGE="usage: start.sh RUN ATTEMPT -- COMMAND [ARGUMENT ...]
The command runs in the run's pack, with its Python first in PATH: start.sh r1 1 -- jaxft train --config=config.json
JAXFT_DEVICE_SECONDS (120): how long to wait until no process holds a chip.
exit code: 0 started, or was started before; 2 refused; 16 a chip is still held, by the processes that it names"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# >= 4)) && [[ "$3" == -- ]] || usage
RUN="$1" ATTEMPT="$2"
shift 3
check_run "$RUN"
check_attempt "$ATTEMPT"
FOLDER="$ROOT/runs/$RUN/attempts/$ATTEMPT"
[[ -d "$ROOT/runs/$RUN/pack" ]] || refuse "run $RUN is not set up on this host: setup.sh $RUN ARCHIVE"
mkdir -p "$FOLDER"
note_activity "$RUN"

# One start at a time on this host. The attempt holds the lock too, until its pid file is written.
exec 9> "$ROOT/start.lock"
flock --wait 900 9 || refuse "another start has not ended in 900 s: see ps -ef | grep start.sh" "$BUSY"

if [[ -f "$FOLDER/pid" ]]; then
  if [[ -f "$FOLDER/exit" ]]; then
    say "attempt $ATTEMPT has ended with $(< "$FOLDER/exit"); nothing is started"
  elif [[ -n "$(group_of "$FOLDER/pid")" ]]; then
    say "attempt $ATTEMPT runs already, as $(cut -d ' ' -f 1 "$FOLDER/pid")"
  else
    say "attempt $ATTEMPT was started before and has been killed; start attempt $((ATTEMPT + 1))"
  fi
  exit "$DONE"
fi
newest="$(attempts_of "$RUN" | tail -n 1)"
((newest == ATTEMPT)) || refuse "attempt $newest of run $RUN is newer than attempt $ATTEMPT, which is not started"

for number in $(attempts_of "$RUN"); do
  old="$(group_of "$ROOT/runs/$RUN/attempts/$number/pid")"
  [[ -n "$old" ]] || continue
  say "attempt $number still runs as $old, and is ended"
  end_group "$old" 60
done

left="${JAXFT_DEVICE_SECONDS:-120}"
while held="$(holders)" && [[ -n "$held" ]]; do
  ((left-- > 0)) || refuse "chips of this host are held, by process, name and device: ${held//$'\n'/; }. End them with \
kill, or create the node again." "$BUSY"
  [[ ! -f "$FOLDER/stopped" ]] || break
  sleep 1
done
[[ ! -f "$FOLDER/stopped" ]] || refuse "attempt $ATTEMPT was stopped before it started"
as_root rm -f "$LOCKFILE"

setsid bash "$(dirname "${BASH_SOURCE[0]}")/attempt.sh" "$RUN" "$ATTEMPT" -- "$@" \
  < /dev/null >> "$FOLDER/log" 2>&1 &
# The lock is free for this process once the attempt has written its pid file and let go of it.
exec 9>&-
for ((i = 0; i < 100; i++)); do
  [[ ! -f "$FOLDER/pid" ]] || break
  sleep 0.1
done
[[ -f "$FOLDER/pid" ]] || refuse "attempt $ATTEMPT has not begun after 10 s; see $FOLDER/log"
say "attempt $ATTEMPT runs as $(cut -d ' ' -f 1 "$FOLDER/pid"); its log is $FOLDER/log"
