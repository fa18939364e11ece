#!/usr/bin/env bash
# The study on a SLURM cluster: bash tools/slurm.sh SCALE [sbatch options]
# such as --partition=gpu --gres=gpu:1 --cpus-per-task=8. One array task a run. A task that is preempted or whose
# time is up goes back into the queue, and on from its last checkpoint. Jobs that wait for each other:
# data -> lr -> extend (grids whose winner is at an edge, in one job) -> choose -> main -> eval, plot, report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $# -gt 0 ]] || { echo "error: usage: bash tools/slurm.sh SCALE [sbatch options]" >&2; exit 1; }
python=$(command -v python || command -v python3) ||
  { echo "error: no python on the PATH: install Python 3.11 or later" >&2; exit 1; }
scale=$("$python" study.py scale "$1"); shift
mkdir -p "out/$scale/slurm"
# B: is the shell of the batch job, which exec makes the run itself
options=(--parsable --requeue --signal=B:TERM@60 --kill-on-invalid-dep=yes --open-mode=append
         --output="out/$scale/slurm/%x-%A_%a.txt" "$@")

submit() { # submit NAME DEPENDENCY COMMAND [ARRAY]
  sbatch "${options[@]}" --job-name="$scale-$1" ${2:+--dependency="$2"} ${4:+--array="$4"} --wrap="$3"
}

py=$(printf %q "$python")
study="exec $py study.py"
last() { echo $(($("$python" study.py count "$scale" "$1") - 1)); } # index of a stage's last task

# Task I of a stage runs the I-th run of its fixed list, if it is not finished.
id=$(submit data "" "$study data $scale")
id=$(submit lr "afterok:$id" "$study run $scale lr \$SLURM_ARRAY_TASK_ID" "0-$(last lr)")
# what the sweep still lacks: points beyond the edges, and runs that failed, which do not stop the others
id=$(submit extend "afterany:$id" "$study run $scale lr")
id=$(submit choose "afterany:$id" "$py study.py choose $scale && exec $py report.py --preregister out/$scale")
id=$(submit main "afterok:$id" "$study run $scale main \$SLURM_ARRAY_TASK_ID" "0-$(last main)")
id=$(submit report "afterany:$id" "exec bash sweep.sh $scale eval plot report")
echo "submitted; the last job is $id: squeue and \`bash sweep.sh $scale --status\` show them; what they print is in" \
  "out/$scale/slurm"
