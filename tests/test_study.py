"""study.py and sweep.sh: grids, choice, stages, devices, plans, status, signals, SLURM."""
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import jobs
import study
import system
from test_smoke import ENV, ROOT, write_data

PATH = os.path.dirname(sys.executable) + ":" + os.environ["PATH"]


def sweep_run(study_dir, arm, lr, loss, seed=1, kind="sweep", **config):
    """A run as train.py leaves it; loss None: diverged."""
    folder = study_dir / ("" if kind == "main" else kind) / study.run_name(kind, arm, lr, seed)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(arm=arm, seed=seed, learning_rate=lr) | config))
    end = [dict(step=9, val_loss=loss), dict(event="finished", step=9)] if loss else [
        dict(event="diverged", step=5)]
    rows = [dict(step=0, val_loss=8.0), *end]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def fails(capsys, *args):
    """The one line that a command of study.py ends with."""
    with pytest.raises(SystemExit) as e:
        jobs.main(list(args))
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)
    return str(e.value)


# ---- grids and choice
def test_grid_grows_until_the_winner_is_bracketed(tmp_path):
    grid = study.SCALES["mini"]["grids"]["muon"]

    def loss(lr):  # best at 0.25, two doublings beyond the grid
        return 5 + math.log(lr / 0.25) ** 2

    assert study.missing_lrs("mini", "muon", tmp_path) == [(lr, 1) for lr in grid]
    for lr in grid:
        sweep_run(tmp_path, "muon", lr, loss(lr))
    for outer in (0.128, 0.256, 0.512):
        assert study.missing_lrs("mini", "muon", tmp_path) == [(outer, 1)]
        # a diverged run brackets too
        sweep_run(tmp_path, "muon", outer, loss(outer) if outer < 0.5 else None)
    assert study.missing_lrs("mini", "muon", tmp_path) == []
    assert study.winner(study.sweep_results(tmp_path, "muon")) == (0.256, True, [])


def test_grid_stops_after_three_extensions_and_says_not_bracketed(tmp_path):
    for arm in study.ARMS:
        while missing := study.missing_lrs("mini", arm, tmp_path):
            for lr, seed in missing:
                sweep_run(tmp_path, arm, lr, 5 + lr, seed)  # lower is always better
    study.choose("mini", tmp_path)
    for arm, pick in study.chosen(tmp_path).items():
        assert len(pick["tried"]) == 8 and not pick["bracketed"]
        assert pick["lr"] == pytest.approx(study.SCALES["mini"]["grids"][arm][0] / 8)


def test_an_extension_is_run_with_every_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("SWEEP_SEEDS", "1, 2 3")
    grid = study.grid("mini", "muon")
    assert study.missing_lrs("mini", "muon", tmp_path) == [(lr, seed) for seed in (1, 2, 3) for lr in grid]
    for seed in (1, 2, 3):
        for lr in grid:
            sweep_run(tmp_path, "muon", lr, 5 - lr, seed)
    outer = grid[-1] * 2
    assert study.missing_lrs("mini", "muon", tmp_path) == [(outer, seed) for seed in (1, 2, 3)]
    sweep_run(tmp_path, "muon", outer, 1.0, 1)  # one seed does not make it the winner
    assert study.missing_lrs("mini", "muon", tmp_path) == [(outer, 2), (outer, 3)]
    for seed in (2, 3):
        sweep_run(tmp_path, "muon", outer, 9.0, seed)
    assert study.missing_lrs("mini", "muon", tmp_path) == []
    assert study.winner(study.sweep_results(tmp_path, "muon"))[:2] == (grid[-1], True)


def test_a_grid_value_that_is_not_its_own_name(tmp_path, monkeypatch):
    """0.1 * 3 is no 0.3: folder, command and log say 0.3, and so does the grid."""
    monkeypatch.setitem(study.SCALES["ci"]["grids"], "muon", [0.1 * 3, 0.1, 0.7])
    monkeypatch.setattr(study, "ARMS", ["muon"])
    assert study.grid("ci", "muon") == [0.1, 0.3, 0.7]
    for lr in (0.1, 0.3, 0.7):
        sweep_run(tmp_path, "muon", lr, 5 + abs(lr - 0.3))
    assert study.missing_lrs("ci", "muon", tmp_path) == [] == study.stage_runs("ci", "lr", tmp_path)
    study.choose("ci", tmp_path)
    assert study.chosen(tmp_path)["muon"]["lr"] == 0.3 and study.chosen(tmp_path)["muon"]["bracketed"]


def test_the_final_loss_decides_not_the_lowest_ever_seen(tmp_path):
    for lr, loss in ((1e-3, 5.0), (2e-3, 4.9), (4e-3, 5.1)):
        sweep_run(tmp_path, "adamw", lr, loss)
    log = tmp_path / "sweep" / "adamw-lr0.001" / "log.jsonl"
    log.write_text(json.dumps(dict(step=5, val_loss=1.0)) + "\n" + log.read_text())
    assert study.winner(study.sweep_results(tmp_path, "adamw"))[0] == 2e-3


