"""What a study is: the arms, the learning-rate grids, the runs, and how their logs are read.

    python study.py plan SCALE              what the study costs, before it starts
    python study.py list SCALE lr|main      the commands that a stage still needs, one a line, for any scheduler
    python study.py run SCALE lr|main       run them, JOBS at once, until none is left
    python study.py choose SCALE            pick the learning rates once the sweep is done
    python study.py count SCALE lr|main     for slurm.sh: runs of a fresh study's stage
    python study.py task SCALE lr|main I    for slurm.sh: the I-th of them
    python study.py extend SCALE I          for slurm.sh: grow the I-th arm's grid until its winner is no edge
"""
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import system
from configurator import ROOT, fail, resolve
from model import GPT, GPTConfig

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
    "mini": dict(sweep_tokens=131_072, grids={
        "adamw": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        "adamw_qk": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
        "muon": [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2],
        "muon_qk": [4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2]}),
    "ci": dict(sweep_tokens=10_240, grids={  # a minute, to see that every stage works; its numbers mean nothing
        arm: [1e-3, 3e-3, 1e-2, 3e-2, 1e-1] for arm in ARMS}),
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
    val_loss = {"finished": rows[-1].get("val_loss") if rows else None, "diverged": math.inf}.get(status)
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
    pick = chosen(ROOT / "out" / scale).get(arm)
    if pick:
        return pick["lr"], f"the winner of {len(pick['tried'])} in out/{scale}/chosen_lr.json"
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


# ---- the runs of a stage
def sweep_results(study_dir, arm):
    """{learning rate: (status, final val loss)} of an arm's ended sweep runs."""
    runs = [r for r in load_runs(study_dir, "sweep") if r["config"]["arm"] == arm and r["status"] != "unfinished"]
    return {r["config"]["learning_rate"]: (r["status"], r["val_loss"]) for r in runs}


def winner(results):
    """(lr, bracketed) of {lr: (status, loss)}: the lowest final val loss; bracketed if both neighbours were run too."""
    lrs = sorted(results)
    best = min(lrs, key=lambda lr: results[lr][1])
    return best, lrs[0] < best < lrs[-1]


def missing_lrs(scale, arm, study_dir):
    """Learning rates that an arm's sweep still has to run: what is left of its grid; then, while the winner is at an
    edge, one point a factor of two further out, at most MAX_EXTENSIONS a side."""
    grid, results = SCALES[scale]["grids"][arm], sweep_results(study_dir, arm)
    if left := [lr for lr in grid if lr not in results]:
        return left
    best, bracketed = winner(results)
    if bracketed or math.isinf(results[best][1]):
        return []
    outer = float(f"{best * 2:.6g}") if best == max(results) else float(f"{best / 2:.6g}")
    extensions = sum(lr > grid[-1] if outer > best else lr < grid[0] for lr in results)
    return [outer] if extensions < MAX_EXTENSIONS else []


def stage_runs(scale, stage, study_dir, fixed=False):
    """[(run folder, arguments of train.py)] that a stage still has to run; arms take turns, so that the first jobs
    compile different graphs and the others find them in the cache. fixed: the list of a fresh study, whatever has run."""
    study_dir, runs = Path(study_dir), []
    if stage == "lr":
        missing = SCALES[scale]["grids"] if fixed else {arm: missing_lrs(scale, arm, study_dir) for arm in ARMS}
        for i in range(max(map(len, missing.values()))):
            for arm in (a for a in ARMS if i < len(missing[a])):
                lr = missing[arm][i]
                runs.append((study_dir / "sweep" / f"{arm}-lr{lr:g}", [
                    f"config/{scale}.py", f"config/{arm}.py", f"--seed={SWEEP_SEED}", f"--learning_rate={lr:g}", "--n_ckpt=0",
                    f"--max_tokens={SCALES[scale]['sweep_tokens']}"]))
    elif stage == "main":
        runs = [(study_dir / f"{arm}-seed{seed}", [f"config/{scale}.py", f"config/{arm}.py", f"--seed={seed}"])
                for seed in SEEDS for arm in ARMS]
    elif stage == "transfer":  # does the choice hold at a third of the main budget?
        for arm, choice in chosen(study_dir).items():
            for lr in (choice["lr"], float(f"{choice['lr'] / 2:.6g}")):
                runs.append((study_dir / "transfer" / f"{arm}-lr{lr:g}", [
                    f"config/{scale}.py", f"config/{arm}.py", f"--seed={SWEEP_SEED}", f"--learning_rate={lr:g}", "--n_ckpt=0",
                    f"--max_tokens={scale_config(scale)['max_tokens'] // 3}"]))
    else:
        raise ValueError(f"stage {stage!r} has no runs: choose lr, main or transfer")
    return [(d, [*args, f"--out_dir={os.path.relpath(d, ROOT)}"]) for d, args in runs if fixed
            or not (d / "config.json").exists() or load_run(d)["status"] == "unfinished"]


