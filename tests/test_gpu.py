"""What a GPU runs: on one (pytest -m cuda, under two minutes on an H100), and on a stand-in without
one, so that no line that only CUDA reaches is executed for the first time at a user's. tests/standin.py
says what the stand-in does not reach."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import muon
import study
import system
from model import GPTConfig, gpt_config
from muon import Muon
from probe import probe
from test_smoke import ENV, ROOT, TINY, data, tiny_model, train, write_data  # noqa: F401 (data is a fixture)

STANDIN = str(ROOT / "tests/standin.py")


def on_standin(script, *args, gpus=1, launcher=(), env={}):
    return subprocess.run([sys.executable, *launcher, STANDIN, str(ROOT / script), *map(str, args)],
                          capture_output=True, text=True, env=dict(ENV, GPUS=str(gpus)) | env, cwd=ROOT)


def log_of(out_dir):
    rows, events = study.read_log(out_dir)
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows + events]


# ---- the stand-in
@pytest.mark.parametrize("device, flags", [("auto", []), ("cuda", ["--deterministic=1"]), ("cuda:1", [])])
def test_a_run_on_a_standin_is_the_run_on_a_cpu(tmp_path, data, device, flags):  # noqa: F811
    """Every line of train.py's CUDA branches, both optimizers' too."""
    arm = "muon_qk" if device == "auto" else "adamw"
    train(tmp_path / "cpu", data, "--dtype=float32", arm=arm)
    done = on_standin("train.py", f"config/{arm}.py", *TINY, f"--data_dir={data}",
                      f"--out_dir={tmp_path / 'gpu'}", f"--device={device}", *flags, gpus=2)
    assert done.returncode == 0, done.stderr
    assert "device NVIDIA H100 80GB HBM3, float32" in done.stdout
    assert log_of(tmp_path / "gpu") == log_of(tmp_path / "cpu")
    block = dict(re.findall(r"^(\w+): +(.+)$", done.stdout.split("---\n")[1], re.M))
    assert float(block["mfu"]) >= 0 and block["peak_memory_mb"] == "1024"


def test_torchrun_gives_each_process_its_own_standin(tmp_path, data):  # noqa: F811
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = ["config/muon_qk.py", *TINY, f"--data_dir={data}", "--device=auto", "--max_tokens=320"]
    done = on_standin("train.py", *args, f"--out_dir={tmp_path / 'r'}", gpus=2, launcher=launcher)
    assert done.returncode == 0 and study.load_run(tmp_path / "r")["status"] == "finished", done.stderr
    done = on_standin("train.py", *args, f"--out_dir={tmp_path / 's'}", gpus=1, launcher=launcher)
    assert done.returncode and "error: device cuda:1 is not there" in done.stderr


def test_tf32_override_of_vendors_containers(tmp_path, data):  # noqa: F811
    """The variable moves one of torch's two switches; a query of the other is then an
    error unless both were set."""
    done = on_standin("train.py", "config/muon.py", *TINY, f"--data_dir={data}",
                      f"--out_dir={tmp_path / 'r'}", "--device=cuda", "--max_tokens=64",
                      env=dict(TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1"))
    assert done.returncode == 0, done.stderr
    code = ("import torch, system; system.start_device('cpu'); "
            "assert torch.get_float32_matmul_precision() == 'highest'; "
            "assert not torch.backends.cuda.matmul.allow_tf32; "
            "print(torch.backends.cuda.matmul.fp32_precision)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env=dict(ENV, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1"))
    assert done.returncode == 0, done.stderr


def test_evaluation_on_a_standin(tmp_path, data):  # noqa: F811
    train(tmp_path / "r", data, "--n_ckpt=1")
    path = next((tmp_path / "r").glob("ckpt_step_*.pt"))
    state = torch.load(path, weights_only=True)
    state["config"]["data"]["tokenizer"] = "gpt2-4096"  # any that there is; its ids above 255 do not occur
    state["config"]["vocab_size"] = 4096
    state["model"]["wte.weight"] = torch.cat([state["model"]["wte.weight"], torch.zeros(4096 - 256, 32)])
    torch.save(state, path)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import evaluate, scoring, torch\n" \
           f"model, config = evaluate.load_checkpoint({str(path)!r}, 'cuda')\n" \
           "import numpy as np\nprint(scoring.val_losses(model, np.arange(100) % 250, 'float32')[0].sum())\n"
    (tmp_path / "values.py").write_text(code)
    done = subprocess.run([sys.executable, STANDIN, str(tmp_path / "values.py")], capture_output=True,
                          text=True, env=ENV)
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr
    done = on_standin("evaluate.py", "--ckpt", path, "--sample", "Once upon", "--device=cuda")
    assert done.returncode == 0 and done.stdout.startswith("Once upon"), done.stderr


def test_bench_on_a_standin(tmp_path):
    (tmp_path / "gpu.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); "
                                     "import bench; bench.bench_gpu('ci', 6)\n")
    done = subprocess.run([sys.executable, STANDIN, str(tmp_path / "gpu.py")], capture_output=True,
                          text=True, env=ENV, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"{arm} at ci: [\d,]+ tokens/s.* MFU .*under the mask.*1024 MB", done.stdout)
               for arm in ("adamw", "muon_qk"))


# ---- devices, memory, messages
@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA L40", None), ("AMD Instinct MI300X", None)])
def test_peak_is_looked_up_or_unknown(monkeypatch, name, peak):
    monkeypatch.setattr(system, "device_name", lambda device: name)
    assert system.peak_flops("cuda") == peak


def test_micro_batch_fits(monkeypatch):
    c, small = GPTConfig(), GPTConfig(block_size=256, vocab_size=4096)
    for local, dtype, m in ((32, "float32", 4), (32, "bfloat16", 8), (3, "float32", 3), (11, "float32", 1)):
        assert system.fitting_micro_batch(small, local, "cpu", dtype) == m
    assert system.fitting_micro_batch(c, 16, "cpu", "float32") == 1  # larger than what is kept: one at a time
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: type("card", (), dict(total_memory=24 * 2**30)))
    fits = {}
    for jobs in (1, 2, 8):
        monkeypatch.setenv("GPU_JOBS", str(jobs))
        fits[jobs] = m = system.fitting_micro_batch(c, 64, "cuda", "bfloat16")
        assert 64 % m == 0 and jobs * system.training_bytes(c, m) < 0.8 * 24 * 2**30 \
            <= jobs * system.training_bytes(c, 2 * m)
    assert fits[1] > fits[2] > fits[8]


@pytest.mark.parametrize("compiled, qk_norm", [(False, False), (False, True), (True, True)])
def test_training_bytes_against_what_autograd_keeps(compiled, qk_norm):
    """From above, and by no more than a third: what a layer keeps for the backward pass, each storage
    counted once, under autocast to bfloat16. Of the embedding's and the last norm's share, which the
    formula leaves out, two layers are told apart from one."""
    def kept(n_layer):
        model = tiny_model(qk_norm, block_size=128, n_layer=n_layer, n_head=4, n_embd=256, ffn_dim=448,
                           vocab_size=64)
        if compiled:
            model.compile_parts()
        own, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in own:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
            return t

        x = torch.zeros(2, 128, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
                torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x, x)
        assert loss.requires_grad
        # their bfloat16 copies, in the 18 bytes of a parameter
        weights = sum(p.numel() * 2 for p in model.h.parameters())
        return sum(n for n, _ in storages.values()) - weights

    c = gpt_config(dict(block_size=128, vocab_size=64, n_layer=1, n_head=4, n_embd=256, ffn_dim=448,
                        qk_norm=qk_norm))
    tokens = 2 * 128
    layer = ((system.training_bytes(c, 2, "bfloat16", compiled)
              - system.training_bytes(c, 1, "bfloat16", compiled)) * 2
             - tokens * 64 * (4 if compiled else 16))
    measured = kept(3) - kept(2)
    assert 0.75 * layer < measured <= layer, (measured, layer, measured / layer)


def test_ranks_exchange_one_message_a_step(tmp_path, data):  # noqa: F811
    """All gradients and the loss in one buffer; the other call is the two flags of stopping and saving."""
    (tmp_path / "count.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch.distributed as dist\n"
        "real, calls = dist.all_reduce, []\n"
        "def all_reduce(t, *args, **kw):\n    calls.append(t.numel())\n    return real(t, *args, **kw)\n"
        f"dist.all_reduce = all_reduce\nsys.argv = [{str(ROOT / 'train.py')!r}, *sys.argv[1:]]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\nprint('calls', calls)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=1", str(tmp_path / "count.py"), "config/adamw.py", *TINY,
                           f"--data_dir={data}", f"--out_dir={tmp_path / 'r'}", "--max_tokens=320",
                           "--looks=0", "--n_ckpt=0"], capture_output=True, text=True, env=ENV, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    calls = json.loads(done.stdout.split("calls ")[1])
    params = study.read_json(tmp_path / "r/config.json")["num_params"]
    assert [n for n in calls if n > 2] == [params + 1] * 5 and len(calls) == 5 + 6


# ---- a real GPU
def gpu(test):
    """Runs with `pytest -m cuda`, where there is one."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


