"""The decoder of the study: RMSNorm, RoPE, SwiGLU, tied embeddings, no biases, optional QK-Norm.

Without QK-Norm it computes what Hugging Face's LlamaForCausalLM computes, with it what Qwen3ForCausalLM
computes, so export.py only renames weights. Head dim is n_embd / n_head, 64 at every scale of the study.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

NORM_EPS = 1e-6      # given explicitly because defaults differ between libraries
ROPE_THETA = 10_000.0
CPU_BLOCK = 128      # queries a block of attention on a CPU; blocks of 64 and 256 were the same or slower


@dataclass
class GPTConfig:
    block_size: int = 2048
    vocab_size: int = 50304  # GPT-2's 50,257 padded up to a multiple of 64 for matrix units
    n_layer: int = 22
    n_head: int = 8
    n_embd: int = 512
    ffn_dim: int = 896
    qk_norm: bool = False
    qk_gain: bool = True  # whether QK-Norm's gains learn; frozen ones stay at one


def gpt_config(keys):
    """The GPTConfig in a dict of train.py's keys, such as a config.json; a key from before it
    existed has its default."""
    return GPTConfig(**{field: keys[field] for field in GPTConfig.__dataclass_fields__ if field in keys})


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim, learns=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if learns else nn.Buffer(torch.ones(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        return self.weight * y.to(x.dtype)


def rope_table(block_size, head_dim, device=None):
    """cos, sin of shape (block_size, head_dim), float32: RoPE angles, half-split layout (Su et al. 2021,
    arXiv:2104.09864; the layout of Hugging Face's rotate_half)."""
    inv_freq = 1.0 / (ROPE_THETA ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    angle = torch.outer(torch.arange(block_size).float(), inv_freq)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(device), angle.sin().to(device)


def apply_rope(x, cos, sin):
    """Rotate x (B, n_head, T, head_dim) by tables (T, head_dim) or (B, 1, T, head_dim);
    the dtype of x is kept."""
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


def causal_blocks(q, k, v):
    """Causal attention of q, k, v (B, n_head, T, head_dim) in blocks of CPU_BLOCK queries, each against
    the keys up to its end. The same sum as scaled_dot_product_attention, which a CPU does slowly: its
    backward pass, and long rows. Scores of bfloat16 q and k are rounded to bfloat16."""
    q, out = q * q.shape[-1] ** -0.5, []  # a power of two at head_dim 64: nothing is rounded
    # joined below: 8 % of a step at 4m against slicing k and v
    ks, vs = k.split(CPU_BLOCK, -2), v.split(CPU_BLOCK, -2)
    for i, queries in enumerate(q.split(CPU_BLOCK, -2)):
        scores = (queries @ torch.cat(ks[:i + 1], -2).mT).float()
        at = torch.arange(queries.shape[-2], device=q.device)
        scores[..., i * CPU_BLOCK:].masked_fill_(at[:, None] < at, float("-inf"))
        out.append(scores.softmax(-1).to(v.dtype) @ torch.cat(vs[:i + 1], -2))
    return torch.cat(out, dim=-2)


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(head_dim)) v under the causal mask, of q, k, v (B, n_head, T, head_dim)."""
    if torch.compiler.is_compiling() and q.device.type == "cpu" and CPU_BLOCK < q.shape[-2] <= 4 * CPU_BLOCK:
        return causal_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.head_dim = config.n_embd // config.n_head
        # three matrices, not one: Muon orthogonalises each alone, and fusing them is known to hurt
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        # one gain for q and one for k, shared by the heads, as in Qwen3
        self.q_norm = RMSNorm(self.head_dim, config.qk_gain) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.qk_gain) if config.qk_norm else nn.Identity()

    def qkv(self, x, cos, sin):
        """Queries, keys and values (B, n_head, T, head_dim) of x (B, T, n_embd), as attention
        sees them; cos, sin: RoPE's tables. Here is what QK-Norm does and where: the probes
        measure what this returns."""
        q, k, v = (proj(x).unflatten(-1, (self.n_head, self.head_dim))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(self, x, cos, sin, attend=causal_attention):
        y = attend(*self.qkv(x, cos, sin))
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.n_embd)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend=causal_attention):
        x = x + self.attn(self.norm1(x), cos, sin, attend)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} does not divide by n_head {config.n_head}: "
                             f"change one of them")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        cos, sin = rope_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, generator):
        """GPT-2's init: normal(0, 0.02), projections into the residual stream divided by
        sqrt(2 n_layer). Gains are one and draw nothing, so all arms of a seed start from the same
        matrices. generator: a CPU one, so that every device starts from the same weights."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) \
                    if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                p.copy_(torch.randn(p.shape, generator=generator) * std)
            else:
                p.fill_(1.0)
        return self

    def hidden(self, idx):
        """Final normed hidden states (B, T, n_embd) of token ids idx (B, T)."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are longer than block_size {self.config.block_size}: "
                             f"cut the context")
        x = self.wte(idx)
        for block in self.h:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.norm(x)

    def logits(self, hidden):
        """float32 logits (..., vocab_size) of hidden states (..., n_embd)."""
        return F.linear(hidden, self.wte.weight).float()

    def loss(self, hidden, targets, reduction="mean"):
        """Cross-entropy in nats of hidden (B, T, n_embd) against targets (B, T); targets of -1 do not count.
        reduction: 'mean' a scalar, 'none' (B, T)."""
        losses = F.cross_entropy(self.logits(hidden).flatten(0, 1), targets.flatten(), ignore_index=-1,
                                 reduction=reduction)
        return losses if reduction == "mean" else losses.view_as(targets)

    def forward(self, idx, targets=None):
        """Logits (B, T, vocab_size) of idx (B, T); with targets (B, T) the mean loss instead."""
        x = self.hidden(idx)
        return self.logits(x) if targets is None else self.loss(x, targets)

    def compile_parts(self):
        """torch.compile of a block, one graph for all n_layer of them, and of the loss. Of the whole it
        would take twice as long at 6 layers and more at 22; nested_compile_region, meant for this,
        gives wrong gradients in float32 in torch 2.13."""
        for block in self.h:
            block.compile(dynamic=False)
        self.loss = torch.compile(self.loss, dynamic=False)

    def num_params(self):
        """Parameters, the tied embedding counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Training FLOPs a token, forward and backward: 6 for each weight of a matrix product (the tied
        head counts, the look-up does not) and 12 * n_layer * n_embd * T / 2 for causal attention (PaLM,
        arXiv:2204.02311, app. B, halved for the mask)."""
        c = self.config
        matrices = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return 6 * matrices + 6 * c.n_layer * c.n_embd * c.block_size
