"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with the match-RMS scale of Liu et al.
2025 (arXiv:2502.16982), as torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), batched: matrices of one
shape, or of its transpose, are stacked and orthogonalised in one call.
"""
import torch
import torch.distributed as dist

from system import has_bfloat16

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: steepest at zero, so five steps do
NS_STEPS = 5
# elements that a CPU process orthogonalises at once, so that they stay in cache
CPU_CHUNK = {torch.bfloat16: 2**20, torch.float32: 2**18}


def working_dtype(device):
    """bfloat16, or float32 where the device has no bfloat16 products: that only leaves rounding out,
    and is ten times faster there."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def orthogonalize(G, steps=NS_STEPS):
    """Newton-Schulz on a stack G (N, rows, cols) with rows <= cols: singular values of each matrix go
    to about 0.7 to 1.2, directions stay. Returns (N, rows, cols) in the device's working_dtype."""
    a, b, c = NS_COEFFICIENTS
    X = G.to(working_dtype(G.device))
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # spectral norm at most 1
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


class Muon(torch.optim.Optimizer):
    """Muon for 2-D hidden matrices.

    Update: buf = momentum * buf + (1 - momentum) * grad; U = orthogonalize(lerp(grad, buf, momentum))
    (Nesterov); p = p * (1 - lr * weight_decay) - lr * 0.2 * sqrt(max(rows, cols)) * U.
    The factor gives U the RMS of a typical AdamW update (arXiv:2502.16982, eq. 4), so lr is AdamW's unit.
    Under torch.distributed each rank orthogonalises its share of a stack and the results are gathered.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}: "
                                 f"give it to AdamW")

    @torch.no_grad()
    def step(self):
        world = dist.get_world_size() if dist.is_initialized() else 1
        for group in self.param_groups:
            stacks = {}  # wide shape -> parameters, so that up, gate and down share one call
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                stacks.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for (rows, cols), stack in stacks.items():
                device = stack[0].device
                n = max(1, CPU_CHUNK[working_dtype(device)] // (rows * cols)) * world \
                    if device.type == "cpu" else len(stack)
                for chunk in (stack[i:i + n] for i in range(0, len(stack), n)):
                    grads, bufs = [p.grad for p in chunk], [self.state[p]["momentum_buffer"] for p in chunk]
                    torch._foreach_lerp_(bufs, grads, 1 - group["momentum"])
                    # grads are done with: Nesterov in place
                    torch._foreach_lerp_(grads, bufs, group["momentum"])
                    wide = [g if g.shape[0] <= g.shape[1] else g.mT for g in grads]
                    update = orthogonalize_shared(wide)
                    torch._foreach_mul_(chunk, 1 - group["lr"] * group["weight_decay"])
                    update = update.to(chunk[0].dtype)  # at once: a list of mixed dtypes is added one by one
                    torch._foreach_add_(chunk, [u if p.shape[0] <= p.shape[1] else u.mT
                                                for p, u in zip(chunk, update)],
                                        alpha=-group["lr"] * 0.2 * max(rows, cols) ** 0.5)


def orthogonalize_shared(matrices):
    """Orthogonalise a list of equal wide matrices, divided over the ranks where there are several.
    Returns (len(matrices), rows, cols)."""
    if not dist.is_initialized():
        return orthogonalize(torch.stack(matrices))
    world, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(matrices) // world)  # padded to equal shares, which all_gather_into_tensor needs
    mine = matrices[rank * share:(rank + 1) * share]
    mine = mine + [torch.zeros_like(matrices[0])] * (share - len(mine))
    mine = orthogonalize(torch.stack(mine))
    whole = mine.new_empty(world * share, *mine.shape[1:])
    dist.all_gather_into_tensor(whole, mine)
    return whole[:len(matrices)]
