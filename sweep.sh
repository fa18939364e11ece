#!/usr/bin/env bash
# The whole study: bash sweep.sh [SCALE] [STAGE ...]        stages: data lr main eval plot report (default: all), transfer
#   bash sweep.sh SCALE --plan      what it costs: runs, tokens, FLOPs, disk, memory, hours; starts nothing
#   bash sweep.sh SCALE --list      the commands of the runs that are still needed, one a line, for any scheduler
# SCALE: mini, 4m or 80m; 80m where CUDA is there, else mini. JOBS=N runs at once (default: one a GPU, or one a CPU core).
# SEEDS="42 137 7" adds seeds. Run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=$(command -v python || command -v python3) || { echo "error: no python on the PATH: install Python 3.11 or later" >&2; exit 1; }
"$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "lm_eval", "tqdm"))))' ||
  { echo "error: $python lacks packages: run pip install -r requirements.txt" >&2; exit 1; }

scale=""
stages=()
for word in "$@"; do
  case $word in
    data|lr|main|eval|plot|report|transfer|--plan|--list) stages+=("$word") ;;
    *) [[ -z $scale ]] || { echo "error: '$word' is no stage: choose from data lr main eval plot report transfer --plan --list" >&2; exit 1; }
       scale=$word ;;
  esac
done
if [[ -z $scale ]]; then
  if nvidia-smi -L >/dev/null 2>&1; then scale=80m; else scale=mini; fi
fi
[[ -f config/$scale.py && $scale =~ ^(ci|mini|4m|80m)$ ]] || { echo "error: scale '$scale' is not known: choose mini, 4m or 80m" >&2; exit 1; }
[[ ${#stages[@]} -gt 0 ]] || stages=(data lr main eval plot report)

case " ${stages[*]} " in
  *" --plan "*) exec "$python" study.py plan "$scale" ;;
  *" --list "*) "$python" study.py list "$scale" lr; exec "$python" study.py list "$scale" main ;;
esac
case " ${stages[*]} " in *" lr "*|*" main "*) "$python" study.py plan "$scale" ;; esac

failed=()
for stage in "${stages[@]}"; do
  echo "== $stage =="
  case $stage in
    data)
      data_dir=$("$python" -c "import sys, study; print(study.scale_config(sys.argv[1])['data_dir'])" "$scale")
      "$python" "$data_dir/prepare.py" ;;
    lr)
      "$python" study.py run "$scale" lr || { s=$?; (( s < 128 )) || exit "$s"; failed+=(lr); }
      "$python" study.py choose "$scale" || exit 1 ;;
    main)
      "$python" report.py --preregister "out/$scale"
      "$python" study.py run "$scale" main || { s=$?; (( s < 128 )) || exit "$s"; failed+=(main); } ;;
    transfer)
      "$python" study.py run "$scale" transfer || { s=$?; (( s < 128 )) || exit "$s"; failed+=(transfer); } ;;
    eval)   "$python" evaluate.py "out/$scale" ${ROWS:+--rows "$ROWS"} || failed+=(eval) ;;
    plot)   "$python" plot.py "out/$scale" || failed+=(plot) ;;
    report) "$python" report.py "out/$scale" || failed+=(report) ;;
  esac
done
if (( ${#failed[@]} )); then
  echo "error: not everything went well in: ${failed[*]}; the lines above say what" >&2
  exit 1
fi
[[ -f out/$scale/report.md ]] && echo "done: out/$scale/report.md and out/$scale/figures" || true
