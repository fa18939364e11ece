#!/usr/bin/env bash
# The whole study: bash sweep.sh [SCALE] [STAGE ...]
#   stages: data lr main eval plot report (default: these), and neighbours, which comes after main
#   bash sweep.sh SCALE --plan      what it costs: runs, tokens, FLOPs, disk, memory, hours; starts nothing
#   bash sweep.sh SCALE --list      the commands of the runs that are still needed, one a line, for any scheduler
#   bash sweep.sh SCALE --status    every run with its state, wherever it runs
# SCALE: a scale of study.py; 80m where torch sees a GPU, else mini. JOBS=N runs at once (default: the scale's number
# on each GPU, or one a CPU core). SEEDS="42 137 7" adds seeds, ARMS and SWEEP_SEEDS say what else to run. Run again, it
# goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=$(command -v python || command -v python3) ||
  { echo "error: no python on the PATH: install Python 3.11 or later" >&2; exit 1; }
"$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "lm_eval", "tqdm"))))' ||
  { echo "error: $python lacks packages: run pip install -r requirements.txt" >&2; exit 1; }

scale="" show="" stages=()
for word in "$@"; do
  case $word in
    data|lr|main|neighbours|eval|plot|report) stages+=("$word") ;;
    --plan|--list|--status) show=${word#--} ;;
    *) [[ -z $scale ]] || { echo "error: '$word' is no stage: choose from data lr main neighbours eval plot report" \
         "--plan --list --status" >&2; exit 1; }
       scale=$word ;;
  esac
done
scale=$("$python" study.py scale ${scale:+"$scale"})
[[ -z $show ]] || exec "$python" study.py "$show" "$scale"
[[ ${#stages[@]} -gt 0 ]] || stages=(data lr main eval plot report)

# A signal to this script goes on to what it runs, which saves and says how to go on; this script then leaves with it.
child=""
trap '[[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM HUP INT
failed=()
go() { # go STAGE COMMAND ...
  local status=0
  "$python" "${@:2}" & child=$!
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child" && status=0 || status=$?; done
  (( status < 128 )) || exit "$status"
  (( status == 0 )) || failed+=("$1")
  return "$status"
}

[[ ! " ${stages[*]} " =~ \ (lr|main|neighbours)\  ]] || "$python" study.py plan "$scale"
out=out/$scale
for stage in "${stages[@]}"; do
  echo "== $stage =="
  case $stage in
    data)   go data study.py data "$scale" || exit 1 ;;
    lr)     go lr study.py run "$scale" lr || true
            go lr study.py choose "$scale" || exit 1 ;;
    main)   go main report.py --preregister "$out" || exit 1
            go main study.py run "$scale" main || true ;;
    neighbours) go neighbours study.py run "$scale" neighbours || true ;;
    eval)   go eval evaluate.py "$out" ${ROWS:+--rows "$ROWS"} || true ;;
    plot)   go plot plot.py "$out" || true ;;
    report) go report report.py "$out" || true ;;
  esac
done
if (( ${#failed[@]} )); then
  echo "error: not everything went well in: ${failed[*]}; the lines above say what; mend it and run this again" >&2
  exit 1
fi
[[ ! -f $out/report.md ]] ||
  echo "done: $out/report.md, $out/report.html, $out/figures, $out/results.json, $out/chosen_lr.json"