def test_the_lowest_mean_wins_and_near_ones_tie():
    def results(*losses):
        return {lr: dict(enumerate(seeds, 1)) for lr, seeds in zip((1e-3, 2e-3, 4e-3, 8e-3), losses)}

    far = [6.0, 6.1, 6.2]
    # means 5.1, 5.0: standard error of the difference sqrt(0.01 / 3 + 0.01 / 3) = 0.0816, twice that is 0.163
    assert study.winner(results(far, [5.0, 5.1, 5.2], [4.9, 5.0, 5.1], far)) == (4e-3, True, [2e-3])
    # the same means with sds of 0.01: 2 * 0.00816 is less than 0.1
    assert study.winner(results(far, [5.09, 5.1, 5.11], [4.99, 5.0, 5.01], far)) == (4e-3, True, [])
    # no neighbour, however near, is a tie; of both sides each may be
    assert study.winner(results([5.0, 5.1, 5.2], far, [4.9, 5.0, 5.1], [4.95, 5.0, 5.12]))[2] == [8e-3]
    assert study.winner(results([5.0, 5.2], [4.9, 5.1], [4.95, 5.2]))[2] == [1e-3, 4e-3]
    # the lowest single run does not win; one diverged seed rules a rate out; one seed gives no noise
    assert study.winner(results([4.0, 6.0], [4.8, 4.9], [4.9, 5.0]))[0] == 2e-3
    assert study.winner(results([4.0, math.inf], [4.8, 4.9], [4.9, 5.0])) == (2e-3, True, [4e-3])
    assert study.winner(results([5.0], [4.9], [4.9001])) == (2e-3, True, [])


