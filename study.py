"""What a study is: arms, scales, grids, seeds, its runs, how their logs are read, and how they are run.

    python study.py plan SCALE             what the study costs, before it starts
    python study.py status SCALE           every run with its state, wherever it runs
    python study.py list SCALE [STAGE]     the commands that are still needed, one a line, for any scheduler
    python study.py run SCALE STAGE        run them, JOBS at once, until none is left; STAGE: lr, main or neighbours
    python study.py choose SCALE           pick the learning rates once the sweep is done
    python study.py data SCALE             prepare its data, where they are not whole
    for sweep.sh and slurm.sh: scale [SCALE], count SCALE STAGE, task SCALE STAGE I, count SCALE extend, extend SCALE I
"""
import collections
import fcntl
import functools
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import system
from configurator import ROOT, fail, find, resolve
from model import GPT, gpt_config


def words(name, default, kind=str):
    """The environment variable `name` as a list: words apart by spaces or commas, none of them twice."""
    text = os.environ.get(name)
    if text is None:
        return default
    found = text.replace(",", " ").split()
    if wrong := [word for word in found if kind is int and not word.isdecimal()]:
        fail(f"{name}={text!r}: {wrong[0]!r} is no whole number of 0 or more")
    found = [kind(word) for word in found]
    if not found or len(set(found)) < len(found):
        fail(f"{name}={text!r} {'names one twice' if found else 'is empty'}: give each once, or leave {name} unset")
    return found


# An arm is a name: its label here, its grid at each scale, config/ARM.py, and the lines that make it different.
LABELS = {
    "adamw": "AdamW",
    "adamw_qk": "AdamW + QK-Norm",
    "muon": "Muon",
    "muon_qk": "Muon + QK-Norm",
    "adamw_qk_frozen": "AdamW + QK-Norm, frozen",  # gains of one that do not learn
    "muon_qk_frozen": "Muon + QK-Norm, frozen",
}
FACTORIAL = ["adamw", "adamw_qk", "muon", "muon_qk"]  # the 2x2 that contrasts, registration and verdict are about
ARMS = words("ARMS", FACTORIAL)  # the arms that are run
SEEDS = words("SEEDS", [42, 137], int)  # of the main runs
MAX_EXTENSIONS = 3  # a side: a winner at an edge is not a winner, so the grid grows by factors of two
FIRST_SWEEP_SEED = 1  # the one that a sweep run's folder does not name
if unknown := [arm for arm in ARMS if arm not in LABELS]:
    fail(f"ARMS: no arm named {unknown[0]!r}: choose from {' '.join(LABELS)}")

# A scale is config/SCALE.py and its row here. sweep_tokens: of one sweep run, 1/15 of a main run at the plan's scale.
# sweep_seeds: not main seeds, so that no main run is the run that its learning rate was picked on.
SCALES = {
    "80m": dict(sweep_tokens=20_000_000, sweep_seeds=[1], grids={  # one seed, as in the plan: 20 runs of 4 GPU minutes
        "adamw": [1e-4, 3e-4, 6e-4, 1e-3, 2e-3],
        "adamw_qk": [3e-4, 6e-4, 1e-3, 2e-3, 4e-3],
        "muon": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
        "muon_qk": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
        "adamw_qk_frozen": [3e-4, 6e-4, 1e-3, 2e-3, 4e-3],
        "muon_qk_frozen": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3]}),
    "4m": dict(sweep_tokens=1_100_000, sweep_seeds=[1, 2, 3], grids={  # three: a third of what the main runs cost
        "adamw": [3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3],
        "adamw_qk": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
        "muon": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
        "muon_qk": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
        "adamw_qk_frozen": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
        "muon_qk_frozen": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]}),
    "mini": dict(sweep_tokens=131_072, sweep_seeds=[1], grids={  # one: three would double a newcomer's wait
        "adamw": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        "adamw_qk": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
        "muon": [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2],
        "muon_qk": [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2],
        "adamw_qk_frozen": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
        "muon_qk_frozen": [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2]}),
    "ci": dict(sweep_tokens=10_240, sweep_seeds=[1], grids={  # a minute, to see that every stage works
        arm: [1e-3, 3e-3, 1e-2, 3e-2, 1e-1] for arm in LABELS}),
}


def sweep_seeds(scale):
    """Seeds of a scale's sweep: SWEEP_SEEDS in the environment, else its row. ValueError where one is a main seed."""
    seeds = words("SWEEP_SEEDS", SCALES[scale]["sweep_seeds"], int)
    if both := sorted({*seeds} & {*SEEDS}):
        raise ValueError(f"seed {both[0]} is in SEEDS and in the sweep: a main run must not be the run that its "
                         f"learning rate was picked on")
    return seeds


def grid(scale, arm):
    """An arm's learning rates at a scale, ascending, each as %g writes it, so that names, commands and logs agree."""
    rates = SCALES[scale]["grids"].get(arm)
    if not rates:
        raise ValueError(f"study.py has no grid for {arm} at scale {scale}: add one to SCALES")
    return sorted({float(f"{lr:g}") for lr in rates})


@functools.cache
def scale_config(scale, arm="adamw"):
    """All keys of train.py at a scale and arm. ValueError where a config file is missing or wrong."""
    return resolve(ROOT / "train.py", [f"config/{scale}.py", f"config/{arm}.py"])


@functools.cache
def defaults():
    """train.py's keys with their defaults: what a config.json from before a key existed stands for."""
    return resolve(ROOT / "train.py", [])


