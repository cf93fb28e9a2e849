#!/usr/bin/env bash
# Run train_byol_mammo.py under SLURM: sbatch submit_byol.sh --data_dir split_images/training ...
#
# Arguments are passed on to the script; sbatch's flags (--time, --partition, ...) stand before this file.
#   more GPUs   sbatch --nodes=2 submit_byol.sh ...      or --gres=gpu:4 --ntasks-per-node=4: a task per GPU
#   no GPU      sbatch --gres=none submit_byol.sh ...
# Before the time limit, or by SIGTERM, the run saves its state; the job is requeued and resumes by itself.
#
# VENV            environment to activate (default: .venv beside this file; empty = the active one)
# MAX_REQUEUES    restarts after which the job stays stopped, in case it never gets anywhere (default: 100)
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

# The signal may come at any time. One is enough: a second would end the training without saving. USR1
# also stands for TERM, which some clusters send to the training as well as to this shell.
signals=0 training='' forwarded=''
# shellcheck disable=SC2317
forward() {
    signals=$((signals + 1))
    if [ -n "$training" ] && [ -z "$forwarded" ]; then
        forwarded=1
        kill -USR1 "$training" 2>/dev/null || true
    fi
}
trap forward USR1 TERM

# SLURM runs a copy of this file, so its folder is known from where sbatch was called.
project="${SLURM_SUBMIT_DIR:-$(dirname "$(readlink -f "$0")")}"
if [ ! -f "$project/train_byol_mammo.py" ]; then
    echo "error: no train_byol_mammo.py in $project: call sbatch in its folder" >&2
    exit 2
fi
venv="${VENV-$project/.venv}"
if [ -n "$venv" ] && [ -f "$venv/bin/activate" ]; then
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
elif [ -n "${VENV:-}" ]; then
    echo "error: no environment in VENV=$VENV" >&2
    exit 2
fi
# The same number of threads at each start keeps CPU runs equal bit for bit.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-$(nproc)}}"

command=(python3 "$project/train_byol_mammo.py" --wandb_mode offline "$@")
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
    # srun hands signals on to its tasks. After the first task's end the others have two minutes to save
    # or to finish; without that limit they would wait for a crashed one for ever.
    command=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=120 "${command[@]}")
fi

"${command[@]}" &
training=$!
while :; do
    before=$signals status=0
    wait "$training" || status=$?
    # A wait that a signal ended says nothing about the training.
    [ "$before" -eq "$signals" ] && break
done
if [ "$signals" -eq 0 ] || [ "$status" -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    exit "$status"
fi

# Saved by a signal: start anew, unless someone cancelled the job.
job="$(scontrol show job "$SLURM_JOB_ID")" restarts="${SLURM_RESTART_COUNT:-0}"
if [[ "$job" != *JobState=RUNNING* && "$job" != *Reason=TimeLimit* ]]; then
    echo "stopped by SLURM or by scancel: not requeued; the same command goes on where it stopped" >&2
elif [ "$status" -lt 128 ]; then
    echo "error: the training failed with status $status while it was stopping; not requeued" >&2
elif [ "$restarts" -ge "${MAX_REQUEUES:-100}" ]; then
    echo "error: not requeued after $restarts restarts; give it a longer --time or a higher MAX_REQUEUES" >&2
else
    echo "requeue of job $SLURM_JOB_ID after $restarts restarts" >&2
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$status"
