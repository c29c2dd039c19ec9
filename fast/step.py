"""One token at a time, compiled: the step of generation near the memory's speed.

    model.generate(ids, compile=True)            python generate.py --compile "HAMLET."

    B  rows · H  heads · D  width of one head · S  keys in view · C  width · V  vocabulary

What is compiled is the model's own: each Block of neo.py or neox.py and the output head, with
whatever hooks, wrappers and other layers they have.  A step reads every weight once and computes
next to nothing, so its floor is bytes over bandwidth.  Two of torch's functions keep a CPU from
it, and within a compiled part each has another form in its place:

    one_row     F.linear as multiply and sum.  Compiled, it streams the matrix twice as fast as
                torch's linear does for one row in float32, and half again as fast in bfloat16
                (benchmark.py ceilings; fast/linear.py has the form without a compiler).
    one_query   F.scaled_dot_product_attention as two such sums with a softmax between them.

torch.compile turns each block into a few loops; `whole` keeps it from folding the LayerNorm before
a matrix into the loop over the matrix, where it would be computed again for every row.  Blocks that
are alike share what is compiled: lengths are dynamic, and the cache is a KVCache, whose slots never
move, so there is one compilation for a cache partly and one for a cache wholly filled.
"""

import os
import shutil

import torch
import torch.nn.functional as F

from attention import at_least_float32
from fast.linear import Instead, few_rows

# ------------------------------------------------------------------------------------------------
# The two forms
# ------------------------------------------------------------------------------------------------

def whole(x):
    """x itself; to the compiler a tensor that has to be finished before anyone reads it."""
    return x.as_strided(x.shape, x.stride())


def one_row(x, weight, bias=None):
    """F.linear for x (..., K) -> (..., N).  For more rows than one a matrix product of torch's wins."""
    rows, K = x.numel() // x.size(-1), x.size(-1)
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    if rows > 1:
        few = rows <= 16 and x.dtype == torch.float32 and x.device.type == "cpu"
        y = few_rows(x.reshape(rows, K), weight, bias) if few else F.linear(x, weight, bias)
        return y.view(*x.shape[:-1], -1)
    y = (weight * whole(x.reshape(1, K))).sum(-1, dtype=at_least_float32(x.dtype))       # (N,)
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], -1)


def one_query(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """F.scaled_dot_product_attention for q (B, H, 1, D) and k, v (B, H, S, D) -> (B, H, 1, D)"""
    if torch.is_autocast_enabled(q.device.type):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    scores = (k * q).sum(-1, dtype=at_least_float32(q.dtype)) * scale                    # (B, H, S)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask[..., 0, :], torch.finfo(scores.dtype).min)
    weights = whole(scores.softmax(-1))
    return (v * weights[..., None]).sum(2, keepdim=True).to(q.dtype)


FORMS = {F.linear: one_row, F.scaled_dot_product_attention: one_query}


class Slots:
    """One layer of a KVCache for one new token: the slot to write (1,), and which are seen (B, S)."""

    def __init__(self, keys, values, slot, seen):
        self.keys, self.values, self.slot, self.seen = keys, values, slot, seen

    def append(self, layer, k, v, key_mask):
        """KVCache.append for k, v (B, H, 1, D); how many are seen may differ without compiling anew."""
        self.keys.index_copy_(2, self.slot, k.to(self.keys.dtype))
        self.values.index_copy_(2, self.slot, v.to(self.values.dtype))
        S = self.seen.size(1)
        return self.keys[:, :, :S], self.values[:, :, :S], self.seen


def block_forms(block, x, slots, how):
    with Instead(FORMS):
        return block(x, cache=Slots(*slots), **how)


def head_forms(head, x):
    with Instead(FORMS):
        return head(x)


compiled_block, compiled_head = (torch.compile(f, fullgraph=True)          # all of it, or an error
                                 for f in (block_forms, head_forms))
# torch.compile overlooks hooks that come later, unless it is told to look for them at every call.
LOOK_FOR_HOOKS = {"skip_nnmodule_hook_guards": False}


# ------------------------------------------------------------------------------------------------
# The step
# ------------------------------------------------------------------------------------------------

class Step:
    """What model(new, mask, position_ids, cache=cache).logits[:, -1] is for one new token a row.

    Made once for each text; what is compiled is kept for the whole process, and on disk by torch.
    Raises RuntimeError where there is no C++ compiler for a model on a CPU, where dropout is on,
    and, at the first token, where the compiler cannot take a part of the model.
    """

    def __init__(self, model, cache):
        check_compiler(model.device)
        check_dropout(model)
        # Another model, dtype or batch is another compilation.  At torch's limit of 8 the ninth would
        # silently run uncompiled, slower than torch's own kernels and less exact.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.model, self.cache = model, cache
        self.layers = {block: i for i, block in enumerate(model.transformer.blocks)}
        self.everything = torch.ones(cache.batch_size, cache.max_length, dtype=torch.bool,
                                     device=model.device)

    @torch.no_grad()
    def __call__(self, new, mask, position_ids):
        """new (B, 1) ids, mask (B, length + 1), position_ids (B, 1) -> logits (B, V)."""
        self.places = {}
        self.model.run, self.model.transformer.run = compiled_head, self.run_block
        try:
            with torch._dynamo.config.patch(LOOK_FOR_HOOKS):
                out = self.model(new, mask, position_ids, cache=self.cache, logits_to_keep=1)
            return out.logits[:, -1]
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError("compile=True: torch.compile cannot take this model as it is "
                               f"({reason}); leave compile out") from error
        finally:
            del self.model.run, self.model.transformer.run

    def run_block(self, block, x, *, cache, key_mask, backend, return_weights, **how):
        """What transformer.run does, by the compiled block."""
        layer = self.layers[block]
        keys, values = cache.keys[layer], cache.values[layer]
        n = keys.size(2)
        if n not in self.places:
            self.places[n] = self.place(n, key_mask)
        for slots in (keys, values):                       # one compilation for caches of any length
            torch._dynamo.maybe_mark_dynamic(slots, 2)
        return compiled_block(block, x, (keys, values, *self.places[n]), {**how, "backend": "sdpa"})

    def place(self, slots, key_mask):
        """For a layer with so many slots: the one to write (1,), and which of them are seen (B, S)."""
        past = self.cache.length
        S = min(past + 1, slots)
        slot = torch.tensor([past % slots], device=self.everything.device)
        if key_mask is None:
            seen = self.everything[:, :S]
        else:                                              # mask columns, newest last, in slot order
            seen = key_mask[:, -S:]
            seen = seen if past < slots else seen.roll((past + 1) % slots, dims=1)
        seen = seen.contiguous()
        torch._dynamo.maybe_mark_dynamic(seen, 1)
        return slot, seen


def check_dropout(model):
    """Raise RuntimeError if dropout is on: compiled, it would draw other numbers than uncompiled."""
    rates = [getattr(module, name, 0.0) for module in model.modules() if module.training
             for name in ("p", "attention_dropout")]
    if any(isinstance(rate, float) and rate > 0 for rate in rates):
        raise RuntimeError("compile=True decodes without dropout, and this model is in training mode; "
                           "call model.eval() first")


def check_compiler(device):
    """Raise RuntimeError if torch.compile would find no C++ compiler."""
    names = [os.environ.get("CXX"), "g++", "clang++"]
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise RuntimeError("compiled decoding needs a C++ compiler (g++ or clang++, or the one that CXX "
                           "names), and none was found; install one, or leave compile out")