def test_choose_with_several_seeds(tmp_path, monkeypatch):
    """Losses one a seed, None where one diverged; runs of a seed that is no longer asked for do not count."""
    monkeypatch.setenv("SWEEP_SEEDS", "1 2")
    monkeypatch.setattr(study, "ARMS", ["muon"])
    losses = {4e-3: (5.0, 5.2), 8e-3: (4.9, 5.1), 1.6e-2: (4.0, None), 3.2e-2: (6.0, 6.0),
              6.4e-2: (None, None)}
    for lr, seeds in losses.items():
        for seed, loss in enumerate(seeds, 1):
            sweep_run(tmp_path, "muon", lr, loss, seed)
    sweep_run(tmp_path, "muon", 3.2e-2, 0.5, 3)
    study.choose("mini", tmp_path)
    text = (tmp_path / "chosen_lr.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    pick = study.chosen(tmp_path)["muon"]
    assert pick["lr"] == 8e-3 and pick["val_loss"] == pytest.approx(5.0) and pick["bracketed"]
    assert pick["seeds"] == [1, 2] and pick["tie"] == [4e-3]
    assert [t["val_losses"] for t in pick["tried"]] == [list(seeds) for seeds in losses.values()]
    assert [t["val_loss"] for t in pick["tried"]] == [pytest.approx(5.1), pytest.approx(5.0), None, 6.0, None]


def test_choose_refuses_a_half_done_sweep(tmp_path):
    sweep_run(tmp_path, "muon", 4e-3, 5.0)
    with pytest.raises(ValueError, match="lacks 19 runs"):
        study.choose("mini", tmp_path)
    assert not (tmp_path / "chosen_lr.json").exists()


def test_a_damaged_or_copied_folder_is_run_again_not_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ARMS", ["muon"])
    grid = study.grid("mini", "muon")
    for lr in grid:
        folder = sweep_run(tmp_path, "muon", lr, 5.0)
    (folder / "config.json").write_text("{}")
    shutil.rmtree(tmp_path / f"sweep/muon-lr{grid[0]:g}")
    shutil.copytree(tmp_path / f"sweep/muon-lr{grid[1]:g}", tmp_path / f"sweep/muon-lr{grid[0]:g}")
    due = [folder.name for folder, _ in study.stage_runs("mini", "lr", tmp_path)]
    assert due == [f"muon-lr{grid[0]:g}", f"muon-lr{grid[-1]:g}"]
    with pytest.raises(ValueError, match="lacks 2 runs"):
        study.choose("mini", tmp_path)


def test_numbers_that_are_none(tmp_path):
    """A loss that is not finite is a divergence, and a spot check of it is JSON."""
    folder = sweep_run(tmp_path, "muon", 4e-3, math.nan)
    assert study.load_run(folder)["status"] == "diverged" and study.load_run(folder)["val_loss"] == math.inf
    for bad in (math.nan, math.inf, None):
        row = dict(step=9, tokens=9, val_loss=bad, mean_pr=bad, max_logit_layer_0=bad, max_logit_layer_1=1.0)
        (folder / "log.jsonl").write_text(json.dumps(row | dict(step=0)) + "\n")
        event = study.spot_check(folder, row)
        json.dumps(event, allow_nan=False)
        assert event["nan"] and "not finite" in event["flags"]
        assert "flags: not finite, val loss not falling" in study.spot_check_line(event)


# ---- what a person types
@pytest.mark.parametrize("name, text, says", [
    ("SEEDS", "42,42", "is empty or names one twice"), ("SEEDS", "7 07", "is empty or names one twice"),
    ("SEEDS", " , ", "is empty or names one twice"), ("SEEDS", "", "is empty or names one twice"),
    ("SEEDS", "4 x", "'x' is no whole number"),
    ("SEEDS", "-1", "'-1' is no whole number"), ("SEEDS", "1.5", "'1.5' is no whole number"),
    ("SWEEP_SEEDS", "7,seven", "'seven'"),
    ("SWEEP_SEEDS", "", "is empty"), ("JOBS", "0", "one whole number of 1 or more"),
    ("JOBS", "-1", "'-1' is no whole number"),
    ("JOBS", "two", "'two' is no whole number"), ("JOBS", "1 2", "one whole number"),
    ("JOBS", "", "is empty")])
def test_lists_that_make_no_sense(monkeypatch, capsys, name, text, says):
    monkeypatch.setenv(name, text)
    if name == "SEEDS":
        with pytest.raises(SystemExit) as e:
            study.words("SEEDS", [42], int)
        assert says in str(e.value) and str(e.value).startswith(f"error: {name}={text!r}")
    else:
        assert says in fails(capsys, "scale", "ci")


def test_lists_with_commas(monkeypatch):
    monkeypatch.setenv("SEEDS", "42,137, 7 8")
    assert study.words("SEEDS", [1], int) == [42, 137, 7, 8]


def test_wrong_lists_end_sweep_in_one_line():
    done = subprocess.run(["bash", str(ROOT / "sweep.sh"), "ci", "lr"], capture_output=True, text=True,
                          cwd="/", env=dict(ENV, PATH=PATH, ARMS="muon sgd"))
    assert done.returncode and not done.stdout and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ARMS: no arm named 'sgd'")


@pytest.mark.parametrize("args", [
    ["scale"], ["plan"], ["status"], ["list"], ["list", "lr"], ["run", "lr"], ["choose"], ["data"],
    ["count", "lr"], ["run", "main", "0"]])
def test_a_main_seed_is_no_sweep_seed(monkeypatch, capsys, args):
    monkeypatch.setenv("SWEEP_SEEDS", "3 137")
    assert "seed 137 is in SEEDS and in the sweep" in fails(capsys, args[0], "ci", *args[1:])


@pytest.mark.parametrize("args, says", [
    ([], "usage: python study.py"), (["plan"], "usage"), (["run", "ci"], "usage"),
    (["run", "ci", "eval"], "usage"), (["list", "ci", "x"], "usage"),
    (["plan", "ci", "lr"], "usage"), (["go", "ci"], "usage"), (["run", "ci", "lr", "-1"], "usage"),
    (["run", "ci", "lr", "x"], "usage"), (["count", "ci"], "usage"),
    (["plan", "80b"], "scale '80b' is not known: choose one of 80m, 4m, mini, ci"),
    (["run", "ci", "lr", "20"], "lr has no run 20: choose one of 0 to 19")])
def test_wild_arguments(capsys, args, says):
    assert says in fails(capsys, *args)


def test_wrong_scale_of_the_study():
    done = subprocess.run(["bash", str(ROOT / "sweep.sh"), "80b"], capture_output=True, text=True, cwd="/",
                          env=dict(ENV, PATH=PATH))
    assert done.returncode
    assert done.stderr.strip() == "error: scale '80b' is not known: choose one of 80m, 4m, mini, ci"


def test_main_waits_for_the_sweep_and_neighbours_for_main(tmp_path, monkeypatch):
    (tmp_path / "chosen_lr.json").write_text(json.dumps({arm: dict(lr=0.01, val_loss=5.0, bracketed=True,
        tried=[]) for arm in study.ARMS[:3]}))
    for stage in ("main", "neighbours"):
        with pytest.raises(ValueError, match="no rate for muon_qk: run `bash sweep.sh ci lr` first"):
            jobs.run("ci", stage, tmp_path, 1)
    monkeypatch.setattr(study, "ARMS", study.ARMS[:3])
    with pytest.raises(ValueError, match="6 main runs come before neighbours: run `bash sweep.sh ci main` first"):
        jobs.run("ci", "neighbours", tmp_path, 1)
    runs = study.stage_runs("ci", "neighbours", tmp_path)
    assert [folder.name for folder, _ in runs] == [
        f"{arm}-lr{lr}" for lr in ("0.005", "0.02") for arm in study.ARMS]
    assert all("--seed=42" in given and not any("max_tokens" in a for a in given) for _, given in runs)


# ---- devices
FAKE = """
import os, sys, types
listed = os.environ.get("CUDA_VISIBLE_DEVICES")
listed = ["0", "1"] if listed is None else [e for e in listed.split(",") if e]
if any(e.startswith("MIG") for e in listed):
    listed = listed[:1]  # as CUDA does
def init():
    if not listed:
        raise RuntimeError("No CUDA GPUs are available")
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(  # the real one takes seconds
    init=init, device_count=lambda: len(listed),
    get_device_properties=lambda i: types.SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)))
"""


@pytest.fixture
def cuda(monkeypatch):
    """A machine with two CUDA devices, as far as torch can tell."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(jobs, "COUNT", FAKE + jobs.COUNT)
    monkeypatch.delenv("JOBS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(system, "cores", lambda: 16)
    jobs.devices.cache_clear()
    yield monkeypatch
    jobs.devices.cache_clear()


@pytest.mark.parametrize("listed, entries", [
    (None, ["0", "1"]), ("0, 1", ["0", "1"]), ("3", ["3"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
    ("MIG-1,MIG-2, MIG-3", ["MIG-1", "MIG-2", "MIG-3"]), ("", []), ("1,0", ["1", "0"])])
def test_devices_are_counted_by_torch_and_named_as_they_were(cuda, capsys, tmp_path, listed, entries):
    if listed is not None:
        cuda.setenv("CUDA_VISIBLE_DEVICES", listed)
    found, why = jobs.devices()
    assert found == [({"CUDA_VISIBLE_DEVICES": entry}, "NVIDIA H100, 80 GiB") for entry in entries]
    at_once = jobs.jobs_at_once("80m")
    assert at_once == (len(entries) or 16)
    assert jobs.jobs_at_once("4m") == (8 * len(entries) or 16)  # small models share a GPU
    jobs.plan("ci", tmp_path)
    what = f"{len(entries)} x NVIDIA H100, 80 GiB" if entries else \
        "CPU, 16 cores (RuntimeError: No CUDA GPUs are available)"
    assert f"  device: {what}; runs at once: {at_once}\n" in capsys.readouterr().out
    if entries:
        assert [jobs.job_env(slot, at_once)["CUDA_VISIBLE_DEVICES"] for slot in range(at_once)] == entries


def test_several_jobs_share_a_device_and_its_cores(cuda):
    cuda.delenv("OMP_NUM_THREADS", raising=False)
    cuda.setenv("JOBS", "5")
    envs = [jobs.job_env(slot, jobs.jobs_at_once("80m")) for slot in range(5)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in envs] == ["0", "1", "0", "1", "0"]
    assert all((env["GPU_JOBS"], env["OMP_NUM_THREADS"], env["TORCHINDUCTOR_COMPILE_THREADS"]) == ("3", "3",
        "3") for env in envs)
    cuda.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    env = jobs.job_env(0, 100)
    assert env["OMP_NUM_THREADS"] == "1" and env["GPU_JOBS"] == "50"
    assert env["TORCHINDUCTOR_COMPILE_THREADS"] == "7"


def test_rocm_keeps_its_own_variable(cuda):
    cuda.setattr(torch.version, "cuda", None)
    cuda.setattr(torch.version, "hip", "7.0")
    cuda.setenv("HIP_VISIBLE_DEVICES", "2,3")
    assert [jobs.job_env(slot, 2)["HIP_VISIBLE_DEVICES"] for slot in (0, 1)] == ["2", "3"]
    assert "CUDA_VISIBLE_DEVICES" not in jobs.job_env(0, 2)


def test_the_default_scale_follows_the_device(cuda, capsys):
    jobs.main(["scale"])
    cuda.setattr(torch.version, "cuda", None)
    jobs.devices.cache_clear()
    jobs.main(["scale"])
    assert capsys.readouterr().out.split() == ["80m", "mini"]
    assert jobs.devices()[1] == f"torch {torch.__version__} is a CPU build"


# ---- plans, lists, status
def test_plan_is_five_lines_and_trains_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(jobs, "devices", lambda: ([], "none is counted here"))  # which a CUDA build does in a child
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(jobs, "start", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: type("usage", (), dict(free=10**12)))  # it needs 50 GB
    jobs.plan("80m", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("scale 80m: 79.12M parameters")
    assert "2800.0M training tokens" in lines[0]
    assert "20 of the sweep" in lines[1] and "8 main runs" in lines[1] and "device: CPU" in lines[3]
    # 6 * 79.1M + 6 * 22 * 512 * 2048 = 0.613 GFLOPs a token; 2.8G tokens; 30 % of 989 TFLOP/s
    assert "0 of 28 runs done; training alone" in lines[4] and "H100 80GB HBM3 1.6 h" in lines[4]
    assert not any(tmp_path.iterdir())


def test_plan_refuses_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: type("usage", (), dict(free=10**9)))
    with pytest.raises(ValueError, match="1.0 GB free and the study needs"):
        jobs.plan("80m", tmp_path)


def test_list_prints_a_command_a_run():
    done = subprocess.run(["bash", str(ROOT / "sweep.sh"), "80m", "--list"], capture_output=True, text=True,
                          cwd="/", env=dict(ENV, PATH=PATH))
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 28 and len(set(lines)) == 28
    assert sum("--seed=137" in line for line in lines) == 4 and all(" train.py config/80m.py config/"
        in line for line in lines)
    assert "main runs come after the sweep" in done.stderr


def test_each_array_task_is_one_run(tmp_path):
    for stage, n in (("lr", 20), ("main", 8)):
        runs = study.stage_runs("80m", stage, tmp_path, fixed=True)
        assert len({folder for folder, _ in runs}) == len(runs) == n


def test_status_names_every_state(tmp_path, capsys, monkeypatch):
    """From files alone: waiting, running, unfinished, finished, diverged; flags; why a run stopped."""
    budget = dict(max_tokens=20_480, batch_tokens=1024)
    sweep_run(tmp_path, "adamw", 0.01, 5.0, 42, "main", **budget)
    sweep_run(tmp_path, "adamw_qk", 0.01, None, 42, "main", **budget)
    begun = [sweep_run(tmp_path, arm, 0.01, 5.0, seed, "main", **budget) for arm, seed
             in (("muon", 42), ("muon", 137), ("muon_qk", 42))]
    for folder in begun:
        spot = dict(event="spot_check", step=6, flags=["val loss not falling"])
        row = dict(step=6, train_loss=6.5, val_loss=6.4, mean_pr=20.0, tokens_per_s=1000.0)
        (folder / "log.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(spot) + "\n")
    (begun[0] / "progress.json").write_text(json.dumps(dict(step=12, tokens_per_s=2048.0)))
    (begun[1] / "output.txt").write_text("step 6\nerror: out of something\n")
    (tmp_path / "adamw-seed137").mkdir()
    (tmp_path / "adamw-seed137" / "output.txt").write_text("starting\n")
    shutil.copytree(begun[0], tmp_path / "muon-seed7")
    held = system.lock(begun[0])
    entries = {e["dir"].name: e for e in jobs.survey("ci", tmp_path) if e["dir"].parent == tmp_path}
    states = {name: e["status"] for name, e in entries.items()}
    assert states == {"adamw-seed42": "finished", "adamw_qk-seed42": "diverged", "muon-seed42": "running",
                      "muon-seed137": "unfinished", "muon_qk-seed42": "unfinished", "adamw-seed137": "waiting",
                      "adamw_qk-seed137": "waiting",
                      "muon_qk-seed137": "waiting"}
    assert entries["muon-seed42"]["row"]["step"] == 12 and entries["muon-seed42"]["row"]["train_loss"] == 6.5
    monkeypatch.setattr(jobs, "ROOT", tmp_path / "project")
    (tmp_path / "project/out").mkdir(parents=True)
    (tmp_path / "project/out/ci").symlink_to(tmp_path)
    jobs.main(["status", "ci"])
    out = capsys.readouterr().out
    assert "muon-seed7 is left out: its config.json is that of muon-seed42" in out
    line = next(line for line in out.splitlines() if line.startswith("muon-seed42"))
    assert line.split() == ("muon-seed42 running step 12 of 20 2,048 tokens/s, 4 s left train 6.5000 val 6.4000 "
                            "mean PR 20.0000 val loss not falling").split()
    line = next(line for line in out.splitlines() if line.startswith("muon-seed137"))
    assert " unfinished " in line and line.endswith("val loss not falling, error: out of something")
    assert "2 of 28 runs done, 1 running, 2 unfinished, 1 diverged, about " in out
    held.close()
    assert not jobs.is_running(begun[0])
    # a lock of another machine is not seen from here: fresh files tell
    (begun[0] / "lock").write_text("process 3 on elsewhere\n")
    assert jobs.is_running(begun[0])
    os.utime(begun[0] / "progress.json", (1000, 1000))
    assert not jobs.is_running(begun[0])


def test_a_look_at_a_starting_run_does_not_stop_it(tmp_path):
    """Who asks for the state holds the lock for a moment; who stays keeps others out."""
    (tmp_path / "lock").touch()
    look = open(tmp_path / "lock")
    fcntl.flock(look, fcntl.LOCK_SH)
    threading.Timer(0.1, look.close).start()
    held = system.lock(tmp_path)
    with pytest.raises(ValueError, match="in use by process"):
        system.lock(tmp_path)
    held.close()


def test_time_left_goes_by_the_median_speed():
    def entry(state, left, speed=None):
        return dict(status=state, left=left, row=dict(tokens_per_s=speed))

    ended = [entry("finished", 0, speed) for speed in (10.0, 20.0, 900.0)]
    waiting = [entry("waiting", 2000) for _ in range(4)]
    assert jobs.summary("ci", waiting, 2) == "out/ci: 0 of 4 runs done"  # none has begun
    assert jobs.summary("ci", ended + waiting, 2) == "out/ci: 3 of 7 runs done, about 3 min of training left"
    # two jobs do not halve one run
    assert jobs.summary("ci", ended + waiting[:1], 2) == "out/ci: 3 of 4 runs done, about 2 min of training left"
    assert jobs.summary("ci", ended, 2) == "out/ci: 3 of 3 runs done"


def test_lines_while_it_runs(tmp_path, capsys):
    folder = sweep_run(tmp_path, "muon", 0.01, 5.0, 42, "main", max_tokens=20_480, batch_tokens=1024)
    row = dict(step=10, train_loss=6.5, tokens_per_s=1024.0)
    (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
    held = system.lock(folder)
    jobs.show([], "ci", tmp_path, 2)
    assert capsys.readouterr().out == "out/ci: 0 of 28 runs done, 1 running, about 3 min of training left\n"
    said = {}
    bars = [type("bar", (), dict(set_description_str=lambda self, line: said.update({id(self): line})))()
            for _ in range(3)]
    jobs.show(bars, "ci", tmp_path, 2)
    lines = [said[id(bar)] for bar in bars]
    assert lines[0].startswith("out/ci: 0 of 28 runs done, 1 running") and lines[2] == ""
    assert lines[1].split() == ("muon-seed42 running step 10 of 20 1,024 tokens/s, 10 s left train 6.5000 val - "
                                "mean PR -").split()
    held.close()


# ---- runs: a scale of one's own, signals, orphans
def project(folder, *scales, tokens=(4, 8)):
    """A copy of the project; scales are added: config/SCALE.py and a row of study.py, head dim 32, tiny."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("out", "data", ".git", "__pycache__", "docs"))
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data/tokens.py", folder / "data")
    write_data(folder / "data/mine", 40_000, 4_000)
    for scale in scales:
        (folder / f"config/{scale}.py").write_text(f"""scale = "{scale}"
n_layer = 2\nn_head = 2\nn_embd = 64\nffn_dim = 96\nblock_size = 64\nvocab_size = 256\ndata_dir = "data/mine"
max_tokens = {tokens[1] * 256}\nbatch_tokens = 256\neval_tokens = 1024\nprobe_tokens = 128
log_interval = 2\nsv_interval = 4\ncompile = False
""")
        text = (folder / "study.py").read_text()
        (folder / "study.py").write_text(text.replace("SCALES = {\n", f"""SCALES = {{
    "{scale}": dict(sweep_tokens={tokens[0] * 256}, sweep_seeds=[1],
                    grids={{arm: [1e-3, 1e-2, 1e-1] for arm in LABELS}}),
""", 1))
    return folder


def command(folder, *args, ok=True, **env):
    """What study.py prints; with ok=False its one line of error, and what it printed before."""
    done = subprocess.run([sys.executable, "study.py", *args], cwd=folder, env=dict(ENV, **env),
                          capture_output=True, text=True)
    assert (done.returncode == 0) == ok and "Traceback" not in done.stderr, done.stderr
    return done.stdout if ok else done.stderr + done.stdout


def test_a_scale_is_two_files(tmp_path):
    """A scale with head dim 32 and data of one's own, from its list to its neighbours."""
    copy, env = project(tmp_path / "project", "small"), dict(ARMS="muon_qk_frozen", SEEDS="42 7", JOBS="2")
    out = copy / "out/small"
    assert "is whole, 40,000 tokens for training and 4,000 for validation: nothing to make" in command(copy,
        "data", "small")
    assert len(command(copy, "list", "small", **env).splitlines()) == 3 + 2
    told = command(copy, "plan", "small", **env)
    assert told.startswith("scale small: 0.09M parameters, 2 layers, width 64")
    assert "no rate for muon_qk_frozen" in command(copy, "run", "small", "main", ok=False, **env)
    told = command(copy, "run", "small", "lr", **env)
    assert "muon_qk_frozen-lr0.01: finished, val loss " in told and "of training left" in told
    command(copy, "choose", "small", **env)
    assert set(study.chosen(out)) == {"muon_qk_frozen"}

    # someone else, such as an orphan, holds the first main run, which is named; the other goes on
    first = out / "muon_qk_frozen-seed42"
    first.mkdir()
    held = system.lock(first)
    told = command(copy, "run", "small", "main", ok=False, **env)
    assert "muon_qk_frozen-seed42: exit status 1: error: " in told and f"is in use by process {os.getpid()} on " in told
    assert "1 runs did not end (muon_qk_frozen-seed42)" in told and "muon_qk_frozen-seed7: finished, val loss" in told
    held.close()
    # why a run stopped stands there until it is run again
    line = next(line for line in command(copy, "status", "small", **env).splitlines()
                if line.startswith("muon_qk_frozen-seed42"))
    assert " waiting " in line and "in use by" in line
    assert "muon_qk_frozen-seed42: finished, val loss" in command(copy, "run", "small", "main", **env)

    command(copy, "run", "small", "neighbours", **env)
    table = [line.split()[:2] for line in command(copy, "status", "small", **env).splitlines()[1:]]
    assert sum(words[0].startswith("neighbours/") and words[1] in jobs.ENDED for words in table) == 2
    run = study.load_run(first)
    assert run["status"] == "finished" and study.head_dim(run["config"]) == 32
    assert run["config"]["qk_gain"] is False
    assert run["config"]["learning_rate"] == study.chosen(out)["muon_qk_frozen"]["lr"]
    assert "left to do: 0.0M training tokens" in command(copy, "plan", "small", **env)


def test_a_forked_run_is_the_run_of_its_command(tmp_path):
    """To the digit, and of the files as they are when it starts."""
    copy, env = project(tmp_path / "project", "small"), dict(ARMS="muon_qk", OMP_NUM_THREADS="1")
    line = shlex.split(command(copy, "list", "small", "lr", **env).splitlines()[0])
    subprocess.run([sys.executable, *line[1:], "--out_dir=by_hand"], cwd=copy, check=True, env=ENV | env)
    command(copy, "run", "small", "lr", "0", **env)
    rows, again = (study.load_run(d)["rows"] for d in (copy / "by_hand", copy / "out/small/sweep/muon_qk-lr0.001"))
    assert len(rows) == 2 and [r | dict(tokens_per_s=0) for r in rows] == [r | dict(tokens_per_s=0) for r in again]

    unset = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", f"""
import jobs, pathlib
path = pathlib.Path("model.py")
path.write_text(path.read_text().replace("NORM_EPS = 1e-6", "NORM_EPS = 1e-1"))
child = jobs.start({line[2:]} + ["--out_dir=edited"], "output.txt", jobs.job_env(0, jobs.system.cores()))
child.join()
assert child.exitcode == 0"""], cwd=copy, env=unset, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1e-1" in (copy / "edited/source/model.py").read_text()
    assert study.read_json(copy / "edited/source/versions.json")["threads"] == 1
    assert study.load_run(copy / "edited")["rows"][0]["val_loss"] != rows[0]["val_loss"]


@pytest.mark.parametrize("gpu", [False, True])
def test_a_run_is_forked_on_a_cpu_and_starts_anew_with_a_gpu(tmp_path, gpu):
    copy = project(tmp_path / "project", "small")
    (copy / "train.py").write_text("""import os, sys, signal
print(open("/proc/self/cmdline").read().split("\\0")[1:], os.getsid(0) == os.getpid(), os.getcwd(), sys.argv[1:],
      os.environ["SLOT"], "torch._inductor" in sys.modules, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
      os.readlink("/proc/self/fd/0"))
sys.exit("the end")""")
    code = f"""import jobs, signal
signal.signal(signal.SIGTERM, lambda *_: None)
jobs.devices = lambda: ([({{}}, "a GPU")] * {gpu}, "")
child = jobs.start(["--key=1"], "output.txt", jobs.job_env(0, 1) | dict(SLOT="3"))
child.join()
print(child.exitcode)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=ENV, capture_output=True, text=True, input="x")
    assert done.stdout == "1\n", done.stderr
    said, end = (copy / "output.txt").read_text().splitlines()
    begun = [str(copy / "train.py"), "--key=1", ""] if gpu else ["-c", code, ""]
    assert end == "the end" and said.startswith(str(begun))
    assert said.endswith(f" True {copy} ['--key=1'] 3 {not gpu} True /dev/null")


