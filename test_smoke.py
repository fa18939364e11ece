"""The tests of model, Muon, probes, config and a run: closed forms, independent implementations, the real script run
tiny.

    pytest                  all of it, minutes on two cores
    pytest -m slow          what takes longer: twenty kills, the real 80m shape
"""
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import configurator
import muon
import study
import system
from model import GPT, GPTConfig, RMSNorm, causal_blocks
from muon import Muon, orthogonalize
from probe import attention_stats, gram, pr1, pr2, probe, singular_values

for ignored in (signal.SIGHUP, signal.SIGINT):  # where pytest runs under nohup; the runs that it starts would too
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, signal.SIG_DFL)
ROOT = Path(__file__).resolve().parent
ENV = dict(os.environ, OMP_NUM_THREADS="1")
TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--ffn_dim=48", "--block_size=16", "--vocab_size=256",
        "--batch_tokens=64", "--max_tokens=1280", "--probe_tokens=64", "--log_interval=5", "--sv_interval=10",
        "--compile=0", "--dtype=float32", "--device=cpu", "--learning_rate=0.01"]


def write_data(folder, n_train=4000, n_val=333, vocab=256, seed=0):
    """A data folder of tokens that can be learned: each follows from the one before, with noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    meta = dict(tokenizer="random", vocab_size=vocab, eot=0, settings={}, command="none",
                val_bytes=2 * n_val, train_bytes=2 * n_train)
    for split, name, n in (("train", "train.bin", n_train), ("val", "val_set.bin", n_val)):
        tokens = np.cumsum(rng.integers(1, 4, n)).astype(np.uint16) % vocab
        tokens.astype("<u2").tofile(folder / name)
        meta |= {f"{split}_tokens": n, f"{split}_sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def train(out_dir, data_dir, *args, arm="muon_qk", ok=True, **popen):
    """Run the real train.py; returns its stdout, or with ok=False its one line of error."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), f"config/{arm}.py", *TINY,
                           f"--data_dir={data_dir}", f"--out_dir={out_dir}", *args],
                          capture_output=True, text=True, env=ENV, **popen)
    if ok:
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr, done.stderr
    error = done.stderr.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: "), done.stderr
    return error[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A finished tiny run of each arm at seed 42, and one of muon_qk at seed 137."""
    out = tmp_path_factory.mktemp("out")
    for arm in study.ARMS:
        train(out / f"{arm}-seed42", data, arm=arm)
    train(out / "muon_qk-seed137", data, "--seed=137")
    return out


def tiny_model(qk_norm=False, seed=0, **kw):
    c = GPTConfig(**{**dict(block_size=32, vocab_size=96, n_layer=2, n_head=2, n_embd=64, ffn_dim=80,
                            qk_norm=qk_norm), **kw})
    return GPT(c).init_weights(torch.Generator().manual_seed(seed))


# ---- probe.py: the closed forms
def test_orthonormal_rows_have_pr_equal_to_rank():
    q = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0][:40]
    s = singular_values(gram(q))
    assert pr1(s).item() == pytest.approx(40, abs=1e-5) and pr2(s).item() == pytest.approx(40, abs=1e-8)


def test_rank_one_has_pr_one():
    x = torch.outer(torch.randn(100), torch.randn(64))
    s = torch.linalg.svdvals(x.double())
    assert pr1(s).item() == pytest.approx(1, abs=1e-5) and pr2(s).item() == pytest.approx(1, abs=1e-9)


def test_gaussian_pr():
    """Random-matrix values: PR2 = nm / (n + m + 1) for n x m, PR1 = (8 / 3 pi)^2 d for a square one."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 512, 64, generator=g)
    assert pr2(singular_values(gram(x))).mean().item() == pytest.approx(64 * 512 / (64 + 512 + 1), rel=2e-3)
    y = torch.randn(20, 256, 256, generator=g)
    assert pr1(singular_values(gram(y))).mean().item() == pytest.approx((8 / (3 * math.pi)) ** 2 * 256, rel=1e-2)


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_geometric_spectrum(q):
    s, n = q ** torch.arange(64, dtype=torch.float64), 64

    def closed(q):
        return (1 + q) * (1 - q ** n) / ((1 - q) * (1 + q ** n))

    assert pr1(s).item() == pytest.approx(closed(q)) and pr2(s).item() == pytest.approx(closed(q * q))


def test_gain_sets_pr2_of_isotropic_keys():
    gain = torch.linspace(0.1, 2, 64, dtype=torch.float64)
    k = torch.nn.functional.normalize(torch.randn(400_000, 64, dtype=torch.float64,
                                                  generator=torch.Generator().manual_seed(0)), dim=1) * 8
    expected = (gain ** 2).sum() ** 2 / (gain ** 4).sum()
    assert pr2(singular_values(gram(k * gain))).item() == pytest.approx(expected.item(), rel=1e-3)


def test_pr_is_invariant_under_scaling_and_rotation():
    x = torch.randn(300, 64, dtype=torch.float64) @ torch.diag(torch.linspace(0.1, 1, 64, dtype=torch.float64))
    rotation = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    for pr in (pr1, pr2):
        values = [pr(singular_values(gram(y))).item() for y in (x, 1e3 * x, x @ rotation)]
        assert values[1:] == pytest.approx([values[0]] * 2)


def test_entropy_uniform_and_one_hot():
    T = 50
    entropy, logit = attention_stats(torch.zeros(2, T, 64), torch.randn(2, T, 64))
    assert entropy.item() == pytest.approx(math.lgamma(T + 1) / T, abs=1e-6) and logit.item() == 0
    k = 100 * torch.eye(64)[:T].expand(2, T, 64)  # each position attends to itself alone
    assert attention_stats(100 * k, k)[0].item() == pytest.approx(0, abs=1e-6)


def test_qk_norm_bounds_logits():
    model = tiny_model(qk_norm=True, n_embd=128)
    for p in model.h.parameters():
        if p.ndim == 2:
            p.data.mul_(50)  # however large the weights, |logit| <= sqrt(head_dim)
    metrics, _ = probe(model, torch.randint(0, 96, (4, 32)))
    largest = max(metrics["max_logit_layer_0"], metrics["max_logit_layer_1"])
    assert 2 < largest <= 8 + 1e-4


# ---- probe.py: against plain numpy on captured keys
@pytest.mark.parametrize("qk_norm", [False, True])
def test_probe_equals_numpy_on_captured_keys(qk_norm, monkeypatch):
    model = tiny_model(qk_norm).eval()
    if qk_norm:
        for block in model.h:
            block.attn.k_norm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    idx = torch.randint(0, 96, (3, 32), generator=torch.Generator().manual_seed(2))
    metrics, spectra = probe(model, idx)
    seen = []  # what the forward pass really hands to attention
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, k, v, **kw: seen.append((q, k)) or sdpa(q, k, v, **kw))
    model(idx)
    assert len(seen) == 2
    for i, (q, k) in enumerate(seen):
        q, k = q.detach().double().numpy(), k.detach().double().numpy()
        B, H, T, D = k.shape
        pr, centered, entropy, spectrum = [], [], [], []
        logits = np.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(D)
        for h in range(H):
            keys = k[:, h].reshape(-1, D)
            s = np.linalg.svd(keys, compute_uv=False)
            spectrum.append(s)
            pr.append(s.sum() ** 2 / (s ** 2).sum())
            c = np.linalg.svd(keys - keys.mean(0), compute_uv=False)
            centered.append((c ** 2).sum() ** 2 / (c ** 4).sum())
        for b, h, t in np.ndindex(B, H, T):
            p = np.exp(logits[b, h, t, :t + 1] - logits[b, h, t, :t + 1].max())
            p /= p.sum()
            entropy.append(-(p * np.log(p)).sum())
        w = model.h[i].attn.k_proj.weight.detach().double().numpy().reshape(H, D, -1)
        if qk_norm:
            w = w * model.h[i].attn.k_norm.weight.detach().double().numpy()[:, None]
        ws = np.linalg.svd(w, compute_uv=False)
        assert metrics[f"pr_layer_{i}"] == pytest.approx(np.mean(pr), rel=1e-5)
        assert metrics[f"pr_centered_layer_{i}"] == pytest.approx(np.mean(centered), rel=1e-5)
        assert metrics[f"pr_weight_layer_{i}"] == pytest.approx(
            ((ws ** 2).sum(1) ** 2 / (ws ** 4).sum(1)).mean(), rel=1e-6)
        assert metrics[f"attn_entropy_layer_{i}"] == pytest.approx(np.mean(entropy), rel=1e-5)
        assert metrics[f"max_logit_layer_{i}"] == pytest.approx(
            max(logits[b, h][np.tril_indices(T)].max() for b in range(B) for h in range(H)), rel=1e-5)
        np.testing.assert_allclose(spectra[f"sv_layer_{i}"], spectrum, rtol=1e-4)
        np.testing.assert_allclose(spectra[f"sv_weight_layer_{i}"], ws, rtol=1e-5)
        # before RoPE: undo the rotation of each position
        cos, sin = model.cos[:T].numpy(), model.sin[:T].numpy()
        flat = k * cos - np.concatenate([-k[..., D // 2:], k[..., :D // 2]], -1) * sin
        s = np.stack([np.linalg.svd(flat[:, h].reshape(-1, D), compute_uv=False) for h in range(H)])
        assert metrics[f"pr_pre_rope_layer_{i}"] == pytest.approx((s.sum(1) ** 2 / (s ** 2).sum(1)).mean(), rel=1e-5)
    assert metrics["mean_pr"] == pytest.approx(np.mean([metrics["pr_layer_0"], metrics["pr_layer_1"]]))


def test_a_vector_added_to_all_keys_changes_pr_but_not_centered_pr():
    k = torch.randn(500, 64, dtype=torch.float64)
    moved = k + 10 * torch.randn(64, dtype=torch.float64)

    def centered(x):
        return pr2(singular_values(gram(x - x.mean(0)))).item()

    assert centered(moved) == pytest.approx(centered(k))
    assert pr1(singular_values(gram(moved))) < 0.8 * pr1(singular_values(gram(k)))


# ---- model.py
def test_parameter_counts():
    for scale, millions in (("80m", 79.1), ("4m", 4.4)):
        config = study.scale_config(scale)
        with torch.device("meta"):
            model = GPT(GPTConfig(**{k: config[k] for k in GPTConfig.__dataclass_fields__}))
        assert model.num_params() / 1e6 == pytest.approx(millions, rel=0.02)
    assert all(study.scale_config(s)["n_embd"] == 64 * study.scale_config(s)["n_head"] for s in study.SCALES)


def test_rms_norm_closed_form():
    x = torch.randn(5, 7, 64) * 3
    expected = x / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(RMSNorm(64)(x), expected.float())


def test_no_position_sees_the_future():
    model, idx = tiny_model(), torch.randint(0, 96, (1, 32))
    changed = idx.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 96
    a, b = model(idx), model(changed)
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.allclose(a[:, 20:], b[:, 20:])


def test_rope_depends_on_distance_only():
    from model import apply_rope, rope_table
    cos, sin = rope_table(64, 64)
    q, k = torch.randn(2, 1, 1, 1, 64).expand(2, 1, 1, 64, 64)
    scores = (apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).mT)[0, 0]
    for offset in (0, 3, 17):
        diagonal = scores.diagonal(-offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_arms_of_a_seed_start_from_the_same_matrices():
    plain, qk = tiny_model(False, seed=3), tiny_model(True, seed=3)
    for name, p in plain.state_dict().items():
        assert torch.equal(p, qk.state_dict()[name])
    assert not torch.equal(plain.wte.weight, tiny_model(False, seed=4).wte.weight)


def test_flops_against_torch_counter():
    """The formula against torch's own count of the matrix products of forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny_model()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 32, dtype=torch.long), torch.zeros(1, 32, dtype=torch.long)).backward()
    causal = 6 * 2 * 64 * 32  # torch counts the whole square of attention, we the half under the mask
    assert counter.get_total_flops() / 32 == model.flops_per_token() + causal


@pytest.mark.parametrize("T", [1, 128, 300])
def test_attention_in_blocks_is_attention(T):
    q, k, v, g = (torch.randn(2, 3, T, 64, generator=torch.Generator().manual_seed(i)).requires_grad_()
                  for i in range(4))
    ours, theirs = causal_blocks(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert (ours - theirs).abs().max() < 2e-6
    for a, b in zip(torch.autograd.grad(ours, (q, k, v), g), torch.autograd.grad(theirs, (q, k, v), g)):
        assert (a - b).abs().max() < 2e-5


# ---- muon.py
BOTH_KINDS_OF_DEVICE = pytest.mark.parametrize("bfloat16", [True, False])  # with bfloat16 products and without


@BOTH_KINDS_OF_DEVICE
def test_muon_equals_torch_optim_muon(monkeypatch, bfloat16):
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: bfloat16)
    # the first four in two pieces, the rest alone
    monkeypatch.setattr(muon, "CPU_CHUNK", dict.fromkeys(muon.CPU_CHUNK, 2 * 64 * 64))
    shapes = [(64, 64)] * 4 + [(128, 64)] * 2 + [(64, 128), (128, 352), (352, 128), (128, 128)]
    g = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s, generator=g) * 0.02) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.02, weight_decay=0.1, momentum=0.95)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(10):
        before = [(p.detach().clone(), q.detach().clone()) for p, q in zip(ours, theirs)]
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step(), b.step()
        for p, q, (p0, q0) in zip(ours, theirs, before):
            update, reference = p - p0, q - q0
            # bf16 rounding over five products
            assert (update - reference).norm() / reference.norm() < 0.02, (step, tuple(p.shape))


@BOTH_KINDS_OF_DEVICE
def test_ranks_share_newton_schulz_however_small_the_pieces(monkeypatch, bfloat16):
    """Ten matrices over three ranks in pieces of one matrix a rank: four each, padding included, and not ten."""
    taken = []
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr(muon, "CPU_CHUNK", dict.fromkeys(muon.CPU_CHUNK, 1))
    monkeypatch.setattr(muon, "orthogonalize", lambda G: taken.append(len(G)) or G)
    for name, result in (("is_initialized", True), ("get_world_size", 3), ("get_rank", 1),
                         ("all_gather_into_tensor", None)):
        monkeypatch.setattr(muon.dist, name, lambda *args, result=result: result)
    params = [torch.nn.Parameter(torch.zeros(8, 16)) for _ in range(10)]
    for p in params:
        p.grad = torch.ones_like(p)
    Muon(params).step()
    assert sum(taken) == 4


@BOTH_KINDS_OF_DEVICE
def test_newton_schulz_is_its_polynomial_on_singular_values(monkeypatch, bfloat16):
    """Exactly, U p(p(p(p(p(s / |s|))))) V^T: from numpy's SVD in float64, to rounding in either dtype."""
    monkeypatch.setattr(muon, "has_bfloat16", lambda device: bfloat16)
    G = torch.randn(3, 64, 192, generator=torch.Generator().manual_seed(0))
    u, s, vh = np.linalg.svd(G.double().numpy(), full_matrices=False)
    s /= np.sqrt((s ** 2).sum(-1, keepdims=True))
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        s = a * s + b * s ** 3 + c * s ** 5
    expected, got = (u * s[:, None]) @ vh, orthogonalize(G)
    assert got.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert np.linalg.norm(got.double().numpy() - expected) / np.linalg.norm(expected) < (0.02 if bfloat16 else 1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (128, 352)])
def test_orthogonalize_flattens_the_spectrum(shape):
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    U = orthogonalize(G).double()
    s = torch.linalg.svdvals(U)
    assert s.max() < 1.3 and (s > 0.3).double().mean() > 0.95
    u, _, vh = torch.linalg.svd(G.double(), full_matrices=False)
    assert ((u @ vh) * U).sum() / (U.norm() * (3 * shape[0]) ** 0.5) > 0.97  # the directions of the polar factor


def test_muon_update_has_the_rms_of_adamw():
    p = torch.nn.Parameter(torch.zeros(128, 352))
    p.grad = torch.randn(128, 352)
    Muon([p], lr=1.0, weight_decay=0).step()
    assert p.detach().pow(2).mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


# ---- configurator.py
def test_config_files_and_arguments(tmp_path):
    script = ROOT / "train.py"
    file = tmp_path / "mine.py"
    file.write_text("# mine\nlearning_rate = 1\nmax_tokens = 1e6\nqk_norm = True\n")
    config = configurator.resolve(script, [str(file), "--max_tokens=2e6", "--qk_norm=false", "--compile=1",
                                           "--out_dir=5"])
    assert config["learning_rate"] == 1.0 and type(config["learning_rate"]) is float
    assert config["max_tokens"] == 2_000_000 and type(config["max_tokens"]) is int
    assert config["qk_norm"] is False and config["compile"] is True and config["out_dir"] == "5"
    assert configurator.resolve(script, ["--max_tokens=5", str(file)])["max_tokens"] == 1_000_000  # later ones win


@pytest.mark.parametrize("args, says", [
    (["--lerning_rate=1"], "did you mean learning_rate"), (["--seed=1.5"], "seed = 1.5 is not of type int"),
    (["--qk_norm=maybe"], "qk_norm = 'maybe' is not of type bool"),
    (["--learning_rate=fast"], "learning_rate = 'fast' is not of type float"),
    (["--seed"], "--seed=VALUE"), (["nothing.py"], "nothing.py cannot be read"), (["--qk_norm=2"], "not of type bool"),
    (["--max_tokens=nan"], "max_tokens"), (["--seed=True"], "seed = True is not of type int")])
def test_wrong_arguments(args, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        configurator.resolve(ROOT / "train.py", args)


@pytest.mark.parametrize("text, says", [
    ("n_layr = 3\n", "did you mean n_layer"), ("n_layer = 'x'\n", "not of type int"),
    ("import os\n", "line 1: not a plain assignment"),
    ("n_layer = 1 + seed\n", "line 1: not a plain assignment"), ("n_layer =\n", "line 1")])
def test_wrong_config_file(tmp_path, text, says):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)):
        configurator.resolve(ROOT / "train.py", [str(tmp_path / "c.py")])


def test_help_lists_every_key_with_its_comment():
    out = subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"],
                         capture_output=True, text=True, env=ENV).stdout
    assert out.splitlines()[2] == "# study" and "configure" not in out
    for key, value, _ in configurator.assignments(ROOT / "train.py", "configure("):
        assert re.search(rf"^{key} = .+  # .+$", out, re.M), f"{key} is not there or has no comment"


