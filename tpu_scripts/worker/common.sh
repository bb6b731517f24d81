# shellcheck shell=bash
# Sourced by the scripts of this folder, which run on a host of a slice. All that they keep is under $ROOT:
#   worker/                  these scripts
#   packs/HASH/              an archive, unpacked; venvs/HASH/ its environment
#   runs/RUN/pack            -> the pack that the run uses
#   runs/RUN/env             its secrets, mode 600
#   runs/RUN/attempts/N/     pid, log, and exit once the attempt has ended
# The variables below can be set in the environment, so that a folder and a few files can play a host.

set -Eeuo pipefail
trap 'echo "$0: line $LINENO has failed" >&2' ERR
umask 077

ROOT="${JAXFT_WORKER_ROOT:-$HOME/jaxft-pod}"
DEV="${JAXFT_DEV:-/dev}"                                  # where the chips' devices are
LOCKFILE="${JAXFT_LIBTPU_LOCKFILE:-/tmp/libtpu_lockfile}" # what libtpu leaves behind when it is killed
METADATA="${JAXFT_METADATA:-http://metadata.google.internal}"
DONE=0 REFUSED=2 BUSY=16 NOT_PERMITTED=77
export DONE REFUSED BUSY NOT_PERMITTED LOCKFILE METADATA

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*"; }

refuse() {
  say "$1" >&2
  exit "${2:-$REFUSED}"
}

usage() {
  printf '%s\n' "$USAGE" >&2
  exit "$REFUSED"
}

# JAXFT_CLOCK names a file with the seconds since 1970, for tests.
now() { if [[ -n "${JAXFT_CLOCK:-}" ]]; then cat "$JAXFT_CLOCK"; else date +%s; fi; }

# Both become names of folders.
check_run() {
  [[ "$1" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || refuse "the run '$1' is not a name of lower-case letters, digits and -"
}
check_attempt() { [[ "$1" =~ ^[1-9][0-9]*$ ]] || refuse "the attempt '$1' is not a number from 1"; }

# write FILE TEXT: whole or not at all.
write() {
  printf '%s\n' "$2" > "$1.partial.$$"
  mv -f "$1.partial.$$" "$1"
}

# Whoever looks at a run or changes it says so here; the guard takes a run that nobody looks at for forgotten.
note_activity() { write "$ROOT/runs/$1/activity" "$(now)"; }

# The numbers of the attempts of a run, the newest last.
attempts_of() {
  local folder
  for folder in "$ROOT/runs/$1/attempts"/*/; do
    [[ ! -d "$folder" ]] || basename "$folder"
  done | sort -n
}

# What identifies a process for as long as the machine runs: the number of a process is used again after its end.
start_of() { sed 's/.*) //' "/proc/$1/stat" 2> /dev/null | cut -d ' ' -f 20; }
boot_id() { cat /proc/sys/kernel/random/boot_id; }

# The processes of a group that have not ended.
members() { ps -e -o pid=,pgid=,stat= | awk -v group="$1" '$2 == group && $3 !~ /^Z/ { print $1 }'; }

# group_of FILE: the number of the group that a pid file names, or nothing if all of it has ended.
group_of() {
  local group boot start
  [[ -f "$1" ]] || return 0
  read -r group boot start < "$1"
  [[ "$boot" == "$(boot_id)" ]] || return 0
  [[ ! -e "/proc/$group" || "$(start_of "$group")" == "$start" ]] || return 0
  [[ -z "$(members "$group")" ]] || echo "$group"
}

# Writes this process, the leader of its group, into a pid file.
record_pid() { write "$1" "$$ $(boot_id) $(start_of $$)"; }

# end_group GROUP SECONDS: SIGTERM, by which `jaxft train` saves; SIGKILL for whatever is left after SECONDS.
end_group() {
  local left=$((10 * $2))
  kill -TERM -- "-$1" 2> /dev/null || true
  while [[ -n "$(members "$1")" ]]; do
    if ((left-- <= 0)); then
      say "group $1 has not ended $2 s after SIGTERM: SIGKILL"
      kill -KILL -- "-$1" 2> /dev/null || true
      while [[ -n "$(members "$1")" ]]; do sleep 0.1; done
    else
      sleep 0.1
    fi
  done
}

as_root() {
  if ((EUID)) && sudo -n true 2> /dev/null; then sudo -n "$@"; else "$@"; fi
}

chips() {
  local device count=0
  for device in "$DEV"/accel* "$DEV"/vfio/[0-9]*; do
    [[ ! -e "$device" ]] || count=$((count + 1))
  done
  echo "$count"
}

# One line for each process that has a chip open: its number, its name and the device. A process that ends while all
# are looked at makes `find` fail.
holders() {
  local folder device pid name
  { as_root find /proc/[0-9]*/fd -maxdepth 1 \( -lname "$DEV/accel*" -o -lname "$DEV/vfio/*" \) -printf '%h %l\n' \
    2> /dev/null || true; } | sort -u | while read -r folder device; do
    pid="${folder#/proc/}"
    pid="${pid%/fd}"
    name="$({ tr -d ' ' < "/proc/$pid/comm"; } 2> /dev/null || true)"
    echo "$pid ${name:-?} $device"
  done
}

# metadata PATH: a value of the VM's metadata server; fails where there is none.
metadata() { curl --silent --show-error --fail --max-time 10 -H "Metadata-Flavor: Google" "$METADATA/computeMetadata/v1/$1"; }

# as_service_account CURL-ARGUMENTS: with the VM's token, which curl reads from its stdin and no command line shows.
as_service_account() {
  local token
  token="$(metadata instance/service-accounts/default/token | sed -n 's/.*"access_token" *: *"\([^"]*\)".*/\1/p')"
  printf 'header = "Authorization: Bearer %s"\n' "$token" | curl --silent --show-error --max-time 60 --config - "$@"
}

# detach NAME SCRIPT ARGUMENT...: runs a script of this folder in a group of its own, unless the same one runs already
# with the same arguments; one with others is ended first. Its pid and log are in runs/RUN/NAME.
detach() {
  local folder="$ROOT/runs/$RUN/$1" script="$2" old i
  shift 2
  exec 9> "$folder/lock"
  flock --wait 60 9 || refuse "another start of $script has not ended in 60 s" "$BUSY"
  old="$(group_of "$folder/pid")"
  if [[ -n "$old" ]]; then
    if [[ "$(cat "$folder/arguments" 2> /dev/null)" == "$*" ]]; then
      say "runs already, as $old"
      return
    fi
    end_group "$old" 5
  fi
  rm -f "$folder/pid"
  write "$folder/arguments" "$*"
  JAXFT_DETACHED=yes setsid bash "$(dirname "${BASH_SOURCE[0]}")/$script" "$@" < /dev/null >> "$folder/log" 2>&1 &
  exec 9>&-
  for ((i = 0; i < 100; i++)); do
    if [[ -f "$folder/pid" ]]; then
      say "runs as $(cut -d ' ' -f 1 "$folder/pid"); its log is $folder/log"
      return
    fi
    sleep 0.1
  done
  refuse "has not begun after 10 s; see $folder/log"
}
