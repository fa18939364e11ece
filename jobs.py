"""How a study is run and watched: state, devices, jobs, plan, and the commands of study.py."""
import collections
import fcntl
import functools
import importlib
import json
import math
import multiprocessing
import os
import runpy
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
from study import ENDED, SCALES, STAGES, chosen, load_run, load_runs, number, read_json, scale_config, stage_runs


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


def last_words(folder):
    """The last line that a run printed, such as why it stopped; "" where there is none."""
    output = folder / "output.txt"
    return output.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1] if output.exists() else ""


def survey(scale, study_dir, say=lambda line: None):
    """Every run of a study, begun or not (neighbours only where one was begun), as load_run() gives it, with
    `row`, its newest numbers, `left`, its tokens still to come, and a status that may be waiting or running."""
    entries = []
    for stage, kind in STAGES.items():
        if kind == "neighbours" and not (study_dir / kind).exists():
            continue
        begun = {run["dir"]: run for run in load_runs(study_dir, kind, say)}
        due = [folder for folder, _ in stage_runs(scale, stage, study_dir)]
        budget = dict(max_tokens=SCALES[scale]["sweep_tokens"]) if kind == "sweep" else {}
        waiting = dict(config=scale_config(scale) | budget, rows=[], events=[], status="waiting")
        for folder in sorted({*begun, *due}):
            run = begun.get(folder, waiting)
            c, row, status, left = run["config"], dict(*run["rows"][-1:]), run["status"], 0
            if status not in ENDED:
                row |= read_json(folder / "progress.json", {})
                left = c["max_tokens"] - row.get("step", 0) * c["batch_tokens"]
                status = "running" if is_running(folder) else status
            entries.append(run | dict(dir=folder, row=row, status=status, left=left))
    return entries


def summary(scale, entries, jobs):
    """survey() in one line: how much is done; how long the rest takes, jobs at once and at the median speed."""
    count = collections.Counter(e["status"] for e in entries)
    parts = [f"out/{scale}: {sum(count[status] for status in ENDED)} of {len(entries)} runs done"]
    parts += [f"{count[status]} {status}" for status in ("running", "unfinished", "diverged") if count[status]]
    left = [e["left"] for e in entries]
    speeds = [e["row"]["tokens_per_s"] for e in entries if e["row"].get("tokens_per_s")]
    if speeds and any(left):
        seconds = max(sum(left) / jobs, *left) / statistics.median(speeds)
        parts.append(f"about {duration(seconds)} of training left")
    return ", ".join(parts)


def run_line(study_dir, e):
    """One of survey() in one line: what matters most first, since a terminal may cut it off."""
    row, name = e["row"], os.path.relpath(e["dir"], study_dir)
    steps, speed = e["config"]["max_tokens"] // e["config"]["batch_tokens"], row.get("tokens_per_s")
    pace = f"{number(speed, ',.0f')} tokens/s"
    if speed and e["left"]:
        pace += f", {duration(e['left'] / speed)} left"
    train, val, pr = (number(row.get(key), ".4f") for key in ("train_loss", "val_loss", "mean_pr"))
    notes = [flag for event in e["events"] for flag in event.get("flags", [])]
    if e["status"] in ("waiting", "unfinished"):
        notes += filter(None, [last_words(e["dir"])])
    return (f"{name:<30} {e['status']:<10} step {row.get('step', 0):>5} of {steps:<5} {pace:<27} train {train:>7}  "
            f"val {val:>7}  mean PR {pr:>7}  {', '.join(dict.fromkeys(notes))}").rstrip()


# ---- devices
COUNT = """import json, torch
torch.cuda.init()
found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in found]))"""


