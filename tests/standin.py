"""A GPU's stand-in, for lines that only CUDA reaches: python tests/standin.py SCRIPT [ARGUMENT ...]

Runs a script as if torch had GPUS (default 1) H100s: what is put on device 'cuda' stays on the CPU,
torch.cuda's queries have made-up answers, and torch's own checks of their arguments are kept. It does
not reach what depends on a tensor's own device (attention's choice in model.py, Muon's stacks),
kernels, autocast in bfloat16, nccl, streams and the compiler.
"""
import os
import runpy
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

NAME, GPUS = "NVIDIA H100 80GB HBM3", int(os.environ.get("GPUS", 1))
MEMORY = 80 * 2**30


def on_cpu(x):
    """x, or the CPU where x is a CUDA device that is there; a device without an index is
    what torch makes of it."""
    is_cuda = isinstance(x, torch.device) and x.type == "cuda" \
        or isinstance(x, str) and x.split(":")[0] == "cuda"
    if is_cuda and (torch.device(x).index or 0) >= GPUS:
        raise RuntimeError(f"CUDA error: invalid device ordinal {x}")
    return torch.device("cpu") if is_cuda else x


class OnCPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **kwargs or {})
        if function is torch.Tensor.pin_memory:
            return args[0]
        return function(*map(on_cpu, args), **{key: on_cpu(value) for key, value in (kwargs or {}).items()})


def install():
    checked = torch.cuda._utils._get_device_index

    def of(answer):
        return lambda device=None, *args, **kwargs: (checked(device, optional=True), answer)[1]

    torch.cuda.is_available, torch.cuda.device_count = (lambda: GPUS > 0), (lambda: GPUS)
    torch.cuda.is_initialized, torch.cuda.current_device, torch.cuda._lazy_init = \
        (lambda: True), (lambda: 0), (lambda: None)
    torch.cuda.get_device_name, torch.cuda.synchronize = of(NAME), of(None)
    torch.cuda.get_device_properties = of(
        types.SimpleNamespace(name=NAME, total_memory=MEMORY, major=9, minor=0))
    torch.cuda.reset_peak_memory_stats = of(None)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.accelerator.current_stream = lambda device=None: types.SimpleNamespace(is_capturing=lambda: False)
    torch.cuda.mem_get_info, torch.cuda.max_memory_allocated = of((MEMORY, MEMORY)), of(2**30)
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch._C._cuda_setDevice = lambda index: None  # torch.cuda.set_device keeps its own check of its argument
    real = torch.profiler.profile
    torch.profiler.profile = lambda activities, **kw: real(
        activities=[torch.profiler.ProfilerActivity.CPU], **kw)
    start = dist.init_process_group
    dist.init_process_group = lambda backend=None, **kw: start(
        backend.replace("cpu:gloo,cuda:nccl", "gloo"), **kw)
    OnCPU().__enter__()


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
