# Sourced by run.sh and study.sh, which set root, the project's folder: the interpreter, what it lacks, scratch.
#
# PYTHON names the interpreter. A machine without a package index gets what is missing from
# wheels/ in the project's folder:
#     pip download --no-deps --only-binary=:all: -d wheels lightly lightly_utils kornia kornia-rs
# with --python-version and --platform of that machine.
set -euo pipefail
PYTHON=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if compgen -G "$root/wheels/*.whl" > /dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" "$root"/wheels/*.whl
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1
