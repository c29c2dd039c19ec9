"""One token at a time, compiled: the step of generation near the memory's speed.

    model.generate(ids, compile=True)            python generate.py --compile "HAMLET."

    B  rows · H  heads · D  width of one head · S  keys in view · C  width · V  vocabulary

A step reads every weight once and computes next to nothing, so its floor is bytes over bandwidth.
Two things keep torch's own kernels from it on a CPU, and each has its form here:

    one_row     a matrix times one vector, written as multiply and sum.  Compiled, it streams the
                matrix twice as fast as torch's linear does for one row in float32, and half again as
                fast in bfloat16 (benchmark.py ceilings; fast.linear.few_rows is the form without a compiler).
    one_query   one query's attention as two such sums with a softmax between them.

torch.compile turns each block into a few loops; `whole` keeps it from folding the LayerNorm before
a matrix into the loop over the matrix, where it would be computed again for every row.  A block is
compiled twice, for caches partly and wholly filled, not once a layer or a length: lengths are
dynamic, and the cache is a KVCache, whose slots never move.  The blocks are those of neo.py and neox.py, for T = 1.
"""

import os
import shutil

import torch
import torch.nn.functional as F

from attention import at_least_float32
from fast.linear import few_rows
from neox import GPTNeoXConfig, rotary_tables, rotate


# ------------------------------------------------------------------------------------------------
# The two forms
# ------------------------------------------------------------------------------------------------

def whole(x):
    """x itself; to the compiler a tensor that has to be finished before anyone reads it."""
    return x.as_strided(x.shape, x.stride())


def one_row(x, weight, bias=None):
    """Linear layer for x (B, K) -> (B, N).  For more rows than one a matrix product of torch's wins."""
    if x.size(0) > 1:
        few = x.size(0) <= 16 and x.dtype == torch.float32 and x.device.type == "cpu"
        return (few_rows if few else F.linear)(x, weight, bias)
    y = (weight * whole(x)).sum(-1, dtype=at_least_float32(x.dtype))       # (N,)
    return (y if bias is None else y + bias).to(x.dtype)[None]


def one_query(q, keys, values, slot, k, v, seen, scale):
    """Store k, v (B, H, D) in their slot and let q (B, H, D) read what is seen.  -> (B, H * D)

    keys, values (B, H, slots, D) are a layer's cache; seen (B, S) bool: which of the first S slots.
    """
    keys.index_copy_(2, slot, k[:, :, None])
    values.index_copy_(2, slot, v[:, :, None])
    S = seen.size(1)
    scores = (keys[:, :, :S] * q[:, :, None]).sum(-1, dtype=at_least_float32(q.dtype)) * scale
    scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)           # (B, H, S)
    weights = whole(scores.softmax(-1))
    out = (values[:, :, :S] * weights[..., None]).sum(2)                                 # (B, H, D)
    return out.to(q.dtype).flatten(1)


# ------------------------------------------------------------------------------------------------
# The blocks, for one token of each row: x (B, C) -> (B, C)
# ------------------------------------------------------------------------------------------------

def norm(x, ln):
    return F.layer_norm(x, x.shape[-1:], ln.weight, ln.bias, ln.eps)


def linear(x, layer):
    return one_row(x, layer.weight, layer.bias)


