"""One training run: python train.py config/muon_qk.py --seed=42, or torchrun --standalone --nproc_per_node=N train.py ...

Config files and --key=value override the keys below (--help lists them). The same command again continues an unfinished
run, to the bit on the same machine and thread count, and leaves a finished one alone.
"""
import gc
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import study
import system
from configurator import ROOT, configure, fail, find
from model import GPT, GPTConfig
from muon import Muon
from probe import probe

sys.path.append(str(ROOT / "data"))
from tokens import load_bin, load_meta  # noqa: E402

# study
scale = "80m"  # names the folder under out/; the numbers of a scale are in config/SCALE.py
arm = "adamw"  # adamw, adamw_qk, muon or muon_qk: names the run; config/ARM.py sets what it stands for
seed = 42  # initial weights and data order, the same in all four arms
out_dir = ""  # "": out/SCALE/ARM-seedSEED
# data
data_dir = "data/fineweb_edu"  # a folder with train.bin, val_set.bin and meta.json
eval_tokens = 0  # the first so many tokens of val_set.bin; 0: all of it
probe_tokens = 8192  # val tokens whose keys are probed
# model
n_layer = 22  # blocks
n_head = 8  # heads of n_embd / n_head = 64 dimensions: PR is out of 64 at every scale
n_embd = 512  # width of the residual stream
ffn_dim = 896  # SwiGLU's three matrices: 896 makes 79.1M parameters
block_size = 2048  # ten HellaSwag shots need 1,000 to 1,400 tokens
vocab_size = 50304  # GPT-2's 50,257 padded up to a multiple of 64
qk_norm = False  # RMSNorm of queries and keys, per head, before RoPE
qk_gain = True  # QK-Norm's gains learn; False: they stay at one, as in the frozen arms
# optimizer
optimizer = "adamw"  # adamw, or muon for hidden matrices and adamw for the rest
learning_rate = 0.0  # every group's peak; 0: the winner in out/SCALE/chosen_lr.json, else the middle of the arm's grid
embed_lr_scale = 1.0  # times learning_rate for embeddings, norms and gains: does a high Muon LR help through them?
weight_decay = 0.1  # hidden matrices only, decoupled, the same lr * wd in both optimizers
grad_clip = 1.0  # global norm; 0 disables
warmup_frac = 0.1  # a share, so that sweep and main runs have the same shape
min_lr_frac = 0.1  # the cosine ends here, inside the run's own budget
max_tokens = 300_000_000  # a run's budget; floored to whole steps
batch_tokens = 32_768  # tokens a step, over all devices and micro-batches
# logging
log_interval = 500  # steps between rows of log.jsonl: val loss and probes
sv_interval = 5000  # steps between spectra; also at step 0, at every token checkpoint and at the end
n_ckpt = 6  # checkpoints at so many equal shares of the budget (the plan's 50M ... 300M); 0: none is kept
ckpt_interval_s = 900.0  # seconds between rolling checkpoints, so that a kill costs little
looks = True  # False: no val loss, no probes; the weights must come out the same
# system
device = "auto"  # cuda where there is one, else cpu
dtype = "auto"  # autocast's; bfloat16 where the device multiplies it in hardware, else float32: a CPU without is 10 x slower in it
compile = True  # torch.compile; falls back to eager with one line where no compiler is there
micro_batch = 0  # sequences a device takes at once; 0: what fits

config = configure(__file__)
globals().update(config)


def check(ok, message):
    if not ok:
        fail(message)


# ---- settings that cannot work are refused before anything is written
check(scale in study.SCALES, f"scale {scale!r} is not known: choose one of {', '.join(study.SCALES)}")
check(arm in study.LABELS, f"arm {arm!r} is not known: choose one of {', '.join(study.LABELS)}")
check(optimizer in ("adamw", "muon"), f"optimizer {optimizer!r} is not known: choose adamw or muon")
check(dtype in ("auto", "bfloat16", "float32"), f"dtype {dtype!r} is not supported: choose auto, bfloat16 or float32")
check(n_embd % (2 * n_head) == 0, f"n_embd {n_embd} does not divide into {n_head} heads of even width: change one")
check(seed >= 0, f"seed {seed} is negative: choose 0 or more")
max_steps = max_tokens // batch_tokens
check(max_steps > 0, f"max_tokens {max_tokens} is less than one batch of {batch_tokens}: raise it")
check(probe_tokens >= block_size, f"probe_tokens {probe_tokens} is less than block_size {block_size}: raise it")

