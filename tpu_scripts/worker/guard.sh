#!/usr/bin/env bash
# A watchdog on this host: deletes the host's own node at a time limit, or once nothing of the run is alive and nobody
# has looked at it for a while. It needs no other machine, so it works when the one that started the run is gone.
USAGE="usage: guard.sh RUN --api=tpu|compute --node=NAME --until=SECONDS [--idle_minutes=20]
         [--queued=NAME | --group=NAME] [--zone=ZONE] [--project=ID]
--until: seconds since 1970. --queued, --group: the queued resource or the managed group that the node belongs to, which
is deleted as a whole. --zone, --project: without them the VM's own.
A look is a call of setup.sh, start.sh, state.sh or stop.sh.
exit code: 0 it watches; 77 it watches, but may not delete the node, and says why; 2 refused"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TPU_API="${JAXFT_TPU_API:-https://tpu.googleapis.com}"
COMPUTE_API="${JAXFT_COMPUTE_API:-https://compute.googleapis.com}"
IAM_API="${JAXFT_IAM_API:-https://cloudresourcemanager.googleapis.com}"
POLL="${JAXFT_GUARD_POLL:-30}"

(($# >= 1)) || usage
ARGUMENTS=("$@") RUN="$1"
shift
check_run "$RUN"
API="" NODE="" UNTIL="" IDLE=20 QUEUED="" GROUP="" ZONE="" PROJECT=""
for argument in "$@"; do
  value="${argument#*=}"
  case "$argument" in
    --api=*) API="$value" ;;
    --node=*) NODE="$value" ;;
    --until=*) UNTIL="$value" ;;
    --idle_minutes=*) IDLE="$value" ;;
    --queued=*) QUEUED="$value" ;;
    --group=*) GROUP="$value" ;;
    --zone=*) ZONE="$value" ;;
    --project=*) PROJECT="$value" ;;
    *) usage ;;
  esac
done
[[ "$UNTIL" =~ ^[0-9]+$ ]] || refuse "--until is '$UNTIL', not seconds since 1970: $((60 * 60)) more than now is an hour"
[[ "$IDLE" =~ ^[1-9][0-9]*$ ]] || refuse "--idle_minutes is '$IDLE', not a whole number from 1"
[[ -n "$NODE" ]] || refuse "--node is missing: the name of this host's node or instance"
[[ "$API" == tpu || "$API" == compute ]] || refuse "--api is '$API', not tpu or compute"
RUNS="$ROOT/runs/$RUN"
mkdir -p "$RUNS/guard"

# Where it is, from the metadata server. A TPU VM may be in a project of Google's own, and names the user's in tpu-env.
own_zone() { metadata instance/zone | sed 's|.*/||'; }
own_project() {
  local project
  project="$(metadata instance/attributes/tpu-env 2> /dev/null | sed -n "s/^CONSUMER_PROJECT_ID: *'\{0,1\}\([^']*\)'\{0,1\}$/\1/p")"
  if [[ -n "$project" ]]; then echo "$project"; else metadata project/project-id; fi
}

# What is deleted, and the permission for it.
target() {
  local within
  if [[ "$API" == tpu ]]; then
    within="$TPU_API/v2/projects/$PROJECT/locations/$ZONE"
    if [[ -n "$QUEUED" ]]; then
      URL="$within/queuedResources/$QUEUED" QUERY="?force=true" PERMISSION=tpu.queuedResources.delete
    else
      URL="$within/nodes/$NODE" QUERY="" PERMISSION=tpu.nodes.delete
    fi
  else
    within="$COMPUTE_API/compute/v1/projects/$PROJECT/zones/$ZONE"
    if [[ -n "$GROUP" ]]; then
      URL="$within/instanceGroupManagers/$GROUP" QUERY="" PERMISSION=compute.instanceGroupManagers.delete
    else
      URL="$within/instances/$NODE" QUERY="" PERMISSION=compute.instances.delete
    fi
  fi
}

status_of() { as_service_account --output /dev/null --write-out '%{http_code}' "$@" || true; }

# Prints why it may not delete the node, or nothing.
obstacle() {
  local scopes code granted
  if ! scopes="$(metadata instance/service-accounts/default/scopes 2> /dev/null)"; then
    echo "this VM has no service account: create it with one, and with --scopes=cloud-platform"
    return
  fi
  if [[ "$scopes" != *auth/cloud-platform* ]]; then
    echo "the scopes of this VM's service account lack cloud-platform: create it with --scopes=cloud-platform"
    return
  fi
  code="$(status_of "$URL")"
  if [[ "$code" != 200 ]]; then
    echo "$URL answers with $code: check the name, zone and project, and that the service account of this VM has a role with $PERMISSION"
    return
  fi
  # It does not say what it may where this API is not enabled; the read above has to do then.
  granted="$(as_service_account --fail -H "Content-Type: application/json" --data "{\"permissions\": [\"$PERMISSION\"]}" \
    "$IAM_API/v1/projects/$PROJECT:testIamPermissions" 2> /dev/null)" || return 0
  [[ "$granted" == *"$PERMISSION"* ]] \
    || echo "the service account of this VM lacks $PERMISSION in project $PROJECT: give it a role with this permission"
}

# Prints why the node is to be deleted now, or nothing.
reason() {
  local time last number newest ended
  time="$(now)"
  if ((time >= UNTIL)); then
    echo "the time limit is reached"
    return
  fi
  for number in $(attempts_of "$RUN"); do
    [[ -z "$(group_of "$RUNS/attempts/$number/pid")" ]] || return 0
  done
  last="$(cat "$RUNS/activity" 2> /dev/null || echo 0)"
  ((time - last >= 60 * IDLE)) || return 0
  newest="$(attempts_of "$RUN" | tail -n 1)"
  ended="$(cat "$RUNS/attempts/${newest:-0}/exit" 2> /dev/null || true)"
  if [[ -n "$ended" ]]; then
    echo "attempt $newest ended with $ended, and nobody has looked at it for $IDLE minutes"
  else
    echo "nothing of the run is alive, and nobody has looked at it for $IDLE minutes"
  fi
}

watch() {
  local why code
  record_pid "$RUNS/guard/pid"
  exec 9>&-
  while sleep "$POLL"; do
    why="$(reason)"
    [[ -n "$why" ]] || continue
    say "$(date -u +%FT%TZ) $why: deletes $URL"
    code="$(status_of --request DELETE "$URL$QUERY")"
    say "$(date -u +%FT%TZ) the API answers with $code"
    if [[ "$code" == 404 ]]; then break; fi
  done
}

[[ -n "$ZONE" ]] || ZONE="$(own_zone)" || refuse "--zone is missing, and there is no metadata server to ask"
[[ -n "$PROJECT" ]] || PROJECT="$(own_project)" || refuse "--project is missing, and there is no metadata server to ask"
target
if [[ -n "${JAXFT_DETACHED:-}" ]]; then
  watch
  exit "$DONE"
fi
note_activity "$RUN"
why_not="$(obstacle)"
detach guard guard.sh "${ARGUMENTS[@]}"
[[ -z "$why_not" ]] || refuse "MAY NOT delete the node: $why_not" "$NOT_PERMITTED"
say "deletes $URL at $(date -u -d "@$UNTIL" +%FT%TZ), or $IDLE minutes after the last look with nothing alive"
