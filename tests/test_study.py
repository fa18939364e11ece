"""study.py and sweep.sh: grids, choice, stages, plans, lists, signals, SLURM."""
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

import study
from test_smoke import ENV, ROOT


# ---- study.py
def sweep_run(study_dir, arm, lr, loss):
    """A sweep run as train.py leaves it; loss None: diverged."""
    folder = study_dir / "sweep" / f"{arm}-lr{lr:g}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(arm=arm, seed=1, learning_rate=lr)))
    rows = [dict(step=0, val_loss=8.0)] + ([dict(step=9, val_loss=loss), dict(event="finished", step=9)] if loss else
                                           [dict(event="diverged", step=5)])
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_grid_grows_until_the_winner_is_bracketed(tmp_path):
    grid = study.SCALES["mini"]["grids"]["muon"]

    def loss(lr):  # best at 0.25, two doublings beyond the grid
        return 5 + math.log(lr / 0.25) ** 2

    assert study.missing_lrs("mini", "muon", tmp_path) == grid
    for lr in grid:
        sweep_run(tmp_path, "muon", lr, loss(lr))
    for outer in (0.128, 0.256, 0.512):
        assert study.missing_lrs("mini", "muon", tmp_path) == [outer]
        sweep_run(tmp_path, "muon", outer, loss(outer) if outer < 0.5 else None)  # a diverged run brackets too
    assert study.missing_lrs("mini", "muon", tmp_path) == []
    assert study.winner(study.sweep_results(tmp_path, "muon")) == (0.256, True)


def test_grid_stops_after_three_extensions_and_says_not_bracketed(tmp_path):
    for arm in study.ARMS:
        while missing := study.missing_lrs("mini", arm, tmp_path):
            for lr in missing:
                sweep_run(tmp_path, arm, lr, 5 + lr)  # lower is always better
    study.choose("mini", tmp_path)
    for arm, pick in study.chosen(tmp_path).items():
        assert len(pick["tried"]) == 8 and not pick["bracketed"]
        assert pick["lr"] == pytest.approx(study.SCALES["mini"]["grids"][arm][0] / 8)


def test_the_final_loss_decides_not_the_lowest_ever_seen(tmp_path):
    for lr, loss in ((1e-3, 5.0), (2e-3, 4.9), (4e-3, 5.1)):
        sweep_run(tmp_path, "adamw", lr, loss)
    log = tmp_path / "sweep" / "adamw-lr0.001" / "log.jsonl"
    log.write_text(json.dumps(dict(step=5, val_loss=1.0)) + "\n" + log.read_text())
    assert study.winner(study.sweep_results(tmp_path, "adamw"))[0] == 2e-3


def test_choose_refuses_a_half_done_sweep(tmp_path):
    sweep_run(tmp_path, "muon", 4e-3, 5.0)
    with pytest.raises(ValueError, match="lacks 19 runs"):
        study.choose("mini", tmp_path)
    assert not (tmp_path / "chosen_lr.json").exists()


def test_wrong_scale_of_the_study():
    done = subprocess.run(["bash", str(ROOT / "sweep.sh"), "80b"], capture_output=True, text=True, cwd="/")
    assert done.returncode and done.stderr.strip() == "error: scale '80b' is not known: choose mini, 4m or 80m"


# ---- plans and lists
def test_plan_refuses_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: type("usage", (), dict(free=10**9)))
    with pytest.raises(ValueError, match="1.0 GB free and the study needs"):
        study.plan("80m", tmp_path)


def test_list_prints_a_command_a_run():
    done = subprocess.run(["bash", str(ROOT / "sweep.sh"), "80m", "--list"], capture_output=True, text=True, cwd="/",
                          env=dict(ENV, PATH=os.path.dirname(sys.executable) + ":" + os.environ["PATH"]))
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 28 and len(set(lines)) == 28
    assert sum("--seed=137" in line for line in lines) == 4 and all(" train.py config/80m.py config/" in line for line in lines)


def test_each_array_task_is_one_run(tmp_path):
    for stage, n in (("lr", 20), ("main", 8)):
        runs = study.stage_runs("80m", stage, tmp_path, fixed=True)
        assert len({folder for folder, _ in runs}) == len(runs) == n


def test_signal_reaches_all_children(tmp_path):
    """SIGTERM to the runner stops every run, and each says how to go on."""
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("out", "data", ".git", "__pycache__"))
    (copy / "data").symlink_to(ROOT / "data")
    if not (ROOT / "data/poetry/meta.json").exists():
        pytest.skip("data/poetry is not prepared: python data/poetry/prepare.py")
    (copy / "config/ci.py").write_text((copy / "config/ci.py").read_text().replace("20_480", "20_480_000"))
    (copy / "study.py").write_text((copy / "study.py").read_text().replace("sweep_tokens=10_240", "sweep_tokens=10_240_000"))
    child = subprocess.Popen([sys.executable, "study.py", "run", "ci", "lr"], cwd=copy, env=dict(ENV, JOBS="2"), stdout=subprocess.PIPE, text=True)
    logs = [copy / "out/ci/sweep" / name / "log.jsonl" for name in ("adamw-lr0.001", "adamw_qk-lr0.001")]
    deadline = time.time() + 60
    while not all(p.exists() for p in logs) and time.time() < deadline:
        time.sleep(0.1)
    child.terminate()
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 143 and "run the same command again to go on" in out
    for p in logs:
        assert "run the same command again" in p.with_name("output.txt").read_text()
        assert p.with_name("ckpt_rolling.pt").exists()


# ---- SLURM, for real, on one host
@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))) or os.geteuid() != 0,
                    reason="needs root and SLURM: apt-get install slurmctld slurmd slurm-client munge")
def test_slurm_runs_the_study(tmp_path):
    host, path = socket.gethostname().split(".")[0], dict(os.environ, PATH=os.path.dirname(sys.executable) + ":" + os.environ["PATH"])
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
    servers = [subprocess.Popen(command, env=path, stdout=subprocess.DEVNULL, stderr=open(tmp_path / "servers.txt", "a")) for command in
               (["munged", "-F", "--force"], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host])]
    try:
        time.sleep(5)
        subprocess.run(["scontrol", "update", f"nodename={host}", "state=resume"], env=path, capture_output=True)
        done = subprocess.run(["bash", "tools/slurm.sh", "ci"], cwd=copy, env=dict(path, OMP_NUM_THREADS="1"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + (tmp_path / "servers.txt").read_text()
        deadline, preempted = time.time() + 500, False
        while time.time() < deadline and not (copy / "out/ci/report.md").exists():
            time.sleep(2)
            running = subprocess.run(["squeue", "-h", "-t", "R", "-n", "ci-main", "-o", "%i"], env=path, capture_output=True, text=True).stdout.split()
            if running and not preempted:  # a preempted task is requeued and goes on
                preempted = subprocess.run(["scontrol", "requeue", running[0]], env=path).returncode == 0
        assert (copy / "out/ci/report.md").exists(), subprocess.run(["squeue"], env=path, capture_output=True, text=True).stdout
        runs = study.load_runs(copy / "out/ci")
        assert preempted and len(runs) == 8 and all(r["status"] == "finished" for r in runs)
    finally:
        for server in reversed(servers):
            server.terminate()
