"""One training run: python train.py config/muon_qk.py --seed=42, or torchrun --nproc_per_node=N train.py ...

Config files and --key=value override the keys below (--help lists them). The same command again continues an
unfinished run, to the bit on the same CPU and thread count, and leaves a finished one alone.
"""
import gc
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import study
import system
from configurator import ROOT, configure, fail, find, whole_file
from model import GPT, gpt_config
from muon import Muon
from probe import probe

sys.path.append(str(ROOT / "data"))
from tokens import load_bin, load_meta  # noqa: E402

# study
scale = "80m"  # names the folder under out/; the numbers of a scale are in config/SCALE.py
arm = "adamw"  # names the run; config/ARM.py sets what it stands for
seed = 42  # initial weights and data order, the same in all arms
out_dir = ""  # "": out/SCALE/ARM-seedSEED
# data
data_dir = "data/fineweb_edu"  # a folder with train.bin, val_set.bin and meta.json
eval_tokens = 0  # the first so many tokens of val_set.bin; 0: all of it
probe_tokens = 8192  # val tokens whose keys are probed
# model
n_layer = 22  # blocks
n_head = 8  # heads of n_embd / n_head dimensions: 64 at every scale of the study, and PR is out of that
n_embd = 512  # width of the residual stream
ffn_dim = 896  # SwiGLU's three matrices: 896 makes 79.1M parameters
block_size = 2048  # ten HellaSwag shots need 1,000 to 1,400 tokens
vocab_size = 50304  # GPT-2's 50,257 padded up to a multiple of 64
qk_norm = False  # RMSNorm of queries and keys, per head, before RoPE
qk_gain = True  # QK-Norm's gains learn; False: they stay at one, as in the frozen arms
# optimizer
optimizer = "adamw"  # adamw, or muon for hidden matrices and adamw for the rest
learning_rate = 0.0  # every group's peak; 0: the winner in out/SCALE/chosen_lr.json, else the grid's middle
embed_lr_scale = 1.0  # times learning_rate for embeddings, norms and gains: does a high Muon LR help through them?
weight_decay = 0.1  # hidden matrices only, decoupled, the same lr * wd in both optimizers
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's: lower than its default, as is usual for language models
grad_clip = 1.0  # global norm; 0 disables
warmup_frac = 0.1  # a share, so that sweep and main runs have the same shape
min_lr_frac = 0.1  # the cosine ends here, inside the run's own budget
max_tokens = 300_000_000  # a run's budget; floored to whole steps
batch_tokens = 32_768  # tokens a step, over all devices and micro-batches
# logging
log_interval = 500  # steps between rows of log.jsonl: val loss and probes; 0: at token checkpoints and the end
first_look = True  # a row at step 0 as well; sweep runs do without, since nothing is made of it
sv_interval = 5000  # steps between spectra; also at step 0, at every token checkpoint and at the end; 0: only there
n_ckpt = 6  # checkpoints at so many equal shares of the budget (the plan's 50M ... 300M); 0: none is kept
ckpt_interval_s = 900.0  # seconds between rolling checkpoints, so that a kill costs little; 0: none
# system
device = "auto"  # cuda where there is one, else cpu; or cpu, cuda, cuda:1
dtype = "auto"  # autocast's; bfloat16 where the device multiplies it in hardware, else float32, there 10 x faster
compile = True  # torch.compile; falls back to eager with one line where it does not work
deterministic = False  # on CUDA too the same run twice, or killed and resumed, gives the same bits; slower there
micro_batch = 0  # sequences a device takes at once; 0: what fits, and what the run began with

config = configure(__file__)
globals().update(config)


def check(ok, message):
    if not ok:
        fail(message)