# ---- devices: torchrun sets RANK; without it this is the only process
ddp = "RANK" in os.environ
rank, world = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if ddp else (0, 1)
if device == "auto":
    device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cuda" and ddp:
    device = f"cuda:{os.environ['LOCAL_RANK']}"
device = torch.device(device)
if device.type == "cuda":
    torch.cuda.set_device(device)
    # training multiplies in bfloat16; what is left in float32 is the probes, and those have to be exact
    torch.backends.cuda.matmul.fp32_precision = "ieee"
else:
    system.keep_freed_memory()
if dtype == "auto":
    dtype = "bfloat16" if system.has_bfloat16(device) else "float32"
if ddp:
    # gloo beside nccl: the ranks agree on stopping and saving over CPU tensors, without waiting for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
master = rank == 0


def say(message):
    if master:
        tqdm.write(message)


# ---- batch shape
sequences, rest = divmod(batch_tokens, block_size)
check(not rest and sequences, f"batch_tokens {batch_tokens} is no multiple of block_size {block_size}: change one")
check(sequences % world == 0, f"{sequences} sequences a step do not divide over {world} processes: change batch_tokens")
local = sequences // world
gpt_config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, ffn_dim, qk_norm, qk_gain)
micro = micro_batch or system.fitting_micro_batch(gpt_config, local, device, dtype)
check(local % micro == 0, f"{local} sequences a device do not divide into micro-batches of {micro}: change micro_batch")

# ---- data, checked before anything is written
try:
    data_dir = find(data_dir)
    meta = load_meta(data_dir)
    train_data, val_data = (load_bin(data_dir, split, vocab_size) for split in ("train", "val"))
except (ValueError, OSError) as e:
    fail(e)
n_blocks = (len(train_data) - 1) // block_size
check(n_blocks >= sequences, f"{data_dir}/train.bin holds {len(train_data)} tokens, less than one batch of {batch_tokens}"
      f" at block_size {block_size}: prepare more or lower them")
check(len(val_data) > max(eval_tokens, probe_tokens), f"{data_dir}/val_set.bin holds {len(val_data)} tokens, too few for "
      f"eval_tokens {eval_tokens} and probe_tokens {probe_tokens}: prepare more or lower them")
probe_data = val_data[:probe_tokens // block_size * block_size]
val_data = val_data[:eval_tokens + 1] if eval_tokens else val_data

# ---- the run's folder: settings, lock, source
if not learning_rate:
    try:
        learning_rate, where = study.default_lr(scale, arm)
    except ValueError as e:
        fail(e)
    say(f"learning_rate {learning_rate:g}, {where}")
out_dir = Path(out_dir) if out_dir else ROOT / "out" / scale / f"{arm}-seed{seed}"
config.update(learning_rate=learning_rate, dtype=dtype, data_dir=os.path.relpath(data_dir, ROOT), out_dir=str(out_dir))
FREE = {"out_dir", "data_dir", "device", "compile", "micro_batch", "ckpt_interval_s"}  # may change between starts
done = torch.zeros(1)
if master:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = system.lock(out_dir)
        if (out_dir / "config.json").exists():
            old = json.loads((out_dir / "config.json").read_text())
            differ = [f"{k} {old.get(k)!r} -> {config[k]!r}" for k in config if k not in FREE and old.get(k) != config[k]]
            check(not differ, f"{out_dir} was made with other settings ({', '.join(differ)}): give another --out_dir or delete it")
            changed = [k for k in ("train_sha256", "val_sha256") if old["data"][k] != meta[k]]
            check(not changed, f"{data_dir} changed since the run in {out_dir} began ({', '.join(changed)}): bring the old "
                  f"data back, or give another --out_dir")
            status = study.load_run(out_dir)["status"]
            if status != "unfinished":
                print(f"{out_dir} is {status}: nothing to do")
                done += 1
        else:
            system.write_text(out_dir / "config.json", json.dumps(
                dict(config, data=meta, num_params=GPT(gpt_config).num_params()), indent=1))
            (out_dir / "source").mkdir(exist_ok=True)
            for path in [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*.sh")) if not p.name.startswith("test_")]:
                shutil.copy(path, out_dir / "source")
            commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
            system.write_text(out_dir / "source" / "versions.json", json.dumps(dict(
                python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, commit=commit.stdout.strip(),
                device=system.device_name(device), threads=torch.get_num_threads(), world=world, platform=platform.platform())))
    except ValueError as e:
        fail(e)
    except OSError as e:
        fail(f"cannot write into {out_dir}: {e.strerror or e}: make it writable or give another --out_dir")
if ddp:
    dist.broadcast(done, 0)
if done:
    if ddp:
        dist.destroy_process_group()
    sys.exit(0)

# ---- model and optimizers
model = GPT(gpt_config).to(device)
hidden = [p for p in model.h.parameters() if p.ndim == 2]
others = [p for p in model.parameters() if all(p is not q for q in hidden)]  # embedding, norms, QK gains
adamw_groups = [dict(params=others, weight_decay=0.0, lr_scale=embed_lr_scale)]
optimizers = []
if optimizer == "muon":
    optimizers.append(Muon([dict(params=hidden, lr_scale=1.0)], weight_decay=weight_decay))
else:
    adamw_groups.append(dict(params=hidden, weight_decay=weight_decay, lr_scale=1.0))
optimizers.append(torch.optim.AdamW(adamw_groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, fused=True))
grouped = [p for o in optimizers for group in o.param_groups for p in group["params"]]
assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters()), "a parameter is in no or two groups"

if compile and not system.can_compile(device):
    say("torch.compile needs a C++ compiler, and none was found: running eager, slower")
    compile = False
if compile:
    model.compile_parts()
autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def lr_at(step):
    """Learning rate of a step: linear warmup, then cosine to min_lr_frac, over this run's own budget."""
    warmup = max(1, round(warmup_frac * max_steps))
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    return learning_rate * (min_lr_frac + (1 - min_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress)))


