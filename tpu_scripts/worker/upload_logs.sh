#!/usr/bin/env bash
# Copies the logs of a run on this host to a bucket or a mounted folder every minute, so that they outlive the host.
USAGE="usage: upload_logs.sh RUN WORKER --to=gs://BUCKET/FOLDER|FOLDER
WORKER: the number of this host in the run. The logs are at TO/logs/attempt-N/worker-WORKER.log, with .exit beside them
once the attempt has ended. It ends with the last attempt of the run, and is started again with the next.
exit code: 0 it uploads; 2 refused, or the first upload failed, and it says why"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

STORAGE="${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}"
POLL="${JAXFT_UPLOAD_POLL:-60}"

(($# == 3)) && [[ "$3" == --to=?* ]] || usage
ARGUMENTS=("$@") RUN="$1" WORKER="$2" TO="${3#--to=}"
TO="${TO%/}"
check_run "$RUN"
[[ "$WORKER" =~ ^[0-9]+$ ]] || refuse "WORKER is '$WORKER', not a whole number"
[[ "$TO" == gs://?*/?* || "$TO" == /* ]] || refuse "--to=$TO is neither gs://BUCKET/FOLDER nor a folder from /"
RUNS="$ROOT/runs/$RUN"
mkdir -p "$RUNS/upload"

# A name of an object as a part of an address.
encoded() {
  local LC_ALL=C text="$1" i byte
  for ((i = 0; i < ${#text}; i++)); do
    case "${text:i:1}" in
      [a-zA-Z0-9._~-]) printf '%s' "${text:i:1}" ;;
      *)
        printf -v byte %d "'${text:i:1}"
        printf '%%%02X' $((byte & 255))
        ;;
    esac
  done
}

# put FILE NAME: one file, whole or not at all.
put() {
  local bucket name code
  if [[ "$TO" == /* ]]; then
    mkdir -p "$(dirname "$TO/$2")" && cp "$1" "$TO/$2.partial" && mv -f "$TO/$2.partial" "$TO/$2"
    return
  fi
  bucket="${TO#gs://}"
  name="${bucket#*/}/$2"
  bucket="${bucket%%/*}"
  code="$(as_service_account --output /dev/null --write-out '%{http_code}' -H "Content-Type: text/plain" \
    --max-time 600 --data-binary "@$1" "$STORAGE/upload/storage/v1/b/$bucket/o?uploadType=media&name=$(encoded "$name")")" || return 1
  [[ "$code" == 200 ]] || { say "$TO/$2: the bucket answers with $code" >&2 && return 1; }
}

# Uploads each log that has changed. A file's new size is noted once it is there.
upload() {
  local number file name size failed=0
  for number in $(attempts_of "$RUN"); do
    for file in log exit; do
      [[ -f "$RUNS/attempts/$number/$file" ]] || continue
      name="logs/attempt-$number/worker-$WORKER.$file"
      size="$(stat -c %s "$RUNS/attempts/$number/$file")"
      [[ "$(cat "$RUNS/upload/$number.$file" 2> /dev/null)" != "$size" ]] || continue
      if put "$RUNS/attempts/$number/$file" "$name"; then write "$RUNS/upload/$number.$file" "$size"; else failed=1; fi
    done
  done
  ((failed)) || touch "$RUNS/upload/done"
  return "$failed"
}

alive() {
  local number
  for number in $(attempts_of "$RUN"); do
    [[ -z "$(group_of "$RUNS/attempts/$number/pid")" ]] || return 0
  done
  return 1
}

# Logs go on until all has ended; what came before the end is uploaded after it, three times if it must.
loop() {
  local going i
  record_pid "$RUNS/upload/pid"
  exec 9>&-
  while true; do
    if alive; then going=true; else going=false; fi
    if upload; then
      $going || return 0
    elif ! $going; then
      for ((i = 0; i < 3; i++)); do
        sleep "$POLL"
        if upload; then return 0; fi
      done
      refuse "the last logs could not be uploaded"
    fi
    sleep "$POLL"
  done
}

if [[ -n "${JAXFT_DETACHED:-}" ]]; then
  loop
  exit "$DONE"
fi
upload || refuse "$TO does not take the logs: give the service account of this VM a role with storage.objects.create there"
detach upload upload_logs.sh "${ARGUMENTS[@]}"
