"""How a study is run and watched: state, devices, jobs, plan, and the commands of study.py."""
import collections
import fcntl
import functools
import json
import math
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import study
import system
from configurator import ROOT, fail, find
from model import GPT, gpt_config
from study import SCALES, STAGES, chosen, load_run, load_runs, number, read_json, scale_config, stage_runs

ENDED = ("finished", "diverged")
FAILED = "failed with exit status"  # begins the line that run() writes below what a run printed


# ---- where a study is, from its files alone
def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def is_running(folder):
    """Whether a process trains in a run's folder. The lock of another machine may not show here: then
    progress.json tells, which train.py writes every five seconds, though not in a val pass."""
    here = True
    try:
        with open(folder / "lock", encoding="utf-8") as f:
            here = f.read().endswith(f" on {socket.gethostname()}\n")
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no lock, or a file system without locks
    progress = folder / "progress.json"
    return not here and progress.exists() and time.time() - progress.stat().st_mtime < 300


def look(folder, kind, run, tokens, batch_tokens):
    """Where a run is: {dir, kind, state, step, steps, tokens (of a step), row, flags, pace}. state: waiting,
    running, unfinished, finished, diverged or failed; row: the newest numbers; pace: seconds a training
    token, with start-up and val passes once it is finished. run: load_run() of what has begun, else None;
    tokens and batch_tokens are the budget of what has not."""
    output, row, flags, pace = folder / "output.txt", {}, [], None
    output = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.exists() else []
    failed = bool(output) and output[-1].startswith(FAILED)
    state = "running" if is_running(folder) else "failed" if failed else "unfinished" if run else "waiting"
    if run:
        tokens, batch_tokens = run["config"]["max_tokens"], run["config"]["batch_tokens"]
        row = dict(*run["rows"][-1:])
        flags = [flag for event in run["events"] for flag in event.get("flags", [])]
        if run["status"] != "unfinished":
            state = run["status"]
        else:
            now = read_json(folder / "progress.json", {})
            row |= {key: value for key, value in now.items() if value is not None}
        if row.get("tokens_per_s"):
            pace = 1 / row["tokens_per_s"]
        if state == "finished":
            begun, ended = ((folder / name).stat().st_mtime for name in ("config.json", "log.jsonl"))
            pace = (ended - begun) / tokens
    return dict(dir=folder, kind=kind, state=state, step=row.get("step", 0), steps=tokens // batch_tokens,
                tokens=batch_tokens, row=row, flags=flags + output[-2:-1] * (state == "failed"), pace=pace)


def survey(scale, study_dir, say=lambda line: None):
    """look() at every run of a study, begun or not: sweep, main, and neighbours where they were begun."""
    c, entries = scale_config(scale), []
    for stage, kind in STAGES.items():
        if kind != "neighbours" or (study_dir / "neighbours").exists():
            begun = {run["dir"]: run for run in load_runs(study_dir, kind, say)}
            due = stage_runs(scale, stage, study_dir, fixed=True) + stage_runs(scale, stage, study_dir)
            tokens = SCALES[scale]["sweep_tokens"] if kind == "sweep" else c["max_tokens"]
            entries += [look(folder, kind, begun.get(folder), tokens, c["batch_tokens"])
                        for folder in sorted({*begun, *dict(due)})]
    return entries


def seconds_left(entries, jobs):
    """Seconds until the runs of survey() have ended, jobs at once: by the median pace of the finished runs of
    their kind, else of the begun ones, else of any. None where none has begun."""
    def pace(kind):
        known = [e for e in entries if e["pace"]]
        same = [e for e in known if e["kind"] == kind]
        finished = [e for e in same if e["state"] == "finished"]
        return statistics.median(e["pace"] for e in finished or same or known)

    if not any(e["pace"] for e in entries):
        return None
    left = [(e["steps"] - e["step"]) * e["tokens"] * pace(e["kind"])
            for e in entries if e["state"] not in ENDED]
    return max(sum(left) / jobs, max(left, default=0))


