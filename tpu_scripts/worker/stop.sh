#!/usr/bin/env bash
# Stops a run on this host: SIGTERM, by which `jaxft train` saves and ends with 75, and SIGKILL after SECONDS.
USAGE="usage: stop.sh RUN [SECONDS=300]
exit code: 0 nothing of the run is left on this host; 2 refused"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# >= 1 && $# <= 2)) || usage
RUN="$1" SECONDS_LEFT="${2:-300}"
check_run "$RUN"
[[ "$SECONDS_LEFT" =~ ^[0-9]+$ ]] || refuse "SECONDS is '$SECONDS_LEFT', not a whole number"
if [[ ! -d "$ROOT/runs/$RUN/attempts" ]]; then
  say "nothing of run $RUN has been started on this host"
  exit "$DONE"
fi
note_activity "$RUN"

# An attempt that waits for its chips, or whose start arrives late, reads this and gives up.
for number in $(attempts_of "$RUN"); do
  [[ -f "$ROOT/runs/$RUN/attempts/$number/exit" ]] || touch "$ROOT/runs/$RUN/attempts/$number/stopped"
done
exec 9> "$ROOT/start.lock"
flock --wait 900 9 || refuse "a start has not ended in 900 s: see ps -ef | grep start.sh" "$BUSY"
for number in $(attempts_of "$RUN"); do
  folder="$ROOT/runs/$RUN/attempts/$number"
  group="$(group_of "$folder/pid")"
  if [[ -n "$group" ]]; then
    end_group "$group" "$SECONDS_LEFT"
    say "attempt $number, group $group, has ended with $(cat "$folder/exit" 2> /dev/null || echo 'SIGKILL')"
  fi
done
say "nothing of run $RUN is left on this host"
