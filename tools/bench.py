"""What things cost on this machine, two sides in turns, medians and ratios:

    python tools/bench.py gpu          on a GPU: tokens/s, MFU, memory and time by kernel of adamw and
                                       muon_qk at 80m, in two minutes
    python tools/bench.py nanogpt DIR  a training step of mini, 4m and four layers of 80m against nanoGPT's
                                       model; DIR is a checkout of karpathy/nanoGPT
    python tools/bench.py muon         our batched step against torch.optim.Muon, at mini, 4m and 80m
    python tools/bench.py start        to the first training step, and of a run of one step back to the prompt

What it gave, and on which machine, is in docs/LOG.md.
"""
import contextlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import study  # noqa: E402
import system  # noqa: E402
from configurator import fail  # noqa: E402
from model import GPT, gpt_config  # noqa: E402
from muon import Muon  # noqa: E402
from tokens import FILES, sha256_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# train.py's dtype auto; both sides of a comparison have it
AUTO = "bfloat16" if system.has_bfloat16(DEVICE) else "float32"


def in_turns(sides, rounds):
    """{name: [seconds a round]} of {name: function}, the sides in turns after one warm-up each:
    drift hits both alike."""
    seconds = {name: [] for name in sides}
    for r in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if r:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def show(label, seconds, other, steps=1):
    """One line: both sides' median milliseconds a step, the ratio other / ours, and its spread over rounds."""
    ratios = [theirs / ours for theirs, ours in zip(seconds[other], seconds["ours"])]
    ours, theirs = (1e3 * median(seconds[name]) / steps for name in ("ours", other))
    print(f"{label:<28} ours {ours:.4g} ms, {other} {theirs:.4g} ms, "
          f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def config_of(scale, **changes):
    return gpt_config({**study.scale_config(scale), **changes})


def random_data(folder, vocab_size, n):
    """A data folder of n random tokens, the same for train and val."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, n).astype("<u2")
    meta = dict(vocab_size=vocab_size, eot=0, tokenizer="random", command="none", settings={})
    for split, file in FILES.items():
        tokens.tofile(folder / file)
        meta |= {f"{split}_tokens": n, f"{split}_sha256": sha256_of(folder / file)}
    (folder / "meta.json").write_text(json.dumps(meta))


def bench_gpu(scale="80m", steps=40):
    """The real train.py in this process, on random tokens: as it is, and half of the steps under torch's
    profiler."""
    c, batch, peak = config_of(scale), study.scale_config(scale)["batch_tokens"], system.peak_flops(DEVICE)
    with torch.device("meta"):
        flops = GPT(c).flops_per_token()  # gains count for nothing: the same in both arms

    def run(arm, steps, out_dir):
        sys.argv = ["train.py", f"config/{scale}.py", f"config/{arm}.py", "--learning_rate=1e-3", "--n_ckpt=0",
                    f"--data_dir={out_dir.parent}", f"--out_dir={out_dir}", f"--max_tokens={steps * batch}",
                    f"--log_interval={steps // 2}", f"--eval_tokens={c.block_size}",
                    f"--probe_tokens={c.block_size}", "--ckpt_interval_s=0"]
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return study.read_log(out_dir)[0][-1]["tokens_per_s"]  # of the second half, when all is warm

    print(f"{system.device_name(DEVICE)}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        random_data(Path(folder), min(c.vocab_size, 50_000), 4 * batch)
        for arm in ("adamw", "muon_qk"):
            torch.cuda.reset_peak_memory_stats()
            speed = run(arm, steps, Path(folder) / arm)
            mfu = f"{speed * flops / peak:.1%}" if peak else "unknown"
            print(f"{arm} at {scale}: {speed:,.0f} tokens/s, {1e3 * batch / speed:.1f} ms a step, MFU {mfu} "
                  f"(attention under the mask), peak memory {system.peak_memory(DEVICE) / 2**20:.0f} MB", flush=True)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                run(arm, steps // 2, Path(folder) / f"{arm}-profile")
            print(profile.key_averages().table("self_device_time_total", 20, max_name_column_width=60), flush=True)


def bench_muon(rounds=5):
    """An optimizer step on a model's hidden matrices, same gradients. Two layers of 80m, as torch.optim.Muon
    would take minutes for all 22 on a CPU without bfloat16, in which it always multiplies."""
    for scale, layers in (("mini", 6), ("4m", 8), ("80m", 2)):
        params = [p for p in GPT(config_of(scale, n_layer=layers)).to(DEVICE).h.parameters() if p.ndim == 2]
        for p in params:
            p.grad = torch.randn_like(p)
        sides = {"ours": Muon(params, lr=1e-3).step,
                 "torch.optim.Muon": torch.optim.Muon(params, lr=1e-3, adjust_lr_fn="match_rms_adamw").step}
        show(f"muon step, {scale}, {layers} layers", in_turns(sides, rounds), "torch.optim.Muon")


def train_step(model, loss_of, c, micro):
    """A function that does one training step on random tokens, AdamW; loss_of: model, compiled."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    block = torch.randint(0, c.vocab_size, (micro, c.block_size + 1), device=DEVICE)

    def step():
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=AUTO == "bfloat16"):
            loss = loss_of(block[:, :-1].contiguous(), block[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def bench_nanogpt(folder, rounds=9):
    """A step against nanoGPT's model at the same layers, width, heads, vocabulary, context, batch, dtype and
    number of weights, both compiled, and both with the memory of steps before that system.py keeps for ours."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    system.start_device(DEVICE)
    for scale, micro, layers, steps in (("mini", 8, 6, 10), ("4m", 8, 8, 3), ("80m", 1, 4, 1)):
        torch.compiler.reset()
        # its MLP has 4 * n_embd and two matrices; ours three, so this ffn_dim has as many weights
        c = config_of(scale, n_layer=layers, ffn_dim=round(8 / 3 * config_of(scale).n_embd / 8) * 8)
        ours = GPT(c).init_weights(torch.Generator().manual_seed(0)).to(DEVICE)
        ours.compile_parts()
        theirs = nanogpt.GPT(nanogpt.GPTConfig(
            block_size=c.block_size, vocab_size=c.vocab_size, n_layer=layers, n_head=c.n_head,
            n_embd=c.n_embd, dropout=0.0, bias=False)).to(DEVICE)
        compiled = torch.compile(theirs, dynamic=False)
        step, other = train_step(ours, ours, c, micro), train_step(theirs, lambda x, y: compiled(x, y)[1], c, micro)
        seconds = in_turns({"ours": lambda: [step() for _ in range(steps)],
                            "nanoGPT": lambda: [other() for _ in range(steps)]}, rounds)
        show(f"{scale}, {layers} layers, compiled", seconds, "nanoGPT", steps)


def bench_start(rounds=5):
    """Seconds of a run of one step at mini with a warm compile cache and one thread, as sweep.sh starts a main
    run: to its first training step, which begins when step 0 has been looked at, and back to the prompt."""
    first, whole = [], []
    env = dict(os.environ, OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        for r in range(rounds + 1):  # the first one warms the cache
            start = time.perf_counter()
            run = subprocess.Popen(
                [sys.executable, "-u", "train.py", "config/mini.py", "config/muon_qk.py", "--n_ckpt=0",
                 f"--max_tokens={study.scale_config('mini')['batch_tokens']}", f"--out_dir={folder}/{r}"],
                cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
            first += [time.perf_counter() - start for line in run.stdout if line.startswith("step 0/")]
            if run.wait():
                sys.exit(run.returncode)
            whole.append(time.perf_counter() - start)
    print(f"start: to the first training step {median(first[1:]):.1f} s, "
          f"a run of one step {median(whole[1:]):.1f} s")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["gpu"] if DEVICE == "cuda":
            bench_gpu()
        case ["nanogpt", folder] if (Path(folder) / "model.py").exists():
            bench_nanogpt(folder)
        case ["muon"]:
            bench_muon()
        case ["start"]:
            bench_start()
        case _:
            fail("give gpu (on a GPU), nanogpt DIR (a checkout of karpathy/nanoGPT), muon or start")