# ---- what a study's folder holds
def read_json(path, empty=None):
    """A JSON object, or `empty` where there is no file. ValueError, naming the file, where it is something else."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty
    except ValueError as e:
        raise ValueError(f"{path} is no JSON ({e}): restore it or delete it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: restore it or delete it")
    return value


def read_log(run_dir):
    """Rows and events of a run's log.jsonl, as two lists of dicts. A half last line, which a kill can leave, is
    passed over; any other broken line is a ValueError."""
    rows, events = [], []
    path = Path(run_dir) / "log.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is no whole line
        try:
            row = json.loads(line)
            (events if "event" in row else rows).append(row)
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number}: not JSON: restore the file or delete {run_dir}") from None
    return rows, events


def load_run(run_dir):
    """One run as {dir, config, rows, events, status, val_loss}. status: 'finished', 'diverged' or 'unfinished';
    val_loss: the final one in nats a token, inf where diverged, None where unfinished. ValueError for a folder whose
    config.json is missing or no run's."""
    run_dir = Path(run_dir)
    config = read_json(run_dir / "config.json", {})
    if not {"arm", "seed", "learning_rate"} <= config.keys():
        raise ValueError(f"{run_dir / 'config.json'} is no run's: delete the folder or restore the file")
    rows, events = read_log(run_dir)
    ends = [e["event"] for e in events if e["event"] in ("finished", "diverged")]
    status = ends[-1] if ends else "unfinished"
    val_loss = rows[-1].get("val_loss") if rows and status == "finished" else None
    if status == "diverged" or val_loss is not None and not math.isfinite(val_loss):
        status, val_loss = "diverged", math.inf
    return dict(dir=run_dir, config=defaults() | config, rows=rows, events=events, status=status, val_loss=val_loss)


KINDS = {"main": "*-seed*", "sweep": "sweep/*", "neighbours": "neighbours/*"}  # kind of run: its folders in a study's
STAGES = {"lr": "sweep", "main": "main", "neighbours": "neighbours"}  # stage that trains: the kind of its runs


def run_name(kind, arm, lr, seed):
    """The name of a run's folder."""
    if kind == "main":
        return f"{arm}-seed{seed}"
    return f"{arm}-lr{lr:g}" + (f"-seed{seed}" if kind == "sweep" and seed != FIRST_SWEEP_SEED else "")


def load_runs(study_dir, kind="main", say=lambda line: None):
    """The runs of one of KINDS in a study folder such as out/mini, sorted by arm in the order of LABELS, then learning
    rate, then seed. A folder that is damaged, a copy, or of no known arm is left out, and say() is told so."""
    runs = []
    for folder in sorted(Path(study_dir).glob(KINDS[kind])):
        if not (folder / "config.json").exists():
            continue  # not begun
        try:
            run = load_run(folder)
            c = run["config"]
            name = run_name(kind, c["arm"], c["learning_rate"], c["seed"])
            if c["arm"] not in LABELS:
                raise ValueError(f"its arm {c['arm']!r} is not in study.py")
            if folder.name != name:
                raise ValueError(f"its config.json is that of {name}: a copy is no run of the study")
            runs.append(run)
        except (ValueError, OSError) as e:
            say(f"{folder} is left out: {e}")
    order = {arm: i for i, arm in enumerate(LABELS)}
    return sorted(runs, key=lambda r: (order[r["config"]["arm"]], r["config"]["learning_rate"], r["config"]["seed"]))


def arms_of(*runs):
    """The arms of a study in the order of LABELS: those to be run, and those that lists of runs hold."""
    have = {r["config"]["arm"] for group in runs for r in group}
    return [arm for arm in LABELS if arm in have or arm in ARMS]


def head_dim(config):
    """The largest PR there can be."""
    return config["n_embd"] // config["n_head"]


def layer_values(row, name):
    """The values of `name`_layer_0, _1, ... of a log row, as a list: name is pr, pr_centered, pr_pre_rope, pr_weight,
    attn_entropy or max_logit."""
    values = []
    while f"{name}_layer_{len(values)}" in row:
        values.append(row[f"{name}_layer_{len(values)}"])
    return values


def chosen(study_dir):
    """chosen_lr.json, or {} where there is none: {arm: {lr, val_loss, bracketed, tie, seeds, tokens, tried}}. val_loss
    is the mean over the sweep's seeds; tie lists the neighbouring rates that lie within the noise of the winner's;
    tried is [{lr, val_loss, status, val_losses}], val_losses one a seed, None where one diverged. ValueError for a file
    that is no such thing."""
    path = Path(study_dir) / "chosen_lr.json"
    picks = read_json(path, {})
    if any(not isinstance(pick, dict) or not {"lr", "val_loss", "bracketed", "tried"} <= pick.keys()
           for pick in picks.values()):
        raise ValueError(f"{path} holds no chosen learning rates: restore it, or delete it and choose again")
    return {arm: dict(dict(tie=[], seeds=[pick.get("seed", FIRST_SWEEP_SEED)]), **pick) for arm, pick in picks.items()}


