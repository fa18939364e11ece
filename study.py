"""What a study is: arms, scales, grids, seeds, its runs, and how their logs are read. jobs.py runs it:

    python study.py plan SCALE             what the study costs, before it starts
    python study.py status SCALE           every run with its state, wherever it runs
    python study.py list SCALE [STAGE]     the commands that are still needed, one a line, for any scheduler
    python study.py run SCALE STAGE [I]    run them, JOBS at once; STAGE: lr, main or neighbours; I: one of them
    python study.py choose SCALE           pick the learning rates once the sweep is done
    python study.py data SCALE             prepare its data, where they are not whole
    for sweep.sh and slurm.sh: scale [SCALE]; count SCALE STAGE, the number of I
"""
import functools
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import system
from configurator import ROOT, fail, resolve
from model import GPT, gpt_config


def words(name, default, kind=str):
    """The environment variable `name` as a list: words apart by spaces or commas, none of them twice."""
    text = os.environ.get(name)
    if text is None:
        return default
    found = text.replace(",", " ").split()
    if wrong := [word for word in found if kind is int and not word.isdecimal()]:
        fail(f"{name}={text!r}: {wrong[0]!r} is no whole number of 0 or more")
    if not found or len({*map(kind, found)}) < len(found):
        fail(f"{name}={text!r} is empty or names one twice: give each once, or leave {name} unset")
    return [*map(kind, found)]


# An arm is a name: its label here, its grid at each scale, config/ARM.py, and what makes it different.
LABELS = {
    "adamw": "AdamW",
    "adamw_qk": "AdamW + QK-Norm",
    "muon": "Muon",
    "muon_qk": "Muon + QK-Norm",
    "adamw_qk_frozen": "AdamW + QK-Norm, frozen",  # gains of one that do not learn
    "muon_qk_frozen": "Muon + QK-Norm, frozen",
}
FACTORIAL = ["adamw", "adamw_qk", "muon", "muon_qk"]  # the 2x2: contrasts, registration, verdict
ARMS = words("ARMS", FACTORIAL)  # the arms that are run
SEEDS = words("SEEDS", [42, 137], int)  # of the main runs
MAX_EXTENSIONS = 3  # a side: a winner at an edge is not a winner, so the grid grows by factors of two
FIRST_SWEEP_SEED = 1  # the one that a sweep run's folder does not name
if unknown := [arm for arm in ARMS if arm not in LABELS]:
    fail(f"ARMS: no arm named {unknown[0]!r}: choose from {' '.join(LABELS)}")