def where(scale, entries, jobs):
    """One line: how much of survey() is done, and what is left."""
    count, seconds = collections.Counter(e["state"] for e in entries), seconds_left(entries, jobs)
    parts = [f"out/{scale}: {sum(count[state] for state in ENDED)} of {len(entries)} runs done"]
    parts += [f"{count[state]} {state}" for state in ("running", "unfinished", "failed", "diverged")
              if count[state]]
    return ", ".join(parts + [f"about {duration(seconds or 0)} of training left"] * bool(seconds))


def status(scale, study_dir):
    """Print every run of a study with its state, and what is left."""
    entries = survey(scale, study_dir, print)
    names = [str(e["dir"].relative_to(study_dir)) for e in entries]
    form = f"{{:<{max(map(len, names))}}}  {{:<10}} {{:>13}} {{:>8}} {{:>8}} {{:>8}} {{:>9}}  {{}}"
    print(form.format("run", "state", "step", "train", "val", "mean PR", "tokens/s", "flags"))
    for name, e in zip(names, entries):
        numbers = [number(e["row"].get(key), digits) for key, digits in (
            ("train_loss", ".4f"), ("val_loss", ".4f"), ("mean_pr", ".2f"), ("tokens_per_s", ",.0f"))]
        flags = ", ".join(dict.fromkeys(e["flags"]))
        print(form.format(name, e["state"], f"{e['step']}/{e['steps']}", *numbers, flags).rstrip())
    running = sum(e["state"] == "running" for e in entries)
    print(where(scale, entries, running or jobs_at_once(scale)))
    left = ["training"] * any(e["state"] not in ENDED for e in entries) + [
        name for name in ("results.json", "figures", "report.md") if not (study_dir / name).exists()]
    if not running and left:
        print(f"left: {', '.join(left)}; `bash sweep.sh {scale}` goes on with it")


# ---- devices
COUNT = """import json, torch
torch.cuda.init()
found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[p.name, p.total_memory] for p in found]))"""


@functools.cache
def devices():
    """([({variable: entry} that makes it the only one, name, bytes of memory)] of the CUDA devices, why there
    is none). torch counts them, in a child process: CUDA must not start in this one."""
    if not (torch.version.cuda or torch.version.hip):
        return [], f"torch {torch.__version__} is a CPU build"
    hip = torch.version.hip and "HIP_VISIBLE_DEVICES" in os.environ
    variable = "HIP_VISIBLE_DEVICES" if hip else "CUDA_VISIBLE_DEVICES"
    entries = [entry.strip() for entry in os.environ.get(variable, "").split(",") if entry.strip()]
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True,
                          env=os.environ | ({variable: ",".join(entries)} if entries else {}))
    found = json.loads(done.stdout or "[]")
    if found and entries and entries[0].startswith("MIG"):
        found = found[:1] * len(entries)  # a process sees one slice, however many are listed
    why = [line for line in done.stderr.splitlines() if "Error: " in line] or ["torch sees no CUDA device"]
    names = entries or map(str, range(len(found)))
    return [({variable: name}, *device) for name, device in zip(names, found)], why[-1]


def jobs_at_once(scale):
    """JOBS, else the scale's gpu_jobs on each GPU, else one a CPU core."""
    jobs = study.words("JOBS", None, int) or [len(devices()[0]) * SCALES[scale].get("gpu_jobs", 1) or system.cores()]
    if len(jobs) > 1 or jobs[0] < 1:
        fail(f"JOBS={os.environ['JOBS']!r}: give one whole number of 1 or more, or leave JOBS unset")
    return jobs[0]


