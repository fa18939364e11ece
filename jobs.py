"""How a study is run and watched: devices, jobs, state, plan, and the commands of study.py."""
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
from study import (MAX_EXTENSIONS, SCALES, STAGES, choose, chosen, load_run, load_runs, number, read_json,
                   scale_config, stage_runs, sweep_seeds, words)


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
          f"{' '.join(map(str, study.SEEDS))}; neighbours, optional, adds {2 * len(study.ARMS)} such")
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
    if stage != "lr" and (lacking := [arm for arm in study.ARMS if arm not in picks]):
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
                if {*study.ARMS} - {*chosen(study_dir)}:
                    print(f"main runs come after the sweep: first `python study.py choose {scale}`, then `python "
                          f"report.py --preregister out/{scale}`", file=sys.stderr)
            case ["run", stage] if stage in STAGES:
                run(scale, stage, study_dir, jobs_at_once())
            case ["count", stage] if stage in STAGES or stage == "extend":
                print(len(study.ARMS if stage == "extend" else stage_runs(scale, stage, study_dir, fixed=True)))
            case ["task", stage, i] if stage in STAGES:
                arguments = nth(stage_runs(scale, stage, study_dir, fixed=True), i)[1]
                run(scale, stage, study_dir, 1, lambda due: due == arguments)
            case ["extend", i]:
                arm = nth(study.ARMS, i)
                run(scale, "lr", study_dir, jobs_at_once(), lambda due: due[1] == f"config/{arm}.py")
            case _:
                fail("usage: python study.py plan|status|choose|data SCALE, list SCALE [STAGE], run SCALE STAGE; "
                     f"SCALE: {', '.join(SCALES)}; STAGE: {', '.join(STAGES)}")
    except (ValueError, OSError) as e:
        fail(e)