@gpu
@pytest.mark.parametrize("arm", list(study.LABELS))
def test_each_arm_on_cuda(tmp_path, data, arm):  # noqa: F811
    train(tmp_path / "gpu", data, "--device=cuda", arm=arm)
    train(tmp_path / "cpu", data, arm=arm)
    a, b = (study.load_run(tmp_path / side) for side in ("gpu", "cpu"))
    assert a["rows"][0]["val_loss"] == pytest.approx(b["rows"][0]["val_loss"], abs=1e-5)
    assert a["status"] == "finished" and a["val_loss"] == pytest.approx(b["val_loss"], abs=0.02)


@gpu
def test_80m_on_cuda(tmp_path):
    """Ten compiled steps of the real shape: learns, no recompilation or graph break, memory under the
    plan's bound, a resume."""
    folder = write_data(tmp_path / "d", n_train=700_000, n_val=140_000, vocab=50_000)
    args = [sys.executable, str(ROOT / "train.py"), "config/80m.py", "config/muon_qk.py",
            f"--data_dir={folder}", "--learning_rate=1e-3", f"--out_dir={tmp_path / 'r'}",
            "--max_tokens=327680", "--n_ckpt=2", "--eval_tokens=131072"]
    done = subprocess.run(args, capture_output=True, text=True, cwd=ROOT,
                          env=dict(os.environ, TORCH_LOGS="recompiles,graph_breaks"))
    assert done.returncode == 0 and "running eager" not in done.stdout, done.stderr
    assert "Recompiling function" not in done.stderr and "Graph break" not in done.stderr
    print(done.stdout.split("---")[1])
    run = study.load_run(tmp_path / "r")
    assert run["rows"][0]["val_loss"] == pytest.approx(np.log(50304), abs=0.3) \
        and run["val_loss"] < run["rows"][0]["val_loss"]
    peak = int(re.search(r"peak_memory_mb: +(\d+)", done.stdout)[1]) * 2**20
    micro = run["config"]["micro_batch"]
    bound = system.training_bytes(gpt_config(run["config"]), micro)
    print(f"peak {peak / 2**30:.2f} GiB, bound {bound / 2**30:.2f} GiB, micro-batches of {micro}")
    assert 0.5 * bound < peak < bound