def scale_config(scale, arm="adamw"):
    """All keys of train.py at a scale and arm."""
    return resolve(ROOT / "train.py", [f"config/{scale}.py", f"config/{arm}.py"])


def gpus():
    """Names of the CUDA devices, without starting CUDA in this process."""
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    except FileNotFoundError:
        return []
    names = out.stdout.splitlines() if out.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else [names[int(i)] for i in visible.split(",") if i.isdigit() and int(i) < len(names)]


def run_stage(scale, stage, study_dir):
    """Run what a stage needs, JOBS at once: one a GPU, or on a CPU one a core with one thread each. A failed run does not
    stop the others; returns their names. SIGINT and SIGTERM go to all children, which save and leave."""
    devices = gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = int(os.environ.get("JOBS", len(devices) or cores))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else \
        [str(i) for i in range(len(devices))]
    running, failed, ended, stop = {}, [], 0, []

    def on_signal(number, frame):
        stop.append(number)
        for child, *_ in running.values():
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    while True:
        queue = []
        if not stop and len(running) < jobs:
            busy = [folder for _, folder, _, _ in running.values()]
            queue = [r for r in stage_runs(scale, stage, study_dir) if r[0] not in busy and r[0] not in failed]
        for slot in sorted(set(range(jobs)) - set(running)):
            if not queue:
                break
            folder, args = queue.pop(0)
            folder.mkdir(parents=True, exist_ok=True)
            env = dict(os.environ)
            if devices:
                env["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
            else:
                env["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
            with open(folder / "output.txt", "a") as out:
                child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *args], stdout=out, stderr=out, env=env, cwd=ROOT,
                                         start_new_session=True)  # Ctrl-C reaches it through us, once
            running[slot] = child, folder, time.time(), out
        if not running:
            break
        left = len(queue) + len(running)
        while all(child.poll() is None for child, *_ in running.values()):
            time.sleep(0.1)
        for slot, (child, folder, start, _) in list(running.items()):
            if child.poll() is None:
                continue
            left -= 1
            del running[slot]
            if child.returncode:
                lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines() or ["no output"]
                print(f"{folder.name}: stopped with status {child.returncode}: {lines[-1]}", flush=True)
                failed.append(folder)
            else:
                ended += 1
                run = load_run(folder)
                loss = f"val loss {run['val_loss']:.4f}" if run["status"] == "finished" else run["status"]
                print(f"{stage} {ended:>2}, {left} to go: {folder.name}, {loss}, {time.time() - start:.0f} s", flush=True)
    if stop:
        print(f"stopped by {signal.Signals(stop[0]).name}: run the same command again to go on")
        sys.exit(128 + stop[0])
    return [folder.name for folder in failed]


def choose(scale, study_dir):
    """Pick each arm's learning rate by its sweep and write chosen_lr.json. ValueError while runs are missing."""
    if missing := stage_runs(scale, "lr", study_dir):
        raise ValueError(f"the sweep in {study_dir} lacks {len(missing)} runs, such as {missing[0][0].name}: "
                         f"run `bash sweep.sh {scale} lr`")
    picks = {}
    for arm in ARMS:
        results = sweep_results(study_dir, arm)
        best, bracketed = winner(results)
        loss = results[best][1]
        if math.isinf(loss):
            raise ValueError(f"every sweep run of {arm} in {study_dir} diverged: lower its grid in study.py")
        picks[arm] = dict(lr=best, val_loss=loss, bracketed=bracketed, seed=SWEEP_SEED, tokens=SCALES[scale]["sweep_tokens"],
                          tried=[dict(lr=lr, val_loss=loss if status == "finished" else None, status=status)
                                 for lr, (status, loss) in sorted(results.items())])
        print(f"{LABELS[arm]:<16} lr = {best:g}, val loss {loss:.4f}{'' if bracketed else ', not bracketed'}")
    system.write_text(Path(study_dir) / "chosen_lr.json", json.dumps(picks, indent=1))