def test_data_of_ones_own_that_are_not_whole(tmp_path):
    copy = project(tmp_path / "project", "small")
    (copy / "data/mine/val_set.bin").unlink()
    assert "val_set.bin is missing" in command(copy, "data", "small", ok=False)
    shutil.rmtree(copy / "data/mine")
    assert "run python data/text/prepare.py" in command(copy, "data", "small", ok=False)


def test_a_signal_reaches_all_runs(tmp_path):
    """Every run saves and says how to go on, and nothing is left behind."""
    copy = project(tmp_path / "project", "small", tokens=(50_000, 50_000))
    start = ["bash", "sweep.sh", "small", "lr", "eval"]
    child = subprocess.Popen(start, cwd=copy, env=dict(ENV, JOBS="2", PATH=PATH), stdout=subprocess.PIPE,
                             text=True, start_new_session=True)
    folders = [copy / "out/small/sweep" / name for name in ("adamw-lr0.001", "adamw_qk-lr0.001")]
    deadline = time.time() + 240
    while not all((folder / "log.jsonl").exists() for folder in folders) and time.time() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGHUP)
    out, _ = child.communicate(timeout=240)
    assert "2 unfinished" in out and "run the same command again to go on" in out and "== eval" not in out
    assert child.returncode == 143
    for folder in folders:
        assert not jobs.is_running(folder) and (folder / "ckpt_rolling.pt").exists()
        assert "run the same command again" in (folder / "output.txt").read_text()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(copy).encode() in p.read_bytes()]


