"""What depends on the machine: files written whole, locks, compilers, device peaks and memory."""
import contextlib
import ctypes
import fcntl
import functools
import json
import os
import re
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from configurator import fail, whole_file

# dense bfloat16 peaks with float32 accumulation, FLOP/s, from the vendors' data sheets (no sparsity).
# By torch's exact names: a MIG slice, a laptop's card or another board of a family has another peak, and unknown is
# better than wrong.
PEAK_BF16 = {
    "NVIDIA B200": 2250e12, "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA L40S": 362e12, "NVIDIA A10G": 70e12,
    "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 5090": 209.5e12, "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


# ---- devices
def start_device(name, local_rank=0, deterministic=False):
    """torch.device of a name, made ready for a run: auto (CUDA where it is there, else cpu), cpu, cuda or cuda:N.
    A CUDA device has its index, that of torchrun's local_rank where the name has none. ROCm's devices are torch's
    'cuda'. deterministic has to come before CUDA and the compiler start. ValueError for what is not there."""
    if deterministic:
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1"}
        torch.use_deterministic_algorithms(True)
        # it only finds reads of what was never written
        torch.utils.deterministic.fill_uninitialized_memory = False
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if there else "cpu"
    kind, _, index = name.partition(":")
    index = index or str(local_rank)
    if kind not in ("cpu", "cuda") or not index.isdecimal():
        raise ValueError(f"device {name!r} is not supported: choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index) >= there:
        raise ValueError(f"device cuda:{index} is not there: torch sees {there} CUDA devices{why_cpu()}")
    # training multiplies in bfloat16; what is left in float32 is the probes, and those have to be exact. This call
    # sets the older and the newer switch: with one alone, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE makes later queries an error
    torch.set_float32_matmul_precision("highest")
    if kind == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    device = torch.device("cuda", int(index))
    torch.cuda.set_device(device)
    return device


def why_cpu():
    """Why torch has no CUDA device, as the end of a sentence; "" where it has one."""
    if torch.cuda.is_available():
        return ""
    built = torch.version.cuda or torch.version.hip
    why = f"built for {built}, but no usable GPU or driver" if built else "a CPU build"
    return f" (torch {torch.__version__}, {why})"


def cores():
    """CPU cores that this process may use: taskset, cgroups' cpusets and SLURM say less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def device_name(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"^model name\s*: (.+)", cpuinfo(), re.M)
    return f"CPU {model[1]}" if model else "CPU"


def peak_flops(device):
    """bfloat16 peak of a device in FLOP/s, or None where it is not in the table."""
    return PEAK_BF16.get(device_name(device))


def has_bfloat16(device):
    """Whether a device multiplies bfloat16 matrices in hardware. A CPU without it trains 13 to 20 x slower in
    bfloat16 than in float32. CPUs that are not x86 count as without: none was measured."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(re.search(r"^flags\s*:.*\b(avx512_bf16|amx_bf16)\b", cpuinfo(), re.M))


KEPT_BLOCK = 2**25  # bytes: the most that glibc's malloc can be told to keep


def keep_freed_memory():
    """Keep what malloc frees for the next step, in blocks of up to 32 MB, instead of giving it back to the kernel and
    faulting it in again: 5 % of a step at mini and 4m on a CPU. Without that limit it was 10 % at 80m too, and twice
    the memory. glibc only."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-3, KEPT_BLOCK)  # M_MMAP_THRESHOLD: larger blocks come from mmap, which free unmaps
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def training_bytes(c, micro_batch, dtype="bfloat16", compiled=True):
    """Peak memory in bytes of one training step of a GPTConfig at micro_batch sequences, from above: 18 a parameter
    (weight, gradient, two moments, float32; a bfloat16 copy), what each layer keeps for the backward pass, and the
    logits."""
    params = c.vocab_size * c.n_embd + c.n_layer * (4 * c.n_embd ** 2 + 3 * c.n_embd * c.ffn_dim)
    tokens, w = micro_batch * c.block_size, getattr(torch, dtype).itemsize
    # two residuals in float32; two normed inputs, q, k, v and attention's output; gate, up and their product
    layer = 2 * 4 * c.n_embd + 6 * w * c.n_embd + 3 * w * c.ffn_dim + 2 * w * c.n_embd * c.qk_norm + 16 * c.n_head
    logits = 2 * w * c.vocab_size  # they and their gradient
    if not compiled:  # norms in float32, silu's output, casts; logits and their softmax in float32
        layer += 2 * 4 * c.n_embd + 3 * w * c.n_embd + w * c.ffn_dim + (8 + 2 * w) * c.n_embd * c.qk_norm
        logits += 3 * 4 * c.vocab_size
    return 18 * params + tokens * (c.n_layer * layer + logits)


def fitting_micro_batch(c, local, device, dtype, compiled=True):
    """The largest divisor of `local` sequences that fits in 80 % of the device's memory, which GPU_JOBS processes
    share (not of what is free: jobs that start together all see an empty card, and a run goes on with what it began
    with). On a CPU the largest whose logits stay in a block that malloc keeps. c: a GPTConfig; dtype: train.py's."""
    divisors = [m for m in range(1, local + 1) if local % m == 0]
    if torch.device(device).type == "cuda":
        share = 0.8 * torch.cuda.get_device_properties(device).total_memory / int(os.environ.get("GPU_JOBS", 1))
        return max((m for m in divisors if training_bytes(c, m, dtype, compiled) < share), default=1)
    logits = c.block_size * c.vocab_size * getattr(torch, dtype).itemsize
    return max((m for m in divisors if m * logits < KEPT_BLOCK), default=1)


def peak_memory(device):
    """Bytes that this process has held at most: on a GPU torch's tensors, on a CPU all of it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- signals
def catch_signals():
    """A list that gets the number of the first SIGTERM, SIGINT or SIGHUP; one more ends the process at once, if it
    comes a second later: a scheduler may send its own beside the one that study.py passes on."""
    caught, at = [], []

    def on_signal(number, frame):
        if caught and time.monotonic() - at[0] > 1:
            os._exit(128 + number)
        caught.append(number)
        at.append(time.monotonic())

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, on_signal)
    return caught


# ---- files
@contextlib.contextmanager
def errors_in_one_line(what, advice):
    """End the script in one line where the block runs into an operating system's error or out of memory."""
    try:
        yield
    except OSError as e:
        fail(f"{what}: {e.strerror or e}: {advice}")
    except torch.OutOfMemoryError as e:
        fail(f"out of memory ({str(e).splitlines()[0][:120]}): give a smaller --micro_batch")


def append_row(path, row):
    """Append a dict to a .jsonl file, on disk before anything goes on. ValueError for NaN or infinity, which JSON
    does not know."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(row, allow_nan=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


def newest_checkpoint(folder, say):
    """(content, path) of the whole ckpt_*.pt of the highest step in a run's folder, ({}, None) where there is none.
    Damaged ones are passed over, and say() is told."""
    found = []
    for path in [*folder.glob("ckpt_step_*.pt"), *folder.glob("ckpt_rolling.pt")]:
        try:  # mapped, so that only the file's index is read
            found.append((torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"], path))
        except Exception as e:  # a damaged file can fail anywhere inside the unpickler
            say(f"warning: {path} is no whole checkpoint ({type(e).__name__}): taking the one before")
    path = max(found, default=(0, None))[1]
    return torch.load(path, map_location="cpu", weights_only=True) if path else {}, path


def write_text(path, text):
    with whole_file(path) as f:
        f.write(text.encode())


def lock(folder):
    """Hold folder for this process; returns the open file, which has to stay open. The kernel frees it when the
    process dies, so a stale lock is simply taken over. ValueError, naming the holder, where another process has it."""
    f = open(Path(folder) / "lock", "a+", encoding="utf-8")
    try:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # whoever asks how a study stands holds it for a moment
            time.sleep(0.2)
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        raise ValueError(f"{folder} is in use by {f.read().strip() or 'another process'}: wait for it or give "
                         "another --out_dir") from None
    except OSError as e:
        print(f"warning: the file system of {folder} has no locks ({e}): take care that one process at a time "
              "works there")
    f.truncate(0)
    f.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    f.flush()
    return f