def measure(scale):
    """(tokens/s, seconds to the first step) of a short Muon run at a scale on this machine, one job, on random tokens."""
    c = scale_config(scale, "muon")
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, c["vocab_size"], 64 * c["block_size"] + 1).astype(np.uint16)
        meta = dict(vocab_size=c["vocab_size"], eot=0, tokenizer="random", command="none", settings={})
        for split, name in (("train", "train.bin"), ("val", "val_set.bin")):
            tokens.tofile(Path(folder) / name)
            meta |= {f"{split}_tokens": len(tokens), f"{split}_sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
        (Path(folder) / "meta.json").write_text(json.dumps(meta))
        gpu = bool(gpus())
        batch = c["batch_tokens"] if gpu else max(c["block_size"], 2048)
        env = dict(os.environ) if gpu else dict(os.environ, OMP_NUM_THREADS="1")
        start = time.time()
        out = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), f"config/{scale}.py", "config/muon.py", "--looks=0", "--n_ckpt=0",
             f"--data_dir={folder}", f"--out_dir={folder}/run", f"--batch_tokens={batch}", f"--max_tokens={batch * (20 if gpu else 6)}",
             f"--eval_tokens={c['block_size']}", f"--probe_tokens={c['block_size']}"], capture_output=True, text=True, env=env)
        if out.returncode:
            raise ValueError(f"the measurement failed: {(out.stderr.strip().splitlines() or ['no output'])[-1]}")
    values = dict(line.split(":", 1) for line in out.stdout.partition("---")[2].splitlines() if ":" in line)
    return float(values["tokens_per_s"]), time.time() - start - float(values["train_seconds"])


UTILISATION = 0.3  # assumed share of a GPU's peak where nothing was measured: what small models commonly reach