# ---- train.py: runs
def test_four_arms_learn_and_start_paired(runs):
    rows = {r["dir"].name: r["rows"] for r in study.load_runs(runs)}
    assert len(rows) == 5
    for name, log in rows.items():
        assert [r["step"] for r in log] == [0, 3, 5, 6, 10, 13, 15, 16, 20], name  # every 5, and sixths of 20 steps
        assert log[-1]["val_loss"] < log[0]["val_loss"] - 0.3, name
    start = {name: log[0]["val_loss"] for name, log in rows.items()}
    assert start["adamw-seed42"] == start["muon-seed42"] and start["adamw_qk-seed42"] == start["muon_qk-seed42"]
    assert start["muon_qk-seed42"] != start["muon_qk-seed137"]


def test_logged_val_loss_equals_a_loop_of_ones_own(runs, data):
    for run in study.load_runs(runs):
        ckpt = torch.load(run["dir"] / "ckpt_step_20.pt", weights_only=True)
        c = run["config"]
        model = GPT(GPTConfig(**{k: c[k] for k in GPTConfig.__dataclass_fields__}))
        model.load_state_dict(ckpt["model"])
        tokens = torch.from_numpy(np.fromfile(data / "val_set.bin", "<u2").astype(np.int64))
        losses = []
        for start in range(0, len(tokens) - 1, 16):
            x, y = tokens[start:start + 16], tokens[start + 1:start + 17]
            logp = model(x[None, :len(y)])[0].log_softmax(-1)
            losses += [-logp[t, y[t]].item() for t in range(len(y))]
        assert len(losses) == len(tokens) - 1
        assert run["val_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_part_of_the_val_set_leaves_the_probe_alone(tmp_path, runs, data):
    """eval_tokens may be less than probe_tokens: the keys probed are the same, the loss is that of the part."""
    train(tmp_path / "part", data, "--eval_tokens=32", "--max_tokens=64", "--n_ckpt=1")
    part, whole = study.load_run(tmp_path / "part")["rows"][0], study.load_run(runs / "muon_qk-seed42")["rows"][0]
    assert part["mean_pr"] == whole["mean_pr"] and part["val_loss"] != whole["val_loss"]
    model = GPT(GPTConfig(16, 256, 2, 2, 32, 48, True)).init_weights(torch.Generator().manual_seed(42))
    tokens = torch.from_numpy(np.fromfile(data / "val_set.bin", "<u2").astype(np.int64)[:33])
    with torch.no_grad():
        assert part["val_loss"] == pytest.approx(
            model(tokens[:-1].view(2, 16), tokens[1:].view(2, 16)).item(), abs=1e-5)


def test_spectra_agree_with_the_log(runs):
    for run in study.load_runs(runs):
        by_step = {r["step"]: r for r in run["rows"]}
        files = sorted(run["dir"].glob("sv_layer_*.npy"))
        assert {int(f.stem.split("_")[-1]) for f in files} == {0, 3, 6, 10, 13, 16, 20}
        for f in files:
            _, _, layer, _, step = f.stem.split("_")
            s = np.load(f)
            assert s.shape == (2, 16) and s.dtype == np.float32 and (np.diff(s, axis=1) <= 0).all()
            assert (s.sum(1) ** 2 / (s ** 2).sum(1)).mean() == pytest.approx(
                by_step[int(step)][f"pr_layer_{layer}"], abs=1e-4)
            s = np.load(f.with_name(f.name.replace("sv_", "sv_weight_")))
            assert (s ** 2).sum(1).__pow__(2).__truediv__((s ** 4).sum(1)).mean() == pytest.approx(
                by_step[int(step)][f"pr_weight_layer_{layer}"], abs=1e-4)


def test_batches_are_a_permutation_of_the_epoch(tmp_path, data):
    """Each block of the train set once an epoch, another order for another seed, the same order in every arm."""
    source = (ROOT / "train.py").read_text().split("# ---- model and optimizers")[0]
    order = {}
    for arm, seed in (("adamw", 1), ("muon_qk", 1), ("adamw", 2)):
        code = (source + "\nn = n_blocks\n"
                "print(json.dumps([int(block_at(i)[0]) * 65536 + int(block_at(i)[1]) for i in range(2 * n)]), n)\n")
        code = code.replace("__file__", repr(str(ROOT / "train.py")))
        out = subprocess.run([sys.executable, "-c", code, f"config/{arm}.py", *TINY, f"--data_dir={data}",
                              f"--seed={seed}", f"--out_dir={tmp_path / (arm + str(seed))}"],
                             capture_output=True, text=True, cwd=ROOT, env=ENV)
        assert out.returncode == 0, out.stderr
        blocks, n = out.stdout.splitlines()[-1].rsplit(" ", 1)
        order[arm, seed] = json.loads(blocks)
        n = int(n)
    tokens = np.fromfile(data / "train.bin", "<u2").astype(int)
    expected = sorted(tokens[i * 16] * 65536 + tokens[i * 16 + 1] for i in range((len(tokens) - 1) // 16))
    one = order["adamw", 1]
    assert sorted(one[:n]) == sorted(one[n:]) == expected and one[:n] != one[n:]
    assert order["muon_qk", 1] == one and order["adamw", 2] != one


def test_run_again_is_a_no_op_and_other_settings_are_refused(runs, data):
    before = {p.name: p.read_bytes() for p in (runs / "muon_qk-seed42").iterdir() if p.is_file() and p.name != "lock"}
    assert "nothing to do" in train(runs / "muon_qk-seed42", data)
    line = train(runs / "muon_qk-seed42", data, "--weight_decay=0.2", ok=False)
    assert "weight_decay 0.1 -> 0.2" in line
    assert before == {p.name: p.read_bytes() for p in (runs / "muon_qk-seed42").iterdir()
                      if p.is_file() and p.name != "lock"}


def test_dtype_auto_is_what_the_device_multiplies_and_is_written_down(tmp_path, data):
    train(tmp_path / "r", data, "--max_tokens=64", "--dtype=auto")
    dtype = json.loads((tmp_path / "r/config.json").read_text())["dtype"]
    assert dtype == ("bfloat16" if system.has_bfloat16("cpu") else "float32")
    assert "nothing to do" in train(tmp_path / "r", data, "--max_tokens=64", f"--dtype={dtype}")
    other = {"bfloat16": "float32", "float32": "bfloat16"}[dtype]
    assert f"dtype '{dtype}' -> '{other}'" in train(tmp_path / "r", data, "--max_tokens=64",
                                                    f"--dtype={other}", ok=False)


def test_final_block_can_be_grepped(tmp_path, data):
    out = train(tmp_path / "r", data, "--max_tokens=256")
    block = dict(re.findall(r"^(\w+): +(.+)$", out.split("---\n")[1], re.M))
    assert float(block["val_loss"]) == pytest.approx(study.load_run(tmp_path / "r")["val_loss"], abs=1e-6)
    assert int(block["tokens"]) == 256 and block["mfu"] == "unknown"
    assert ((tmp_path / "r" / "source" / "train.py").exists()
            and (tmp_path / "r" / "source" / "versions.json").exists())


def test_gradient_accumulation_changes_nothing_but_rounding(tmp_path, data):
    losses = []
    for micro in (4, 1):
        train(tmp_path / str(micro), data, f"--micro_batch={micro}")
        losses.append([r["val_loss"] for r in study.read_log(tmp_path / str(micro))[0]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_train_loss_is_the_mean_over_micro_batches(tmp_path, data):
    logged = [study.read_log(tmp_path / m)[0][-1]["train_loss"] for m in ("4", "1")
              if train(tmp_path / m, data, f"--micro_batch={m}", "--max_tokens=64")]
    assert logged[0] == pytest.approx(logged[1], abs=1e-5)


# ---- train.py: bad input, one line each, nothing written
@pytest.mark.parametrize("args, says", [
    (["--scale=80b"], "scale '80b' is not known: choose one of 80m, 4m, mini"),
    (["--arm=sgd"], "arm 'sgd' is not known"),
    (["--batch_tokens=60"], "batch_tokens 60 is no multiple of block_size 16"),
    (["--batch_tokens=48", "--micro_batch=2"], "3 sequences a device do not divide into micro-batches of 2"),
    (["--block_size=8192", "--batch_tokens=8192", "--probe_tokens=8192", "--max_tokens=8192"], "holds 4000 tokens"),
    (["--probe_tokens=512"], "val_set.bin holds 333 tokens"), (["--vocab_size=100"], "vocabulary of 256"),
    (["--max_tokens=10"], "max_tokens 10 is less than one batch"),
    (["--n_head=3"], "n_embd 32 does not divide into 3 heads"), (["--data_dir=nowhere"], "meta.json is missing"),
    (["--dtype=float8"], "dtype 'float8' is not supported"), (["--device=mps"], "device 'mps' is not supported"),
    (["--device=foo"], "device 'foo' is not supported"), (["--device=cuda:7"], "device cuda:7 is not there"),
    (["--device=xpu:0"], "choose auto, cpu, cuda or cuda:N"), (["--n_layer=0"], "n_layer 0 makes no sense"),
    (["--micro_batch=-1"], "micro_batch -1 makes no sense"), (["--seed=-1"], "seed -1"),
    (["--learning_rate=-1"], "learning_rate -1.0"), (["--learning_rate=1e999"], "learning_rate inf"),
    (["--warmup_frac=1.5"], "at most 1"), (["--ckpt_interval_s=-1"], "ckpt_interval_s -1.0"),
    (["--batch_tokens=0"], "batch_tokens 0"), (["--block_size=0"], "block_size 0")])
def test_bad_settings(tmp_path, data, args, says):
    line = train(tmp_path / "r", data, *args, ok=False)
    assert says in line
    assert not (tmp_path / "r").exists()


def test_damaged_data(tmp_path):
    folder = write_data(tmp_path / "d")
    whole = (folder / "train.bin").read_bytes()
    for content, says in ((whole[:-10], "bytes, expected"), (None, "train.bin is missing"),
                          (whole[:-2] + b"\xff\x00", "sha256")):
        (folder / "train.bin").write_bytes(content) if content else (folder / "train.bin").unlink()
        assert says in train(tmp_path / "r", folder, ok=False)
        assert not (tmp_path / "r").exists()


def test_out_dir_that_cannot_be_written(tmp_path, data):
    (tmp_path / "file").write_text("in the way")
    assert "file" in train(tmp_path / "file" / "r", data, ok=False)
