#!/usr/bin/env bash
# Brings this checkout to every host and installs it there, with the versions of constraints/. Run it again to update.
USAGE="usage: setup_workers.sh --name=NAME --zone=ZONE --run=RUN [--project=ID] [--api=tpu|compute] [--hours=H]
         [--queued] [--extras=gcs,tpu] [--dry-run] [-- FILE ...]
FILE: files and folders, named from the root of the checkout, that the run reads there under the same names.
--hours: the watchdog of the first host deletes the slice after so long, or when nobody has looked at it for 20 minutes
and nothing runs. It needs a service account that may delete it, and says so if it may not. --queued: the slice came from
the queue, so that the watchdog deletes the queued resource of this name."
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OWN=" run hours extras | queued "
RUN="" HOURS="" EXTRAS="gcs,tpu" QUEUED=false
parse "$@"
check_run "$RUN"
[[ -z "$HOURS" || "$HOURS" =~ ^[1-9][0-9]*$ ]] || refuse "--hours='$HOURS' is not a whole number from 1"
[[ "$EXTRAS" =~ ^[a-z]+(,[a-z]+)*$ ]] || refuse "--extras='$EXTRAS' is not a list of names with commas between them"

CHECKOUT="$(dirname "$SCRIPTS")"
FOLDER="$(mktemp -d)"
trap 'rm -rf "$FOLDER"' EXIT
mkdir "$FOLDER/pack" "$FOLDER/pack/source"
for name in setup.py README.md LICENSE jaxft configs tpu_scripts; do
  cp -R "$CHECKOUT/$name" "$FOLDER/pack/source/"
done
cp -R "$SCRIPTS/worker" "$FOLDER/pack/"
find "$FOLDER/pack" -name __pycache__ -prune -exec rm -rf {} +
# libtpu is the one that jax asks for on a TPU; constraints/ names the one that plans are made with.
grep -v '^libtpu==' "$CHECKOUT/constraints/3.12.txt" > "$FOLDER/pack/lock.txt"
printf '%s' "$EXTRAS" > "$FOLDER/pack/extras.txt"
for file in ${REST[@]+"${REST[@]}"}; do
  [[ "$file" != /* && "/$file/" != */../* ]] || refuse "$file is not named from the root of the checkout"
  [[ -e "$CHECKOUT/$file" ]] || refuse "there is no $file in $CHECKOUT"
  mkdir -p "$FOLDER/pack/$(dirname "$file")"
  cp -R "$CHECKOUT/$file" "$FOLDER/pack/$file"
done
# The same files give the same archive where tar is GNU's.
stable=()
! tar --version | grep -q GNU || stable=(--sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner)
tar -C "$FOLDER/pack" ${stable[@]+"${stable[@]}"} -cf - . | gzip -n > "$FOLDER/archive"
HASH="$({ sha256sum "$FOLDER/archive" 2> /dev/null || shasum -a 256 "$FOLDER/archive"; } | cut -d ' ' -f 1)"
ARCHIVE="jaxft-$HASH.tar.gz"
LOCAL="${TMPDIR:-/tmp}/$ARCHIVE" # it stays there, so that what --dry-run prints can be pasted
mv "$FOLDER/archive" "$LOCAL"

on_workers all mkdir -p "$REMOTE"
copy_to_workers "$LOCAL" "$REMOTE/$ARCHIVE"
on_workers all tar -xzf "$REMOTE/$ARCHIVE" -C "$REMOTE" ./worker
on_workers all bash "$REMOTE/worker/setup.sh" "$RUN" "$REMOTE/$ARCHIVE"
if [[ -n "$HOURS" ]]; then
  node=("--api=$API" "--node=$NAME")
  ! $QUEUED || node+=("--queued=$NAME")
  on_workers 0 bash "$REMOTE/worker/guard.sh" "$RUN" "--until=$(($(date +%s) + 3600 * HOURS))" "${node[@]}" "${WHERE[@]}"
fi
