"""What things cost on this machine, two sides in turns, medians and ratios. Without a name, all of it one after the other:

    python tools/bench.py [NAME ...] [DIR]

    dtype      tokens/s of mini in dtype auto against the other one
    train      tokens/s of mini and 4m: attention in blocks against scaled_dot_product_attention
    nanogpt    tokens/s of mini, 4m and four layers of 80m against nanoGPT's model; DIR is a checkout of karpathy/nanoGPT
    muon       our batched step against torch.optim.Muon, at the shapes of mini, 4m and 80m
    looks      probes and val passes as shares of training
    start      from the shell's prompt to the first training step, and of a run of one step back to it, with a warm compile cache
    data       data/text/prepare.py against nanoGPT's way on the same text; needs data/poetry
    figures    plot.py and report.py on a full study: 28 runs of 22 layers
    eval       HellaSwag 10-shot against lm-eval's stock hf model, float32 and bfloat16; needs requirements-dev.txt
"""
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "data")]
import study  # noqa: E402
import system
from model import GPT, GPTConfig
from muon import Muon
from probe import probe


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AUTO = "bfloat16" if system.has_bfloat16(DEVICE) else "float32"  # train.py's dtype auto; both sides of a comparison have it


def bench_eval():
    for dtype in sorted({"float32", AUTO}):
        eval_in(dtype)


def eval_in(dtype, rounds=4):
    """HellaSwag 10-shot at context 2048 on random weights of the 80m shape: items a second of our adapter and of lm-eval's stock
    `hf` model on the exported checkpoint, taken in turns in one process, and the ratio. Needs requirements-dev.txt."""
    from lm_eval.models.huggingface import HFLM

    import evaluate
    import export
    items, batch = (2, 1) if DEVICE == "cpu" else (64, 32)  # of a round, and the stock model's batch
    rng = random.Random(0)
    encoding = evaluate.get_encoding("gpt2")
    words = [w for w in map(encoding.decode, ([i] for i in range(256, 6000))) if w.startswith(" ") and w[1:].isalpha()]

    def text(low, high):
        return "".join(rng.choices(words, k=rng.randint(low, high)))[1:]

    # made-up lengths: ten shots come to 1,000 to 1,200 tokens, the low end of what HellaSwag needs
    rows = [dict(activity_label=text(1, 3), ctx_a=text(40, 100) + ".", ctx_b=text(1, 4), endings=[text(5, 35) for _ in range(4)],
                 label="0") for _ in range(40 + items * rounds)]
    task = evaluate.build_task("hellaswag", {"train": rows[:40], "validation": rows[40:]})
    config = GPTConfig()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "ckpt_step_1.pt"
        torch.save(dict(model=GPT(config).init_weights(torch.Generator().manual_seed(0)).state_dict(), step=1, tokens=1,
                        config=dict(vars(config), data=dict(tokenizer="gpt2"))), checkpoint)
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
            device=DEVICE, dtype=dtype, items=items * rounds, prompt_tokens=f"{min(lengths)} to {max(lengths)}",
            ours_s_per_item=f"{per['ours']:.3f}", hf_s_per_item=f"{per['hf']:.3f}", largest_difference_nats=f"{worst:.2e}",
            ratio=f"{statistics.median(ratios):.2f}", ratio_by_round=" ".join(f"{r:.2f}" for r in ratios),
            ).items():
        print(f"eval_{key + ':':<26}{value}")


def in_turns(sides, rounds):
    """{name: [seconds a round]} of {name: function}, the sides in turns after one warm-up each: drift hits both alike."""
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


def show(label, seconds, ours, other, per=1.0, unit="s"):
    """One line: both medians, their ratio other / ours, and the ratio's spread round by round."""
    ratios = sorted(o / u for u, o in zip(seconds[ours], seconds[other]))
    a, b = (per / statistics.median(seconds[n]) if per != 1.0 else statistics.median(seconds[n]) for n in (ours, other))
    print(f"{label:<28} {ours} {a:,.4g} {unit}, {other} {b:,.4g} {unit}, ratio {statistics.median(ratios):.2f} "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)


def gpt_config(scale, **changes):
    c = study.scale_config(scale)
    return GPTConfig(**{**{k: c[k] for k in GPTConfig.__dataclass_fields__}, **changes})