# ---- settings that cannot work are refused before anything is written
check(scale in study.SCALES, f"scale {scale!r} is not known: choose one of {', '.join(study.SCALES)}")
check(arm in study.LABELS, f"arm {arm!r} is not known: choose one of {', '.join(study.LABELS)}")
check(optimizer in ("adamw", "muon"), f"optimizer {optimizer!r} is not known: choose adamw or muon")
check(dtype in ("auto", "bfloat16", "float32"), f"dtype {dtype!r} is not supported: auto, bfloat16 or float32 is")
sizes = "n_layer n_head n_embd ffn_dim block_size vocab_size probe_tokens batch_tokens max_tokens".split()
shares = "warmup_frac min_lr_frac beta1 beta2".split()
for key, value in config.items():
    if type(value) in (int, float):
        low, high = int(key in sizes), 1 if key in shares else sys.float_info.max
        check(low <= value <= high,
              f"{key} {value} makes no sense: give {low} or more" + ", at most 1" * (key in shares))
check(n_embd % (2 * n_head) == 0, f"n_embd {n_embd} does not divide into {n_head} heads of even width: change one")
max_steps = max_tokens // batch_tokens
check(max_steps > 0, f"max_tokens {max_tokens} is less than one batch of {batch_tokens}: raise it")
check(probe_tokens >= block_size, f"probe_tokens {probe_tokens} is less than block_size {block_size}: raise it")

# ---- devices: torchrun sets RANK; without it this is the only process, whatever a platform left in the environment
ddp = dist.is_torchelastic_launched()
rank, world, local_rank = (int(os.environ.get(name, default) if ddp else default)
                           for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
master = rank == 0
try:
    device = system.start_device(device, local_rank, deterministic)
except ValueError as e:
    fail(e)
if dtype == "auto":
    dtype = "bfloat16" if system.has_bfloat16(device) else "float32"
if ddp:
    # gloo beside nccl: the ranks agree on stopping and saving over CPU tensors, without waiting for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def say(message):
    if master:
        tqdm.write(message)


# ---- data, checked before anything is written
try:
    data_dir = find(data_dir)
    meta = load_meta(data_dir)
    train_data, val_data = (load_bin(data_dir, split, vocab_size) for split in ("train", "val"))
    if not learning_rate:
        learning_rate, where = study.default_lr(scale, arm)
        say(f"learning_rate {learning_rate:g}, {where}")
    out_dir = Path(out_dir).expanduser() if out_dir else ROOT / "out" / scale / f"{arm}-seed{seed}"
    begun = study.read_json(out_dir / "config.json", {})
except (ValueError, OSError) as e:
    fail(e)
n_blocks = (len(train_data) - 1) // block_size
sequences, rest = divmod(batch_tokens, block_size)
check(not rest and sequences, f"batch_tokens {batch_tokens} is no multiple of block_size {block_size}: change one")
check(n_blocks >= sequences, f"{data_dir}/train.bin holds {len(train_data)} tokens, less than one batch of "
      f"{batch_tokens} at block_size {block_size}: prepare more or lower them")
check(len(val_data) > max(eval_tokens, probe_tokens), f"{data_dir}/val_set.bin holds {len(val_data)} tokens, too few "
      f"for eval_tokens {eval_tokens} and probe_tokens {probe_tokens}: prepare more or lower them")
probe_data = val_data[:probe_tokens // block_size * block_size]
val_data = val_data[:eval_tokens + 1] if eval_tokens else val_data

# ---- batch shape: micro-batches round differently, so a run keeps the size that it began with
check(sequences % world == 0, f"{sequences} sequences a step do not divide over {world} processes: change one")
local = sequences // world
micro = micro_batch or begun.get("micro_batch")
if not micro or not micro_batch and local % micro:  # begun with other processes
    micro = system.fitting_micro_batch(gpt_config(config), local, device, dtype, compile)
check(local % micro == 0, f"{local} sequences a device do not divide into micro-batches of {micro}: change one")

# ---- the run's folder: lock, settings, source
config.update(learning_rate=learning_rate, dtype=dtype, micro_batch=micro, data_dir=os.path.relpath(data_dir, ROOT),
              out_dir=str(out_dir))
done = torch.zeros(1)
if master:
    try:
        with system.errors_in_one_line(f"cannot write into {out_dir}", "make it writable or give another --out_dir"):
            lock = study.open_run(out_dir, config, meta, device)  # held as long as this process lives
        status = study.load_run(out_dir)["status"]
    except ValueError as e:
        fail(e)
    if status != "unfinished":
        print(f"{out_dir} is {status}: nothing to do")
        done += 1
if ddp:
    dist.broadcast(done, 0)
if done:
    if ddp:
        dist.destroy_process_group()
    sys.exit(0)
why = system.why_cpu() if device.type == "cpu" else ""
say(f"device {system.device_name(device)}{why}, {dtype}, micro-batches of {micro}")


# ---- batches: that of a step is a pure function of (seed, step)
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
    """Inputs and targets (micro, block_size) int64 of at most micro blocks of at most block_size + 1 token ids, copied
    without waiting. Where tokens are missing the target is -1, which does not count: one shape, one compiled graph."""
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


# ---- model and optimizers
autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
model = GPT(gpt_config(config)).to(device)
if compile:
    try:  # one micro-batch forward and backward, so that what cannot compile shows before anything is lost
        model.compile_parts()
        with autocast:
            model(*train_batch(0, 0)).backward()
        model.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        fail(f"out of memory with micro-batches of {micro} sequences: give --micro_batch={max(1, micro // 2)}")
    except Exception as e:  # a compiler, its headers, a home or a temporary folder can be missing in any way
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:150]}"
        say(f"torch.compile does not work here ({why}): running eager, slower")
        model = GPT(gpt_config(config)).to(device)
