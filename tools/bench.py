"""What things cost on this machine, two sides in turns, medians and ratios. Without a name, all but gpu:

    python tools/bench.py [NAME ...] [DIR]

    gpu        on a GPU: ceilings, tokens/s, MFU, memory and milliseconds by part of adamw and muon_qk
               at 80m, in two minutes
    nanogpt    tokens/s of mini, 4m and four layers of 80m against nanoGPT's model; DIR is a checkout of
               karpathy/nanoGPT
    muon       our batched step against torch.optim.Muon, at the shapes of mini, 4m and 80m
    looks      probes and val passes as shares of training
    start      to the first training step, and of a run of one step back to the prompt, with a warm
               compile cache
    eval       HellaSwag 10-shot against lm-eval's stock hf model, float32 and bfloat16; needs
               requirements-dev.txt

What it gave, and on which machine, is in docs/LOG.md.
"""
import contextlib
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import study  # noqa: E402
import system  # noqa: E402
from model import GPT, GPTConfig, gpt_config  # noqa: E402
from muon import Muon  # noqa: E402
from probe import probe  # noqa: E402

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
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if r:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def show(label, seconds, ours, other, per=None):
    """One line: both medians, in seconds or as `per` tokens/s, their ratio other / ours, and its
    spread round by round."""
    ratios = sorted(o / u for u, o in zip(seconds[ours], seconds[other]))
    a, b = (per / s if per else s for s in (statistics.median(seconds[name]) for name in (ours, other)))
    unit = "tokens/s" if per else "s"
    print(f"{label:<28} {ours} {a:,.4g} {unit}, {other} {b:,.4g} {unit}, "
          f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def config_of(scale, **changes):
    return gpt_config({**study.scale_config(scale), **changes})


def random_data(folder, vocab_size, n):
    """A data folder of n random train tokens and n / 4 val tokens."""
    tokens, meta = np.random.default_rng(0).integers(0, vocab_size, n).astype("<u2"), {}
    for split, name, part in (("train", "train.bin", tokens), ("val", "val_set.bin", tokens[:n // 4])):
        part.tofile(Path(folder) / name)
        meta |= {f"{split}_tokens": len(part), f"{split}_sha256": hashlib.sha256(part.tobytes()).hexdigest()}
    (Path(folder) / "meta.json").write_text(json.dumps(meta | dict(
        vocab_size=vocab_size, eot=0, tokenizer="random", command="none", settings={})))
    return folder


PARTS = {  # names of kernels, the first that fits
    "attention": r"flash|fmha|sdpa|attention", "matrix products": r"gemm|nvjet|cutlass|cublas|matmul|Cijk",
    "optimizer": r"multi_tensor|adam|foreach", "compiled": r"triton", "copies": r"memcpy|memset|copy"}


def bench_gpu(scale="80m", steps=40):
    """The real train.py in this process, on random tokens: first as it is, then a fifth of the steps
    under torch's profiler."""
    c = config_of(scale)
    n = 8192 if DEVICE == "cuda" else 256
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    seconds = in_turns({"product": lambda: a @ a, "copy": lambda: a.clone()}, 10)
    ceiling = 2 * n**3 / statistics.median(seconds["product"])
    print(f"{system.device_name(DEVICE)}, torch {torch.__version__}: matrix product "
          f"{ceiling / 1e12:.0f} TFLOP/s in bfloat16, copy "
          f"{4 * n**2 / statistics.median(seconds['copy']) / 1e9:,.0f} GB/s read and written", flush=True)
    batch = study.scale_config(scale)["batch_tokens"]
    with tempfile.TemporaryDirectory() as folder:
        random_data(folder, min(c.vocab_size, 50_000), 4 * batch)

        def run(arm, steps, name):
            out, argv = io.StringIO(), sys.argv
            sys.argv = ["train.py", f"config/{scale}.py", f"config/{arm}.py", "--learning_rate=1e-3",
                        f"--data_dir={folder}", "--n_ckpt=0", f"--out_dir={folder}/{name}",
                        f"--max_tokens={steps * batch}", f"--log_interval={steps // 2}",
                        f"--eval_tokens={c.block_size}", f"--probe_tokens={c.block_size}",
                        "--ckpt_interval_s=0"]
            try:
                with contextlib.redirect_stdout(out):
                    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            finally:
                sys.argv = argv
            return dict(re.findall(r"^(\w+): +(.+)$", out.getvalue().partition("---\n")[2], re.M))

        for arm in ("adamw", "muon_qk"):
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            block = run(arm, steps, arm)
            speed, peak = study.read_log(Path(folder) / arm)[0][-1]["tokens_per_s"], system.peak_flops(DEVICE)
            with torch.device("meta"):
                flops = GPT(config_of(scale)).flops_per_token()  # gains count for nothing
            full = flops + 6 * c.n_layer * c.n_embd * c.block_size
            mfu = f"{speed * flops / peak:.1%} (attention under the mask), " \
                  f"{speed * full / peak:.1%} (the whole square)" if peak else "unknown"
            print(f"{arm} at {scale}: {speed:,.0f} tokens/s, {1e3 * batch / speed:.1f} ms a step, MFU "
                  f"{mfu}, of the matrix product's speed {speed * flops / ceiling:.1%}, micro-batches "
                  f"of {block['micro_batch']}, peak memory {block['peak_memory_mb']} MB", flush=True)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                run(arm, steps // 5 * 2, f"{arm}-profile")
            spent = dict.fromkeys([*PARTS, "other"], 0.0)
            for e in profile.key_averages():
                part = next((part for part, pattern in PARTS.items()
                             if re.search(pattern, e.key, re.I)), "other")
                spent[part] += e.self_device_time_total / 1e3 / (steps // 5 * 2)
            print(f"{arm}: ms a step by kernel, looks included: "
                  + ", ".join(f"{part} {ms:.1f}" for part, ms in spent.items()), flush=True)


def bench_muon(rounds=7):
    """Seconds of an optimizer step on a model's hidden matrices, same gradients. Two layers of 80m
    where torch.optim.Muon, which always multiplies in bfloat16, would take minutes a step."""
    for scale, layers in (("mini", 6), ("4m", 8), ("80m", 22 if AUTO == "bfloat16" else 2)):
        sides = {}
        for name, optimizer in (("ours", lambda p: Muon(p, lr=1e-3)),
                                ("torch.optim.Muon", lambda p: torch.optim.Muon(
                                    p, lr=1e-3, adjust_lr_fn="match_rms_adamw"))):
            params = [p for p in GPT(config_of(scale, n_layer=layers)).h.parameters() if p.ndim == 2]
            for p in params:
                p.grad = torch.randn_like(p)
            sides[name] = optimizer(params).step
        show(f"muon step, {scale}, {layers} layers", in_turns(sides, rounds if scale != "80m" else 3),
             "ours", "torch.optim.Muon")


def train_step(model, c, micro, dtype=AUTO):
    """A function that does one training step on random tokens, AdamW, compiled as in train.py."""
    model = model.to(DEVICE)
    if isinstance(model, GPT):
        model.compile_parts()
        forward = model
    else:
        forward = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    block = torch.randint(0, c.vocab_size, (micro, c.block_size + 1), device=DEVICE)

    def step():
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(block[:, :-1].contiguous(), block[:, 1:].contiguous())
        loss = loss[1] if isinstance(loss, tuple) else loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def serve(pipe, folder, scale, micro, layers):
    """A process that does as many training steps as it is asked for: ours, or with a
    folder nanoGPT's. 0 ends it."""
    if folder:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
        nanogpt = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        c = config_of(scale, n_layer=layers)
        model = nanogpt.GPT(nanogpt.GPTConfig(
            block_size=c.block_size, vocab_size=c.vocab_size, n_layer=layers, n_head=c.n_head,
            n_embd=c.n_embd, dropout=0.0, bias=False))
    else:
        system.keep_freed_memory()
        # its MLP has 4 * n_embd and two matrices; ours three, so this ffn_dim has as many weights
        c = config_of(scale, n_layer=layers, ffn_dim=round(8 / 3 * config_of(scale).n_embd / 8) * 8)
        model = GPT(c).init_weights(torch.Generator().manual_seed(0))
    step = train_step(model, c, micro)
    while steps := pipe.recv():
        for _ in range(steps):
            step()
        pipe.send(steps)


def bench_nanogpt(folder, rounds=9):
    """Tokens/s of a step against nanoGPT's model at the same layers, width, heads,
    vocabulary, context, batch, dtype and number of weights, each in a process of its own as
    its users run it, both compiled."""
    spawn = multiprocessing.get_context("spawn")
    for scale, micro, layers, steps in (("mini", 8, 6, 10), ("4m", 8, 8, 3), ("80m", 1, 4, 1)):
        sides, pipes = {}, []
        for name, where in (("ours", None), ("nanoGPT", folder)):
            here, there = spawn.Pipe()
            spawn.Process(target=serve, args=(there, where, scale, micro, layers)).start()
            sides[name] = lambda here=here: (here.send(steps), here.recv())
            pipes.append(here)
        seconds = in_turns(sides, rounds)
        for pipe in pipes:
            pipe.send(0)
        show(f"{scale}, {layers} layers, compiled", seconds, "ours", "nanoGPT",
             steps * micro * config_of(scale).block_size)


def bench_looks(rounds=3):
    """A probe and a val pass as shares of the training between two looks, at each scale's own cadence."""
    for scale, micro in (("mini", 8), ("4m", 8), ("80m", 1)):
        config, c = study.scale_config(scale), config_of(scale)
        model = GPT(c).init_weights(torch.Generator().manual_seed(0)).to(DEVICE)
        step = train_step(model, c, micro)
        idx = torch.randint(0, c.vocab_size, (config["probe_tokens"] // c.block_size, c.block_size),
                            device=DEVICE)
        block = torch.randint(0, c.vocab_size, (micro, c.block_size), device=DEVICE)

        def val():
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=AUTO == "bfloat16"):
                model(block, block)

        sides = {"step": step, "probe": lambda: probe(model, idx), "val": val}
        seconds = {name: statistics.median(s) for name, s in in_turns(sides, rounds).items()}
        between = seconds["step"] * config["log_interval"] * config["batch_tokens"] / block.numel()
        val_seconds = seconds["val"] * (config["eval_tokens"] or 5_000_000) / block.numel()
        print(f"looks {scale}: probe {seconds['probe']:.2f} s, {seconds['probe'] / between:.2%} of the "
              f"training between two looks; val pass {val_seconds / between:.1%}, a token of it "
              f"{seconds['val'] / seconds['step']:.2f} of a training token", flush=True)


def bench_start(rounds=5):
    """Seconds of a run of one step at mini with a warm compile cache and one thread, as sweep.sh starts
    it: to its first training step, which begins when step 0 is in the log, and back to the prompt."""
    first, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        for r in range(rounds + 1):  # the first one warms the cache
            out_dir = Path(folder) / str(r)
            args = [sys.executable, "train.py", "config/mini.py", "config/muon_qk.py", f"--out_dir={out_dir}",
                    f"--max_tokens={study.scale_config('mini')['batch_tokens']}"]
            start = time.perf_counter()
            run = subprocess.Popen(args, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"),
                                   stdout=subprocess.DEVNULL)
            while run.poll() is None and not (out_dir / "log.jsonl").exists():
                time.sleep(0.01)
            first.append(time.perf_counter() - start)
            if run.wait():
                sys.exit(run.returncode)
            whole.append(time.perf_counter() - start)
    print(f"start: to the first training step {statistics.median(first[1:]):.1f} s, "
          f"a run of one step {statistics.median(whole[1:]):.1f} s")


def bench_eval():
    for dtype in sorted({"float32", AUTO}):
        eval_in(dtype)


def eval_in(dtype, rounds=4):
    """HellaSwag 10-shot at context 2048 on random weights of the 80m shape: items a second of our
    adapter and of lm-eval's stock `hf` model on the exported checkpoint, taken in turns in one process,
    and the ratio. Needs requirements-dev.txt."""
    from lm_eval.models.huggingface import HFLM

    import evaluate
    import export
    items, batch = (2, 1) if DEVICE == "cpu" else (64, 32)  # of a round, and the stock model's batch
    rng = random.Random(0)
    encoding = evaluate.get_encoding("gpt2")
    words = [w for w in map(encoding.decode, ([i] for i in range(256, 6000)))
             if w.startswith(" ") and w[1:].isalpha()]

    def text(low, high):
        return "".join(rng.choices(words, k=rng.randint(low, high)))[1:]

    # made-up lengths: ten shots come to 1,000 to 1,200 tokens, the low end of what HellaSwag needs
    rows = [dict(activity_label=text(1, 3), ctx_a=text(40, 100) + ".", ctx_b=text(1, 4),
                 endings=[text(5, 35) for _ in range(4)], label="0") for _ in range(40 + items * rounds)]
    task = evaluate.build_task("hellaswag", {"train": rows[:40], "validation": rows[40:]})
    config = GPTConfig()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "ckpt_step_1.pt"
        torch.save(dict(model=GPT(config).init_weights(torch.Generator().manual_seed(0)).state_dict(),
                        step=1, tokens=1, config=dict(vars(config), data=dict(tokenizer="gpt2"))),
                   checkpoint)
        export.export(checkpoint, Path(folder) / "hf")
        hf = HFLM(pretrained=str(Path(folder) / "hf"), device=DEVICE, dtype=dtype, batch_size=batch)
        ours = evaluate.adapter(encoding, config.block_size)
        ours.model, ours.dtype = evaluate.load_checkpoint(checkpoint, DEVICE)[0], dtype
    seconds, worst = {"ours": [], "hf": []}, 0.0
    for r in range(rounds):
        requests = task.instances[r * items * 4:(r + 1) * items * 4]
        scores = {}
        for name, lm in (("ours", ours), ("hf", hf)):
            start = time.perf_counter()
            scores[name] = lm.loglikelihood(requests, disable_tqdm=True)
            seconds[name].append((time.perf_counter() - start) / items)
        worst = max(worst, *(abs(a[0] - b[0]) for a, b in zip(scores["ours"], scores["hf"])))
    lengths = [len(encoding.encode(request.args[0])) for request in task.instances[::4]]
    per = {name: statistics.median(s) for name, s in seconds.items()}
    ratios = [theirs / ours for theirs, ours in zip(seconds["hf"], seconds["ours"])]
    for key, value in dict(
            device=DEVICE, dtype=dtype, items=items * rounds,
            prompt_tokens=f"{min(lengths)} to {max(lengths)}", ours_s_per_item=f"{per['ours']:.3f}",
            hf_s_per_item=f"{per['hf']:.3f}", largest_difference_nats=f"{worst:.2e}",
            ratio=f"{statistics.median(ratios):.2f}", ratio_by_round=" ".join(f"{r:.2f}" for r in ratios),
            ).items():
        print(f"eval_{key + ':':<26}{value}")


if __name__ == "__main__":
    names = "gpu nanogpt muon looks start eval".split()
    benches = {name: globals()[f"bench_{name}"] for name in names}
    folders = [word for word in sys.argv[1:] if word not in benches]
    if len(folders) > 1 or folders and not (Path(folders[0]) / "model.py").exists():
        sys.exit(f"error: {' '.join(folders)} is neither a name nor a checkout of nanoGPT: "
                 f"names are {' '.join(benches)}")
    for name in [word for word in sys.argv[1:] if word in benches] or names[1:]:
        if name != "nanogpt":
            benches[name]()
        elif folders:
            bench_nanogpt(folders[0])
        else:
            print("nanogpt: left out, it needs the folder of a checkout of karpathy/nanoGPT")
