#!/usr/bin/env bash
# A run on several nodes under SLURM, one task per GPU:  sbatch examples/slurm.sh
# Shortly before its time limit, and when it is preempted, the run saves and exits with status 75. The job then returns
# to the queue, and the same command resumes the run.
#SBATCH --job-name=vlft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
[[ -f .venv/bin/activate ]] && source .venv/bin/activate

# The clone, the data and --output_dir must be on a disk that every node sees. Any flag of vlft train may follow, also
# --deepspeed.
srun --kill-on-bad-exit=1 python -m vlft train --config examples/lora_vision.yaml \
    --model_id "${MODEL:-Qwen/Qwen2-VL-7B-Instruct}" --data_path "${DATA:-train.json}" \
    --image_folder "${IMAGE_FOLDER:-images}" --output_dir "${OUTPUT:-output/run}" "$@"
status=$?

# 143: a task that was ended (SIGTERM) because another task had exited with 75 before it.
if ((status == 75 || status == 143)); then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $status