# ---- data: the batch of a step is a pure function of (seed, step)
permutations = {}


def block_at(i):
    """The i-th block of the run, counted over epochs: (block_size + 1,) token ids."""
    epoch, i = divmod(i, n_blocks)
    if epoch not in permutations:
        permutations.clear()
        permutations[epoch] = np.random.default_rng([seed, epoch]).permutation(n_blocks)
    start = permutations[epoch][i] * block_size
    return train_data[start:start + block_size + 1]


def batch_of(blocks):
    """Inputs and targets (micro, block_size) int64 of at most micro blocks of at most block_size + 1 token ids, copied without
    waiting. Where tokens are missing the target is -1, which does not count: one shape, one compiled graph."""
    xy = np.zeros((2, micro, block_size), dtype=np.int64)
    xy[1] = -1
    for row, block in enumerate(blocks):
        xy[0, row, :len(block) - 1], xy[1, row, :len(block) - 1] = block[:-1], block[1:]
    xy = torch.from_numpy(xy)
    if device.type == "cuda":
        xy = xy.pin_memory().to(device, non_blocking=True)
    return xy.unbind()


def train_batch(index, m):
    """Micro-batch m of this rank's share of global batch `index`."""
    first = index * sequences + rank * local + m * micro
    return batch_of([block_at(i) for i in range(first, first + micro)])


def evaluate():
    """Mean loss in nats over the val set: every token once, in order, in blocks of block_size. Not under no_grad, so that training's
    own graphs do it: others take seconds to trace and load in every run, and save 1 % of a val pass at 80m, 15 % at mini."""
    n = len(val_data) - 1
    total = torch.zeros((), dtype=torch.float64, device=device)
    starts = range(0, n, block_size)
    for b in range(rank * micro, len(starts), world * micro):
        blocks = [val_data[start:start + block_size + 1] for start in starts[b:b + micro]]
        with autocast:
            loss = model(*batch_of(blocks)).detach()
        total += loss.double() * sum(len(block) - 1 for block in blocks)
    if ddp:
        dist.all_reduce(total)
    return total.item() / n


# ---- state: what a checkpoint carries beside weights and optimizers
step = 0
skip = []  # batches that made a loss explode and are left out since the restart
log_path = out_dir / "log.jsonl"


def log(row):
    """Append one row to log.jsonl, on disk before anything goes on."""
    if master:
        with open(log_path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())


def save(path):
    """Write a checkpoint aside, flush it, then rename: the previous one stays until the new one is whole. log_bytes is
    where the log ends now, so that a resumed log has no row twice and no half row."""
    if master:
        state = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step,
                     tokens=step * batch_tokens, skip=skip, log_bytes=log_path.stat().st_size, config=dict(config, data=meta))
        system.write_whole(path, lambda f: torch.save(state, f))


