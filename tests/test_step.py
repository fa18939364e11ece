"""What a step relies on: compiled gradients, one graph, a loop that never waits for the device, the real 80m
shape."""
import ast
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import study
import system
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
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "config/muon_qk.py", *TINY, f"--data_dir={data}",
                           f"--out_dir={tmp_path / 'r'}", "--max_tokens=640", "--compile=1", "--dtype=bfloat16",
                           "--n_layer=10"], capture_output=True, text=True, cwd=ROOT,
                          env=dict(ENV, TORCH_LOGS="recompiles,graph_breaks"))
    assert done.returncode == 0, done.stderr
    if "running eager" in done.stdout:
        pytest.skip("no C++ compiler")
    # one graph for training and evaluation
    assert "Recompiling function" not in done.stderr and "Graph break" not in done.stderr


def test_the_step_reads_nothing_from_the_device():
    """Between two looks the loop has no call that makes the host wait for the device."""
    tree = ast.parse((ROOT / "train.py").read_text())
    loop = next(n for n in ast.walk(tree) if isinstance(n, ast.While))
    text = (ROOT / "train.py").read_text()
    marker = text[:text.index("# -- one step of training")].count("\n") + 1
    step = [n for n in loop.body if n.lineno > marker]
    assert len(step) > 8
    called = {n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, "id", "")
              for s in step for n in ast.walk(s) if isinstance(n, ast.Call)}
    assert {"backward", "step", "clip_grad_norm_", "train_batch"} <= called
    assert not called & {"item", "cpu", "tolist", "numpy", "synchronize", "float", "int", "bool", "print", "say",
                         "nonzero"}


# ---- devices
@pytest.mark.parametrize("line, has", [
    ("flags\t\t: fpu avx avx2", False),
    ("flags\t\t: fpu avx avx2 avx512f avx512bw", False),  # emulated there
    ("flags\t\t: fpu avx512f avx512_bf16 clzero", True),
    ("flags\t\t: fpu avx512f amx_bf16 avx512_fp16 amx_tile amx_int8", True),
    ("Features\t: fp asimd i8mm bf16", False), ("", False)])
def test_bfloat16_where_the_cpu_has_it(monkeypatch, line, has):
    monkeypatch.setattr(system, "cpuinfo", lambda: f"processor\t: 0\nmodel name\t: X\n{line}\nbugs\t:\n")
    assert system.has_bfloat16("cpu") is has


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="torch 2.11 or later")
def test_bfloat16_is_what_torch_says_of_this_cpu():
    said = torch.cpu.get_capabilities()
    assert system.has_bfloat16("cpu") == bool(said.get("avx512_bf16") or said.get("amx_bf16"))


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
    subprocess.run([sys.executable, str(ROOT / "data/text/prepare.py"), str(folder / "verse.txt"),
                    "--out", str(folder / "bins"), "--tokenizer", "gpt2"], check=True)
    return folder / "bins"


@pytest.mark.slow
@pytest.mark.parametrize("arm", study.ARMS)
def test_80m_on_a_cpu(tmp_path, gpt2_text, arm):
    """Three compiled steps of the real shape with log, probes at full size, part of a val pass, a checkpoint and a
    resume. Measured: three to seven minutes and 3.4 to 4 GB an arm on two cores."""
    command = [sys.executable, "train.py", "config/80m.py", f"config/{arm}.py", f"--data_dir={gpt2_text}",
               f"--out_dir={tmp_path / 'r'}", "--batch_tokens=4096", "--max_tokens=12288", "--n_ckpt=1",
               "--eval_tokens=4096", "--device=cpu", "--ckpt_interval_s=1"]
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
    assert (log["rows"][0]["val_loss"] == pytest.approx(np.log(50304), abs=0.3)
            and log["rows"][-1]["val_loss"] < log["rows"][0]["val_loss"])
    assert np.load(tmp_path / "r/sv_layer_21_step_3.npy").shape == (8, 64)