# ---- SLURM
def fake(folder, name, script):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


def test_slurm_jobs(tmp_path):
    """Signals for the run itself, arrays as long as their stage, paths with blanks, no endless waiting."""
    folder = tmp_path / "a b"
    copy = project(folder, "small")
    fake(tmp_path / "my bin", "sbatch",
         f"printf '%q ' \"$@\" >> '{tmp_path}/jobs'; echo >> '{tmp_path}/jobs'; wc -l < '{tmp_path}/jobs'")
    fake(tmp_path / "my bin", "python", f"exec {sys.executable} \"$@\"")
    done = subprocess.run(["bash", "tools/slurm.sh", "small", "--partition=gpu"], cwd=copy,
                          capture_output=True, text=True,
                          env=dict(ENV, ARMS="adamw muon muon_qk", SEEDS="1234",
                                   PATH=f"{tmp_path}/my bin:{os.environ['PATH']}"))
    assert done.returncode == 0, done.stderr
    submitted = [shlex.split(line) for line in (tmp_path / "jobs").read_text().splitlines()]
    given = [dict(option.partition("=")[::2] for option in job) for job in submitted]
    assert all(job["--signal"] == "B:TERM@60" and job["--kill-on-invalid-dep"] == "yes" and "--requeue"
               in job and job["--partition"] == "gpu"
               for job in given)
    assert [job["--job-name"] for job in given] == [f"small-{name}" for name
                                                    in ("data", "lr", "extend", "choose", "main", "report")]
    assert [job.get("--array") for job in given] == [None, "0-8", None, None, "0-2", None]
    assert [job.get("--dependency") for job in given] == [None, "afterok:1", "afterany:2", "afterany:3",
                                                          "afterok:4", "afterany:5"]
    for job in given:
        assert "exec " in job["--wrap"]
    python = f"{tmp_path}/my bin/python"
    assert shlex.split(given[1]["--wrap"]) == ["exec", python, "study.py", "run", "small", "lr",
                                               "$SLURM_ARRAY_TASK_ID"]
    assert "error: usage" in subprocess.run(["bash", str(ROOT / "tools/slurm.sh")], capture_output=True,
                                            text=True, env=dict(ENV, PATH=PATH)).stderr


