#!/usr/bin/env bash
# Prints where each process of the newest attempt is in its Python code, if py-spy is installed on this host.
USAGE="usage: dump.sh RUN
exit code: 0 also if there is nothing to print; 2 refused"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# == 1)) || usage
RUN="$1"
check_run "$RUN"
PATH="$PATH:$HOME/.local/bin"
if ! command -v py-spy > /dev/null; then
  say "py-spy is not installed here, so that the code in which the run hangs is not shown"
  exit "$DONE"
fi
newest="$(attempts_of "$RUN" | tail -n 1)"
group="$(group_of "$ROOT/runs/$RUN/attempts/${newest:-0}/pid")"
[[ -n "$group" ]] || exit "$DONE"
for pid in $(members "$group"); do
  as_root py-spy dump --pid "$pid" 2> /dev/null || true
done