def restore():
    """Set weights, optimizers, step, skip and log to the newest whole checkpoint, or to the seed's start."""
    global step, skip
    paths = [*out_dir.glob("ckpt_step_*.pt"), *out_dir.glob("ckpt_rolling.pt")]
    states = []
    for path in sorted(paths, key=lambda p: -p.stat().st_mtime_ns):
        try:
            states.append((torch.load(path, map_location="cpu", weights_only=True), path))
        except Exception as e:  # a damaged file can fail anywhere inside the unpickler
            say(f"warning: {path} is no whole checkpoint ({type(e).__name__}): trying the one before")
        if states:
            break
    if states:
        state, path = states[0]
        shapes = {name: p.shape for name, p in state["model"].items()}
        check(shapes == {name: p.shape for name, p in model.state_dict().items()},
              f"{path} holds a model of another shape: delete it, or give another --out_dir")
        model.load_state_dict(state["model"])
        for o, o_state in zip(optimizers, state["optimizers"], strict=True):
            o.load_state_dict(o_state)
        step, skip, log_bytes = state["step"], state["skip"], state["log_bytes"]
    else:
        model.init_weights(torch.Generator().manual_seed(seed))
        for o in optimizers:
            o.state.clear()
        step, skip, log_bytes = 0, [], 0
    if master:
        if log_path.exists() or log_bytes:
            check(log_path.exists() and log_path.stat().st_size >= log_bytes, f"{log_path} is shorter than its checkpoint "
                  f"says ({log_bytes} bytes): bring it back, or delete {out_dir} to start again")
            os.truncate(log_path, log_bytes)
    if ddp:
        dist.barrier()
    return bool(states)


def data_index(step):
    """The batch that a step draws: the step's number, moved on past skipped batches."""
    for s in sorted(skip):
        step += s <= step
    return step


# ---- stopping: the first SIGTERM or Ctrl-C saves and leaves, the second leaves at once
signals = []


def on_signal(number, frame):
    if signals:
        os._exit(128 + number)
    signals.append(number)


for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, on_signal)