def default_lr(scale, arm):
    """(learning rate, where it is from) of an arm: the sweep's winner in out/SCALE/chosen_lr.json, else the middle of
    its grid."""
    if pick := chosen(ROOT / "out" / scale).get(arm):
        return pick["lr"], f"the winner of {len(pick['tried'])} in out/{scale}/chosen_lr.json"
    rates = grid(scale, arm)
    return rates[len(rates) // 2], f"the middle of the {arm} grid, since out/{scale}/chosen_lr.json has no winner yet"


def finite(x):
    """x, or None where it is no finite number: JSON knows neither NaN nor infinity."""
    return x if x is not None and math.isfinite(x) else None


def number(x, form=".4f"):
    return "-" if x is None else f"{x:{form}}"


# keys that may change between two starts of a run: none of them moves a number by more than rounding
FREE = {"out_dir", "data_dir", "device", "compile", "micro_batch", "ckpt_interval_s", "first_look"}


def open_run(out_dir, config, meta, device):
    """Take a run's folder for this process: lock it, and check settings and data against those that it began with; or, in a new
    one, write config.json and a copy of the source. Returns the lock, to be held. ValueError or OSError where that fails."""
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = system.lock(out_dir)
    if old := read_json(out_dir / "config.json"):
        known = defaults() | old
        differ = [f"{k} {known[k]!r} -> {config[k]!r}" for k in config if k not in FREE and known[k] != config[k]]
        if differ:
            raise ValueError(f"{out_dir} was made with other settings ({', '.join(differ)}): give another --out_dir or delete it")
        if changed := [k for k in ("train_sha256", "val_sha256") if old.get("data", {}).get(k) != meta[k]]:
            raise ValueError(f"{config['data_dir']} changed since the run in {out_dir} began ({', '.join(changed)}): bring the old "
                             f"data back, or give another --out_dir")
        return lock
    with torch.device("meta"):
        num_params = GPT(gpt_config(config)).num_params()
    (out_dir / "source").mkdir(exist_ok=True)
    for path in [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*.sh")) if not p.name.startswith("test_")]:
        shutil.copy(path, out_dir / "source")
    try:
        commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout
    except OSError:  # no git: the copy of the source says it all
        commit = ""
    system.write_text(out_dir / "source" / "versions.json", json.dumps(dict(
        python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, commit=commit.strip() or "unknown",
        device=system.device_name(device), threads=torch.get_num_threads(), platform=platform.platform())))
    system.write_text(out_dir / "config.json", json.dumps(dict(config, data=meta, num_params=num_params), indent=1))
    return lock


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
    before = next((e for e in reversed(events) if e["event"] == "spot_check"), (rows or [row])[0])
    loss, pr, logit = (finite(x) for x in (row["val_loss"], row["mean_pr"], largest_logit(row)))
    nan = None in (loss, pr, logit)
    falling = None not in (loss, before["val_loss"]) and loss < before["val_loss"]
    flags = ["not finite"] * nan + ["val loss not falling"] * (not falling) + \
        [f"largest logit above {LOGIT_FLAG}"] * (logit is not None and logit > LOGIT_FLAG)
    return dict(event="spot_check", step=row["step"], tokens=row["tokens"], val_loss=loss, falling=falling, nan=nan,
                mean_pr=pr, mean_pr_before=finite(before["mean_pr"]), max_logit=logit,
                max_logit_before=finite(largest_logit(before)), flags=flags)


def largest_logit(row):
    """Of a log row or of a spot check; None where one is missing."""
    logits = layer_values(row, "max_logit") or [row.get("max_logit")]
    return None if None in logits else max(logits)


def spot_check_line(e):
    return (f"val loss {number(e['val_loss'])} {'falling' if e['falling'] else 'NOT falling'}, mean PR "
            f"{number(e['mean_pr_before'], '.2f')} -> {number(e['mean_pr'], '.2f')}, largest logit "
            f"{number(e['max_logit_before'], '.1f')} -> {number(e['max_logit'], '.1f')}, "
            f"flags: {', '.join(e['flags']) or 'none'}")


# ---- the runs of a stage
def sweep_results(study_dir, arm, seeds=None):
    """{learning rate: {seed: final val loss, inf where diverged}} of an arm's ended sweep runs, of `seeds` or all."""
    results = {}
    for run in load_runs(study_dir, "sweep"):
        c = run["config"]
        if c["arm"] == arm and run["status"] != "unfinished" and (seeds is None or c["seed"] in seeds):
            results.setdefault(c["learning_rate"], {})[c["seed"]] = run["val_loss"]
    return results


def winner(results):
    """(lr, bracketed, tie) of sweep_results(): the lowest mean over seeds of the final val loss; bracketed if both its
    neighbours were run too; tie: the neighbours whose mean lies less than two standard errors of the difference higher,
    sqrt(s_a^2 / n + s_b^2 / n), which one seed does not give."""
    lrs = sorted(results)
    losses = {lr: list(results[lr].values()) for lr in lrs}
    mean = {lr: sum(losses[lr]) / len(losses[lr]) for lr in lrs}
    best = min(lrs, key=mean.get)
    at, tie = lrs.index(best), []
    for lr in lrs[max(0, at - 1):at] + lrs[at + 1:at + 2]:
        if math.isfinite(mean[lr]) and min(len(losses[lr]), len(losses[best])) > 1:
            noise = math.sqrt(sum(statistics.variance(losses[x]) / len(losses[x]) for x in (lr, best)))
            tie += [lr] * (mean[lr] - mean[best] < 2 * noise)
    return best, 0 < at < len(lrs) - 1, tie


def missing_lrs(scale, arm, study_dir):
    """(learning rate, seed) of what an arm's sweep still has to run: what is left of its grid; then, while the winner
    is at an edge, one point a factor of two further out, at most MAX_EXTENSIONS a side."""
    rates, seeds = grid(scale, arm), sweep_seeds(scale)
    results = sweep_results(study_dir, arm, seeds)
    begun = [lr for lr in results if lr not in rates]  # an extension whose seeds have not all run
    if left := [(lr, seed) for seed in seeds for lr in rates + begun if seed not in results.get(lr, {})]:
        return left
    best, bracketed, _ = winner(results)
    if bracketed or math.isinf(min(results[best].values())):
        return []
    outer = float(f"{best * 2:.6g}") if best == max(results) else float(f"{best / 2:.6g}")
    extensions = sum(lr > rates[-1] if outer > best else lr < rates[0] for lr in results)
    return [(outer, seed) for seed in seeds] if extensions < MAX_EXTENSIONS else []


def neighbour_lrs(lr):
    """Half and twice a rate: the rates at which the stage `neighbours` trains an arm for the whole main budget."""
    return float(f"{lr / 2:.6g}"), float(f"{lr * 2:.6g}")


def stage_runs(scale, stage, study_dir, fixed=False):
    """[(run folder, arguments of train.py)] that a stage still has to run; arms take turns, so that the first jobs
    compile different graphs and the others find them in the cache. fixed: the list of a fresh study."""
    study_dir = Path(study_dir)
    if stage == "lr":
        due = {arm: [(lr, seed) for seed in sweep_seeds(scale) for lr in grid(scale, arm)] if fixed
               else missing_lrs(scale, arm, study_dir) for arm in ARMS}
        keys = ["--n_ckpt=0", f"--max_tokens={SCALES[scale]['sweep_tokens']}"]
        runs = [(study_dir / "sweep" / run_name("sweep", arm, lr, seed), arm, seed, [f"--learning_rate={lr:g}", *keys])
                for turn in itertools.zip_longest(*([(arm, *point) for point in due[arm]] for arm in ARMS))
                for arm, lr, seed in filter(None, turn)]
    elif stage == "main":
        runs = [(study_dir / run_name("main", arm, 0, seed), arm, seed, []) for seed in SEEDS for arm in ARMS]
    else:  # neighbours: does the choice hold at the main budget, and does the claim hold beside it?
        picks = chosen(study_dir)
        runs = [(study_dir / "neighbours" / run_name("neighbours", arm, lr, SEEDS[0]), arm, SEEDS[0],
                 [f"--learning_rate={lr:g}", "--n_ckpt=0"])
                for side in (0, 1) for arm in ARMS if arm in picks for lr in [neighbour_lrs(picks[arm]["lr"])[side]]]
    begun = [] if fixed else load_runs(study_dir, STAGES[stage])
    ended = [run["dir"] for run in begun if run["status"] != "unfinished"]
    return [(d, [f"config/{scale}.py", f"config/{arm}.py", f"--seed={seed}", *keys,
                 f"--out_dir={os.path.relpath(d, ROOT)}"]) for d, arm, seed, keys in runs if d not in ended]


def choose(scale, study_dir):
    """Pick each arm's learning rate by its sweep and write chosen_lr.json. ValueError while runs are missing."""
    if missing := stage_runs(scale, "lr", study_dir):
        raise ValueError(f"the sweep in {study_dir} lacks {len(missing)} runs, such as {missing[0][0].name}: "
                         f"run `bash sweep.sh {scale} lr`")
    picks = chosen(study_dir)  # an arm that is not in ARMS today keeps its own
    for arm in ARMS:
        results = sweep_results(study_dir, arm, sweep_seeds(scale))
        best, bracketed, tie = winner(results)
        seeds = sorted(results[best])
        mean = {lr: sum(losses.values()) / len(losses) for lr, losses in results.items()}
        if math.isinf(mean[best]):
            raise ValueError(f"{arm} diverged at every learning rate in {study_dir}/sweep: lower its grid in study.py")
        picks[arm] = dict(
            lr=best, val_loss=mean[best], bracketed=bracketed, tie=tie, seeds=seeds,
            tokens=SCALES[scale]["sweep_tokens"],
            tried=[dict(lr=lr, val_loss=finite(mean[lr]), status="finished" if finite(mean[lr]) else "diverged",
                        val_losses=[finite(results[lr][s]) for s in seeds]) for lr in sorted(results)])
        notes = ", not bracketed" * (not bracketed)
        notes += f", a tie with {' and '.join(f'{lr:g}' for lr in tie)}" * bool(tie)
        print(f"{LABELS[arm]:<24} lr = {best:g}, val loss {mean[best]:.4f}{notes}")
    system.write_text(Path(study_dir) / "chosen_lr.json", json.dumps(picks, indent=1, allow_nan=False))


# ---- where a study is, from its files alone
ENDED = ("finished", "diverged")
EXIT = "exit status"  # begins the line that run_stage() writes below what a run printed: status, seconds that it took


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def holder(folder):
    """Who trains in a run's folder, such as 'process 12 on host', or "". A lock that another machine took may not be
    seen from here; of such a run, files written in the last five minutes tell."""
    who = ""
    try:
        with open(folder / "lock", encoding="utf-8") as f:
            who = f.read().strip() or "another process"
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return who
    except OSError:
        pass  # no lock, or a file system without locks
    if not who or who.endswith(f" on {socket.gethostname()}"):
        return ""
    written = [p.stat().st_mtime for p in (folder / "progress.json", folder / "log.jsonl") if p.exists()]
    return who if time.time() - max(written, default=0) < 300 else ""


def look(folder, kind, tokens, batch_tokens):
    """Where a run is: {dir, kind, state, step, steps, batch_tokens, row, flags, pace, device}. state: waiting, running,
    unfinished, finished, diverged or failed; row: the newest numbers; pace: seconds a training token, start-up and val
    passes included once it is finished; tokens, batch_tokens: the budget of a run that has not begun."""
    e = dict(dir=folder, kind=kind, state="waiting", step=0, steps=tokens // batch_tokens, batch_tokens=batch_tokens,
             row={}, flags=[], pace=None, device=None)
    output = folder / "output.txt"
    output = output.read_text(errors="replace").splitlines() if output.exists() else []
    last = output[-1].split() if output and output[-1].startswith(EXIT) else []
    if last and last[2] != "0":
        e.update(state="failed", flags=output[-2:-1])
    if not (folder / "config.json").exists():
        return e
    try:
        run = load_run(folder)
        now, versions = (read_json(folder / name, {}) for name in ("progress.json", "source/versions.json"))
    except (ValueError, OSError) as error:
        return e | dict(state="failed", flags=[str(error)])
    c, row, ended = run["config"], dict(*run["rows"][-1:]), run["status"] != "unfinished"
    if not ended:
        row |= {key: value for key, value in now.items() if value is not None}
        e["state"] = "running" if holder(folder) else "failed" if e["state"] == "failed" else "unfinished"
    flags = [flag for event in run["events"] for flag in event.get("flags", [])]
    e |= dict(row=row, step=row.get("step", 0), steps=c["max_tokens"] // c["batch_tokens"],
              batch_tokens=c["batch_tokens"], device=versions.get("device"),
              flags=[*dict.fromkeys(flags)] + e["flags"] * (not ended))
    e["pace"] = 1 / row["tokens_per_s"] if row.get("tokens_per_s") else None
    if ended:
        e["state"] = run["status"]
        written = [(folder / name).stat().st_mtime for name in ("config.json", "log.jsonl")]
        took = float(last[4]) if last else written[1] - written[0]
        e["pace"] = max(took / c["max_tokens"], e["pace"] or 0) if run["status"] == "finished" else None
    return e


def survey(scale, study_dir, say=lambda line: None):
    """look() at every run of a study, begun or not: sweep, main, and neighbours where they were begun."""
    c, entries = scale_config(scale), []
    for stage, kind in STAGES.items():
        if kind != "neighbours" or (study_dir / "neighbours").exists():
            runs = stage_runs(scale, stage, study_dir, fixed=True) + stage_runs(scale, stage, study_dir)
            begun = [run["dir"] for run in load_runs(study_dir, kind, say)]
            tokens = SCALES[scale]["sweep_tokens"] if stage == "lr" else c["max_tokens"]
            folders = sorted({*begun, *(folder for folder, _ in runs)})
            entries += [look(folder, kind, tokens, c["batch_tokens"]) for folder in folders]
    return entries


def seconds_left(entries, jobs):
    """Seconds until the runs of survey() have ended, jobs at once, learned from those so far: the median pace of the
    finished runs of their kind, else of the begun ones, else of any. None where none has begun."""
    paces = {}
    for e in entries:
        if e["pace"]:
            paces.setdefault((e["kind"], e["state"] == "finished"), []).append(e["pace"])
    if not paces:
        return None

    def pace(kind):
        return statistics.median(next(paces[key] for key in ((kind, True), (kind, False), *paces) if key in paces))

    left = [(e["steps"] - e["step"]) * e["batch_tokens"] * pace(e["kind"]) for e in entries if e["state"] not in ENDED]
    return max(sum(left) / jobs, max(left, default=0))


def where(scale, entries, jobs):
    """One line: how much of survey() is done, and what is left."""
    count = collections.Counter(e["state"] for e in entries)
    done = sum(count[state] for state in ENDED)
    seconds = seconds_left(entries, jobs)
    words = [f"{count[state]} {state}" for state in ("running", "unfinished", "failed", "diverged") if count[state]]
    words += [f"about {duration(seconds)} of training left"] if seconds else []
    return ", ".join([f"out/{scale}: {done} of {len(entries)} runs done", *words])


def show(bars, scale, study_dir, entries, busy, jobs):
    """What is seen while a stage runs: on a terminal a line for the study and one a running job, else one line."""
    entries = [look(e["dir"], e["kind"], e["steps"] * e["batch_tokens"], e["batch_tokens"]) | dict(state="running")
               if e["dir"] in busy else e for e in entries]
    lines = [where(scale, entries, jobs)]
    if not bars:
        print(*lines, flush=True)
    for e in entries if bars else []:
        if e["dir"] in busy:
            row, speed = e["row"], e["row"].get("tokens_per_s")
            left = f"{duration((e['steps'] - e['step']) * e['batch_tokens'] / speed)} left" if speed else "starting"
            lines.append(f"{str(e['dir'].relative_to(study_dir)):<32} step {e['step']:,} of {e['steps']:,}, train loss "
                         f"{number(row.get('train_loss'))}, {number(speed, ',.0f')} tokens/s, {left}")
    for bar, line in zip(bars, lines + [""] * len(bars)):
        bar.set_description_str(line[:shutil.get_terminal_size().columns - 1])


def status(scale, study_dir):
    """Print every run of a study with its state, and what is left."""
    entries = survey(scale, study_dir, print)
    width = max(len(str(e["dir"].relative_to(study_dir))) for e in entries)
    print(f"{'run':<{width}}  {'state':<10} {'step':>13} {'train':>8} {'val':>8} {'mean PR':>8} {'tokens/s':>9}  flags")
    for e in entries:
        train, val, pr, speed = (number(e["row"].get(key), form) for key, form in (
            ("train_loss", ".4f"), ("val_loss", ".4f"), ("mean_pr", ".2f"), ("tokens_per_s", ",.0f")))
        print(f"{str(e['dir'].relative_to(study_dir)):<{width}}  {e['state']:<10} {e['step']:>6}/{e['steps']:<6} "
              f"{train:>8} {val:>8} {pr:>8} {speed:>9}  {', '.join(e['flags'])}".rstrip())
    running = sum(e["state"] == "running" for e in entries)
    print(where(scale, entries, running or jobs_at_once()))
    left = ["training"] * any(e["state"] not in ENDED for e in entries) + [
        name for name in ("results.json", "figures", "report.md") if not (study_dir / name).exists()]
    if not running and left:
        print(f"left: {', '.join(left)}; `bash sweep.sh {scale}` goes on with it")


# ---- running them
COUNT = """import json, torch
try:
    torch.cuda.init()
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    print(json.dumps([[p.name, p.total_memory] for p in found]))
except (RuntimeError, AssertionError) as e:
    print(json.dumps("no CUDA device: " + str(e).split(".")[0]))"""


def visible():
    """(variable, entries) that name the CUDA devices which may be used; no entries where the variable is unset."""
    hip = torch.version.hip and "HIP_VISIBLE_DEVICES" in os.environ
    variable = "HIP_VISIBLE_DEVICES" if hip else "CUDA_VISIBLE_DEVICES"
    return variable, [entry.strip() for entry in os.environ.get(variable, "").split(",") if entry.strip()]


@functools.cache
def devices():
    """([(entry, name, bytes of memory)] of the CUDA devices, why there is none). entry: what makes only that one
    visible. torch counts them, in a child process: CUDA must not start in this one."""
    if not (torch.version.cuda or torch.version.hip):
        return [], f"torch {torch.__version__} is a CPU build"
    variable, entries = visible()
    alone = any(entry.startswith("MIG") for entry in entries)  # a process sees one slice, however many are listed
    found, why = [], ""
    for entry in entries if alone else [",".join(entries)]:
        done = subprocess.run([sys.executable, "-c", COUNT], env=os.environ | ({variable: entry} if entry else {}),
                              capture_output=True, text=True)
        answer = json.loads(done.stdout) if done.returncode == 0 else f"torch fails: {done.stderr.splitlines()[-1:]}"
        found, why = (found, answer) if isinstance(answer, str) else (found + answer, why)
    names = entries or [str(i) for i in range(len(found))]
    return [(name, *device) for name, device in zip(names, found)], why or "no CUDA device"


def jobs_at_once():
    """JOBS, else one a GPU, else one a CPU core."""
    jobs = words("JOBS", None, int) or [len(devices()[0]) or system.cores()]
    if len(jobs) > 1 or jobs[0] < 1:
        fail(f"JOBS={os.environ['JOBS']!r}: give one whole number of 1 or more, or leave JOBS unset")
    return jobs[0]


def device_line(jobs):
    """One line: the devices taken, why, and how many runs share them."""
    found, why = devices()
    names = collections.Counter(f"{name}, {memory / 2**30:.0f} GiB" for _, name, memory in found)
    what = "; ".join(f"{n} x {name}" for name, n in names.items()) or f"CPU, {system.cores()} cores ({why})"
    return f"device: {what}; runs at once: {jobs}"


def job_env(slot, jobs):
    """The environment of a job: its device, how many share it, and its share of the cores."""
    env, (found, _) = dict(os.environ), devices()
    if found:
        env |= {visible()[0]: found[slot % len(found)][0], "GPU_JOBS": str(math.ceil(jobs / len(found)))}
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        env.setdefault(name, str(max(1, system.cores() // jobs)))
    return env


def run_stage(scale, stage, study_dir, jobs, wanted=lambda arguments: True):
    """Run what a stage needs and `wanted` takes, jobs at once. A failed run does not stop the others: returns
    {folder: what is wrong}. SIGINT, SIGTERM and SIGHUP reach all children as SIGTERM: they save and leave."""
    running, failed, stop, shown = {}, {}, [], time.time()
    rows = 1 + min(jobs, max(1, shutil.get_terminal_size().lines - 3)) if sys.stdout.isatty() else 0
    bars = [tqdm(bar_format="{desc}", position=i, leave=False, file=sys.stdout) for i in range(rows)]

    def on_signal(number, frame):
        stop.append(number)
        for child, *_ in running.values():
            child.terminate()

    def start(slot, folder, arguments):
        """The child that trains in folder, or None where it cannot start."""
        try:
            if who := holder(folder):  # such as a run that outlived the sweep that began it
                raise OSError(f"in use by {who}")
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "output.txt", "a", encoding="utf-8") as out:  # own session: Ctrl-C comes through us
                return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], stdout=out, stderr=out,
                                        env=job_env(slot, jobs), cwd=ROOT, start_new_session=True)
        except OSError as e:
            failed[folder] = str(e)

    def ending(child, folder, began):
        """What a child that has left leaves behind, in a few words."""
        took = time.time() - began
        with open(folder / "output.txt", "r+", encoding="utf-8", errors="replace") as out:
            lines = out.read().strip().splitlines() or ["no output"]
            if not stop:
                out.write(f"{EXIT} {child.returncode} after {took:.0f} s\n")
        if child.returncode == 0:
            run = load_run(folder)
            what = f"val loss {number(run['val_loss'])}" if run["status"] == "finished" else run["status"]
            return f"{what}, {duration(took)}"
        if not stop:
            failed[folder] = f"in use by {who}" if (who := holder(folder)) else lines[-1]
        return lines[-1]

    for number_ in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number_) != signal.SIG_IGN:  # as under nohup
            signal.signal(number_, on_signal)
    try:
        while True:
            ended = [slot for slot, (child, *_) in running.items() if child.poll() is not None]
            lines = [f"{running[slot][1].name}: {ending(*running[slot])}" for slot in ended]
            for slot in ended:
                del running[slot]
            busy = [folder for _, folder, _ in running.values()]
            queue = [run for run in ([] if stop else stage_runs(scale, stage, study_dir))
                     if wanted(run[1]) and run[0] not in [*busy, *failed]]
            for slot in range(jobs):
                while queue and slot not in running and not stop:
                    folder, arguments = queue.pop(0)
                    if child := start(slot, folder, arguments):
                        running[slot] = child, folder, time.time()
                        if stop:  # the signal came in between
                            child.terminate()
                    else:
                        lines.append(f"{folder.name}: {failed[folder]}")
            entries = survey(scale, study_dir)
            for line in [] if stop else lines:
                tqdm.write(f"{line}; {where(scale, entries, jobs)}")
            sys.stdout.flush()
            if not running:
                break
            while all(child.poll() is None for child, *_ in running.values()):
                time.sleep(0.1)
                if time.time() - shown > (2 if bars else 60):
                    shown = time.time()
                    show(bars, scale, study_dir, entries, [folder for _, folder, _ in running.values()], jobs)
    finally:  # whatever happened here, nothing is left behind
        for child, *_ in running.values():
            child.terminate()
        for bar in bars:
            bar.close()
    if stop:
        print(f"stopped by {signal.Signals(stop[0]).name}; {where(scale, entries, jobs)}: run the same command again "
              f"to go on")
        if stop[0] == signal.SIGTERM:
            requeue()
        sys.exit(128 + stop[0])
    return failed


def requeue():
    """On SLURM, put this job into the queue again where its time is up: one that was cancelled or preempted is no
    longer RUNNING. A task is named by array and number: one of an array's tasks has the array's own id."""
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job:
        state = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True)
        if state.stdout.strip() == "RUNNING":
            subprocess.run(["scontrol", "requeue", job])


