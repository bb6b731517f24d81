#!/usr/bin/env bash
# Installs jaxft from a git repository into ~/jaxft/.venv on every worker. Run it again to update.
USAGE="usage: setup_workers.sh --name=NAME --zone=ZONE --repo=URL [--ref=main] [--python=python3.11]
         [--project=ID] [--dry-run]"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

REPO="" REF="main" PYTHON="python3.11"
own_option() {
  case "$1" in
    --repo) REPO="$2" ;;
    --ref) REF="$2" ;;
    --python) PYTHON="$2" ;;
    *) return 1 ;;
  esac
}
parse "$@"
[[ -n "$REPO" ]] || refuse "--repo is missing: the git address of jaxft that the workers can reach"
# They become parts of a command on the workers.
[[ "$PYTHON" =~ ^python3(\.[0-9]+)?$ ]] || refuse "--python=$PYTHON is not a name such as python3.11"
printf -v repo '%q' "$REPO"
printf -v ref '%q' "$REF"

# TPU VM images have had Python 3.10; jaxft needs 3.11 or newer.
on_all_workers "set -e
if ! command -v $PYTHON > /dev/null; then
  sudo apt-get update -qq
  sudo apt-get install -y -qq software-properties-common
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  sudo apt-get install -y -qq $PYTHON $PYTHON-venv
fi
[ -d ~/jaxft ] || git clone $repo ~/jaxft
cd ~/jaxft
git fetch origin $ref
git checkout --detach FETCH_HEAD
[ -d .venv ] || $PYTHON -m venv .venv
.venv/bin/pip install --quiet --upgrade pip
.venv/bin/pip install --quiet --editable '.[tpu]'
.venv/bin/python -c 'import jaxft; print(\"jaxft\", jaxft.__version__)'"
