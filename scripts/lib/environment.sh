# shellcheck shell=bash
# Selects the Python of the scripts. Source it, then call use_active_environment or ensure_environment EXTRA...

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
environment="$repository/.venv"
stamp="$environment/glm-image-environment"

fail() {
  echo "error: $*" >&2
  exit 1
}

in_triton_container() {
  [[ -x /opt/tritonserver/bin/tritonserver ]]
}

# Uses the active environment, or a container's Python, if it has all packages; installs nothing. Sets PYTHON.
use_active_environment() {
  [[ ${VIRTUAL_ENV:-} != "$environment" ]] || return 1
  [[ -n ${VIRTUAL_ENV:-} ]] || in_triton_container || return 1
  local python
  python=$(command -v python3) || return 1
  "$python" - <<'PYTHON' || return 1
import importlib.util
import sys
from pathlib import Path

needed = ["torch", "transformers", "diffusers", "tritonclient", "typer", "rich", "zmq"]
if not Path("/opt/tritonserver/bin/tritonserver").is_file():
    needed.append("pytriton")
sys.exit(any(importlib.util.find_spec(name) is None for name in needed))
PYTHON
  PYTHON=$python
  export PYTHONPATH="$repository/python_backends:$repository/client:$repository/gateway${PYTHONPATH:+:$PYTHONPATH}"
}

# Makes or updates .venv and sets PYTHON. Arguments: extras of pyproject.toml.
ensure_environment() {
  if [[ -x $environment/bin/python3 ]] && stamp_covers "$@"; then
    PYTHON="$environment/bin/python3"
    return
  fi
  local base
  base=$(find_python)
  if [[ " $* " == *" triton "* ]]; then
    PYTHONPATH="$repository/python_backends" "$base" -c \
      'import sys; from glm_image.supervisor.requirements import main; sys.exit(main())' || exit 1
  fi
  PYTHON="$environment/bin/python3"
  # Another script may be installing into this checkout.
  exec 9<"$repository/scripts"
  if command -v flock >/dev/null; then flock 9; fi
  make_environment "$base"
  if ! stamp_covers "$@"; then install "$@"; fi
  exec 9<&-
}

# Prints the first Python on PATH for which every pinned package has a release.
find_python() {
  local name candidates=(python3 python3.12 python3.11)
  if [[ -n ${GLM_IMAGE_PYTHON:-} ]]; then candidates=("$GLM_IMAGE_PYTHON"); fi
  for name in "${candidates[@]}"; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      "$name" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$(command -v "$name") has no venv or pip: install python3-venv and python3-pip (Debian, Ubuntu), or use another Python"
      "$name" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  fail "none of ${candidates[*]} is a Python 3.11 or 3.12: install one, or name it with GLM_IMAGE_PYTHON"
}

make_environment() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if ! "$environment/bin/python3" -c "import pip, sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
    echo "Making $environment with Python $version" >&2
    "$1" -m venv --clear "$environment"
  fi
}

install() {
  local extras
  # shellcheck disable=SC2046 # one extra a word
  extras=$(printf '%s\n' "$@" $(stamped_extras) | sort -u | paste -sd, -)
  echo "Installing into $environment: $extras (some minutes the first time)" >&2
  rm -f "$stamp"
  local quiet=--quiet
  if [[ -t 2 ]]; then quiet=; fi
  # shellcheck disable=SC2086 # one extra a word
  "$PYTHON" "$repository/scripts/lib/install_locked.py" $quiet ${extras//,/ } >&2 ||
    fail "the packages of $repository/requirements could not be installed; to start afresh, remove $environment"
  printf '%s\n%s\n' "$(fingerprint)" "${extras//,/ }" >"$stamp"
}

# Prints a hash of everything that determines the installed packages, except the extras.
fingerprint() {
  { cat "$repository/pyproject.toml" "$repository"/requirements/*.txt; "$environment/bin/python3" --version; } | sha256sum | cut -d' ' -f1
}

stamped_extras() {
  if [[ -f $stamp ]]; then sed -n 2p "$stamp"; fi
}

# Succeeds if the last complete installation has the same fingerprint and all of these extras.
stamp_covers() {
  [[ -f $stamp && $(head -n 1 "$stamp") == "$(fingerprint)" ]] || return 1
  local extra
  for extra in "$@"; do
    [[ " $(stamped_extras) " == *" $extra "* ]] || return 1
  done
}

# Prints the extras of a server; outside of Triton containers, Triton itself comes from the package index.
server_extras() {
  echo client server
  if ! in_triton_container; then echo triton; fi
}