UTILISATION = 0.3  # of a GPU's peak, assumed: what small models commonly reach
COMMON = ("NVIDIA B200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA GeForce RTX 4090")


def plan(scale, study_dir):
    """Print in five lines what is left of a study and what it costs. ValueError where the disk does not suffice."""
    c, jobs = scale_config(scale), jobs_at_once()
    with torch.device("meta"):
        model = GPT(gpt_config(c))
    params, flops = model.num_params(), model.flops_per_token()
    sweep_tokens, main_tokens = SCALES[scale]["sweep_tokens"], c["max_tokens"]
    n_sweep, n_main = (len(stage_runs(scale, stage, study_dir)) for stage in ("lr", "main"))
    meta = read_json(find(c["data_dir"]) / "meta.json", {})
    val_tokens = c["eval_tokens"] or meta.get("val_tokens", 5_000_000)

    def work(n_runs, budget, n_ckpt):  # a token of a val pass is a forward pass, a third of a training token
        looks = budget // c["batch_tokens"] // (c["log_interval"] or budget) + n_ckpt + 1
        return n_runs * (budget + looks * val_tokens / 3)

    total = flops * (work(n_sweep, sweep_tokens, 0) + work(n_main, main_tokens, c["n_ckpt"]))
    checkpoint = 12 * params  # bytes: a weight and AdamW's two moments, float32
    n_spectra = c["n_ckpt"] + 2 + (main_tokens // c["batch_tokens"] // c["sv_interval"] if c["sv_interval"] else 0)
    spectra = n_main * n_spectra * c["n_layer"] * 2 * (128 + 4 * c["n_embd"])
    disk = (n_main * c["n_ckpt"] + 2 * min(jobs, n_sweep + n_main)) * checkpoint + spectra  # 2: one written aside
    data = 0 if meta else 2 * (main_tokens + val_tokens)
    sizes = [m for m in (1, 2, 4, 8, 16, 32) if c["batch_tokens"] // c["block_size"] % m == 0]
    memory = ", ".join(f"{m}: {system.training_bytes(gpt_config(c), m) / 2**30:.1f}" for m in sizes)
    here = devices()[0][0][1] if devices()[0] else system.device_name("cpu")
    entries = survey(scale, study_dir)
    seconds = seconds_left([e | dict(pace=e["pace"] if e["device"] == here else None) for e in entries], jobs)
    measured = "no run here yet to measure by"
    if seconds is not None:
        measured = f"about {duration(seconds)} here, by its runs so far"
    training = n_sweep * sweep_tokens + n_main * main_tokens
    print(f"scale {scale}: {params / 1e6:.2f}M parameters, {c['n_layer']} layers, width {c['n_embd']}, context "
          f"{c['block_size']}; left to do: {training / 1e6:.1f}M training tokens, {total:.2e} FLOPs")
    print(f"  runs    {n_sweep} of the sweep, {sweep_tokens / 1e6:.2f}M tokens each (a best rate at an edge adds up to "
          f"{MAX_EXTENSIONS} a side), then {n_main} main runs of {main_tokens / 1e6:.2f}M, seeds "
          f"{' '.join(map(str, SEEDS))}; neighbours, optional, adds {2 * len(ARMS)} such")
    print(f"  room    {disk / 1e9:.1f} GB of disk for checkpoints and spectra, {data / 1e9:.1f} GB for data; GiB of "
          f"memory that a step takes at most, by micro-batch: {memory}")
    print(f"  {device_line(jobs)}")
    print(f"  time    {measured}; "
          f"predicted at {UTILISATION:.0%} of one GPU's bfloat16 peak: " + ", ".join(
              f"{name} {duration(total / system.PEAK_BF16[name] / UTILISATION)}" for name in COMMON), flush=True)
    existing = next(p for p in [study_dir, *study_dir.parents] if p.exists())
    if (free := shutil.disk_usage(existing).free) < disk + data:
        raise ValueError(f"{existing} has {free / 1e9:.1f} GB free and the study needs {(disk + data) / 1e9:.1f} GB: "
                         f"free some, or lower n_ckpt in config/{scale}.py")


def prepare(scale):
    """Make a scale's data by the prepare.py of its folder; data of one's own, without one, have to be whole."""
    folder = find(scale_config(scale)["data_dir"])
    if (folder / "prepare.py").exists():
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, str(folder / "prepare.py")])
    sys.path.append(str(ROOT / "data"))
    from tokens import load_bin
    counts = [len(load_bin(folder, split, scale_config(scale)["vocab_size"])) for split in ("train", "val")]
    print(f"{folder} is whole, {counts[0]:,} tokens for training and {counts[1]:,} for validation: nothing to make")


