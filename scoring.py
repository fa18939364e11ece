"""How a checkpoint scores text: val loss, log-likelihoods of continuations, and lm-eval's view of it."""
import contextlib
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import causal_attention

PASS_TOKENS = {"cuda": 65_536, "cpu": 2048}  # of one pass: fills a GPU, stays near a CPU's cache
HEAD_ROWS = 1024  # positions whose logits exist at once: 200 MB in float32 at 50,304 ids


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
    batch = max(1, min(PASS_TOKENS[device.type], 16_384) // size)  # all their logits exist at once
    for b in tqdm(range(0, len(starts), batch), desc="val", disable=None, leave=False):
        rows = [torch.from_numpy(tokens[s:s + size + 1].astype(np.int64)) for s in starts[b:b + batch]]
        x = pad_sequence([r[:-1] for r in rows], batch_first=True).to(device)
        y = pad_sequence([r[1:] for r in rows], batch_first=True, padding_value=-1).to(device)
        with inference(device, dtype):
            loss = model.loss(model.hidden(x), y, reduction="none")
        nats[b:b + batch] = loss.double().sum(-1).cpu()
    return nats, counts


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
            scored = [target for _, targets in batch for target in targets]
            wanted = torch.tensor([token for _, target in scored for token in target], device=device)
            x, cos, sin = model.wte(idx), model.cos[pos].unsqueeze(1), model.sin[pos].unsqueeze(1)
            for block in model.h:
                x = block(x, cos, sin, packed_attention(mask))
            states = model.norm(x).flatten(0, 1)[rows]
            logps, greedy = [], []
            for h, w in zip(states.split(HEAD_ROWS), wanted.split(HEAD_ROWS)):
                logits = model.logits(h)
                logps.append(logits.gather(-1, w[:, None])[:, 0] - logits.logsumexp(-1))
                greedy.append(logits.argmax(-1) == w)
            sizes = [len(target) for _, target in scored]
            logps, greedy = torch.cat(logps).double().cpu().split(sizes), torch.cat(greedy).cpu().split(sizes)
            for (i, _), logp, same in zip(scored, logps, greedy):
                results[i] = logp.sum().item(), bool(same.all())
            bar.update(len(scored))
    return results


def adapter(encoding, block_size):
    """lm-eval's view of a checkpoint: a TemplateLM whose `model`, `dtype` and `desc` are set from outside,
    so that one, with all texts tokenised once, serves every checkpoint of a tokenizer. After a call `cut`
    tells which requests lost context; the answer to one that cannot be scored is None."""
    from lm_eval.api.model import TemplateLM  # here, because lm_eval takes seconds to import

    class Adapter(TemplateLM):
        eot_token_id = encoding.eot_token
        max_length = block_size
        model = dtype = desc = None

        @functools.lru_cache(maxsize=4)  # the endings of an item repeat its long context
        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            return encoding.encode_ordinary(string)

        @functools.cache
        def _encode_pair(self, context, continuation):
            return super()._encode_pair(context, continuation)

        def _loglikelihood_tokens(self, requests, **kwargs):
            pairs = [(context, target) for _, context, target in requests]
            self.cut = [len(context) + len(target) > block_size + 1 for context, target in pairs]
            return score(self.model, pairs, self.dtype, self.desc)

        def generate_until(self, requests, disable_tqdm=False):
            raise NotImplementedError("the study's tasks only score given texts")

        loglikelihood_rolling = generate_until

    return Adapter()
