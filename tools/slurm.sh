#!/usr/bin/env bash
# The study on a SLURM cluster: bash tools/slurm.sh SCALE [sbatch options, such as --partition=gpu --gres=gpu:1 --cpus-per-task=8]
# One array task a run; preempted tasks are requeued and go on from their last checkpoint. Jobs that wait for each other:
# data -> lr -> extend (grids whose winner is at an edge) -> choose -> main -> eval, plot, report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scale=${1:?"error: usage: bash tools/slurm.sh SCALE [sbatch options]"}; shift
mkdir -p "out/$scale/slurm"
python=$(command -v python || command -v python3)
options=(--parsable --requeue --signal=TERM@60 --output="out/$scale/slurm/%x-%A_%a.txt" --open-mode=append "$@")

submit() { # submit NAME DEPENDENCY COMMAND [ARRAY]
  sbatch "${options[@]}" --job-name="$1" ${2:+--dependency="$2"} ${4:+--array="$4"} --wrap="$3"
}

# Task I of a stage runs the I-th run of its fixed list; train.py leaves a finished run alone.
runs() { echo "exec $python study.py task $scale $1 \$SLURM_ARRAY_TASK_ID"; }

n_lr=$("$python" study.py count "$scale" lr)
n_main=$("$python" study.py count "$scale" main)
id=$(submit "$scale-data" "" "bash sweep.sh $scale data")
id=$(submit "$scale-lr" "afterok:$id" "$(runs lr)" "0-$((n_lr - 1))")
# a winner at an edge makes its arm's grid grow; afterany: a failed run does not stop the others
id=$(submit "$scale-extend" "afterany:$id" "exec $python study.py extend $scale \$SLURM_ARRAY_TASK_ID" "0-3")
id=$(submit "$scale-choose" "afterany:$id" "$python study.py choose $scale && $python report.py --preregister out/$scale")
id=$(submit "$scale-main" "afterok:$id" "$(runs main)" "0-$((n_main - 1))")
id=$(submit "$scale-report" "afterany:$id" "bash sweep.sh $scale eval plot report")
echo "submitted; the last job is $id: squeue shows them, out/$scale/slurm holds what they print"
