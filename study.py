"""What a study is: the arms, the learning-rate grids, the runs, and how their logs are read.

    python study.py list SCALE lr|main      the commands of a stage, one a line (any scheduler can take them)
    python study.py choose SCALE            pick the learning rates; prints the runs that a grid still needs
    python study.py plan SCALE              what the study costs, before it starts
"""
import json
import math
import os
import re
import sys
from pathlib import Path

from configurator import ROOT, fail, find, resolve

ARMS = ["adamw", "adamw_qk", "muon", "muon_qk"]
LABELS = {"adamw": "AdamW", "adamw_qk": "AdamW + QK-Norm", "muon": "Muon", "muon_qk": "Muon + QK-Norm"}
SEEDS = [int(s) for s in os.environ.get("SEEDS", "42 137").split()]  # main runs
SWEEP_SEED = 1  # not a main seed, so that no main run is the run its learning rate was picked on
MAX_EXTENSIONS = 3  # a side: a winner at an edge is not a winner, so the grid grows by factors of two

# sweep: tokens of a sweep run, 1/15 of a main run at the plan's scale
SCALES = {
    "80m": dict(sweep_tokens=20_000_000, grids={
        "adamw": [1e-4, 3e-4, 6e-4, 1e-3, 2e-3],
        "adamw_qk": [3e-4, 6e-4, 1e-3, 2e-3, 4e-3],
        "muon": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
        "muon_qk": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3]}),
    "4m": dict(sweep_tokens=1_100_000, grids={
        "adamw": [3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3],
        "adamw_qk": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
        "muon": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
        "muon_qk": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]}),
    "mini": dict(sweep_tokens=163_840, grids={
        "adamw": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        "adamw_qk": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
        "muon": [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2],
        "muon_qk": [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2]}),
}


def read_log(run_dir):
    """Rows and events of a run's log.jsonl, as two lists of dicts. A half last line, which a kill can leave, is
    passed over; any other broken line is a ValueError."""
    rows, events = [], []
    path = Path(run_dir) / "log.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is no whole line
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number}: not JSON: restore the file or delete {run_dir}") from None
        (events if "event" in row else rows).append(row)
    return rows, events


def load_run(run_dir):
    """One run as {dir, config, rows, events, status, val_loss}. status: 'finished', 'diverged' or 'unfinished';
    val_loss: the final one in nats a token, inf where diverged, None where unfinished."""
    run_dir = Path(run_dir)
    config = json.loads((run_dir / "config.json").read_text())
    rows, events = read_log(run_dir)
    ends = [e["event"] for e in events if e["event"] in ("finished", "diverged")]
    status = ends[-1] if ends else "unfinished"
    val_loss = {"finished": rows[-1]["val_loss"] if rows else None, "diverged": math.inf}.get(status)
    return dict(dir=run_dir, config=config, rows=rows, events=events, status=status, val_loss=val_loss)


def load_runs(study_dir, kind="main"):
    """Runs of a study folder such as out/mini that have a config.json: kind 'main' or 'sweep', sorted by arm in the
    order of ARMS, then seed or learning rate."""
    study_dir = Path(study_dir)
    folders = study_dir.glob("sweep/*" if kind == "sweep" else "*-seed*")
    runs = [load_run(d) for d in folders if (d / "config.json").exists()]
    return sorted(runs, key=lambda r: (ARMS.index(r["config"]["arm"]), r["config"]["seed"], r["config"]["learning_rate"]))


def layer_values(row, name):
    """The values of `name`_layer_0, _1, ... of a log row, as a list: name is pr, pr_centered, pr_pre_rope, pr_weight,
    attn_entropy or max_logit."""
    values = []
    while f"{name}_layer_{len(values)}" in row:
        values.append(row[f"{name}_layer_{len(values)}"])
    return values


def chosen(study_dir):
    """The content of chosen_lr.json ({arm: {lr, bracketed, val_loss, tried, ...}}), or {} where there is none."""
    path = Path(study_dir) / "chosen_lr.json"
    return json.loads(path.read_text()) if path.exists() else {}


def default_lr(scale, arm):
    """(learning rate, where it is from) of an arm: the sweep's winner in out/SCALE/chosen_lr.json, else the middle of
    its grid."""
    winner = chosen(ROOT / "out" / scale).get(arm)
    if winner:
        return winner["lr"], f"the winner of {winner['tried'] and len(winner['tried'])} in out/{scale}/chosen_lr.json"
    grid = SCALES[scale]["grids"][arm]
    return grid[len(grid) // 2], f"the middle of the {arm} grid, since out/{scale}/chosen_lr.json has no winner yet"


def missing_spectra(run_dir, n_layer):
    """Names of spectra that the log speaks of and the folder lacks."""
    rows, events = read_log(run_dir)
    steps = [0] * bool(rows) + [e["step"] for e in events if e["event"] == "spot_check"]
    names = [f"{kind}_layer_{i}_step_{s}.npy" for s in steps for kind in ("sv", "sv_weight") for i in range(n_layer)]
    return [name for name in names if not (Path(run_dir) / name).exists()]


LOGIT_FLAG = 100  # the threshold tau of QK-Clip in Kimi K2 (arXiv:2507.20534)


def spot_check(run_dir, row):
    """Step 6 of the plan, as an event: the row of a token checkpoint against the checkpoint before it (or step 0)."""
    rows, events = read_log(run_dir)
    before = next((e for e in reversed(events) if e["event"] == "spot_check"), None)
    if before is None:
        before = dict(rows[0], max_logit=max(layer_values(rows[0], "max_logit"))) if rows else row
    logit = max(layer_values(row, "max_logit"))
    numbers = [row["val_loss"], row["mean_pr"], logit]
    nan = not all(math.isfinite(x) for x in numbers)
    falling = row["val_loss"] < before["val_loss"]
    flags = ["not finite"] * nan + ["val loss not falling"] * (not falling) + \
        [f"largest logit above {LOGIT_FLAG}"] * (logit > LOGIT_FLAG)
    return dict(event="spot_check", step=row["step"], tokens=row["tokens"], val_loss=row["val_loss"], falling=falling, nan=nan,
                mean_pr=row["mean_pr"], mean_pr_before=before["mean_pr"], max_logit=logit,
                max_logit_before=before.get("max_logit", logit), flags=flags)


def spot_check_line(e):
    return (f"val loss {e['val_loss']:.4f} {'falling' if e['falling'] else 'NOT falling'}, mean PR {e['mean_pr_before']:.2f} -> "
            f"{e['mean_pr']:.2f}, largest logit {e['max_logit_before']:.1f} -> {e['max_logit']:.1f}, "
            f"flags: {', '.join(e['flags']) or 'none'}")