hidden = [p for p in model.h.parameters() if p.ndim == 2]
others = [p for p in model.parameters() if all(p is not q for q in hidden)]  # embedding, norms, QK gains
adamw_groups = [dict(params=others, weight_decay=0.0, lr_scale=embed_lr_scale)]
optimizers = []
if optimizer == "muon":
    optimizers.append(Muon([dict(params=hidden, lr_scale=1.0)], weight_decay=weight_decay))
else:
    adamw_groups.append(dict(params=hidden, weight_decay=weight_decay, lr_scale=1.0))
optimizers.append(torch.optim.AdamW(adamw_groups, lr=1.0, betas=(beta1, beta2), eps=1e-8, fused=True))
grouped = [p for o in optimizers for group in o.param_groups for p in group["params"]]
assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters()), "a parameter in no or two groups"


def lr_at(step):
    """Linear warmup, then cosine to min_lr_frac of the peak at the end of each run's own budget."""
    warmup = max(1, round(warmup_frac * max_steps))
    if step < warmup:
        return learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    return learning_rate * (min_lr_frac + (1 - min_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress)))


def evaluate():
    """Mean loss in nats over the val set: every token once, in order, in blocks of block_size. Not under no_grad, so
    that training's own graphs do it: others would take seconds to trace and load in every run."""
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


# ---- log and checkpoints
log_path = out_dir / "log.jsonl"


def log(row):
    if master:
        system.append_row(log_path, row)


def save(path):
    """Write a checkpoint whole or not at all. log_bytes is where the log ends now, so that a resumed log has no row
    twice and no half row; id tells whether all ranks read the same file."""
    if master:
        state = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], step=step,
                     tokens=step * batch_tokens, skip=skip, log_bytes=log_path.stat().st_size,
                     config=dict(config, data=meta), id=os.urandom(8).hex())
        with whole_file(path) as f:
            torch.save(state, f)


