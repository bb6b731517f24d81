#!/usr/bin/env bash
# Unpacks the archive of a run and installs what it names into an environment of its own. It is safe to repeat.
USAGE="usage: setup.sh RUN ARCHIVE   (ARCHIVE: jaxft-HASH.tar.gz, named by its SHA-256)
JAXFT_PYTHON_ENV: an environment that already has what jaxft needs; nothing is installed then
exit code: 0 set up, or was set up before; 2 refused; another: of the command that failed, which says why"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

(($# == 2)) || usage
RUN="$1" ARCHIVE="$2"
check_run "$RUN"
[[ -f "$ARCHIVE" ]] || refuse "there is no archive $ARCHIVE: copy it again"
HASH="$(basename "$ARCHIVE" .tar.gz)"
HASH="${HASH#jaxft-}"
mkdir -p "$ROOT/runs/$RUN" "$ROOT/packs" "$ROOT/venvs"
note_activity "$RUN"
exec 8> "$ROOT/setup.lock"
flock --wait 3600 8 || refuse "another setup has not ended in an hour: see ps -ef | grep setup.sh"
PACK="$ROOT/packs/$HASH" VENV="${JAXFT_PYTHON_ENV:-$ROOT/venvs/$HASH}"

unpack() {
  [[ "$(sha256sum < "$ARCHIVE" | cut -d ' ' -f 1)" == "$HASH" ]] \
    || refuse "$ARCHIVE is not whole: its SHA-256 is not the one in its name. Copy it again."
  rm -rf "$PACK.partial"
  mkdir "$PACK.partial"
  tar -xzf "$ARCHIVE" -C "$PACK.partial"
  mv "$PACK.partial" "$PACK"
}

# apt is often still at work when a VM has just been created, so its lock is waited for.
apt() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=900 "$@"; }

# Images come with Python 3.10 to 3.12. uv brings 3.12 as it is; without uv apt has it, on 22.04 from deadsnakes.
make_environment() {
  rm -rf "$VENV"
  if command -v uv > /dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv; then
    PATH="$HOME/.local/bin:$PATH"
    uv venv --quiet --python 3.12 "$VENV"
    INSTALL=(uv pip install --quiet --python "$VENV/bin/python")
    return
  fi
  say "uv cannot be had; Python 3.12 comes from apt"
  if ! command -v python3.12 > /dev/null; then
    apt update -qq
    if ! apt install -y -qq python3.12 python3.12-venv; then
      apt install -y -qq software-properties-common
      as_root add-apt-repository -y ppa:deadsnakes/ppa
      apt update -qq
      apt install -y -qq python3.12 python3.12-venv
    fi
  fi
  python3.12 -m venv "$VENV"
  INSTALL=("$VENV/bin/python" -m pip install --quiet)
}

# The package is a wheel, as `jaxft pod run` packs it, or a checkout, as setup_workers.sh does.
install() {
  local package extras
  package="$(find "$PACK/wheel" "$PACK/source" -maxdepth 1 \( -name '*.whl' -o -name source \) 2> /dev/null | head -n 1 || true)"
  [[ -n "$package" ]] || refuse "$ARCHIVE holds no jaxft: pack it again"
  extras="$(< "$PACK/extras.txt")"
  mkdir -p "$PACK/bin"
  if [[ -z "${JAXFT_PYTHON_ENV:-}" ]]; then
    make_environment
    "${INSTALL[@]}" --constraint "$PACK/lock.txt" "jaxft[$extras] @ file://$package"
    mkdir -p "$PACK/site"
  else
    say "uses $VENV, with the jaxft of the archive before its own"
    if [[ -d "$package" ]]; then ln -s source "$PACK/site"; else "$VENV/bin/python" -m zipfile -e "$package" "$PACK/site"; fi
  fi
  printf '#!/usr/bin/env bash\nPYTHONPATH=%q exec %q "$@"\n' "$PACK/site" "$VENV/bin/python" > "$PACK/bin/python"
  printf '#!/usr/bin/env bash\nexec %q -m jaxft.cli "$@"\n' "$PACK/bin/python" > "$PACK/bin/jaxft"
  chmod +x "$PACK/bin/jaxft" "$PACK/bin/python"
  # The versions that this host has, compared with those of the others before the start.
  "$VENV/bin/python" -c 'import importlib.metadata as m
print(*sorted({f"{d.name}=={d.version}" for d in m.distributions()}), sep="\n")' > "$PACK/versions.txt"
  write "$PACK/environment" "$(sha256sum < "$PACK/versions.txt" | cut -d ' ' -f 1)"
}

if [[ -f "$PACK/environment" ]]; then
  say "$HASH is installed already"
else
  # A setup that broke off may have left a half of either.
  rm -rf "$PACK"
  unpack
  say "installs $HASH"
  install
fi

old="$(readlink "$ROOT/runs/$RUN/pack" 2> /dev/null || true)"
if [[ -n "$old" && "$old" != "$PACK" ]]; then
  for number in $(attempts_of "$RUN"); do
    [[ -z "$(group_of "$ROOT/runs/$RUN/attempts/$number/pid")" ]] \
      || refuse "attempt $number of run $RUN runs with $(basename "$old"): stop.sh $RUN, then set it up with another archive"
  done
fi
ln -sfn "$PACK" "$ROOT/runs/$RUN/pack.partial"
mv -fT "$ROOT/runs/$RUN/pack.partial" "$ROOT/runs/$RUN/pack"
note_activity "$RUN"
say "run $RUN uses $HASH: $("$PACK/bin/jaxft" --version)"
