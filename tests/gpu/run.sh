#!/usr/bin/env bash
# What a GPU is asked in seven minutes, the most valuable first (run.py has the stages):
#
#     tests/gpu/run.sh OUT              # OUT/log.txt, OUT/figures.jsonl
#     tests/gpu/run.sh --dry_run OUT    # the same on the CPU at tiny sizes
#     python tests/gpu/table.py OUT     # then writes the figures into docs/measured.md
#
# environment.sh tells what it runs with.
root=$(cd "$(dirname "$0")/../.." && pwd)
. "$root/tests/gpu/environment.sh"
"$PYTHON" "$root/tests/gpu/run.py" "$@"
