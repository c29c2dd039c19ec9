"""The compiled decode step: one new token, at nearly the speed of reading the weights from memory.

    model.generate(ids, compile=True)            python generate.py --compile "HAMLET."

    B  rows · H  heads · D  width of one head · S  keys in view · C  width · V  vocabulary

The parts that are compiled are the model's own: each Block of neo.py or neox.py, and the output
head, with their hooks, wrappers and replaced layers.  A step reads every weight once and computes
little, so it cannot take less time than the bytes of the weights divided by the bandwidth of the
memory.  On a CPU two functions of torch take much longer, and the compiled parts use others:

    one_row     F.linear as multiply and sum.  Compiled, it reads the matrix twice as fast as
                torch's linear does for one row in float32, and 1.5 times as fast in bfloat16
                (benchmark.py ceilings; fast/linear.py has the form without a compiler).
    one_query   F.scaled_dot_product_attention as two such sums with a softmax between them.

torch.compile turns each block into a few loops.  `whole` prevents it from merging the LayerNorm
before a matrix into the loop over the rows of the matrix, where it would be computed again for
every row.  Blocks of the same kind share a compilation.  Lengths are dynamic, and the slots of a
KVCache never move, so there is one compilation for a partly and one for a completely filled cache.
`generate` leaves one slot free, so that only the rings of local layers are ever completely filled.

For the prompt only `unpack` of quantize.py is compiled: with many rows torch's own matrix product
is fast.
"""

import contextlib
import os
import shutil

import torch
import torch.nn.functional as F
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.overrides import TorchFunctionMode

from attention import at_least_float32
from fast.linear import RUNNERS, few_rows
from quantize import UNPACKER, unpack, whole

# ------------------------------------------------------------------------------------------------
# The two functions
# ------------------------------------------------------------------------------------------------

def one_row(x, weight, bias=None):
    """F.linear: x (..., K) -> (..., N).  For more than one row torch's matrix product is faster."""
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


class Instead(TorchFunctionMode):
    """A context in which functions of torch are replaced: `with Instead({F.linear: mine}): ...`

    Layers are called as always, and their weights are never read.  Each call of a torch function
    inside costs some microseconds, but here only once, while the compiler traces it.
    """

    def __init__(self, table):
        super().__init__()
        self.table = table

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.table.get(function, function)(*args, **(kwargs or {}))


class Slots:
    """One layer of a KVCache for one new token.

    keys, values (B, H, slots, D); slot (1,) is where the token is written; seen (B, S) bool, the
    mask of the slots that it reads.
    """

    def __init__(self, keys, values, slot, seen):
        self.keys, self.values, self.slot, self.seen = keys, values, slot, seen

    def append(self, layer, k, v, key_mask):
        """KVCache.append for k, v (B, H, 1, D); another S needs no new compilation."""
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
# torch.compile compiles anew for every other model, dtype or batch size, and keeps 8 by default.
# Here it keeps so many; when one more is needed, all of them are dropped.
MOST = 64
LIMIT, TOO_MANY = "recompile_limit", "FailOnRecompileLimitHit"
if not hasattr(torch._dynamo.config, LIMIT):               # their names in torch 2.6
    LIMIT, TOO_MANY = "cache_size_limit", "FailOnCacheLimitHit"
TOO_MANY = getattr(torch._dynamo.exc, TOO_MANY)
# By default torch.compile ignores hooks that are added after the compilation.
LOOK_FOR_HOOKS = {"skip_nnmodule_hook_guards": False}
# For the prompt.  dynamic: one compilation for matrices of all sizes.
compiled_unpack = torch.compile(unpack, fullgraph=True, dynamic=True)


# ------------------------------------------------------------------------------------------------
# The step
# ------------------------------------------------------------------------------------------------