def job_env(slot, jobs):
    """The environment of a job: its device, how many share it, and its share of the cores."""
    found = devices()[0]
    threads = str(max(1, system.cores() // jobs))
    env = dict(OMP_NUM_THREADS=threads, TORCHINDUCTOR_COMPILE_THREADS=threads) | os.environ
    if found:
        env |= found[slot % len(found)][0] | dict(GPU_JOBS=str(math.ceil(jobs / len(found))))
    return env


# ---- running them
def show(bars, scale, study_dir, jobs):
    """On a terminal a line for the study and one for each run at work; elsewhere the first of them."""
    entries = survey(scale, study_dir)
    lines = [where(scale, entries, jobs)]
    if not bars:
        print(*lines, flush=True)
    for e in entries:
        if e["state"] == "running":
            speed, steps = e["row"].get("tokens_per_s"), e["steps"] - e["step"]
            left = f"{duration(steps * e['tokens'] / speed)} left" if speed else "starting"
            name, loss = str(e["dir"].relative_to(study_dir)), number(e["row"].get("train_loss"))
            lines.append(f"{name:<32} step {e['step']:,} of {e['steps']:,}, train loss {loss}, "
                         f"{number(speed, ',.0f')} tokens/s, {left}")
    for bar, line in zip(bars, lines + [""] * len(bars)):
        bar.set_description_str(line)


def ending(folder, code):
    """What a run that left with this exit status leaves behind, in a few words."""
    with open(folder / "output.txt", "r+", encoding="utf-8", errors="replace") as output:
        last = (output.read().strip().splitlines() or ["no output"])[-1]
        if code:
            output.write(f"{FAILED} {code}\n")
            return last
    run = load_run(folder)
    return f"val loss {number(run['val_loss'])}" if run["status"] == "finished" else run["status"]


def run(scale, stage, study_dir, jobs, wanted=lambda arguments: True):
    """Run what a stage needs and `wanted` takes, jobs at once; a failed run does not stop the others. SIGINT,
    SIGTERM and SIGHUP reach all children as SIGTERM: they save and leave. ValueError where the stage's turn
    has not come, or where a run failed."""
    if stage != "lr" and (lacking := [arm for arm in study.ARMS if arm not in chosen(study_dir)]):
        raise ValueError(f"out/{scale}/chosen_lr.json has no rate for {lacking[0]}: run `bash sweep.sh "
                         f"{scale} lr` first")
    if stage == "neighbours" and (left := stage_runs(scale, "main", study_dir)):
        raise ValueError(f"{len(left)} main runs are missing, and neighbours come after them: run `bash "
                         f"sweep.sh {scale} main` first")
    running, failed, stop, passed_on, shown = {}, [], [], 0, time.time()
    bars = [tqdm(bar_format="{desc}", position=i, leave=False, file=sys.stdout, dynamic_ncols=True)
            for i in range(1 + jobs)] if sys.stdout.isatty() else []
    for caught in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(caught) != signal.SIG_IGN:  # as under nohup
            signal.signal(caught, lambda caught, frame: stop.append(caught))
    try:
        while True:
            busy = failed + [folder for _, folder in running.values()]
            due = [] if stop else stage_runs(scale, stage, study_dir)  # anew: what ended can make a grid grow
            due = [run for run in due if wanted(run[1]) and run[0] not in busy]
            for slot, (folder, arguments) in zip([i for i in range(jobs) if i not in running], due):
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / "output.txt", "a", encoding="utf-8") as output:
                    child = subprocess.Popen(  # in a session of its own: Ctrl-C comes through us
                        [sys.executable, str(ROOT / "train.py"), *arguments], stdout=output, stderr=output,
                        env=job_env(slot, jobs), cwd=ROOT, start_new_session=True)
                running[slot] = child, folder
            if not running:
                break
            while all(child.poll() is None for child, _ in running.values()):
                time.sleep(0.1)
                if len(stop) > passed_on:
                    passed_on = len(stop)
                    for child, _ in running.values():
                        child.terminate()
                if time.time() - shown > (5 if bars else 60):
                    shown = time.time()
                    show(bars, scale, study_dir, jobs)
            for slot, (child, folder) in list(running.items()):
                if child.poll() is not None:
                    del running[slot]
                    failed += [folder] * (child.returncode != 0)
                    if not stop:
                        said = ending(folder, child.returncode)
                        tqdm.write(f"{folder.name}: {said}; {where(scale, survey(scale, study_dir), jobs)}")
                        sys.stdout.flush()
    finally:  # whatever happened here, nothing is left behind
        for child, _ in running.values():
            child.terminate()
        for bar in bars:
            bar.close()
    if stop:
        now = where(scale, survey(scale, study_dir), jobs)
        print(f"stopped by {signal.Signals(stop[0]).name}; {now}: run the same command again to go on")
        if stop[0] == signal.SIGTERM:
            requeue()
        sys.exit(128 + stop[0])
    if failed:
        names = ", ".join(folder.name for folder in failed)
        raise ValueError(f"{len(failed)} runs did not end ({names}): mend what is said above, or in their "
                         f"output.txt, and run the same command again")


def requeue():
    """On SLURM, put this job into the queue again where its time is up: one that was cancelled or preempted
    is no longer RUNNING. A task is named by array and number: one of an array's has the array's own id."""
    if job := os.environ.get("SLURM_JOB_ID"):
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        state = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"],
                               capture_output=True, text=True).stdout.strip()
        if state == "RUNNING":
            subprocess.run(["scontrol", "requeue", job])