def bench_muon(rounds=7):
    """Seconds of an optimizer step on a model's hidden matrices, same gradients. Two layers of 80m where torch.optim.Muon, which
    always multiplies in bfloat16, would take minutes a step."""
    for scale, layers in (("mini", 6), ("4m", 8), ("80m", 22 if AUTO == "bfloat16" else 2)):
        sides = {}
        for name, optimizer in (("ours", lambda p: Muon(p, lr=1e-3)),
                                ("torch.optim.Muon", lambda p: torch.optim.Muon(p, lr=1e-3, adjust_lr_fn="match_rms_adamw"))):
            params = [p for p in GPT(gpt_config(scale, n_layer=layers)).h.parameters() if p.ndim == 2]
            for p in params:
                p.grad = torch.randn_like(p)
            sides[name] = optimizer(params).step
        show(f"muon step, {scale}, {layers} layers", in_turns(sides, rounds if scale != "80m" else 3), "ours", "torch.optim.Muon")


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


def bench_dtype(rounds=3, micro=8):
    """Tokens/s of a step in what dtype auto takes and in the other one."""
    c = gpt_config("mini")
    sides = {dtype: train_step(GPT(c).init_weights(torch.Generator().manual_seed(0)), c, micro, dtype) for dtype in ("bfloat16", "float32")}
    other = "float32" if AUTO == "bfloat16" else "bfloat16"
    show("dtype, mini", in_turns(sides, rounds), AUTO, other, micro * c.block_size, "tokens/s")


def bench_train(rounds=9):
    """Tokens/s of a step with causal_blocks and with scaled_dot_product_attention."""
    import model
    blocks = model.CPU_BLOCK
    for scale, micro in (("mini", 8), ("4m", 8)):
        c = gpt_config(scale)

        def side(block):
            step = train_step(GPT(c).init_weights(torch.Generator().manual_seed(0)), c, micro)

            def run():
                model.CPU_BLOCK = block
                step()
            return run
        seconds = in_turns({"blocks": side(blocks), "sdpa": side(10**6)}, rounds)
        show(f"train {scale}", seconds, "blocks", "sdpa", micro * c.block_size, "tokens/s")
    model.CPU_BLOCK = blocks


def serve(pipe, folder, scale, micro, layers):
    """A process that does as many training steps as it is asked for: ours, or with a folder nanoGPT's. 0 ends it."""
    if folder:
        spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
        nanogpt = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        c = gpt_config(scale, n_layer=layers)
        model = nanogpt.GPT(nanogpt.GPTConfig(block_size=c.block_size, vocab_size=c.vocab_size, n_layer=layers, n_head=c.n_head,
                                              n_embd=c.n_embd, dropout=0.0, bias=False))
    else:
        system.keep_freed_memory()
        # its MLP has 4 * n_embd and two matrices; ours three, so this ffn_dim has as many weights
        c = gpt_config(scale, n_layer=layers, ffn_dim=round(8 / 3 * gpt_config(scale).n_embd / 8) * 8)
        model = GPT(c).init_weights(torch.Generator().manual_seed(0))
    step = train_step(model, c, micro)
    while steps := pipe.recv():
        for _ in range(steps):
            step()
        pipe.send(steps)


def bench_nanogpt(folder, rounds=9):
    """Tokens/s of a step against nanoGPT's model at the same layers, width, heads, vocabulary, context, batch, dtype and number of
    weights, each in a process of its own as its users run it, both compiled."""
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
        show(f"{scale}, {layers} layers, compiled", seconds, "ours", "nanoGPT", steps * micro * gpt_config(scale).block_size, "tokens/s")


