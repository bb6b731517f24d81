#!/usr/bin/env bash
# Prints one line of JSON on an attempt of a run on this host. It changes nothing but the time of the last look.
USAGE="usage: state.sh RUN [ATTEMPT]   (without ATTEMPT: the newest)
attempt: 0 before the first. pid: of its group. exit: the code of its command, null before its end, and for a command
that was killed with its group. log_age: seconds. disk_free, disk_total, log_bytes: bytes. environment: a digest of the
installed versions. upload_age: seconds since the last upload of logs. guard: whether the watchdog runs."
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# >= 1 && $# <= 2)) || usage
RUN="$1"
check_run "$RUN"
RUNS="$ROOT/runs/$RUN"
ATTEMPT="${2:-$(attempts_of "$RUN" | tail -n 1)}"
ATTEMPT="${ATTEMPT:-0}"
[[ "$ATTEMPT" == 0 ]] || check_attempt "$ATTEMPT"
FOLDER="$RUNS/attempts/$ATTEMPT"
[[ ! -d "$RUNS" ]] || note_activity "$RUN"

# A text as a JSON string. What is no UTF-8, and control characters, are left out.
text() { printf '"%s"' "$(printf '%s' "$1" | iconv -c -f utf-8 -t utf-8 | tr -d '\000-\037\177' | sed 's/[\\"]/\\&/g')"; }
# The content of a file, or null.
number_in() { cat "$1" 2> /dev/null || echo null; }
text_in() { if [[ -f "$1" ]]; then text "$(< "$1")"; else echo null; fi; }
age_of() { if [[ -f "$1" ]]; then echo $(($(date +%s) - $(stat -c %Y "$1"))); else echo null; fi; }
truth() { if "$@"; then echo true; else echo false; fi; }

group="$(group_of "$FOLDER/pid")"
# After the exit code, attempt.sh itself is gone in a moment; whatever stays longer was left behind by the command.
for ((i = 0; i < 20; i++)); do
  [[ -n "$group" && -f "$FOLDER/exit" ]] || break
  sleep 0.05
  group="$(group_of "$FOLDER/pid")"
done
pid=null
[[ ! -f "$FOLDER/pid" ]] || pid="$(cut -d ' ' -f 1 "$FOLDER/pid")"
# Before the log is read, so that an exit code never comes with a log from before the end.
exit_code="$(number_in "$FOLDER/exit")"
line="" bytes=0
if [[ -f "$FOLDER/log" ]]; then
  # Of a line that a progress bar writes over and over, the newest.
  line="$(tail -c 4000 "$FOLDER/log" | tr '\r' '\n' | tr -d '\000' | sed '/^[[:space:]]*$/d' | tail -n 1 | cut -c 1-1000)"
  bytes="$(stat -c %s "$FOLDER/log")"
fi
held=""
while read -r holder name device; do
  [[ -n "$holder" ]] || continue
  held+="${held:+, }{\"pid\": $holder, \"name\": $(text "$name"), \"device\": $(text "$device")}"
done <<< "$(holders)"
read -r total free <<< "$(df --output=size,avail -B1 "$HOME" | tail -n 1)"
pack=null
[[ ! -d "$RUNS/pack" ]] || pack="$(text "$(basename "$(readlink -f "$RUNS/pack")")")"

printf '{"run": "%s", "attempt": %s, "pid": %s, "alive": %s, "exit": %s, "stopped": %s' \
  "$RUN" "$ATTEMPT" "$pid" "$(truth test -n "$group")" "$exit_code" "$(truth test -f "$FOLDER/stopped")"
printf ', "last_line": %s, "log_age": %s, "log_bytes": %s' "$(text "$line")" "$(age_of "$FOLDER/log")" "$bytes"
printf ', "chips": %s, "holders": [%s], "disk_free": %s, "disk_total": %s' "$(chips)" "$held" "$free" "$total"
printf ', "boot": "%s", "pack": %s, "environment": %s' "$(boot_id)" "$pack" "$(text_in "$RUNS/pack/environment")"
printf ', "guard": %s, "upload_age": %s}\n' "$(truth test -n "$(group_of "$RUNS/guard/pid")")" "$(age_of "$RUNS/upload/done")"