class Step:
    """Computes model(new, mask, position_ids, cache=cache).logits[:, -1] for one new token a row.

    Make one for each text; the compiled code is kept for the whole process, and on disk by torch.
    Raises RuntimeError if a model on a CPU finds no C++ compiler, if dropout is on, and, at the
    first token, if torch.compile does not support a part of the model or has the whole of it.
    """

    def __init__(self, model, cache):
        check_compiler(model.device)
        keep_code_apart()
        check_dropout(model)
        self.model, self.cache, self.settings = model, cache, compiler_settings()
        self.layers = {block: i for i, block in enumerate(model.transformer.blocks)}
        self.everything = torch.ones(cache.batch_size, cache.max_length, dtype=torch.bool,
                                     device=model.device)

    @staticmethod                          # here, so that sampling.py reaches it without an import
    @contextlib.contextmanager
    def compiled_unpacking():
        """A context in which quantized matrices are unpacked by compiled code: for the prompt.

        Nothing else is compiled there, because with many rows torch's own matrix product is fast.
        """
        def unpacker(*given):
            or_drop_and_retry(lambda: compiled_unpack(*given), unpack)

        before = UNPACKER.set(unpacker)
        try:
            with compiler_settings():
                yield
        finally:
            UNPACKER.reset(before)

    @torch.no_grad()
    def __call__(self, new, mask, position_ids):
        """new (B, 1) ids, mask (B, length + 1), position_ids (B, 1) -> logits (B, V)."""
        self.places = {}
        before = RUNNERS.set({self.model: compiled_head, self.model.transformer: self.run_block})
        try:
            with self.settings:
                logits = or_drop_and_retry(lambda: self.logits(new, mask, position_ids),
                                           block_forms, head_forms)
        finally:
            RUNNERS.reset(before)
        if not self.places:                                # no block was called by run_block
            raise RuntimeError("compile=True: torch.compile already compiles this model as a "
                               "whole; leave compile out")
        return logits

    def logits(self, new, mask, position_ids):
        """The model's own forward pass.  Until its end the cache counts no new token."""
        out = self.model(new, mask, position_ids, cache=self.cache, logits_to_keep=1)
        return out.logits[:, -1]

    def run_block(self, block, x, *, cache, key_mask, backend, return_weights, **how):
        """What PreTrainedModel.run calls instead: the same with the compiled block."""
        layer = self.layers[block]
        keys, values = cache.keys[layer], cache.values[layer]
        n = keys.size(2)
        if n not in self.places:
            self.places[n] = self.place(n, key_mask)
        for slots in (keys, values):                       # one compilation for any cache length
            torch._dynamo.maybe_mark_dynamic(slots, 2)
        return compiled_block(block, x, (keys, values, *self.places[n]), {**how, "backend": "sdpa"})

    def place(self, slots, key_mask):
        """For a layer with so many slots: the slot to write (1,), and the mask `seen` (B, S)."""
        past = self.cache.length
        S = min(past + 1, slots)
        slot = torch.tensor([past % slots], device=self.everything.device)
        if key_mask is None:
            seen = self.everything[:, :S]
        else:                                              # the newest S columns, in order of slots
            seen = key_mask[:, -S:]
            seen = seen if past < slots else seen.roll((past + 1) % slots, dims=1)
        seen = seen.contiguous()
        torch._dynamo.maybe_mark_dynamic(seen, 1)
        return slot, seen


def compiler_settings():
    """A context with our settings of torch's compiler.

    A Step makes it once and enters it for each token: in torch 2.13 each one takes memory for ever.
    """
    most = max(getattr(torch._dynamo.config, LIMIT), MOST)
    return torch._dynamo.config.patch({LIMIT: most, **LOOK_FOR_HOOKS})


def or_drop_and_retry(compute, *functions):
    """The result of compute().

    If torch keeps no more compilations of `functions`, all of them are dropped, and it is computed
    again.  Raises RuntimeError if torch.compile does not support what is computed.
    """
    try:
        try:
            return compute()
        except TOO_MANY:
            for function in functions:
                torch._dynamo.eval_frame.remove_from_cache(function)
            return compute()
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError("compile=True: torch.compile cannot take this model as it is "
                           f"({reason}); leave compile out") from error


def check_dropout(model):
    """Raise RuntimeError if dropout is on: compiled code would draw other random numbers."""
    rates = [getattr(module, name, 0.0) for module in model.modules() if module.training
             for name in ("p", "attention_dropout")]
    if any(isinstance(rate, float) and rate > 0 for rate in rates):
        raise RuntimeError("compile=True decodes without dropout, and this model is in training "
                           "mode; call model.eval() first")


def keep_code_apart():
    """Give the compiled code of other instructions a folder of its own.

    torch keeps compiled code on disk and does not ask for which instructions it was made.  With the
    code of another ATEN_CPU_CAPABILITY a process ended in "double free or corruption".
    """
    instructions = os.environ.get("ATEN_CPU_CAPABILITY")
    default = default_cache_dir()                          # which torch itself writes there too
    if instructions and os.environ.get("TORCHINDUCTOR_CACHE_DIR", default) == default:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{default}_{instructions}"


def check_compiler(device):
    """Raise RuntimeError if torch.compile would find no C++ compiler."""
    names = [os.environ.get("CXX"), "g++", "clang++"]
    if device.type == "cpu" and not any(name and shutil.which(name) for name in names):
        raise RuntimeError("compiled decoding needs a C++ compiler (g++ or clang++, or the one "
                           "that CXX names), and none was found; install one, or leave compile out")