@pytest.mark.parametrize("state, again", [("RUNNING", True), ("COMPLETING", False), ("", False)])
def test_only_a_task_whose_time_is_up_is_queued_again(tmp_path, monkeypatch, state, again):
    """One that was cancelled is not. A task is named by array and number: the array's id names them all."""
    fake(tmp_path, "squeue", f"echo \"$@\" > '{tmp_path}/asked'; echo {state}")
    fake(tmp_path, "scontrol", f"echo \"$@\" > '{tmp_path}/told'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{PATH}")
    for name, value in (("SLURM_JOB_ID", "77"), ("SLURM_ARRAY_JOB_ID", "77"), ("SLURM_ARRAY_TASK_ID", "1")):
        monkeypatch.setenv(name, value)
    jobs.requeue()
    assert "--jobs=77_1" in (tmp_path / "asked").read_text()
    told = tmp_path / "told"
    assert told.exists() == again and (not again or told.read_text() == "requeue 77_1\n")


def test_a_task_is_one_run_and_passes_its_signal_on(tmp_path):
    copy = project(tmp_path / "project", "small", tokens=(50_000, 50_000))
    fake(tmp_path / "bin", "squeue", "echo RUNNING")
    fake(tmp_path / "bin", "scontrol", f"echo \"$@\" > '{tmp_path}/told'")
    env = dict(ENV, PATH=f"{tmp_path}/bin:{PATH}", SLURM_JOB_ID="78", JOBS="2")
    child = subprocess.Popen([sys.executable, "study.py", "run", "small", "lr", "1"], cwd=copy, env=env,
                             stdout=subprocess.DEVNULL)
    log, deadline = copy / "out/small/sweep/adamw_qk-lr0.001/log.jsonl", time.time() + 240
    while not log.exists() and time.time() < deadline:
        time.sleep(0.1)
    child.terminate()
    assert child.wait(timeout=240) == 143 and (tmp_path / "told").read_text() == "requeue 78\n"
    assert log.with_name("ckpt_rolling.pt").exists() and len(list(log.parent.parent.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))),
                    reason="needs root and SLURM: apt-get install slurmctld slurmd slurm-client munge")