def neo_block(block, x, keys, values, slot, seen):
    """GPT-Neo's: attention, then MLP, each added to its input; scores not scaled."""
    attn, mlp = block.attn, block.mlp
    h = norm(x, block.ln_1)
    q, k, v = (linear(h, proj).unflatten(1, (-1, attn.D))                  # each (B, H, D)
               for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    x = linear(one_query(q, keys, values, slot, k, v, seen, 1.0), attn.out_proj) + x
    return x + linear(mlp.act(linear(norm(x, block.ln_2), mlp.up_proj)), mlp.down_proj)


def neox_block(block, x, keys, values, slot, seen, cos, sin):
    """GPT-NeoX's: rotated q and k; attention and MLP side by side, or one after the other."""
    attn, mlp = block.attn, block.mlp
    qkv = linear(norm(x, block.ln_1), attn.qkv_proj).unflatten(1, (-1, 3 * attn.D))      # (B, H, 3D)
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    a = linear(one_query(q, keys, values, slot, k, v, seen, attn.D ** -0.5), attn.out_proj)
    if block.parallel:
        return linear(mlp.act(linear(norm(x, block.ln_2), mlp.up_proj)), mlp.down_proj) + a + x
    x = a + x
    return linear(mlp.act(linear(norm(x, block.ln_2), mlp.up_proj)), mlp.down_proj) + x


def logits(x, ln_f, lm_head):
    return linear(norm(x, ln_f), lm_head)                                  # (B, V)


# ------------------------------------------------------------------------------------------------
# The step
# ------------------------------------------------------------------------------------------------

class Step:
    """What model(new, mask, position_ids, cache=cache).logits[:, -1] is for one new token a row.

    Made once for each text; what is compiled is kept for the whole process, and on disk by torch.
    Raises RuntimeError where there is no C++ compiler for a model on a CPU.
    """

    neo_block, neox_block, logits = (
        torch.compile(f, fullgraph=True) for f in (neo_block, neox_block, logits))      # or an error

    def __init__(self, model, cache):
        check_compiler(model.device)
        # Another model, dtype or batch is another compilation.  At torch's limit of 8 the ninth would
        # silently run uncompiled, slower than torch's own kernels and less exact.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.model, self.cache = model, cache
        self.family = Step.neox_block if isinstance(model.config, GPTNeoXConfig) else Step.neo_block
        for slots in (*cache.keys, *cache.values):         # one compilation for caches of any length
            torch._dynamo.maybe_mark_dynamic(slots, 2)
        self.everything = torch.ones(cache.batch_size, cache.max_length, dtype=torch.bool, device=model.device)

    @torch.no_grad()
    def __call__(self, new, mask, position_ids):
        """new (B, 1) ids, mask (B, length + 1), position_ids (B, 1) -> logits (B, V)."""
        transformer, cache = self.model.transformer, self.cache
        cache.check(*new.shape)
        x = transformer.embed(new[:, 0])                                   # (B, C)
        extra = ()
        if self.family is Step.neox_block:
            cos, sin = rotary_tables(position_ids, self.model.config.rotary_ndims,
                                     self.model.config.rotary_emb_base, x.dtype)
            extra = cos[:, 0], sin[:, 0]                                   # (B, 1, R/2)
        else:
            x = x + transformer.pos_embed(position_ids[:, 0])
        places = {n: self.place(n, mask) for n in {keys.size(2) for keys in cache.keys}}
        for block, keys, values in zip(transformer.blocks, cache.keys, cache.values):
            x = self.family(block, x, keys, values, *places[keys.size(2)], *extra)
        cache.advance(1)
        return Step.logits(x, transformer.ln_f, self.model.lm_head)

    def place(self, slots, mask):
        """For a layer with so many slots: the one to write (1,), and which of them are seen (B, S)."""
        past = self.cache.length
        S = min(past + 1, slots)
        slot = torch.tensor([past % slots], device=mask.device)
        if mask.all():
            seen = self.everything[:, :S]
        else:                                              # mask columns, newest last, in slot order
            seen = mask[:, -S:].bool()
            seen = seen if past < slots else seen.roll((past + 1) % slots, dims=1)
        seen = seen.contiguous()
        torch._dynamo.maybe_mark_dynamic(seen, 1)
        return slot, seen


def check_compiler(device):
    """Raise RuntimeError if torch.compile would find no C++ compiler."""
    names = [os.environ.get("CXX"), "g++", "clang++"]
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise RuntimeError("compiled decoding needs a C++ compiler (g++ or clang++, or the one that CXX "
                           "names), and none was found; install one, or leave compile out")