def restore():
    """Set weights, optimizers and log to the whole checkpoint of the highest step, or to the seed's start. Returns
    (step, the batch that is left out since a restart, or None, whether there was a checkpoint)."""
    state, path = system.newest_checkpoint(out_dir, say)
    if ddp:  # folders of several machines can differ
        seen = [None] * world
        dist.all_gather_object(seen, (state.get("step"), state.get("id")))
        check(len(set(seen)) == 1, f"the processes read different checkpoints in {out_dir} (steps "
              f"{[s for s, _ in seen]}): give them one shared folder, or the same files")
    if state:
        shapes = {name: p.shape for name, p in state["model"].items()}
        check(shapes == {name: p.shape for name, p in model.state_dict().items()},
              f"{path} holds a model of another shape: delete it, or give another --out_dir")
        model.load_state_dict(state["model"])
        for o, o_state in zip(optimizers, state["optimizers"], strict=True):
            o.load_state_dict(o_state)
    else:
        model.init_weights(torch.Generator().manual_seed(seed))
        for o in optimizers:
            o.state.clear()
    if master:
        size, end = log_path.stat().st_size if log_path.exists() else 0, state.get("log_bytes", 0)
        check(size >= end, f"{log_path} is shorter than its checkpoint says ({end} bytes): bring it back, or delete "
              f"{out_dir} to start again")
        if size:
            os.truncate(log_path, end)
    if ddp:
        dist.barrier()
    return state.get("step", 0), state.get("skip"), bool(state)


def data_index(step):
    """The batch that a step draws: the step's number, moved on past the one that is left out."""
    return step + (skip is not None and step >= skip)


