"""What depends on the machine: files written whole, locks, compilers, device peaks and memory."""
import ctypes
import fcntl
import os
import re
import socket
from pathlib import Path

import torch

# dense bfloat16 peaks with float32 accumulation, FLOP/s, from the vendors' data sheets (no sparsity)
PEAK_BF16 = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "L40S": 362e12,
    "L4": 121e12, "RTX 5090": 209.5e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}


def peak_flops(device):
    """bfloat16 peak of a device in FLOP/s by its name, or None where the name is not in the table."""
    name = device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if re.search(rf"\b{re.escape(key)}\b", name)), None)


def device_name(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] \
        if os.path.exists("/proc/cpuinfo") else []
    return f"CPU {models[0]}" if models else "CPU"


def cores():
    """CPU cores that this process may use: taskset and cluster schedulers may leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bfloat16(device):
    """Whether a device multiplies bfloat16 matrices in hardware. A CPU without it trains 13 to 20 x slower in bfloat16 than in
    float32. CPUs that are not x86 count as without: none was measured."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def can_compile(device):
    """Whether torch.compile has what it generates code with: a C++ compiler on a CPU, Triton on a GPU."""
    if torch.device(device).type == "cuda":
        from torch.utils._triton import has_triton
        return has_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    try:
        get_cpp_compiler()
        return True
    except InvalidCxxCompiler:
        return False


KEPT_BLOCK = 2**25  # bytes: the most that glibc's malloc can be told to keep


def keep_freed_memory():
    """Keep what malloc frees for the next step, in blocks of up to 32 MB, instead of giving it back to the kernel and faulting it
    in again: 5 % of a step at mini and 4m on a CPU. Without that limit it was 10 % at 80m too, and twice the memory. glibc only."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-3, KEPT_BLOCK)  # M_MMAP_THRESHOLD: larger blocks come from mmap, which free unmaps
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def training_bytes(c, micro_batch):
    """Peak memory in bytes of one training step of a GPTConfig at micro_batch sequences, from above: 16 a parameter (weight,
    gradient, two moments, float32), the activations that backward needs, and the logits. Compiled it is less: measured at
    80m on a CPU, 0.34 MB a token more from one sequence to two, where this says 0.95."""
    params = c.vocab_size * c.n_embd + c.n_layer * (4 * c.n_embd ** 2 + 3 * c.n_embd * c.ffn_dim)
    tokens = micro_batch * c.block_size
    # a layer keeps two float32 residuals and, in bfloat16, two normed inputs, q k v twice, attention output, four of ffn_dim
    activations = tokens * c.n_layer * (2 * 4 * c.n_embd + 2 * 9 * c.n_embd + 2 * 4 * c.ffn_dim)
    logits = tokens * c.vocab_size * (4 + 4 + 2)
    return 16 * params + activations + logits


def fitting_micro_batch(c, local, device, dtype):
    """The largest divisor of `local` sequences that fits in 80 % of the device's free memory; on a CPU the largest whose logits
    stay in a block that malloc keeps: in float32 1.0 to 1.07 x tokens/s at mini against 2,048 tokens, 1.1 x at 4m against 8,192,
    with a third of the memory. c: a GPTConfig; dtype: train.py's."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        fits = [m for m in range(1, local + 1) if local % m == 0 and training_bytes(c, m) < 0.8 * free]
    else:
        logits = c.block_size * c.vocab_size * getattr(torch, dtype).itemsize
        fits = [m for m in range(1, local + 1) if local % m == 0 and m * logits < KEPT_BLOCK]
    return max(fits, default=1)


def write_whole(path, write, mode="wb"):
    """Call write(file) on a file aside, flush it to disk and rename it to path: path is whole or as it was before.
    OSError where that fails, with nothing left behind."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
        aside.unlink(missing_ok=True)
        raise e if isinstance(e, OSError) else OSError(f"{path}: {str(e).splitlines()[0]}") from None


def write_text(path, text):
    write_whole(path, lambda f: f.write(text), "w")


def lock(folder):
    """Hold folder for this process; returns the open file, which has to stay open. The kernel frees it when the process
    dies, so a stale lock is simply taken over. ValueError, naming the holder, where another process has it."""
    f = open(Path(folder) / "lock", "a+", encoding="utf-8")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        raise ValueError(f"{folder} is in use by {f.read().strip() or 'another process'}: wait for it or give another "
                         f"--out_dir") from None
    f.truncate(0)
    f.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    f.flush()
    return f
