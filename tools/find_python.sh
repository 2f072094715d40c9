#!/bin/sh
# Print a Python >= 3.12: $PYTHON, then what is on the PATH, then pyenv's, 3.12 first (the version
# the pinned packages were tested with).
is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}
pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
if [ -n "$PYTHON" ]; then
    is_new_enough "$PYTHON" && echo "$PYTHON" && exit 0
    echo "PYTHON=$PYTHON is no Python >= 3.12." >&2
    exit 1
fi
for minor in 12 13 14; do
    for candidate in "python3.$minor" "$pyenv_root/versions/3.$minor".*/bin/python; do
        is_new_enough "$candidate" && echo "$candidate" && exit 0
    done
done
is_new_enough python3 && echo python3 && exit 0
echo "No Python >= 3.12 found on the PATH or under $pyenv_root: install one (pyenv install 3.12)" \
    "or name it with PYTHON=/path/to/python3.12." >&2
exit 1