# ---- the run
token_steps = {max_tokens * i // n_ckpt // batch_tokens for i in range(1, n_ckpt + 1)}
probe_idx = torch.from_numpy(probe_data.astype(np.int64)).view(-1, block_size).to(device)
explode = 2 * math.log(vocab_size)  # twice the loss of guessing: no healthy run comes near
signals = system.catch_signals()  # the first saves and leaves, the second leaves at once
start = last_save = noted = time.time()
with system.errors_in_one_line(f"cannot write into {out_dir}", "mend that and run the same command again to go on"):
    step, skip, resumed = restore()
    looked = step if resumed else -1  # the last step with a row in the log
    if resumed:
        say(f"going on from step {step} of {max_steps}")
    bar = tqdm(total=max_steps, initial=step, unit="step", disable=not (master and sys.stderr.isatty()), leave=False)
    bad = torch.full((), -1, device=device)  # first step whose loss or gradient was not finite or exploded
    train_loss = grad_norm = None
    intervals = []  # (steps, seconds) of training between two looks
    since, clock = step, time.perf_counter()

    while True:
        # -- look: only here does the host wait for the device
        due = first_look if not step else log_interval and step % log_interval == 0
        due = due or step in token_steps or step == max_steps
        save_due = bool(ckpt_interval_s) and time.time() - last_save > ckpt_interval_s
        stop = signals[0] if signals else 0
        if ddp:
            flags = torch.tensor([save_due, stop])
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            save_due, stop = flags.tolist()
        row, spectra, bad_step = {}, {}, int(bad) if due or save_due or stop else -1
        if due and step != looked and bad_step < 0:
            if device.type == "cuda":
                torch.cuda.synchronize()
            if step > since:
                intervals.append((step - since, time.perf_counter() - clock))
            row = dict(step=step, tokens=step * batch_tokens, lr=lr_at(max(step - 1, 0)),
                       train_loss=None if train_loss is None else train_loss.item(),
                       grad_norm=None if grad_norm is None else grad_norm.item(),
                       tokens_per_s=intervals[-1][0] * batch_tokens / intervals[-1][1] if step > since else None)
            row["val_loss"] = evaluate()
            if master and math.isfinite(row["val_loss"]):
                metrics, spectra = probe(model, probe_idx)
                row.update(metrics)
            broken = not row["val_loss"] < explode or not all(math.isfinite(x or 0) for x in row.values())
            broken = torch.tensor(int(broken))
            if ddp:
                dist.all_reduce(broken, op=dist.ReduceOp.MAX)
            bad_step = step - 1 if broken else -1  # the last update broke the weights
        if bad_step >= 0:
            reason = dict(step=bad_step, tokens=bad_step * batch_tokens, batch=data_index(bad_step))
            if skip is not None:  # it was restarted once already
                log(dict(event="diverged", **reason))
                say(f"diverged at step {bad_step}, a second time: this run ends here, which is a result")
                break
            what = "loss, gradient or weights not finite or exploded"
            say(f"{what} at step {bad_step}: restarting once from the last checkpoint without that batch")
            step, _, resumed = restore()
            looked, skip = step if resumed else -1, reason["batch"]
            log(dict(event="restart", reason=what, **reason, restart_step=step))
            bad.fill_(-1)
            train_loss = grad_norm = None
            since, clock = step, time.perf_counter()
            bar.reset(max_steps)
            bar.update(step)
            continue
        if row:
            looked = step
            if step in {0, max_steps, *token_steps} or sv_interval and step % sv_interval == 0:
                for name, s in spectra.items():
                    with whole_file(out_dir / f"{name}_step_{step}.npy") as f:
                        np.save(f, s)
            if step in token_steps and master:
                spot = study.spot_check(out_dir, row)
                log(spot)
                say(f"spot check: {study.spot_check_line(spot)}")
            log(row)
            number = lambda key: row.get(key) or math.nan
            say(f"step {step}/{max_steps}  {row['tokens'] / 1e6:.2f}M tokens  train {number('train_loss'):.4f}  "
                f"val {row['val_loss']:.4f}  mean PR {number('mean_pr'):.2f}  {number('tokens_per_s'):,.0f} tokens/s")
            if step in token_steps:
                save(out_dir / f"ckpt_step_{step}.pt")
                last_save = time.time()
            since, clock = step, time.perf_counter()
        if step == max_steps:
            log(dict(event="finished", step=step, tokens=step * batch_tokens))
            break
        if save_due or stop:
            before = time.perf_counter()
            save(out_dir / "ckpt_rolling.pt")
            last_save = time.time()
            clock += time.perf_counter() - before
        if stop:
            say(f"stopped by {signal.Signals(stop).name} at step {step} of {max_steps}, saved in {out_dir}: run the "
                f"same command again to go on")
            sys.exit(128 + stop)

        if master and time.time() - noted > 5:  # for whoever watches a study; rows of the log are far apart
            noted = time.time()
            speed = (step - since) * batch_tokens / (time.perf_counter() - clock)
            system.write_text(out_dir / "progress.json", json.dumps(dict(step=step, tokens_per_s=speed or None)))

        # -- one step of training: nothing in it reads from the device
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
        if ddp:  # one message for all gradients and the loss
            parts = [p.grad for p in model.parameters()] + [train_loss]
            flat = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(flat)
            sums = flat.split([part.numel() for part in parts])
            torch._foreach_copy_(parts, [s.view_as(part) for s, part in zip(sums, parts)])
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        broken = ~torch.isfinite(train_loss + grad_norm) | (train_loss > explode)
        bad = torch.where((bad < 0) & broken, step, bad)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        step += 1
        bar.update(1)

    # ---- the end, as `key: value` lines
    bar.close()
    for name in ("ckpt_rolling.pt", "progress.json"):
        (out_dir / name).unlink(missing_ok=True)
    if master and (final := study.load_run(out_dir))["status"] == "finished":
        steps, train_seconds = np.sum(intervals or [(0, math.nan)], axis=0)
        speed, peak = steps * batch_tokens / train_seconds, system.peak_flops(device)
        say("---")
        for key, value in dict(
                arm=arm, seed=seed, learning_rate=f"{learning_rate:g}", dtype=dtype, micro_batch=micro,
                num_params=model.num_params(), tokens=step * batch_tokens,
                val_loss=f"{final['val_loss']:.6f}",
                mean_pr=f"{final['rows'][-1]['mean_pr']:.4f}", train_seconds=f"{train_seconds:.1f}",
                total_seconds=f"{time.time() - start:.1f}", tokens_per_s=f"{speed:.0f}",
                mfu=f"{speed * model.flops_per_token() / world / peak:.4f}" if peak else "unknown",
                peak_memory_mb=f"{system.peak_memory(device) / 2**20:.0f}", out_dir=out_dir).items():
            say(f"{key + ':':<16}{value}")
if ddp:
    dist.destroy_process_group()
gc.freeze()  # leaving takes 0.2 s, not 1.6: the interpreter's last collections pass over what the compiler made
