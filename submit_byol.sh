#!/usr/bin/env bash
# Run train_byol_mammo.py under SLURM: sbatch submit_byol.sh --data_dir split_images/training ...
# All arguments are passed on; sbatch's own flags (--time, --partition, ...) go before the script's name.
# Shortly before the time limit the job gets SIGUSR1, saves its state and is requeued, then resumes.
# Set VENV to the environment to activate (default: .venv beside this file; empty = the active one).
#SBATCH --job-name=byol-mammo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=byol-%j.log

set -euo pipefail
project="${SLURM_SUBMIT_DIR:-$(dirname "$(readlink -f "$0")")}"
venv="${VENV-$project/.venv}"
[ -n "$venv" ] && [ -f "$venv/bin/activate" ] && source "$venv/bin/activate"

python "$project/train_byol_mammo.py" --wandb_mode offline "$@" &
training=$!
trap 'stopping=1; kill -USR1 "$training" 2>/dev/null || true' USR1
trap 'kill -TERM "$training" 2>/dev/null || true' TERM

status=0
wait "$training" || status=$?
if [ -n "${stopping:-}" ]; then
    # The first wait ended with the signal; this one ends when the state is saved.
    wait "$training" || status=$?
    if [ "$status" -eq 138 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
fi
exit "$status"