def run(scale, stage, study_dir, jobs, wanted=lambda arguments: True):
    """run_stage() where its turn has come. ValueError where it has not, or where a run failed."""
    picks = chosen(study_dir)
    if stage != "lr" and (lacking := [arm for arm in ARMS if arm not in picks]):
        raise ValueError(f"out/{scale}/chosen_lr.json has no rate for {lacking[0]}: run `bash sweep.sh {scale} lr` "
                         f"first")
    if stage == "neighbours" and (left := stage_runs(scale, "main", study_dir)):
        raise ValueError(f"{len(left)} main runs are missing, and neighbours come after them: run `bash sweep.sh "
                         f"{scale} main` first")
    if failed := run_stage(scale, stage, study_dir, jobs, wanted):
        names = ", ".join(folder.name for folder in failed)
        raise ValueError(f"{len(failed)} runs did not end ({names}): mend what is said above, or in their output.txt, "
                         f"and run the same command again")


def nth(items, i):
    if not i.isdecimal() or int(i) >= len(items):
        raise ValueError(f"there is no {i!r} here: choose one of 0 to {len(items) - 1}")
    return items[int(i)]


def main(args):
    command, scale, *rest = [*args, "", ""][:max(2, len(args))]
    if command == "scale" and not scale:
        scale = "80m" if devices()[0] else "mini"
    if command and scale and scale not in SCALES:
        fail(f"scale {scale!r} is not known: choose one of {', '.join(SCALES)}")
    study_dir = ROOT / "out" / scale
    try:
        if scale:  # what no command can do without
            sweep_seeds(scale), scale_config(scale)
        match [command, *rest] if scale else []:
            case ["scale"]:
                jobs_at_once()
                print(scale)
            case ["plan"]:
                plan(scale, study_dir)
            case ["status"]:
                status(scale, study_dir)
            case ["choose"]:
                choose(scale, study_dir)
            case ["data"]:
                prepare(scale)
            case ["list", *stages] if len(stages) < 2 and {*stages} <= STAGES.keys():
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... --list | head` ends quietly
                runs = [run for stage in stages or ("lr", "main") for run in stage_runs(scale, stage, study_dir)]
                for _, arguments in runs:
                    print(shlex.join([Path(sys.executable).name, "train.py", *arguments]))
                if {*ARMS} - {*chosen(study_dir)}:
                    print(f"main runs come after the sweep: first `python study.py choose {scale}`, then `python "
                          f"report.py --preregister out/{scale}`", file=sys.stderr)
            case ["run", stage] if stage in STAGES:
                run(scale, stage, study_dir, jobs_at_once())
            case ["count", stage] if stage in STAGES or stage == "extend":
                print(len(ARMS if stage == "extend" else stage_runs(scale, stage, study_dir, fixed=True)))
            case ["task", stage, i] if stage in STAGES:
                arguments = nth(stage_runs(scale, stage, study_dir, fixed=True), i)[1]
                run(scale, stage, study_dir, 1, lambda due: due == arguments)
            case ["extend", i]:
                arm = nth(ARMS, i)
                run(scale, "lr", study_dir, jobs_at_once(), lambda due: due[1] == f"config/{arm}.py")
            case _:
                fail("usage: python study.py plan|status|choose|data SCALE, list SCALE [STAGE], run SCALE STAGE; "
                     f"SCALE: {', '.join(SCALES)}; STAGE: {', '.join(STAGES)}")
    except (ValueError, OSError) as e:
        fail(e)


if __name__ == "__main__":
    main(sys.argv[1:])
