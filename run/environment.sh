# Sourced by quickstart.sh and test.sh. `environment [EXTRA]` sets PYTHON to an interpreter that has the library's requirements
# (and those of the extra in setup.py): the one that PYTHON names, else that of the active environment, else that of .venv,
# which is made. An environment of yours gets only what it lacks; nothing in it is changed or replaced.
# Run from the repository's root.

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

environment() {
  local extra="${1:-}" candidate missing pins
  if [ -z "${PYTHON:-}" ] && [ -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
    PYTHON="$(command -v python)"
  fi
  if [ -z "${PYTHON:-}" ]; then
    own_environment "$extra"
    return
  fi
  if ! is_recent "$PYTHON"; then
    echo "$PYTHON is no Python 3.11 or newer. Set PYTHON to one, or leave the environment, and .venv is made." >&2
    return 1
  fi
  missing="$("$PYTHON" run/requirements.py missing "$extra")" || return 1
  if [ -n "$missing" ]; then
    echo "Installing what $PYTHON lacks:" $missing
    pins="$(mktemp)"
    "$PYTHON" run/requirements.py pins >"$pins"
    "$PYTHON" -m pip install -qq $missing --constraint "$pins" || return 1
    rm -f "$pins"
  fi
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # the clone itself need not be installed there
}

own_environment() {
  local extra="$1" candidate stamp
  if [ ! -x .venv/bin/python ]; then
    for candidate in python3 python3.13 python3.12 python3.11 python; do
      if is_recent "$candidate"; then break; fi
    done
    if ! is_recent "$candidate"; then
      echo "Python 3.11 or newer is needed, and none was found. Set PYTHON to one." >&2
      return 1
    fi
    echo "Making .venv with $("$candidate" --version)"
    "$candidate" -m venv .venv || return 1
  fi
  PYTHON="$PWD/.venv/bin/python"
  stamp=".venv/installed${extra:+-$extra}"
  if ! cat setup.py constraints.txt | cmp -s - "$stamp"; then
    echo "Installing into .venv (a minute or two)"
    "$PYTHON" -m pip install -qq -e ".${extra:+[$extra]}" -c constraints.txt || return 1
    cat setup.py constraints.txt >"$stamp"
  fi
}