# ---- the run
def main():
    global step
    token_steps = {max_tokens * i // n_ckpt // batch_tokens for i in range(1, n_ckpt + 1)}
    probe_idx = torch.from_numpy(probe_data.astype(np.int64)).view(-1, block_size).to(device)
    flops = model.flops_per_token()
    peak = system.peak_flops(device)
    explode = 2 * math.log(vocab_size)  # twice the loss of guessing: no healthy run comes near after step 0

    looked = -1  # the last step with a row in the log
    if restore():
        looked = step
        say(f"going on from step {step} of {max_steps}")
        missing = study.missing_spectra(out_dir, n_layer)
        if missing and master:
            say(f"warning: {len(missing)} spectra are missing, {missing[0]} the first: the figures go without them")
    bar = tqdm(total=max_steps, initial=step, unit="step", disable=not (master and sys.stderr.isatty()), leave=False)
    bad = torch.full((), -1, device=device)  # first step whose loss or gradient was not finite or exploded
    train_loss = grad_norm = None
    start = last_save = time.time()
    train_seconds, train_steps, warmed_up, first_step = 0.0, 0, False, step
    interval, interval_step = 0.0, step

    while True:
        # -- look: only here does the host wait for the device
        due = step in token_steps or step == max_steps or step % log_interval == 0
        save_due = time.time() - last_save > ckpt_interval_s
        stop = signals[0] if signals else 0
        if ddp:
            flags = torch.tensor([save_due, stop])
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            save_due, stop = flags.tolist()
        if (due or save_due or stop) and (bad_step := int(bad)) >= 0:
            reason = dict(step=bad_step, tokens=bad_step * batch_tokens, batch=data_index(bad_step))
            if skip:  # it was restarted once already
                log(dict(event="diverged", **reason))
                say(f"diverged at step {bad_step}, a second time: this run ends here, which is a result")
                return "diverged"
            say(f"loss or gradient exploded at step {bad_step}: restarting once from the last checkpoint without that batch")
            batch = reason["batch"]
            looked = step if restore() else -1
            skip.append(batch)
            log(dict(event="restart", reason="loss or gradient not finite or exploded", **reason, restart_step=step))
            bad.fill_(-1)
            interval, interval_step = 0.0, step
            bar.reset(max_steps)
            bar.update(step)
            continue
        if due and step != looked:
            looked = step
            if device.type == "cuda":
                torch.cuda.synchronize()
            tokens_per_s = (step - interval_step) * batch_tokens / interval if interval else None
            row = dict(step=step, tokens=step * batch_tokens, lr=lr_at(max(step - 1, 0)),
                       train_loss=None if train_loss is None else train_loss.item(),
                       grad_norm=None if grad_norm is None else grad_norm.item(), tokens_per_s=tokens_per_s)
            if looks:
                row["val_loss"] = evaluate()
            if looks and master:
                metrics, spectra = probe(model, probe_idx)
                row.update(metrics)
                if step % sv_interval == 0 or step in token_steps or step == max_steps:
                    for name, s in spectra.items():
                        system.write_whole(out_dir / f"{name}_step_{step}.npy", lambda f: np.save(f, s))
                if step in token_steps:
                    spot = study.spot_check(out_dir, row)
                    log(spot)
                    say(f"spot check: {study.spot_check_line(spot)}")
            log(row)
            if looks:
                say(f"step {step}/{max_steps}  {row['tokens'] / 1e6:.2f}M tokens  train {row['train_loss'] or math.nan:.4f}  val "
                    f"{row['val_loss']:.4f}  mean PR {row.get('mean_pr', math.nan):.2f}  {tokens_per_s or math.nan:,.0f} tokens/s")
            if step in token_steps:
                save(out_dir / f"ckpt_step_{step}.pt")
                last_save = time.time()
            interval, interval_step = 0.0, step
        if step == max_steps:
            log(dict(event="finished", step=step, tokens=step * batch_tokens))
            break
        if save_due or stop:
            save(out_dir / "ckpt_rolling.pt")
            last_save = time.time()
        if stop:
            say(f"stopped by {signal.Signals(stop).name} at step {step} of {max_steps}, saved in {out_dir}: run the same command again "
                f"to go on")
            sys.exit(128 + stop)

        # -- one step of training: nothing in it reads from the device
        t0 = time.perf_counter()
        lr = lr_at(step)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = lr * group["lr_scale"]
        train_loss = torch.zeros((), device=device)
        index = data_index(step)
        for m in range(local // micro):
            x, y = train_batch(index, m)
            with autocast:
                loss = model(x, y) / (sequences // micro)
            loss.backward()
            train_loss += loss.detach()
        if ddp:
            for p in model.parameters():
                dist.all_reduce(p.grad)
            dist.all_reduce(train_loss)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        broken = ~torch.isfinite(train_loss + grad_norm) | (train_loss > explode)
        bad = torch.where((bad < 0) & broken, step, bad)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        interval += time.perf_counter() - t0
        if warmed_up:
            train_seconds += time.perf_counter() - t0
            train_steps += 1
        warmed_up = warmed_up or step - first_step >= 2  # compilation happens in the first steps of a process
        bar.update(1)

    bar.close()
    (out_dir / "ckpt_rolling.pt").unlink(missing_ok=True)
    speed = train_steps * batch_tokens / train_seconds if train_seconds else math.nan
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    final = study.load_run(out_dir) if master else None
    say("---")
    for key, value in dict(
            arm=arm, seed=seed, learning_rate=f"{learning_rate:g}", dtype=dtype, num_params=model.num_params(), tokens=step * batch_tokens,
            val_loss=f"{final['val_loss'] or math.nan:.6f}", mean_pr=f"{final['rows'][-1].get('mean_pr', math.nan):.4f}",
            train_seconds=f"{train_seconds:.1f}", total_seconds=f"{time.time() - start:.1f}", tokens_per_s=f"{speed:.0f}",
            mfu=f"{speed * flops / world / peak:.4f}" if peak else "unknown", peak_memory_mb=f"{memory / 2**20:.0f}",
            out_dir=out_dir).items() if master else ():
        say(f"{key + ':':<16}{value}")
    return "finished"


try:
    main()
except OSError as e:
    fail(f"cannot write into {out_dir}: {e.strerror or e}: mend that and run the same command again to go on")
if ddp:
    dist.destroy_process_group()
gc.freeze()  # leaving takes 0.2 s, not 1.6: the interpreter's last collections pass over what the compiler made