def plan(scale, study_dir):
    """Print what is left of a study costs: runs, tokens, FLOPs, disk, memory, hours. ValueError where the disk does not suffice."""
    c = scale_config(scale)
    gpt_config = GPTConfig(**{k: c[k] for k in GPTConfig.__dataclass_fields__})
    with torch.device("meta"):
        model = GPT(gpt_config)
    params, flops = model.num_params(), model.flops_per_token()
    n_sweep = len(stage_runs(scale, "lr", study_dir))
    n_main = len(stage_runs(scale, "main", study_dir))
    sweep_tokens, main_tokens = n_sweep * SCALES[scale]["sweep_tokens"], n_main * c["max_tokens"]

    def looking_tokens(n_runs, budget, n_ckpt):  # forward passes over the val set cost a third of training on its tokens
        looks = budget // c["batch_tokens"] // c["log_interval"] + n_ckpt + 1
        return n_runs * looks * (c["eval_tokens"] or 5_000_000) / 3

    looking = looking_tokens(n_sweep, SCALES[scale]["sweep_tokens"], 0) + looking_tokens(n_main, c["max_tokens"], c["n_ckpt"])
    work = sweep_tokens + main_tokens + looking
    # a checkpoint: 4 bytes a weight, and AdamW's two moments; one rolling beside the kept ones
    ckpt = 12 * params
    n_spectra = c["n_ckpt"] + 2 + c["max_tokens"] // c["batch_tokens"] // c["sv_interval"]
    spectra = n_main * n_spectra * c["n_layer"] * 2 * (128 + 4 * c["n_embd"])
    disk = n_main * (c["n_ckpt"] + 1) * ckpt + len(ARMS) * ckpt + spectra
    data_bytes = 2 * 310_000_000 if scale == "80m" else 100_000_000
    missing_data = 0 if (ROOT / c["data_dir"] / "meta.json").exists() else data_bytes
    print(f"scale {scale}: {params / 1e6:.2f}M parameters, {c['n_layer']} layers, width {c['n_embd']}, context {c['block_size']}")
    print(f"  sweep  {n_sweep} runs of {SCALES[scale]['sweep_tokens'] / 1e6:.2f}M tokens; an arm with its winner at an edge adds up to "
          f"{MAX_EXTENSIONS} runs a side")
    print(f"  main   {n_main} runs of {c['max_tokens'] / 1e6:.2f}M tokens, seeds {' '.join(map(str, SEEDS))}")
    print(f"  total  {(sweep_tokens + main_tokens) / 1e6:.1f}M training tokens, {flops * work:.2e} FLOPs: {flops / 1e6:.1f}M a token (6 for "
          f"each weight in a matrix product, 6 * n_layer * n_embd * T for causal attention), val passes included")
    print(f"  disk   {disk / 1e9:.1f} GB of checkpoints and spectra, {missing_data / 1e9:.1f} GB of data to prepare")
    rows = [m for m in (1, 2, 4, 8, 16, 32) if c["batch_tokens"] // c["block_size"] % m == 0]
    print("  memory of a training step by micro-batch, at most: " +
          ", ".join(f"{m}: {system.training_bytes(gpt_config, m) / 2**30:.1f} GiB" for m in rows))
    existing = next(p for p in [study_dir, *study_dir.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < disk + missing_data:
        raise ValueError(f"{existing} has {free / 1e9:.1f} GB free and the study needs {(disk + missing_data) / 1e9:.1f} GB: free some, or "
                         f"lower n_ckpt in config/{scale}.py")
    devices, cores = gpus(), os.cpu_count()
    jobs = int(os.environ.get("JOBS", len(devices) or cores))
    speed, overhead = measure(scale)
    at_once = min(jobs, len(devices) or cores)
    seconds = (work / speed + (n_sweep + n_main) * min(overhead, 15)) / at_once + (overhead if overhead > 15 else 0)
    print(f"  time   about {duration(seconds)} on {at_once} x {devices[0] if devices else 'one CPU core'}: {speed:,.0f} tokens/s measured, "
          f"{overhead:.0f} s to start and compile", flush=True)
    if c["n_embd"] >= 512:  # narrower matrices do not fill a GPU
        print(f"  on one GPU at {UTILISATION:.0%} of its bfloat16 peak, predicted: " + ", ".join(
            f"{name} {duration(flops * work / peak / UTILISATION)}" for name, peak in system.PEAK_BF16.items()), flush=True)


def duration(seconds):
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(args):
    command, scale, *rest = [*args, "", ""][:max(2, len(args))]
    if command not in ("plan", "list", "run", "choose", "count", "task", "extend") or not scale:
        fail(f"usage: {__doc__.strip().splitlines()[2].strip()} (or list, run, choose)")
    if scale not in SCALES:
        fail(f"scale {scale!r} is not known: choose one of {', '.join(SCALES)}")
    study_dir = ROOT / "out" / scale
    try:
        if command == "plan":
            plan(scale, study_dir)
        elif command == "choose":
            choose(scale, study_dir)
        elif command == "list":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... --list | head` ends quietly
            for folder, arguments in stage_runs(scale, *rest[:1] or [""], study_dir):
                print(shlex.join([Path(sys.executable).name, "train.py", *arguments]))
        elif command == "count":
            print(len(stage_runs(scale, rest[0], study_dir, fixed=True)))
        elif command == "task":
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "train.py", *stage_runs(scale, rest[0], study_dir, fixed=True)[int(rest[1])][1]])
        elif command == "extend":
            arm = ARMS[int(rest[0])]
            while missing := missing_lrs(scale, arm, study_dir):
                for _, arguments in (r for r in stage_runs(scale, "lr", study_dir) if r[0].name == f"{arm}-lr{missing[0]:g}"):
                    subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, check=True)
        elif rest[0] == "main" and not chosen(study_dir):
            raise ValueError(f"out/{scale}/chosen_lr.json is missing: run `bash sweep.sh {scale} lr` first")
        elif failed := run_stage(scale, *rest[:1] or [""], study_dir):
            fail(f"{len(failed)} runs failed: {', '.join(failed)}; their output.txt says why")
    except (ValueError, OSError, subprocess.CalledProcessError) as e:
        fail(e)


if __name__ == "__main__":
    main(sys.argv[1:])
