"""What a GPU and a cluster rely on, shown without either: the compiled step, the loop's own structure, plans, lists, SLURM."""
import ast
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import study
import system
from model import GPTConfig
from test_smoke import ENV, ROOT, TINY, data, tiny_model  # noqa: F401 (data is a fixture)


# ---- the compiled step
@pytest.mark.parametrize("qk_norm", [False, True])
def test_no_graph_break(qk_norm):
    model = tiny_model(qk_norm)
    x = torch.zeros(2, 32, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explained = torch._dynamo.explain(model)(x, x)
    assert explained.graph_count == 1 and explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_gradients_are_the_eager_ones(dtype):
    """To rounding, loss and every gradient: the compiler is trusted no more than anything else."""
    model = tiny_model(True, block_size=160, n_layer=3)
    x, y = torch.randint(0, 96, (2, 2, 160), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(x, y)
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    eager = gradients()
    model.compile_parts()
    for name, g in gradients().items():
        assert (g - eager[name]).norm() < (1e-5 if dtype == "float32" else 0.03) * eager[name].norm(), name


def test_nothing_recompiles_between_steps(tmp_path, data):  # noqa: F811
    """However the learning rate moves and however short the last val batch."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "config/muon_qk.py", *TINY, f"--data_dir={data}", f"--out_dir={tmp_path / 'r'}",
                           "--max_tokens=640", "--compile=1", "--dtype=bfloat16", "--n_layer=10"], capture_output=True, text=True, cwd=ROOT,
                          env=dict(ENV, TORCH_LOGS="recompiles,graph_breaks"))
    assert done.returncode == 0, done.stderr
    if "running eager" in done.stdout:
        pytest.skip("no C++ compiler")
    assert "Recompiling function" not in done.stderr and "Graph break" not in done.stderr  # one graph for training and evaluation


def test_the_step_reads_nothing_from_the_device():
    """Between two looks the loop has no call that makes the host wait for the device."""
    tree = ast.parse((ROOT / "train.py").read_text())
    loop = next(n for n in ast.walk(tree) if isinstance(n, ast.While))
    text = (ROOT / "train.py").read_text()
    marker = text[:text.index("# -- one step of training")].count("\n") + 1
    step = [n for n in loop.body if n.lineno > marker]
    assert len(step) > 8
    called = {n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "") for s in step for n in ast.walk(s)
              if isinstance(n, ast.Call)}
    assert {"backward", "step", "clip_grad_norm_", "train_batch"} <= called
    assert not called & {"item", "cpu", "tolist", "numpy", "synchronize", "float", "int", "bool", "print", "say", "nonzero"}


# ---- devices
@pytest.mark.parametrize("capabilities, has", [
    (dict(architecture="x86_64", avx2=True, avx512_f=False, avx512_bf16=False, amx_bf16=False), False),
    (dict(architecture="x86_64", avx2=True, avx512_f=True, avx512_bf16=False, amx_bf16=False), False),  # emulated there
    (dict(architecture="x86_64", avx512_f=True, avx512_bf16=True, amx_bf16=False), True),
    (dict(architecture="x86_64", avx512_f=True, avx512_bf16=True, amx_bf16=True), True), (dict(architecture="arm64", bf16=True), False)])
def test_bfloat16_where_the_cpu_has_it(monkeypatch, capabilities, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert system.has_bfloat16("cpu") is has


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


# ---- the real 80m shape
@pytest.fixture(scope="module")
def gpt2_text(tmp_path_factory):
    """Real text in GPT-2's tokens: the val part of data/poetry, decoded and prepared again."""
    if not (ROOT / "data/poetry/meta.json").exists():
        pytest.skip("data/poetry is not prepared: python data/poetry/prepare.py")
    sys.path.append(str(ROOT / "data"))
    from tokens import get_encoding
    folder = tmp_path_factory.mktemp("text")
    tokens = np.fromfile(ROOT / "data/poetry/val_set.bin", "<u2")[:300_000].tolist()
    (folder / "verse.txt").write_text(get_encoding("gpt2-4096").decode(tokens).replace("<|endoftext|>", "\n"))
    subprocess.run([sys.executable, str(ROOT / "data/text/prepare.py"), str(folder / "verse.txt"), "--out", str(folder / "bins"),
                    "--tokenizer", "gpt2"], check=True)
    return folder / "bins"


@pytest.mark.slow
@pytest.mark.parametrize("arm", study.ARMS)
def test_80m_on_a_cpu(tmp_path, gpt2_text, arm):
    """Three compiled steps of the real shape with log, probes at full size, part of a val pass, a checkpoint and a resume. Measured:
    three to seven minutes and 3.4 to 4 GB an arm on two cores."""
    command = [sys.executable, "train.py", "config/80m.py", f"config/{arm}.py", f"--data_dir={gpt2_text}", f"--out_dir={tmp_path / 'r'}",
               "--batch_tokens=4096", "--max_tokens=12288", "--n_ckpt=1", "--eval_tokens=4096", "--device=cpu",
               "--ckpt_interval_s=1"]
    child = subprocess.Popen(command, cwd=ROOT)
    while child.poll() is None and not (tmp_path / "r/ckpt_rolling.pt").exists():
        time.sleep(0.5)
    child.kill()
    child.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "going on from step" in done.stdout, done.stderr
    print(done.stdout.split("---")[1])
    log = study.load_run(tmp_path / "r")
    assert log["status"] == "finished" and len(study.layer_values(log["rows"][-1], "pr")) == 22
    assert log["rows"][0]["val_loss"] == pytest.approx(np.log(50304), abs=0.3) and log["rows"][-1]["val_loss"] < log["rows"][0]["val_loss"]
    assert np.load(tmp_path / "r/sv_layer_21_step_3.npy").shape == (8, 64)