def bench_looks(rounds=3):
    """A probe and a val pass as shares of the training between two looks, at each scale's own cadence."""
    for scale, micro in (("mini", 8), ("4m", 8), ("80m", 1)):
        config, c = study.scale_config(scale), gpt_config(scale)
        model = GPT(c).init_weights(torch.Generator().manual_seed(0)).to(DEVICE)
        step = train_step(model, c, micro)
        idx = torch.randint(0, c.vocab_size, (config["probe_tokens"] // c.block_size, c.block_size), device=DEVICE)
        block = torch.randint(0, c.vocab_size, (micro, c.block_size), device=DEVICE)

        def val():
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=AUTO == "bfloat16"):
                model(block, block)

        sides = {"step": step, "probe": lambda: probe(model, idx), "val": val}
        seconds = {name: statistics.median(s) for name, s in in_turns(sides, rounds).items()}
        between = seconds["step"] * config["log_interval"] * config["batch_tokens"] / block.numel()
        val_seconds = seconds["val"] * (config["eval_tokens"] or 5_000_000) / block.numel()
        print(f"looks {scale}: probe {seconds['probe']:.2f} s, {seconds['probe'] / between:.2%} of the training between two looks; "
              f"val pass {val_seconds / between:.1%}, a token of it {seconds['val'] / seconds['step']:.2f} of a training token", flush=True)


def bench_start(rounds=5):
    """Seconds of a run of one step at mini with a warm compile cache and one thread, as sweep.sh starts it: to its first training step,
    which begins when step 0 is in the log, and back to the prompt."""
    first, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        for r in range(rounds + 1):  # the first one warms the cache
            out_dir = Path(folder) / str(r)
            args = [sys.executable, "train.py", "config/mini.py", "config/muon_qk.py", f"--out_dir={out_dir}",
                    f"--max_tokens={study.scale_config('mini')['batch_tokens']}"]
            start = time.perf_counter()
            run = subprocess.Popen(args, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL)
            while run.poll() is None and not (out_dir / "log.jsonl").exists():
                time.sleep(0.01)
            first.append(time.perf_counter() - start)
            if run.wait():
                sys.exit(run.returncode)
            whole.append(time.perf_counter() - start)
    print(f"start: to the first training step {statistics.median(first[1:]):.1f} s, a run of one step {statistics.median(whole[1:]):.1f} s")


def command(args):
    """Run it in this folder, quietly, a thread a process as sweep.sh does."""
    done = subprocess.run(args, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def bench_data(rounds=3, n_tokens=16_000_000):
    """Bytes of text a second, a JSON-lines file to token files. nanoGPT's way: `datasets` maps encode_ordinary over the documents
    with a process a core, then writes the ids of 1024 shards one after the other."""
    import datasets
    import numpy as np
    import tokens
    poetry, encoding = ROOT / "data/poetry", tokens.get_encoding("gpt2")
    whole = tokens.load_bin(poetry, "train", 4096)[:n_tokens]
    documents = tokens.get_encoding("gpt2-4096").decode(whole.tolist()).split("<|endoftext|>")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.jsonl"
        file.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in documents if text))

        def ours():
            command([sys.executable, "data/text/prepare.py", str(file), f"--out={tempfile.mkdtemp(dir=folder)}"])

        def theirs():
            cache = tempfile.mkdtemp(dir=folder)
            rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
            rows = rows.map(lambda row: dict(ids=encoding.encode_ordinary(row["text"]) + [encoding.eot_token]), remove_columns=["text"],
                            num_proc=os.cpu_count())
            with open(Path(cache) / "train.bin", "wb") as f:
                for i in range(1024):
                    shard = rows.shard(1024, i, contiguous=True).with_format("numpy")
                    np.concatenate(shard["ids"]).astype(np.uint16).tofile(f)

        datasets.disable_progress_bars()
        show("data", in_turns({"ours": ours, "nanoGPT's way": theirs}, rounds), "ours", "nanoGPT's way", file.stat().st_size / 1e6, "MB/s")


def bench_figures():
    import synthetic
    with tempfile.TemporaryDirectory() as folder:
        synthetic.make_study(Path(folder) / "80m", scale="80m")
        seconds = in_turns({script: lambda script=script: command([sys.executable, script, str(Path(folder) / "80m")])
                            for script in ("plot.py", "report.py")}, 3)
        print("figures of a full study: " + ", ".join(f"{script} {statistics.median(s):.1f} s" for script, s in seconds.items()))


if __name__ == "__main__":
    names = "dtype train nanogpt muon looks start data figures eval".split()
    benches = {name: globals()[f"bench_{name}"] for name in names}
    folders = [word for word in sys.argv[1:] if word not in benches]
    if len(folders) > 1 or folders and not (Path(folders[0]) / "model.py").exists():
        sys.exit(f"error: {' '.join(folders)} is neither a name nor a checkout of nanoGPT: names are {' '.join(benches)}")
    for name in [word for word in sys.argv[1:] if word in benches] or benches:
        if name != "nanogpt":
            benches[name]()
        elif folders:
            bench_nanogpt(folders[0])
        else:
            print("nanogpt: left out, it needs the folder of a checkout of karpathy/nanoGPT")