@gpu
def test_float32_on_cuda_is_float32_on_a_cpu(monkeypatch):
    """Loss, every gradient, every probe, Muon's update."""
    torch.set_float32_matmul_precision("highest")
    idx = torch.randint(0, 96, (2, 4, 32), generator=torch.Generator().manual_seed(0))
    models = {device: tiny_model(True, n_embd=128, ffn_dim=160).to(device) for device in ("cpu", "cuda")}
    losses, metrics = {}, {}
    for device, model in models.items():
        x, y = idx.to(device)
        losses[device] = model(x, y)
        losses[device].backward()
        metrics[device] = probe(model, x)[0]
    assert losses["cuda"].item() == pytest.approx(losses["cpu"].item(), rel=1e-5)
    assert metrics["cuda"] == pytest.approx(metrics["cpu"], rel=1e-3)
    for p, q in zip(models["cpu"].parameters(), models["cuda"].parameters()):
        assert (p.grad - q.grad.cpu()).norm() < 1e-3 * p.grad.norm()
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: False)
    updates = {}
    for device, model in models.items():
        params = [p for p in model.h.parameters() if p.ndim == 2]
        before = [p.detach().clone() for p in params]
        Muon(params, lr=0.01).step()
        updates[device] = [(p.detach() - b).cpu() for p, b in zip(params, before)]
    for a, b in zip(*updates.values()):
        assert (a - b).norm() < 1e-2 * b.norm()