UTILISATION = 0.3  # of a GPU's peak, assumed: what small models commonly reach
COMMON = ("NVIDIA B200", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L4",
          "NVIDIA GeForce RTX 4090")


def plan(scale, study_dir):
    """Print in five lines what is left of a study, and its cost. ValueError where the disk is too full."""
    c, jobs, (found, why) = scale_config(scale), jobs_at_once(scale), devices()
    with torch.device("meta"):
        model = GPT(gpt_config(c))
    params, sweep_tokens, main_tokens = model.num_params(), SCALES[scale]["sweep_tokens"], c["max_tokens"]
    n_sweep, n_main = (len(stage_runs(scale, stage, study_dir)) for stage in ("lr", "main"))
    meta = read_json(find(c["data_dir"]) / "meta.json", {})
    val_tokens = c["eval_tokens"] or meta.get("val_tokens", 5_000_000)

    def work(budget, n_ckpt):  # a token of a val pass is a forward pass, a third of a training token
        looks = budget // c["batch_tokens"] // (c["log_interval"] or budget) + n_ckpt + 1
        return budget + looks * val_tokens / 3

    flops = model.flops_per_token() * (
        n_sweep * work(sweep_tokens, 0) + n_main * work(main_tokens, c["n_ckpt"]))
    # bytes: a weight and AdamW's two moments in float32; of a rolling checkpoint one more is written aside
    disk = 12 * params * (n_main * c["n_ckpt"] + 2 * min(jobs, n_sweep + n_main))
    data = 0 if meta else 2 * (main_tokens + val_tokens)
    memory = ", ".join(f"{m}: {system.training_bytes(gpt_config(c), m) / 2**30:.1f}"
                       for m in (1, 2, 4, 8, 16, 32) if c["batch_tokens"] // c["block_size"] % m == 0)
    names = collections.Counter(f"{name}, {memory / 2**30:.0f} GiB" for _, name, memory in found)
    device = "; ".join(f"{n} x {name}" for name, n in names.items()) or f"CPU, {system.cores()} cores ({why})"
    entries, here = survey(scale, study_dir), found[0][1] if found else system.device_name("cpu")
    for e in entries:  # another machine's pace tells nothing here
        if read_json(e["dir"] / "source/versions.json", {}).get("device") != here:
            e["pace"] = None
    seconds = seconds_left(entries, jobs)
    measured = "no run here yet to measure by" if seconds is None else \
        f"about {duration(seconds)} here, by its runs so far"
    common = [f"{name} {duration(flops / system.PEAK_BF16[name] / UTILISATION)}" for name in COMMON]
    training = n_sweep * sweep_tokens + n_main * main_tokens
    print(f"scale {scale}: {params / 1e6:.2f}M parameters, {c['n_layer']} layers, width {c['n_embd']}, "
          f"context {c['block_size']}; left to do: {training / 1e6:.1f}M training tokens, {flops:.2e} FLOPs\n"
          f"  runs    {n_sweep} of the sweep, {sweep_tokens / 1e6:.2f}M tokens each (a best rate at an edge "
          f"adds up to {study.MAX_EXTENSIONS} a side), then {n_main} main runs of {main_tokens / 1e6:.2f}M, "
          f"seeds {' '.join(map(str, study.SEEDS))}; neighbours, optional, adds {2 * len(study.ARMS)} such\n"
          f"  room    {disk / 1e9:.1f} GB of disk for checkpoints, {data / 1e9:.1f} GB for data; GiB of "
          f"memory that a step takes at most, by micro-batch: {memory}\n"
          f"  device: {device}; runs at once: {jobs}\n"
          f"  time    {measured}; predicted at {UTILISATION:.0%} of one GPU's bfloat16 peak: "
          f"{', '.join(common)}", flush=True)
    existing = next(p for p in [study_dir, *study_dir.parents] if p.exists())
    if (free := shutil.disk_usage(existing).free) < disk + data:
        raise ValueError(f"{existing} has {free / 1e9:.1f} GB free and the study needs "
                         f"{(disk + data) / 1e9:.1f} GB: free some, or lower n_ckpt in config/{scale}.py")


# ---- the commands
def prepare(scale):
    """Make a scale's data by its folder's prepare.py; data of one's own, without one, have to be whole."""
    c = scale_config(scale)
    folder = find(c["data_dir"])
    if (folder / "prepare.py").exists():
        os.execv(sys.executable, [sys.executable, str(folder / "prepare.py")])
    sys.path.append(str(ROOT / "data"))
    from tokens import load_bin
    train, val = (len(load_bin(folder, split, c["vocab_size"])) for split in ("train", "val"))
    print(f"{folder} is whole, {train:,} tokens for training and {val:,} for validation: nothing to make")


def nth(items, i):
    if not i.isdecimal() or int(i) >= len(items):
        raise ValueError(f"there is no {i!r} here: choose one of 0 to {len(items) - 1}")
    return items[int(i)]


def main(args):
    command, scale, *rest = [*args, "", ""][:max(2, len(args))]
    if command == "scale" and not scale:
        scale = "80m" if devices()[0] else "mini"
    if scale and scale not in SCALES:
        fail(f"scale {scale!r} is not known: choose one of {', '.join(SCALES)}")
    study_dir = ROOT / "out" / scale
    try:
        if scale:  # what no command can do without
            study.sweep_seeds(scale), scale_config(scale)
        match [command, *rest] if scale else []:
            case ["scale"]:
                jobs_at_once(scale)
                print(scale)
            case ["plan" | "status" | "choose"]:
                dict(plan=plan, status=status, choose=study.choose)[command](scale, study_dir)
            case ["data"]:
                prepare(scale)
            case ["list", *stages] if len(stages) < 2 and {*stages} <= STAGES.keys():
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... --list | head` ends quietly
                for stage in stages or ("lr", "main"):
                    for _, arguments in stage_runs(scale, stage, study_dir):
                        print(shlex.join([Path(sys.executable).name, "train.py", *arguments]))
                if {*study.ARMS} - {*chosen(study_dir)}:
                    print(f"main runs come after the sweep: first `python study.py choose {scale}`, then "
                          f"`python report.py --preregister out/{scale}`", file=sys.stderr)
            case ["run", stage] if stage in STAGES:
                run(scale, stage, study_dir, jobs_at_once(scale))
            case ["count", "extend"]:
                print(len(study.ARMS))
            case ["count", stage] if stage in STAGES:
                print(len(stage_runs(scale, stage, study_dir, fixed=True)))
            case ["task", stage, i] if stage in STAGES:
                task = nth(stage_runs(scale, stage, study_dir, fixed=True), i)[1]
                run(scale, stage, study_dir, 1, lambda given: given == task)
            case ["extend", i]:
                arm = nth(study.ARMS, i)
                run(scale, "lr", study_dir, jobs_at_once(scale), lambda given: given[1] == f"config/{arm}.py")
            case _:
                fail("usage: python study.py plan|status|choose|data SCALE, list SCALE [STAGE], run SCALE "
                     f"STAGE; SCALE: {', '.join(SCALES)}; STAGE: {', '.join(STAGES)}")
    except (ValueError, OSError) as e:
        fail(e)