def test_slurm_runs_the_study(tmp_path):
    host, path = socket.gethostname().split(".")[0], dict(os.environ, PATH=PATH)
    (tmp_path / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={tmp_path}/state
SlurmdSpoolDir={tmp_path}/spool
SlurmctldPidFile={tmp_path}/ctld.pid
SlurmdPidFile={tmp_path}/d.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
JobRequeue=1
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
""")
    path["SLURM_CONF"] = str(tmp_path / "slurm.conf")
    (tmp_path / "spool").mkdir()
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", ".git", "__pycache__"))
    os.makedirs("/run/munge", exist_ok=True)
    servers = [subprocess.Popen(command, env=path, stdout=subprocess.DEVNULL,
                                stderr=open(tmp_path / "servers.txt", "a")) for command in
               (["munged", "-F", "--force"], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host])]
    try:
        time.sleep(5)
        subprocess.run(["scontrol", "update", f"nodename={host}", "state=resume"], env=path,
                       capture_output=True)
        done = subprocess.run(["bash", "tools/slurm.sh", "ci"], cwd=copy, env=dict(path, OMP_NUM_THREADS="1"),
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + (tmp_path / "servers.txt").read_text()
        deadline, preempted = time.time() + 500, False
        while time.time() < deadline and not (copy / "out/ci/report.md").exists():
            time.sleep(2)
            running = subprocess.run(["squeue", "-h", "-t", "R", "-n", "ci-main", "-o", "%i"], env=path,
                                     capture_output=True, text=True).stdout.split()
            if running and not preempted:  # a preempted task is requeued and goes on
                preempted = subprocess.run(["scontrol", "requeue", running[0]], env=path).returncode == 0
        assert (copy / "out/ci/report.md").exists(), subprocess.run(["squeue"], env=path, capture_output=True,
            text=True).stdout
        runs = study.load_runs(copy / "out/ci")
        assert preempted and len(runs) == 8 and all(r["status"] == "finished" for r in runs)
    finally:
        for server in reversed(servers):
            server.terminate()
