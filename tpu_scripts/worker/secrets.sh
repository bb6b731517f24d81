#!/usr/bin/env bash
# Takes the secrets of a run from stdin into a file of mode 600, which every attempt reads. No command line holds them.
USAGE="usage: secrets.sh RUN MARK < FILE
FILE: lines such as export HF_TOKEN='...', and a last line # MARK, by which a broken connection is recognised
exit code: 0 they are here; 2 refused, or the file is not whole"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# == 2)) || usage
RUN="$1" MARK="$2"
check_run "$RUN"
[[ "$MARK" =~ ^[0-9a-f]{8,}$ ]] || refuse "MARK is '$MARK', not eight or more hexadecimal digits"
mkdir -p "$ROOT/runs/$RUN"
file="$ROOT/runs/$RUN/env"
cat > "$file.partial.$$"
if [[ "$(tail -n 1 "$file.partial.$$")" == "# $MARK" ]]; then
  mv -f "$file.partial.$$" "$file"
  say "the secrets of run $RUN are here"
  exit "$DONE"
fi
rm -f "$file.partial.$$"
# gcloud repeats a command after a broken connection, with nothing left on its stdin.
[[ -f "$file" && "$(tail -n 1 "$file")" == "# $MARK" ]] || refuse "the secrets of run $RUN did not arrive whole: send them again"
say "the secrets of run $RUN are here already"
