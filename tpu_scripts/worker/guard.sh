#!/usr/bin/env bash
# A watchdog on this host: deletes the slices of the run at a time limit, or once nothing of the run is alive on this host
# and nobody has looked at it for a while. It needs no other machine, so it works when the one that started the run is
# gone.
USAGE="usage: guard.sh RUN --api=tpu|compute --node=NAME --until=SECONDS [--idle_minutes=20]
         [--queued=NAME | --group=NAME] [--zone=ZONE] [--project=ID]
--until: seconds since 1970. --queued, --group: the queued resource or the managed group that the node belongs to, which
is deleted as a whole. --node and --group can be repeated for the other slices of the run, this host's own first.
--zone, --project: without them the VM's own.
A look is a call of setup.sh, start.sh, state.sh or stop.sh.
exit code: 0 it watches; 77 it watches, but may not delete them, and says why; 2 refused"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TPU_API="${JAXFT_TPU_API:-https://tpu.googleapis.com}"
COMPUTE_API="${JAXFT_COMPUTE_API:-https://compute.googleapis.com}"
IAM_API="${JAXFT_IAM_API:-https://cloudresourcemanager.googleapis.com}"
POLL="${JAXFT_GUARD_POLL:-30}"
PATIENCE="${JAXFT_GUARD_PATIENCE:-20}" # rounds in which this host's own slice waits for the deletion of another that is refused

(($# >= 1)) || usage
ARGUMENTS=("$@") RUN="$1"
shift
check_run "$RUN"
API="" UNTIL="" IDLE=20 QUEUED="" ZONE="" PROJECT="" NODE_NAMES=() GROUP_NAMES=()
for argument in "$@"; do
  value="${argument#*=}"
  case "$argument" in
    --api=*) API="$value" ;;
    --node=?*) NODE_NAMES+=("$value") ;;
    --until=*) UNTIL="$value" ;;
    --idle_minutes=*) IDLE="$value" ;;
    --queued=*) QUEUED="$value" ;;
    --group=?*) GROUP_NAMES+=("$value") ;;
    --zone=*) ZONE="$value" ;;
    --project=*) PROJECT="$value" ;;
    *) usage ;;
  esac
done
[[ "$UNTIL" =~ ^[0-9]+$ ]] || refuse "--until is '$UNTIL', not seconds since 1970: $((60 * 60)) more than now is an hour"
[[ "$IDLE" =~ ^[1-9][0-9]*$ ]] || refuse "--idle_minutes is '$IDLE', not a whole number from 1"
((${#NODE_NAMES[@]})) || refuse "--node is missing: the name of this host's node or instance"
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

# What is deleted, this host's own last, and the permission for it.
targets() {
  local within name kind names=("${NODE_NAMES[@]}")
  QUERY=""
  if [[ "$API" == tpu ]]; then
    within="$TPU_API/v2/projects/$PROJECT/locations/$ZONE" kind=nodes PERMISSION=tpu.nodes.delete
    if [[ -n "$QUEUED" ]]; then
      kind=queuedResources names=("$QUEUED") QUERY="?force=true" PERMISSION=tpu.queuedResources.delete
    fi
  else
    within="$COMPUTE_API/compute/v1/projects/$PROJECT/zones/$ZONE" kind=instances PERMISSION=compute.instances.delete
    if ((${#GROUP_NAMES[@]})); then
      kind=instanceGroupManagers names=("${GROUP_NAMES[@]}") PERMISSION=compute.instanceGroupManagers.delete
    fi
  fi
  URLS=()
  for name in "${names[@]}"; do URLS=("$within/$kind/$name" "${URLS[@]}"); done
}

status_of() { as_service_account --output /dev/null --write-out '%{http_code}' "$@" || true; }

# Prints why it may not delete the slices, or nothing.
obstacle() {
  local scopes code granted url
  if ! scopes="$(metadata instance/service-accounts/default/scopes 2> /dev/null)"; then
    echo "this VM has no service account: create it with one, and with --scopes=cloud-platform"
    return
  fi
  if [[ "$scopes" != *auth/cloud-platform* ]]; then
    echo "the scopes of this VM's service account lack cloud-platform: create it with --scopes=cloud-platform"
    return
  fi
  for url in "${URLS[@]}"; do
    code="$(status_of "$url")"
    if [[ "$code" != 200 ]]; then
      echo "$url answers with $code: check the name, zone and project, and that the service account of this VM has a role with $PERMISSION"
      return
    fi
  done
  # It does not say what it may where this API is not enabled; the read above has to do then.
  granted="$(as_service_account --fail -H "Content-Type: application/json" --data "{\"permissions\": [\"$PERMISSION\"]}" \
    "$IAM_API/v1/projects/$PROJECT:testIamPermissions" 2> /dev/null)" || return 0
  [[ "$granted" == *"$PERMISSION"* ]] \
    || echo "the service account of this VM lacks $PERMISSION in project $PROJECT: give it a role with this permission"
}

# Prints why the slices are to be deleted now, or nothing.
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

# delete_all WHY: asks for the deletion of every slice, this host's own last, because this process ends with it. While the
# API refuses another one, its own waits. Fails until the API no longer knows of any.
delete_all() {
  local url code left=0 refused=0 own="${URLS[-1]}"
  ROUNDS=$((ROUNDS + 1))
  for url in "${URLS[@]}"; do
    if [[ "$url" == "$own" ]] && ((refused && ROUNDS <= PATIENCE)); then
      say "$(date -u +%FT%TZ) $own waits for the deletion of the others"
      return 1
    fi
    say "$(date -u +%FT%TZ) $1: deletes $url"
    code="$(status_of --request DELETE "$url$QUERY")"
    say "$(date -u +%FT%TZ) the API answers with $code"
    [[ "$code" == 404 ]] || left=1
    [[ "$code" == 404 || "$code" == 2* ]] || refused=1
  done
  return "$left"
}

watch() {
  local why
  ROUNDS=0
  record_pid "$RUNS/guard/pid"
  exec 9>&-
  while sleep "$POLL"; do
    why="$(reason)"
    [[ -n "$why" ]] || continue
    if delete_all "$why"; then break; fi
  done
}

[[ -n "$ZONE" ]] || ZONE="$(own_zone)" || refuse "--zone is missing, and there is no metadata server to ask"
[[ -n "$PROJECT" ]] || PROJECT="$(own_project)" || refuse "--project is missing, and there is no metadata server to ask"
targets
if [[ -n "${JAXFT_DETACHED:-}" ]]; then
  watch
  exit "$DONE"
fi
note_activity "$RUN"
why_not="$(obstacle)"
detach guard guard.sh "${ARGUMENTS[@]}"
[[ -z "$why_not" ]] || refuse "MAY NOT delete the slices: $why_not" "$NOT_PERMITTED"
say "deletes ${URLS[*]} at $(date -u -d "@$UNTIL" +%FT%TZ), or $IDLE minutes after the last look with nothing alive"
