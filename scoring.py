"""How a checkpoint scores text: val loss, and log-likelihoods of continuations as lm-eval's models give them."""
import contextlib
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import causal_attention

# of one pass: near a CPU's cache; on a GPU as many as have 3.3 GB of logits at 50,304 ids, as all can exist at once
PASS_TOKENS = {"cuda": 16_384, "cpu": 2048}


@contextlib.contextmanager
def inference(device, dtype):
    """No gradients, autocast to dtype, no attention of cuDNN's, which plans for each new shape: here are
    many."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.no_grad(), sdpa_kernel(kernels), \
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        yield


def val_losses(model, tokens, dtype):
    """Nats summed over each block of block_size targets, and how many they are, both float64 (n_blocks,):
    each of `tokens` (n,) is predicted once, in order, the block before it unseen, as in train.py's val
    loss."""
    device, size = model.wte.weight.device, model.config.block_size
    starts = np.arange(0, len(tokens) - 1, size)
    nats, counts = np.zeros(len(starts)), np.minimum(size, len(tokens) - 1 - starts).astype(float)
    batch = max(1, PASS_TOKENS[device.type] // size)
    for b in tqdm(range(0, len(starts), batch), desc="val", disable=None, leave=False):
        rows = [torch.from_numpy(tokens[s:s + size + 1].astype(np.int64)) for s in starts[b:b + batch]]
        x = pad_sequence([r[:-1] for r in rows], batch_first=True).to(device)
        y = pad_sequence([r[1:] for r in rows], batch_first=True, padding_value=-1).to(device)
        with inference(device, dtype):
            loss = model.loss(model.hidden(x), y, reduction="none")
        nats[b:b + batch] = loss.double().sum(-1).cpu()
    return nats, counts


@functools.lru_cache(maxsize=4)  # the endings of an item repeat its long context
def encode(encoding, text):
    return encoding.encode_ordinary(text)


def encode_pair(encoding, context, target):
    """Token ids of a context and of the target behind it, as lm-eval's models have them: tokenised as one text,
    blanks at the context's end counted to the target; an empty context is the end of a document."""
    if not context:
        return [encoding.eot_token], encode(encoding, target)
    ids = encode(encoding, context.rstrip())
    return ids, encode(encoding, context + target)[len(ids):]


def widths(group):
    """Tokens of a group in the two parts of pack()'s pass."""
    context, targets = group
    return len(context), sum(len(target) - 1 for _, target in targets)


def share(pairs, block_size):
    """Groups (context, [(index, target), ...]) of consecutive (context, target) pairs: a group has one
    context, cut on the left as lm-eval's hf model does, and its targets fit behind it in a pass of
    block_size tokens. In no group is what cannot be scored: a target of no token, of more than block_size,
    or with nothing before it."""
    groups = []
    for i, (context, target) in enumerate(pairs):
        if not context or not 0 < len(target) <= block_size:
            continue
        context = (context + target)[-(block_size + 1):][:-len(target)]
        if groups and groups[-1][0] == context and sum(widths(groups[-1])) + len(target) - 1 <= block_size:
            groups[-1][1].append((i, target))
        else:
            groups.append((context, [(i, target)]))
    return groups


def batches(groups, limit):
    """Lists of groups that fill passes of at most `limit` tokens, padding included: the longest first."""
    batch, widest = [], (0, 0)
    for group in sorted(groups, key=widths, reverse=True):
        wider = tuple(map(max, widest, widths(group)))
        if batch and (len(batch) + 1) * sum(wider) > limit:
            yield batch
            batch, wider = [], widths(group)
        batch.append(group)
        widest = wider
    if batch:
        yield batch


def pack(groups, device):
    """One pass over groups: idx and pos (B, C + S), mask (B, 1, S, C + S) of the last S tokens, and flat rows
    (n,) of the hidden states that predict the targets, in order. A context fills the first C columns, padded on
    the right; its targets follow one after the other, each with the positions right behind the context."""
    C, S = map(max, zip(*map(widths, groups)))
    S = max(1, S)  # so that there is always a mask
    idx, pos, owner = (np.zeros((len(groups), n), dtype=np.int64) for n in (C + S, C + S, S))
    pos[:, :C], rows = np.arange(C), []
    for b, (context, targets) in enumerate(groups):
        idx[b, :len(context)] = context
        start, at = b * (C + S), C
        for j, (_, target) in enumerate(targets, 1):
            end = at + len(target) - 1  # a target's own last token predicts nothing, the context's last its first
            rows += [start + len(context) - 1, *range(start + at, start + end)]
            idx[b, at:end], pos[b, at:end] = target[:-1], len(context) + np.arange(end - at)
            owner[b, at - C:end - C] = j
            at = end
    idx, pos, owner, rows = (torch.from_numpy(np.asarray(a)).to(device) for a in (idx, pos, owner, rows))
    lengths = torch.tensor([[len(context)] for context, _ in groups], device=device)
    of_context = (torch.arange(C, device=device) < lengths)[:, None].expand(-1, S, -1)
    of_target = (owner[:, :, None] == owner[:, None, :]).tril()
    return idx, pos, torch.cat((of_context, of_target), dim=-1)[:, None], rows


def packed_attention(mask):
    """An `attend` for the model's blocks: the last S of T queries look where mask (B, 1, S, T) is True, those
    before them in causal order."""
    def attend(q, k, v):
        n = q.shape[-2] - mask.shape[-2]
        y = causal_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n])
        return torch.cat((y, F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=mask)), dim=2)
    return attend


def score(model, pairs, dtype, desc=None):
    """[(log-likelihood in nats, whether greedy decoding gives the target)] of [(context, target)], lists of
    token ids; None for a pair that share() leaves out. Consecutive pairs with the same context share one
    pass over it, and the head runs only where something is scored."""
    device, results = model.wte.weight.device, [None] * len(pairs)
    # one autocast around all passes: it keeps its bfloat16 copies of the weights until it ends
    bar = tqdm(total=len(pairs), desc=desc, unit="text", disable=None, leave=False)
    with inference(device, dtype), bar:
        for batch in batches(share(pairs, model.config.block_size), PASS_TOKENS[device.type]):
            idx, pos, mask, rows = pack(batch, device)
            scored = [pair for _, targets in batch for pair in targets]
            wanted = torch.tensor([token for _, target in scored for token in target], device=device)
            x, cos, sin = model.wte(idx), model.cos[pos].unsqueeze(1), model.sin[pos].unsqueeze(1)
            for block in model.h:
                x = block(x, cos, sin, packed_attention(mask))
            logits = model.logits(model.norm(x).flatten(0, 1)[rows])
            logps = logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1)
            sizes = [len(target) for _, target in scored]
            logps, greedy = (t.cpu().split(sizes) for t in (logps.double(), logits.argmax(-1) == wanted))
            for (i, _), logp, same in zip(scored, logps, greedy):
                results[i] = logp.sum().item(), bool(same.all())
            bar.update(len(scored))
    return results