@gpu
def test_a_step_does_not_wait_for_the_device():
    model = tiny_model(True).cuda()
    hidden = [p for p in model.h.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    optimizers = [Muon(hidden), torch.optim.AdamW(rest, fused=True)]
    batch = torch.zeros(2, 2, 32, dtype=torch.long).pin_memory()

    def step():
        x, y = batch.to("cuda", non_blocking=True).unbind()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)

    step()  # states are made in the first
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_which_attention_ran():
    """A fused kernel, forward and backward, not the matrix products of the fallback."""
    q, k, v = (torch.randn(2, 8, 2048, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        torch.cuda.synchronize()
    names = [e.key for e in profile.key_averages()]
    kernels = [name for name in names if re.search(r"flash|fmha|cudnn.*(sdpa|attn)|sdpa", name, re.I)]
    print(kernels)
    assert len(kernels) >= 2, names


@gpu
@pytest.mark.parametrize("flags", [["--compile=0"], ["--compile=1", "--dtype=bfloat16"]])
def test_deterministic_on_cuda(tmp_path, data, flags):  # noqa: F811
    """Two runs, and one that was killed and resumed, agree to the bit."""
    flags = ["--device=cuda", "--deterministic=1", "--max_tokens=3840", "--log_interval=7",
             "--ckpt_interval_s=0.01", *flags]
    for name in ("a", "b"):
        train(tmp_path / name, data, *flags)
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "config/muon_qk.py"), *TINY,
               f"--data_dir={data}", f"--out_dir={tmp_path / 'c'}"]
    child = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
    while child.poll() is None and len(study.read_log(tmp_path / "c")[0]) < 4:
        pass
    child.kill()
    child.wait()
    assert "going on from step" in train(tmp_path / "c", data, *flags)
    weights = [torch.load(tmp_path / name / "ckpt_step_60.pt", weights_only=True)["model"] for name in "abc"]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][key], other[key]) for key in other)
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b") == log_of(tmp_path / "c")


@gpu
def test_evaluation_on_cuda(tmp_path, data):  # noqa: F811
    import evaluate
    import scoring
    train(tmp_path / "r", data, "--n_ckpt=1")
    path = next((tmp_path / "r").glob("ckpt_step_*.pt"))
    tokens, nats = np.arange(500) % 250, {}
    pairs = [([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([7], [8, 9])]
    for device in ("cpu", "cuda"):
        model, _ = evaluate.load_checkpoint(path, device)
        nats[device] = [scoring.val_losses(model, tokens, "float32")[0].sum(),
                        *(ll for ll, _ in scoring.score(model, pairs, "float32"))]
    assert nats["cuda"] == pytest.approx(nats["cpu"], rel=1e-4)