# A scale is config/SCALE.py and its row here. sweep_tokens: of one sweep run, 1/15 of a main run at the
# plan's scale. sweep_seeds: not main seeds, so that no main run is the one that its rate was picked on.
SCALES = {
    "80m": dict(sweep_tokens=20_000_000, sweep_seeds=[1], gpu_jobs=1, grids={  # one seed, as in the plan
        "adamw": [1e-4, 3e-4, 6e-4, 1e-3, 2e-3],
        "adamw_qk": [3e-4, 6e-4, 1e-3, 2e-3, 4e-3],
        "muon": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
        "muon_qk": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
        "adamw_qk_frozen": [3e-4, 6e-4, 1e-3, 2e-3, 4e-3],
        "muon_qk_frozen": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3]}),
    "4m": dict(sweep_tokens=1_100_000, sweep_seeds=[1, 2, 3], gpu_jobs=8, grids={  # a third of the main runs' cost
        "adamw": [3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3],
        "adamw_qk": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
        "muon": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
        "muon_qk": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
        "adamw_qk_frozen": [6e-4, 1.2e-3, 2.4e-3, 4.8e-3, 9.6e-3],
        "muon_qk_frozen": [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]}),
    "mini": dict(sweep_tokens=131_072, sweep_seeds=[1], gpu_jobs=8, grids={  # one: three would double a newcomer's wait
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
    """Seeds of a scale's sweep: SWEEP_SEEDS, else its row. ValueError where one is a main seed."""
    seeds = words("SWEEP_SEEDS", SCALES[scale]["sweep_seeds"], int)
    if both := sorted({*seeds} & {*SEEDS}):
        raise ValueError(f"seed {both[0]} is in SEEDS and in the sweep: a main run must not be the run that "
                         f"its learning rate was picked on")
    return seeds


def grid(scale, arm):
    """An arm's learning rates, ascending, each as %g writes it, so that names, commands and logs agree."""
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
    """A JSON object, or `empty` where there is no file. ValueError, naming it, where it is something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object: restore it or delete it")
    return value


def read_log(run_dir):
    """Rows and events of a run's log.jsonl, as two lists of dicts. A half last line, which a kill can leave,
    is passed over; any other broken line is a ValueError."""
    path, rows, events = Path(run_dir) / "log.jsonl", [], []
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    for at, line in enumerate(lines[:-1], 1):  # what follows the last newline is no whole line
        try:
            row = json.loads(line)
            (events if "event" in row else rows).append(row)
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {at}: no JSON: restore it or delete {run_dir}") from None
    return rows, events


ENDED = ("finished", "diverged")


def load_run(run_dir):
    """One run as {dir, config, rows, events, status, val_loss}. status: finished, diverged or unfinished;
    val_loss: the final one in nats a token, inf where diverged, None where unfinished. ValueError for a
    folder whose config.json is missing or no run's."""
    run_dir = Path(run_dir)
    config = read_json(run_dir / "config.json", {})
    if not {"arm", "seed", "learning_rate"} <= config.keys():
        raise ValueError(f"{run_dir / 'config.json'} is no run's: delete the folder or restore the file")
    rows, events = read_log(run_dir)
    status = ["unfinished", *(e["event"] for e in events if e["event"] in ENDED)][-1]
    val_loss = rows[-1].get("val_loss") if rows and status == "finished" else None
    if status == "diverged" or val_loss is not None and not math.isfinite(val_loss):
        status, val_loss = "diverged", math.inf
    return dict(dir=run_dir, config=defaults() | config, rows=rows, events=events, status=status,
                val_loss=val_loss)


KINDS = {"main": "*-seed*", "sweep": "sweep/*", "neighbours": "neighbours/*"}  # kind of run: its folders
STAGES = {"lr": "sweep", "main": "main", "neighbours": "neighbours"}  # stage that trains: its kind of run


def run_name(kind, arm, lr, seed):
    """The name of a run's folder."""
    if kind == "main":
        return f"{arm}-seed{seed}"
    return f"{arm}-lr{lr:g}" + (f"-seed{seed}" if kind == "sweep" and seed != FIRST_SWEEP_SEED else "")


def load_runs(study_dir, kind="main", say=lambda line: None):
    """The runs of one of KINDS in a study folder such as out/mini, by arm in the order of LABELS, learning
    rate and seed. A folder that is damaged, a copy, or of no known arm is left out, and say() is told so."""
    runs = {}
    for begun in sorted(Path(study_dir).glob(KINDS[kind] + "/config.json")):
        folder = begun.parent
        try:
            run = load_run(folder)
            arm, lr, seed = (run["config"][key] for key in ("arm", "learning_rate", "seed"))
            if arm not in LABELS:
                raise ValueError(f"its arm {arm!r} is not in study.py")
            if folder.name != (name := run_name(kind, arm, lr, seed)):
                raise ValueError(f"its config.json is that of {name}: a copy is no run of the study")
            runs[list(LABELS).index(arm), lr, seed] = run
        except (ValueError, OSError) as e:
            say(f"{folder} is left out: {e}")
    return [runs[place] for place in sorted(runs)]


def arms_of(*runs):
    """The arms of a study in the order of LABELS: those to be run, and those that lists of runs hold."""
    have = {r["config"]["arm"] for group in runs for r in group}
    return [arm for arm in LABELS if arm in have or arm in ARMS]


def head_dim(config):
    """The largest PR there can be."""
    return config["n_embd"] // config["n_head"]


def layer_values(row, name):
    """The values of `name`_layer_0, _1, ... of a log row: name is pr, pr_centered, pr_pre_rope, pr_weight,
    attn_entropy or max_logit."""
    values = []
    while f"{name}_layer_{len(values)}" in row:
        values.append(row[f"{name}_layer_{len(values)}"])
    return values


def chosen(study_dir):
    """chosen_lr.json, or {} where there is none: {arm: {lr, val_loss, bracketed, tie, seeds, tokens, tried}}.
    val_loss is the mean over the sweep's seeds; tie lists the neighbouring rates within the winner's noise;
    tried is [{lr, val_loss, status, val_losses}], val_losses one a seed, None where one diverged. ValueError
    for a file that is no such thing."""
    path = Path(study_dir) / "chosen_lr.json"
    picks = read_json(path, {})
    if any(not isinstance(pick, dict) or not {"lr", "val_loss", "bracketed", "tried"} <= pick.keys()
           for pick in picks.values()):
        raise ValueError(f"{path} holds no chosen learning rates: restore it, or delete it and choose again")
    return {arm: dict(tie=[], seeds=[pick.get("seed", FIRST_SWEEP_SEED)]) | pick
            for arm, pick in picks.items()}


def default_lr(scale, arm):
    """(learning rate, where it is from) of an arm: the winner in out/SCALE/chosen_lr.json, else the middle of
    its grid."""
    if pick := chosen(ROOT / "out" / scale).get(arm):
        return pick["lr"], f"the winner of {len(pick['tried'])} in out/{scale}/chosen_lr.json"
    rates = grid(scale, arm)
    return rates[len(rates) // 2], f"the middle of the {arm} grid: out/{scale}/chosen_lr.json has no winner"


def finite(x):
    """x, or None where it is no finite number: JSON knows neither NaN nor infinity."""
    return x if x is not None and math.isfinite(x) else None


def number(x, form=".4f"):
    return "-" if x is None else f"{x:{form}}"


# keys that may change between two starts of a run: none of them moves a number by more than rounding
FREE = {"out_dir", "data_dir", "device", "compile", "micro_batch", "ckpt_interval_s", "first_look"}


def open_run(out_dir, config, meta, device):
    """Take a run's folder for this process: lock it, and check settings and data against those that it began
    with; or, in a new one, write config.json and a copy of the source. Returns the lock, to be held.
    ValueError or OSError where that fails."""
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = system.lock(out_dir)
    if old := read_json(out_dir / "config.json"):
        old = defaults() | old
        if differ := [f"{k} {old[k]!r} -> {config[k]!r}" for k in config if k not in FREE and old[k] != config[k]]:
            raise ValueError(f"{out_dir} was made with other settings ({', '.join(differ)}): give another "
                             f"--out_dir or delete it")
        if any(old.get("data", {}).get(k) != meta[k] for k in ("train_sha256", "val_sha256")):
            raise ValueError(f"{config['data_dir']} changed since the run in {out_dir} began: bring the old data "
                             f"back, or give another --out_dir")
        return lock
    (out_dir / "source").mkdir(exist_ok=True)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.sh")):
        if not path.name.startswith("test_"):
            shutil.copy(path, out_dir / "source")
    try:
        commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout
    except OSError:  # no git: the copy of the source says it all
        commit = ""
    system.write_text(out_dir / "source" / "versions.json", json.dumps(dict(
        python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
        commit=commit.strip() or "unknown", device=system.device_name(device),
        threads=torch.get_num_threads(), platform=platform.platform())))
    with torch.device("meta"):
        config = dict(config, data=meta, num_params=GPT(gpt_config(config)).num_params())
    system.write_text(out_dir / "config.json", json.dumps(config, indent=1))
    return lock


LOGIT_FLAG = 100  # the threshold tau of QK-Clip in Kimi K2 (arXiv:2507.20534)


def spot_check(run_dir, row):
    """Step 6 of the plan, as an event: the row of a token checkpoint against the one before (or step 0)."""
    def measures(row):  # each None where it is missing or not finite
        logits = layer_values(row, "max_logit")
        return [finite(x) for x in (row["val_loss"], row["mean_pr"], None if None in logits else max(logits))]

    rows, events = read_log(run_dir)
    spots = [e["step"] for e in events if e["event"] == "spot_check"]
    before = next((r for r in reversed(rows) if r["step"] in spots), (rows or [row])[0])
    (loss, pr, logit), (loss_before, pr_before, logit_before) = measures(row), measures(before)
    nan, falling = None in (loss, pr, logit), None not in (loss, loss_before) and loss < loss_before
    flags = {"not finite": nan, "val loss not falling": not falling,
             f"largest logit above {LOGIT_FLAG}": logit is not None and logit > LOGIT_FLAG}
    return dict(event="spot_check", step=row["step"], tokens=row["tokens"], val_loss=loss, falling=falling,
                nan=nan, mean_pr=pr, mean_pr_before=pr_before, max_logit=logit, max_logit_before=logit_before,
                flags=[flag for flag, raised in flags.items() if raised])


def spot_check_line(e):
    return (f"mean PR {number(e['mean_pr_before'], '.2f')} -> {number(e['mean_pr'], '.2f')}, largest logit "
            f"{number(e['max_logit_before'], '.1f')} -> {number(e['max_logit'], '.1f')}, "
            f"flags: {', '.join(e['flags']) or 'none'}")


# ---- the runs of a stage
def sweep_results(study_dir, arm, seeds=None):
    """{learning rate: {seed: final val loss, inf where diverged}} of an arm's ended sweep runs."""
    results = {}
    for run in load_runs(study_dir, "sweep"):
        c = run["config"]
        if c["arm"] == arm and run["status"] != "unfinished" and (seeds is None or c["seed"] in seeds):
            results.setdefault(c["learning_rate"], {})[c["seed"]] = run["val_loss"]
    return results


def winner(results):
    """(lr, bracketed, tie) of sweep_results(): the lowest mean over seeds of the final val loss; bracketed if
    both its neighbours were run too; tie: the neighbours whose mean lies less than two standard errors of the
    difference higher, sqrt(s_a^2 / n + s_b^2 / n), which one seed does not give."""
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
    """[(learning rate, seed)] that an arm's sweep still has to run: what is left of its grid; then, while the
    winner is at an edge, one point a factor of two further out, at most MAX_EXTENSIONS a side."""
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
    """Half and twice a rate: the stage `neighbours` trains an arm at both for the whole main budget."""
    return float(f"{lr / 2:.6g}"), float(f"{lr * 2:.6g}")


def stage_runs(scale, stage, study_dir, fixed=False):
    """[(run folder, arguments of train.py)] that a stage still has to run; arms take turns, so that the first
    jobs compile different graphs and the others find them in the cache. fixed: the list of a fresh study."""
    kind = STAGES[stage]
    if stage == "lr":
        due = {arm: [(lr, seed) for seed in sweep_seeds(scale) for lr in grid(scale, arm)] if fixed
               else missing_lrs(scale, arm, study_dir) for arm in ARMS}
        turns = itertools.zip_longest(*([(arm, *point) for point in due[arm]] for arm in ARMS))
        points = [point for turn in turns for point in turn if point]
        keys = ["--n_ckpt=0", "--first_look=0", f"--max_tokens={SCALES[scale]['sweep_tokens']}"]
    elif stage == "main":  # train.py takes the chosen rate
        points, keys = [(arm, None, seed) for seed in SEEDS for arm in ARMS], []
    else:  # neighbours: does the choice hold at the main budget, and does the claim hold beside it?
        picks = chosen(study_dir)
        points = [(arm, neighbour_lrs(picks[arm]["lr"])[side], SEEDS[0])
                  for side in (0, 1) for arm in ARMS if arm in picks]
        keys = ["--n_ckpt=0"]
    begun = [] if fixed else load_runs(study_dir, kind)
    ended, runs = [run["dir"] for run in begun if run["status"] in ENDED], []
    for arm, lr, seed in points:
        folder = Path(study_dir, "" if kind == "main" else kind, run_name(kind, arm, lr, seed))
        rate = [f"--learning_rate={lr:g}"] if lr else []
        if folder not in ended:
            runs.append((folder, [f"config/{scale}.py", f"config/{arm}.py", f"--seed={seed}", *rate, *keys,
                                  f"--out_dir={os.path.relpath(folder, ROOT)}"]))
    return runs


def choose(scale, study_dir):
    """Pick each arm's rate by its sweep and write chosen_lr.json. ValueError while runs are missing."""
    if missing := stage_runs(scale, "lr", study_dir):
        raise ValueError(f"the sweep in {study_dir} lacks {len(missing)} runs, such as {missing[0][0].name}: "
                         f"run `bash sweep.sh {scale} lr`")
    picks = chosen(study_dir)  # an arm that is not in ARMS today keeps its own
    for arm in ARMS:
        results = sweep_results(study_dir, arm, sweep_seeds(scale))
        best, bracketed, tie = winner(results)
        mean = {lr: sum(losses.values()) / len(losses) for lr, losses in results.items()}
        if math.isinf(mean[best]):
            raise ValueError(f"{arm} diverged at every rate in {study_dir}/sweep: lower its grid in study.py")
        seeds = sorted(results[best])
        tried = [dict(lr=lr, val_loss=finite(mean[lr]), status="finished" if finite(mean[lr]) else "diverged",
                      val_losses=[finite(results[lr][s]) for s in seeds]) for lr in sorted(results)]
        picks[arm] = dict(lr=best, val_loss=mean[best], bracketed=bracketed, tie=tie, seeds=seeds,
                          tokens=SCALES[scale]["sweep_tokens"], tried=tried)
        print(f"{LABELS[arm]:<24} lr = {best:g}, val loss {mean[best]:.4f}" + ", not bracketed" * (not bracketed)
              + f", a tie with {' and '.join(f'{lr:g}' for lr in tie)}" * bool(tie))
    system.write_text(Path(study_dir) / "chosen_lr.json", json.dumps(picks, indent=1, allow_nan=False))


if __name__ == "__main__":
    import jobs
    jobs.main(sys.argv[1:])
