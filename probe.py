"""What the study measures on attention: participation ratio and spectra of the keys,
attention entropy, logits.

Definitions, with s the singular values of a matrix:
  PR1 = (sum s)^2 / sum s^2        the plan's RankProbe
  PR2 = (sum s^2)^2 / sum s^4      the usual participation ratio of covariance eigenvalues s^2
Both are 1 for rank one and r for r equal singular values; neither changes under scaling or rotation.
"""
import math

import torch


def pr1(s):
    """Participation ratio of singular values s (..., n) -> (...): (sum s)^2 / sum s^2. All zero gives nan."""
    return s.sum(-1) ** 2 / (s ** 2).sum(-1)


def pr2(s):
    """Participation ratio of squared singular values s (..., n) -> (...): (sum s^2)^2 / sum s^4.
    All zero gives nan."""
    return (s ** 2).sum(-1) ** 2 / (s ** 4).sum(-1)


def singular_values(gram):
    """Singular values (..., d), descending, float64, of matrices given by their Gram matrices X^T X
    (..., d, d) in float64: exact to about 1e-8 of the largest one, and far cheaper than an SVD of
    thousands of rows. nan where a matrix is not finite."""
    gram = gram.cpu()
    finite = gram.isfinite().all(-1).all(-1)[..., None]
    s = torch.linalg.eigvalsh(gram.where(finite[..., None], 0)).clamp(min=0).sqrt().flip(-1)
    return s.where(finite, math.nan)


def gram(x):
    """X^T X in float64 of x (..., rows, d)."""
    x = x.double()
    return x.mT @ x


def weight_gram(attn):
    """Gram matrices (n_head, head_dim, head_dim) of diag(gain) W_K, head by head: W_K with
    the QK gain folded in."""
    w = attn.k_proj.weight.detach().double().view(attn.n_head, attn.head_dim, -1)
    if hasattr(attn.k_norm, "weight"):
        w = w * attn.k_norm.weight.detach().double()[:, None]
    return w @ w.mT


def attention_stats(q, k):
    """Mean entropy in nats over heads and positions, and the largest scaled logit, of causal attention
    of q on k, both (n_head, T, head_dim) float32. Uniform attention has entropy ln Gamma(T + 1) / T."""
    T = q.shape[-2]
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    logp = scores.log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == float("-inf"), 0)).sum(-1).mean()
    return entropy, scores.max()


@torch.no_grad()
def probe(model, idx):
    """Probe a model on token ids idx (B, T), in float32, drawing no random number and changing no weight.

    Returns (metrics, spectra). metrics: the log keys pr_layer_i, pr_centered_layer_i,
    pr_pre_rope_layer_i, pr_weight_layer_i, attn_entropy_layer_i, max_logit_layer_i and mean_pr, as
    floats. spectra: {"sv_layer_i" and "sv_weight_layer_i": numpy float32 (n_head, head_dim), descending}.
    """
    B, T = idx.shape
    cos, sin = model.cos[:T], model.sin[:T]
    spectra, stats = [], []  # everything stays on the device until one copy at the end
    with torch.autocast(idx.device.type, enabled=False):
        x = model.wte(idx)
        for block in model.h:
            attn, h = block.attn, block.norm1(x)
            q, k, _ = attn.qkv(h, cos, sin)  # what attention sees
            # RoPE by an angle of zero
            unrotated = attn.qkv(h, torch.ones_like(cos), torch.zeros_like(sin))[1]
            keys, unrotated = (t.transpose(0, 1).flatten(1, 2)  # (n_head, B*T, head_dim)
                               for t in (k, unrotated))
            spectra.append(torch.stack([gram(keys), gram(keys - keys.mean(1, keepdim=True)),
                                        gram(unrotated), weight_gram(attn)]))
            # one sequence at a time: T^2 scores of a whole batch would not fit at 80m
            entropy, logit = zip(*(attention_stats(q[b], k[b]) for b in range(B)))
            stats.append(torch.stack([torch.stack(entropy).mean(), torch.stack(logit).max()]))
            x = block.forward(x, cos, sin)  # not what train.py compiled: that is for its own shapes
    # each (n_layer, n_head, head_dim)
    keys, centered, unrotated, weight = singular_values(torch.stack(spectra, 1))
    entropy, logit = torch.stack(stats, 1).double().cpu()
    layers = {  # each (n_layer,): a further metric is a line here
        "pr": pr1(keys).mean(-1),  # mean over heads
        "pr_centered": pr2(centered).mean(-1),
        "pr_pre_rope": pr1(unrotated).mean(-1),
        "pr_weight": pr2(weight).mean(-1),
        "attn_entropy": entropy,
        "max_logit": logit,
    }
    table = torch.stack(list(layers.values()), dim=1)  # (n_layer, metrics)
    metrics = {f"{name}_layer_{i}": value for name, column in zip(layers, table.T)
               for i, value in enumerate(column.tolist())}
    metrics["mean_pr"] = table[:, 0].mean().item()
    return metrics, {f"{name}_layer_{i}": s.float().numpy()
                     for name, values in (("sv", keys), ("sv_weight", weight))
                     for i, s in enumerate(values)}