@functools.cache
def devices():
    """([({variable: entry} that makes it the only one, its name and memory)] of the CUDA devices, why there is
    none). torch counts them, in a child process: CUDA must not start in this one."""
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
    return [({variable: entry}, device) for entry, device in zip(names, found)], why[-1]


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
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def train(arguments, output, env):
    """`python train.py ARGUMENTS`, in a process that run() has forked. On a CPU it goes on from there, where torch and
    its compiler are imported already: half of the start of a run. With a GPU it starts anew, as CUDA forbids forks."""
    os.setsid()  # Ctrl-C comes through run()
    for caught in SIGNALS:
        if signal.getsignal(caught) != signal.SIG_IGN:  # as under nohup
            signal.signal(caught, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with open(os.devnull) as nothing, open(output, "a") as f:
        for fd, file in enumerate((nothing, f, f)):
            os.dup2(file.fileno(), fd)
    os.chdir(ROOT)
    os.environ.update(env, PYTHONUNBUFFERED="1")  # what is printed last comes last, such as why a run stopped
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    if not forks():
        os.execv(sys.executable, [sys.executable, *sys.argv])
    # files edited since are read anew, as their copy in source/ says; and tqdm, whose lock a killed run could keep
    for name, module in [*sys.modules.items()]:
        ours = name != "__main__" and Path(getattr(module, "__file__", None) or "/").parent == ROOT
        if ours or name.partition(".")[0] == "tqdm":
            del sys.modules[name]
    torch.set_num_threads(int(env["OMP_NUM_THREADS"].split(",")[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


def forks():
    """Whether runs may share what is imported here."""
    return sys.platform == "linux" and not devices()[0]


def start(arguments, output, env):
    """train() in a child process."""
    if forks():  # the compiler reads its number of threads when it is imported
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", env["TORCHINDUCTOR_COMPILE_THREADS"])
        importlib.import_module("torch._inductor.compile_fx")
    child = multiprocessing.get_context("fork").Process(target=train, args=(arguments, output, env))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the child has its own handlers
    child.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return child


def show(bars, scale, study_dir, jobs):
    """On a terminal a line for the study and one for each run at work; elsewhere the first of them."""
    entries = survey(scale, study_dir)
    lines = [summary(scale, entries, jobs)]
    lines += [run_line(study_dir, e) for e in entries if e["status"] == "running"]
    if not bars:
        print(lines[0], flush=True)
    for bar, line in zip(bars, lines + [""] * len(bars)):
        bar.set_description_str(line)


def run(scale, stage, study_dir, jobs, only=None):
    """Run what a stage needs, or `only` that folder of it, jobs at once; a failed run does not stop the others.
    SIGINT, SIGTERM and SIGHUP reach all children as SIGTERM: they save and leave. ValueError where the stage's
    turn has not come, or where a run failed."""
    for arm in study.ARMS:
        if stage != "lr" and arm not in chosen(study_dir):
            raise ValueError(f"out/{scale}/chosen_lr.json has no rate for {arm}: run `bash sweep.sh {scale} lr` first")
    if stage == "neighbours" and (left := stage_runs(scale, "main", study_dir)):
        raise ValueError(f"{len(left)} main runs come before neighbours: run `bash sweep.sh {scale} main` first")
    running, failed, stop, passed_on, shown = {}, [], [], 0, time.time()
    bars = [tqdm(bar_format="{desc}", position=i, leave=False, file=sys.stdout, dynamic_ncols=True)
            for i in range(1 + jobs)] if sys.stdout.isatty() else []
    for caught in SIGNALS:
        if signal.getsignal(caught) != signal.SIG_IGN:  # as under nohup
            signal.signal(caught, lambda caught, frame: stop.append(caught))
    try:
        while True:
            busy = failed + [folder for _, folder in running.values()]
            due = [] if stop else stage_runs(scale, stage, study_dir)  # anew: what ended can make a grid grow
            due = [run for run in due if run[0] not in busy and only in (None, run[0])]
            for slot, (folder, arguments) in zip([i for i in range(jobs) if i not in running], due):
                folder.mkdir(parents=True, exist_ok=True)
                running[slot] = start(arguments, folder / "output.txt", job_env(slot, jobs)), folder
            if not running:
                break
            while all(child.is_alive() for child, _ in running.values()):
                time.sleep(0.1)
                if len(stop) > passed_on:
                    passed_on = len(stop)
                    for child, _ in running.values():
                        child.terminate()
                if time.time() - shown > (5 if bars else 60):
                    shown = time.time()
                    show(bars, scale, study_dir, jobs)
            for slot, (child, folder) in list(running.items()):
                if not child.is_alive():
                    del running[slot]
                    if child.exitcode:
                        failed.append(folder)
                        said = f"exit status {child.exitcode}: {last_words(folder)}"
                    else:
                        ended = load_run(folder)
                        said = f"{ended['status']}, val loss {number(ended['val_loss'])}"
                    if not stop:
                        tqdm.write(f"{folder.name}: {said}; {summary(scale, survey(scale, study_dir), jobs)}")
                        sys.stdout.flush()
    finally:  # whatever happened here, nothing is left behind
        for child, _ in running.values():
            child.terminate()
        for bar in bars:
            bar.close()
    if stop:
        now = summary(scale, survey(scale, study_dir), jobs)
        print(f"stopped by {signal.Signals(stop[0]).name}; {now}: run the same command again to go on")
        if stop[0] == signal.SIGTERM:
            requeue()
        sys.exit(128 + stop[0])
    if failed:
        names = ", ".join(folder.name for folder in failed)
        raise ValueError(f"{len(failed)} runs did not end ({names}): mend what is said above, or in their output.txt, "
                         f"and run the same command again")


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


# ---- the commands
UTILISATION = 0.3  # of a GPU's peak, assumed: what small models commonly reach
COMMON = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA GeForce RTX 4090")


def plan(scale, study_dir):
    """Print in five lines what is left of a study, and its cost. ValueError where the disk is too full."""
    c, jobs, (found, why) = scale_config(scale), jobs_at_once(scale), devices()
    with torch.device("meta"):
        model = GPT(gpt_config(c))
    n_sweep, n_main = (len(stage_runs(scale, stage, study_dir)) for stage in ("lr", "main"))
    tokens = n_sweep * SCALES[scale]["sweep_tokens"] + n_main * c["max_tokens"]
    flops = tokens * model.flops_per_token()
    # bytes: a weight and AdamW's two moments in float32; of a rolling checkpoint one more is written aside
    disk = 12 * model.num_params() * (n_main * c["n_ckpt"] + 2 * min(jobs, n_sweep + n_main))
    if not (find(c["data_dir"]) / "meta.json").exists():
        disk += 2 * c["max_tokens"]  # data still to be made
    batch = c["batch_tokens"] // c["block_size"]
    least, most = (system.training_bytes(gpt_config(c), micro_batch) / 2**30 for micro_batch in (1, batch))
    device = f"{len(found)} x {found[0][1]}" if found else f"CPU, {system.cores()} cores ({why})"
    predicted = [f"{name} {duration(flops / system.PEAK_BF16[name] / UTILISATION)}" for name in COMMON]
    print(f"scale {scale}: {model.num_params() / 1e6:.2f}M parameters, {c['n_layer']} layers, width {c['n_embd']}, "
          f"context {c['block_size']}; left to do: {tokens / 1e6:.1f}M training tokens, {flops:.2e} FLOPs\n"
          f"  runs    {n_sweep} of the sweep (a best rate at an edge adds up to {study.MAX_EXTENSIONS} a side), then "
          f"{n_main} main runs, seeds {' '.join(map(str, study.SEEDS))}; neighbours, optional, not counted here\n"
          f"  room    {disk / 1e9:.1f} GB of disk; of memory at most {least:.1f} GiB a step at micro-batch 1, "
          f"{most:.1f} at {batch}\n"
          f"  device: {device}; runs at once: {jobs}\n"
          f"  time    {summary(scale, survey(scale, study_dir), jobs)}; training alone, at {UTILISATION:.0%} "
          f"of one GPU's bfloat16 peak: {', '.join(predicted)}", flush=True)
    free = shutil.disk_usage(next(p for p in (study_dir, *study_dir.parents) if p.exists())).free
    if free < disk:
        raise ValueError(f"{study_dir} has {free / 1e9:.1f} GB free and the study needs {disk / 1e9:.1f} GB: "
                         f"free some, or lower n_ckpt in config/{scale}.py")


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


def main(args):
    command, scale, *rest = [*args, "", ""][:max(2, len(args))]
    if command == "scale" and not scale:
        scale = "80m" if devices()[0] else "mini"
    if scale and scale not in SCALES:
        fail(f"scale {scale!r} is not known: choose one of {', '.join(SCALES)}")
    study_dir = ROOT / "out" / scale
    if command != "run":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... --list | head` ends quietly
    try:
        if scale:  # what no command can do without
            study.sweep_seeds(scale), scale_config(scale)
        match [command, *rest] if scale else []:
            case ["scale"]:
                jobs_at_once(scale)
                print(scale)
            case ["plan"]:
                plan(scale, study_dir)
            case ["status"]:
                entries = survey(scale, study_dir, print)
                at_once = sum(e["status"] == "running" for e in entries) or jobs_at_once(scale)
                print(*(run_line(study_dir, e) for e in entries), summary(scale, entries, at_once), sep="\n")
            case ["choose"]:
                study.choose(scale, study_dir)
            case ["data"]:
                prepare(scale)
            case ["list", *stages] if len(stages) < 2 and {*stages} <= STAGES.keys():
                for stage in stages or ("lr", "main"):
                    for _, arguments in stage_runs(scale, stage, study_dir):
                        print(shlex.join([Path(sys.executable).name, "train.py", *arguments]))
                if {*study.ARMS} - {*chosen(study_dir)}:
                    print(f"main runs come after the sweep: first `python study.py choose {scale}`, then "
                          f"`python report.py --preregister out/{scale}`", file=sys.stderr)
            case ["count", stage] if stage in STAGES:
                print(len(stage_runs(scale, stage, study_dir, fixed=True)))
            case ["run", stage] if stage in STAGES:
                run(scale, stage, study_dir, jobs_at_once(scale))
            case ["run", stage, i] if stage in STAGES and i.isdecimal():
                folders = [folder for folder, _ in stage_runs(scale, stage, study_dir, fixed=True)]
                if int(i) >= len(folders):
                    raise ValueError(f"{stage} has no run {i}: choose one of 0 to {len(folders) - 1}")
                run(scale, stage, study_dir, 1, folders[int(i)])
            case _:
                fail("usage: python study.py plan|status|choose|data SCALE, list SCALE [STAGE], run SCALE "
                     f"STAGE [I]; SCALE: {', '.join(SCALES)}; STAGE: {', '.join(STAGES)}")
    except (ValueError, OSError) as e:
        fail(e)
