"""Causal attention: the rule, the definition, what models call, the cache, and faster forms.

    B  batch                        H  heads
    T  queries: the new tokens      S  keys in view: cached + new, S >= T
    D  width of one head            W  window of a local layer, in tokens

Every backend takes q (B, H, T, D) and k, v (B, H, S, D), where the T queries are the *last* T of
the S positions, and returns (B, H, T, D) in v's dtype.

    visible      which keys may a query read?  One rule for prefill, decode and chunks.
    naive        the definition.  Bit-identical to transformers' eager attention, and slow.
    attention    the one function that models call; it chooses the backend.
    KVCache      keeps keys and values; a local layer keeps only those of its window.

    sdpa         torch's fused kernel; on a local layer it computes nothing outside the window.
    triton       our own kernel, forward and backward, which reads only the keys in the window.
    flash        the flash-attn package.
"""

from __future__ import annotations  # tl.constexpr can be written without triton

import functools
import math
import os
import sys

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

# ------------------------------------------------------------------------------------------------
# The rule
# ------------------------------------------------------------------------------------------------

def visible(T, S, window=None, device=None):
    """May query row i read key column j?  -> (T, S) bool

    Query i and key j are positions in the same text; the answer is 0 <= i - j < window.
    So the window counts the query itself: `window` keys in all, not `window` keys before it.
    (mesh-tensorflow's local attention reads (p - radius, p]; transformers' GPTNeoSelfAttention
    takes the exclusive or of two triangles, which is the same.)

    The last query is the last position.  Because positions are counted from this lower-right
    corner, one rule serves prefill (T == S), decode (T == 1) and a chunk of tokens on a filled
    cache (1 < T < S).
    """
    i = torch.arange(S - T, S, device=device)[:, None]    # (T, 1) position of each query
    j = torch.arange(S, device=device)[None, :]           # (1, S) position of each key
    if window is None:
        return j <= i                                     # global: everything up to itself
    return (j <= i) & (i - j < window)                    # local: itself and window - 1 before it


# ------------------------------------------------------------------------------------------------
# The definition
# ------------------------------------------------------------------------------------------------

def at_least_float32(dtype):
    """float16 and bfloat16 -> float32; float32 and float64 stay."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def naive(q, k, v, *, scale, window=None, key_mask=None, dropout=0.0, upcast=False,
          mask_twice=False, return_weights=False):
    """softmax(q kᵀ · scale + mask) v, in transformers' order of operations, to the last bit.

    Arguments and results are those of `attention`.

    A key that a query may not read gets the lowest finite number added to its score, so its weight
    is 0.  In a padded batch a query may have no key to read; with finite numbers its output is some
    average of the values, where -inf would give NaN.  GPT-Neo masks twice (`mask_twice`): first it
    replaces the scores that the window or the causal rule forbids, then it adds a mask of the
    causal rule and the padding.  Only the outputs of queries without a key depend on this.
    (transformers: eager_attention_forward in modeling_gpt_neox.py, GPTNeoSelfAttention._attn.)
    """
    # transformers' cache returns contiguous keys and values; other strides can round differently.
    k, v = k.contiguous(), v.contiguous()
    if upcast:
        q, k = q.to(at_least_float32(q.dtype)), k.to(at_least_float32(k.dtype))
    scores = q @ k.transpose(-2, -1)                                       # (B, H, T, S)
    if scale != 1.0:
        scores = scores * scale
    T, S = q.size(-2), k.size(-2)
    allowed = visible(T, S, window, q.device)                              # (T, S)
    lowest = torch.finfo(scores.dtype).min
    if mask_twice:
        scores = scores.masked_fill(~allowed, lowest)
        allowed, lowest = visible(T, S, None, q.device), torch.finfo(v.dtype).min
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]                     # (B, 1, T, S)
    scores = scores + torch.zeros_like(allowed, dtype=scores.dtype).masked_fill(~allowed, lowest)
    if key_mask is not None:
        # In float16 the sum can become -inf.  Where that happens to a whole row, transformers'
        # output is NaN, which the next layers spread to other tokens; here it stays finite.
        scores = scores.masked_fill(scores.amax(-1, keepdim=True).isneginf(), 0.0)
    weights = scores.softmax(-1, dtype=at_least_float32(scores.dtype)).to(v.dtype)
    weights = F.dropout(weights, dropout)                                  # (B, H, T, S)
    out = weights @ v                                                      # (B, H, T, D)
    return (out, weights) if return_weights else out


# ------------------------------------------------------------------------------------------------
# The function that models call
# ------------------------------------------------------------------------------------------------

REFERENCE_NAMES = {"eager": "naive", "flash_attention_2": "flash"}     # transformers' -> ours


def attention(q, k, v, *, scale, window=None, backend="auto", key_mask=None, dropout=0.0,
              upcast=False, mask_twice=False, return_weights=False):
    """Causal attention of the last T of S positions.

    q (B, H, T, D); k, v (B, H, S, D); key_mask (B, S) bool, False where a key is padding.
    `scale` is required: GPT-Neo's is 1.0, and a default of 1/sqrt(D) would hide that.
    `window`: a query reads the last `window` keys up to its own; with None it reads all of them.
    `dropout` drops attention weights with that probability (models pass 0.0 in eval mode).
    `upcast`: scores are computed in at least float32 (GPT-Neo), otherwise in q's dtype (GPT-NeoX).
    The softmax is computed in at least float32 in both families.
    `mask_twice`: mask as GPT-Neo does, see `naive`; the fused backends do not need it.

    A query that may read no key: in a padded batch, some queries find nothing but padding among the
    keys that they may read.  Their output is finite with every backend, but not the same:

        naive           an average of the values, as in transformers
        sdpa            attention without any mask (in a local layer, to the keys of its block)
        triton, flash   0

    This changes nothing for real tokens.  A query may always read its own key unless that key is
    padding, so a query without a key is padding itself; and no other query reads the key and the
    value of a padding token, in this layer or in a later one.  So the difference stays in the rows
    of the padding, whose hidden states and logits nobody should use (labels there are -100).

    Returns (B, H, T, D) in v's dtype; with `return_weights` also the weights (B, H, T, S).
    Raises ValueError for shapes that do not fit and for a backend that is unknown or cannot do what
    is asked, ImportError for a backend whose package is missing.
    """
    check_shapes(q, k, v, window, key_mask)
    asked, backend = backend, choose_backend(backend, return_weights)
    if asked == "auto" and backend == "sdpa" and our_kernel_wins(q, k, v, dropout, upcast):
        backend = "triton"
    options = dict(scale=scale, window=window, key_mask=key_mask, dropout=dropout, upcast=upcast)
    if backend == "naive":
        options |= dict(mask_twice=mask_twice, return_weights=return_weights)
    return BACKENDS[backend](q, k, v, **options)


def choose_backend(name="auto", return_weights=False):
    """The name of the backend that will run.  "auto" is decided here, any other name is checked.

    (On a GPU `attention` takes triton for some calls of "auto", see prefers_triton.)

    Raises ValueError for an unknown name, or if a fused backend is asked for attention weights,
    which it never computes as a whole; ImportError if the backend's package is missing.  A backend
    that is asked for by name is never replaced by another.
    """
    if name == "auto":
        return "naive" if return_weights else "sdpa"
    name = REFERENCE_NAMES.get(name, name)
    if name not in BACKENDS:
        known = ["auto", *BACKENDS, *REFERENCE_NAMES]
        raise ValueError(f"unknown attention backend {name!r}; choose one of {', '.join(known)}")
    if return_weights and name != "naive":
        raise ValueError(f"backend {name!r} never forms the attention weights; to see them use "
                         "attn_implementation='naive' or 'auto'")
    if name == "triton":
        import_triton()
    if name == "flash":
        import_flash()
    return name


def prefers_triton(on_gpu, dtype, upcast):
    """Does "auto" take the Triton kernel for the prefill of such a model?

    Yes for GPT-Neo (`upcast`) in half precision on a GPU: torch's kernels must compute its scores
    in float32 and have no window.  On an H200 our kernel was 2 to 29 times as fast in the forward
    pass, and 0.8 (256 tokens) to 12 times with the backward pass (benchmarks/README.md).  In
    float32 it uses no tensor cores, and for one new token it was not measured.
    """
    return on_gpu and triton is not None and upcast and dtype in (torch.float16, torch.bfloat16)


def our_kernel_wins(q, k, v, dropout, upcast):
    """Does "auto" take the Triton kernel for this call?

    Only if the kernel can do what is asked.  torch.func and forward mode need torch's own
    operations.
    """
    return (prefers_triton(q.is_cuda, q.dtype, upcast) and q.dtype == k.dtype == v.dtype
            and q.size(2) > 1 and q.size(3) <= 256 and not dropout
            and not is_traced() and not within_transform())


def check_shapes(q, k, v, window, key_mask):
    """Raise ValueError, with the shapes, for tensors or a window that fit no backend."""
    query, key = q.shape, k.shape
    fits = (len(query) == len(key) == 4 and key == v.shape and query[:2] == key[:2]
            and query[3] == key[3] and 1 <= query[2] <= key[2])
    if not fits:
        raise ValueError("attention needs q (B, H, T, D) and k, v (B, H, S, D) with 1 <= T <= S, "
                         f"got q {tuple(query)}, k {tuple(key)}, v {tuple(v.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query itself), got {window}")
    if key_mask is not None and (key_mask.dtype != torch.bool
                                 or key_mask.shape != (k.size(0), k.size(-2))):
        raise ValueError(f"key_mask must be bool of shape (B, S) = {(k.size(0), k.size(-2))}, got "
                         f"{key_mask.dtype} of shape {tuple(key_mask.shape)}")


# ------------------------------------------------------------------------------------------------
# The cache
# ------------------------------------------------------------------------------------------------

class KVCache:
    """Keys and values of the tokens so far, in buffers that are allocated once.

    A global layer has a slot for each of `max_length` positions.  A local layer has `window` slots
    and uses them as a ring buffer: position p is in slot p % window.  That is enough, since no
    later query can read further back.  At 2048 tokens GPT-Neo's cache has 56.25 % of the size of
    one that keeps everything.

    `length` is the number of tokens in the cache.  It grows once per forward pass, after the last
    layer, so that all layers of a pass see the same length.
    """

    def __init__(self, config, batch_size, max_length, dtype=torch.float32, device=None, shares=1):
        """config: GPTNeoConfig or GPTNeoXConfig; its heads, head_dim and windows are used.

        shares: among how many processes the heads are shared (parallel.py); each caches its own.
        """
        self.length, self.max_length, self.batch_size = 0, max_length, batch_size
        H, D = config.num_attention_heads // shares, config.head_dim
        slots = [max_length if w is None else min(w, max_length) for w in config.windows]
        self.keys = [torch.zeros(batch_size, H, n, D, dtype=dtype, device=device) for n in slots]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    @property
    def nbytes(self):
        """Size in bytes, over all layers."""
        return sum(x.nbytes for x in [*self.keys, *self.values])

    def check(self, B, T):
        """Raise ValueError, with the numbers, if T more tokens of B rows do not fit."""
        if B != self.batch_size:
            raise ValueError(f"the cache was made for a batch of {self.batch_size}, got {B}")
        if self.length + T > self.max_length:
            raise ValueError(f"the cache holds {self.length} of at most {self.max_length} tokens; "
                             f"{T} more do not fit")

    def append(self, layer, k, v, key_mask=None):
        """Store one layer's new k, v (B, H, T, D); return the keys that its T queries may read.

        Returns keys and values (B, H, S, D) and the columns of `key_mask` (B, length + T) that
        belong to them.  Keys are in order of position, except for one new token on a full ring:
        then every key is visible, and attention does not depend on their order.
        """
        if self.length == 0:               # under autocast k and v differ in dtype from the buffers
            self.keys[layer] = self.keys[layer].to(k.dtype)
            self.values[layer] = self.values[layer].to(v.dtype)
        keys, values = self.keys[layer], self.values[layer]
        k, v = k.to(keys.dtype), v.to(values.dtype)
        ring, past, T = keys.size(2), self.length, k.size(2)
        if past + T <= ring:                                       # there are free slots for all
            keys[:, :, past:past + T], values[:, :, past:past + T] = k, v
            return keys[:, :, :past + T], values[:, :, :past + T], key_mask

        if T == 1:                                                 # overwrite the oldest
            slot = past % ring
            keys[:, :, slot], values[:, :, slot] = k[:, :, 0], v[:, :, 0]
            if key_mask is not None:                               # bring the columns in slot order
                key_mask = key_mask[:, -ring:].roll((past + 1) % ring, dims=1)
            return keys, values, key_mask

        # The chunk does not fit into the free slots.  Its first queries still read old keys whose
        # slots its last tokens will take.  So first copy the old keys, in order, with the new ones
        # behind them, and then overwrite the slots.
        kept = min(past, ring)
        old = torch.arange(past - kept, past, device=k.device) % ring
        new = torch.arange(past + T - min(T, ring), past + T, device=k.device)
        seen_k = torch.cat([keys[:, :, old], k], dim=2) if kept else k      # (B, H, kept + T, D)
        seen_v = torch.cat([values[:, :, old], v], dim=2) if kept else v
        keys[:, :, new % ring] = k[:, :, new - past]
        values[:, :, new % ring] = v[:, :, new - past]
        return seen_k, seen_v, None if key_mask is None else key_mask[:, -(kept + T):]

    def advance(self, T):
        """Add T to `length`, after the T tokens have passed through every layer."""
        self.length += T

    def keep(self, rows):
        """Keep these rows of the batch and drop the others: rows (B,) bool."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.batch_size = int(rows.sum())


# ------------------------------------------------------------------------------------------------
# The same, by torch's fused kernel
# ------------------------------------------------------------------------------------------------

def sdpa(q, k, v, *, scale, window=None, key_mask=None, dropout=0.0, upcast=False):
    """torch's scaled_dot_product_attention, which never writes the (T, S) scores to memory.

    Its kernels have no window.  A (T, S) mask would give the right result, but the work would be
    quadratic in T.  So the queries of a local layer are split into blocks; a block of `window`
    queries needs the keys of its own block and of the block before it, and no others:

        keys     |  0   |  1   |  2   |  3   |
        block 0  |▜     |                        ▜ causal edge
        block 1  |  ▙   |▜     |                 ▙ window edge
        block 2         |  ▙   |▜     |
        block 3                |  ▙   |▜     |
    """
    dtype = v.dtype
    if upcast:
        q, k, v = (x.to(at_least_float32(x.dtype)) for x in (q, k, v))
    T, S = q.size(-2), k.size(-2)
    if window is None or one_graph() or window >= S:
        return fused(q, k, v, scale, window, key_mask, dropout).to(dtype)

    block = max(window, 64)                    # smaller blocks: the calls cost more than they save
    parts = []
    for rows in q.split(block, dim=-2):
        end = S - T + sum(part.size(-2) for part in parts) + rows.size(-2)  # last row's key + 1
        begin = max(0, end - rows.size(-2) - window + 1)                    # first row's first key
        parts.append(fused(rows, k[:, :, begin:end], v[:, :, begin:end], scale, window,
                           None if key_mask is None else key_mask[:, begin:end], dropout))
    return torch.cat(parts, dim=-2).to(dtype)


def fused(q, k, v, scale, window, key_mask, dropout):
    """One call of torch's kernel; it gets a mask only if its option is_causal is not enough."""
    T, S = q.size(-2), k.size(-2)
    unlimited = window is None or not one_graph() and window >= S
    square, everything = T == S and unlimited, T == 1 and unlimited
    allowed = None
    if key_mask is not None or not (square or everything):
        allowed = visible(T, S, window, q.device)                           # (T, S)
        if key_mask is not None:
            allowed = allowed & key_mask[:, None, None, :]                  # (B, 1, T, S)
            # A query that may read no key reads all of them.  Its output is not used, but it must
            # be finite: for an empty row cuDNN's kernel makes every gradient of k and v NaN.
            allowed = allowed | ~allowed.any(-1, keepdim=True)
    options = dict(attn_mask=allowed, is_causal=allowed is None and square, scale=scale)
    traced, grads = is_traced(), torch.is_grad_enabled()
    if within_transform() and (traced or grads):
        return in_plain_operations(q, k, v, dropout_p=dropout, **options)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options)
    if traced or dropout or not grads:
        return y
    return DerivableTwice.apply(y, functools.partial(in_plain_operations, **options), q, k, v)


def one_graph():
    """Does torch.export trace this call?  Then one graph, without blocks, serves every length."""
    return getattr(torch.compiler, "is_exporting", bool)()                  # since torch 2.7


def is_traced():
    """Does torch.compile or torch.export trace this call?

    torch.compiler.is_compiling() does not answer this: while one thread compiles, it is true in
    all threads.  is_exporting() is so too; do not generate in one thread while another exports.
    """
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # since 2.7
    return torch.compiler.is_dynamo_compiling() or exporting()


def within_transform():
    """Is this a call inside torch.func (grad, vmap, jvp, functionalize, …) or forward mode?"""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def in_plain_operations(q, k, v, **options):
    """torch's scaled_dot_product_attention, composed of operations that have every derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **options)


class DerivableTwice(torch.autograd.Function):
    """y, the result of a fused kernel, with a gradient that can be differentiated again.

    The gradient of a fused kernel cannot be differentiated.  So with create_graph=True, or under
    torch.func, the backward pass returns the gradient of `plain`, which computes the same function
    of q, k and v by torch's plain operations, and passes none to the kernel.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y, plain, q, k, v):
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.plain, *qkv = inputs
        ctx.save_for_backward(*qkv)
        ctx.dtype = output.dtype                           # under autocast not that of q, k and v

    @staticmethod
    def backward(ctx, grad):
        if not torch.is_grad_enabled():
            return grad, None, None, None, None
        with torch._C._DisableAutocast():
            _, pull = torch.func.vjp(lambda *qkv: ctx.plain(*(x.to(ctx.dtype) for x in qkv)),
                                     *ctx.saved_tensors)
            return None, None, *pull(grad)


# ------------------------------------------------------------------------------------------------
# The same, as a Triton kernel that knows the window
# ------------------------------------------------------------------------------------------------
#
# Each program computes one block of queries of one head (for dk and dv: one block of keys) and
# visits only the blocks of keys (of queries) that the window reaches, so the work is T · window
# and not T².
#
#     forward    s  = q kᵀ · scale       p  = exp(s - m)         l = Σ p       o = p v / l
#     backward   p  = exp(s - m) / l     dp = do vᵀ              delta = Σ p dp
#                ds = p (dp - delta)     dq = ds k · scale       dk = dsᵀ q · scale    dv = pᵀ do
#
# m is the largest score of a row.  It is known only at the end, so the forward pass keeps the
# largest so far and, whenever that rises, scales down what it has summed (online softmax: Milakov
# and Gimelshein 2018; the tiling is FlashAttention's, Dao et al. 2022).
#
# The backward pass computes p again from q, k, m and l.  If a score were rounded in another way
# than in the forward pass, p could become larger than 1 where one key has all the weight, and could
# even overflow.  So both backward kernels multiply q by kᵀ as the forward pass does, in blocks of
# queries that begin at the same rows, and never let s - m be more than 0.
#
# Addresses are a 64-bit base plus 32-bit offsets: an offset within a block always fits 32 bits, an
# offset within a whole tensor may not.

def asked_to_interpret():
    """Does the environment switch on Triton's interpreter?  Triton accepts the same values."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


# Importing Triton takes 0.2 s and 50 MB, so it is imported only where its kernels can run, or where
# it has been imported already (benchmarks/kernels.py does so, to compile without a GPU).
triton, no_triton = None, ("there is no CUDA GPU; without one, set TRITON_INTERPRET=1 before "
                           "Python starts (slow), or use 'sdpa'")
if torch.cuda.is_available() or asked_to_interpret() or "triton" in sys.modules:
    try:
        import triton
        import triton.language as tl
    except Exception as error:                             # a broken package raises anything
        no_triton = f"importing the triton package failed ({error}); pip install triton==3.7.1"


def jit(kernel):
    """triton.jit; without Triton the function itself, which then cannot be run."""
    # do_not_specialize: otherwise Triton would compile again for some of the lengths.
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=("T", "S", "window"))


@jit
def rows_of(X, strides, batch, head, first, N: tl.constexpr, D_PAD: tl.constexpr):
    """Addresses of rows first ... first + N - 1 of one head: (N, D_PAD)."""
    base = X + batch * strides[0] + head * strides[1] + tl.cast(first, tl.int64) * strides[2]
    return base + tl.arange(0, N)[:, None] * strides[2] + tl.arange(0, D_PAD)[None, :]


@jit
def load(X, strides, batch, head, first, ok, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows first, first + 1, … of one head, 0 where not `ok` and beyond D: (len(ok), D_PAD)."""
    at = rows_of(X, strides, batch, head, first, ok.shape[0], D_PAD)
    return tl.load(at, mask=ok[:, None] & (tl.arange(0, D_PAD) < D)[None, :], other=0.0)


@jit
def store(X, strides, batch, head, first, ok, value, D: tl.constexpr, D_PAD: tl.constexpr):
    """Write the rows that `load` reads, rounded to X's dtype."""
    at = rows_of(X, strides, batch, head, first, ok.shape[0], D_PAD)
    tl.store(at, value.to(X.dtype.element_ty),
             mask=ok[:, None] & (tl.arange(0, D_PAD) < D)[None, :])


@jit
def readable(KEY_MASK, batch, j, end, S):
    """Which of the keys at positions j lie before `end` and are not padding?"""
    ok = j < end
    if KEY_MASK is not None:
        ok = ok & (tl.load(KEY_MASK + batch * S + j, mask=ok, other=0) != 0)
    return ok


@jit
def shrink(SHRINK):
    """The factor for the gradients that undoes `magnified`, which has made do larger."""
    factor = 1.0
    if SHRINK is not None:
        factor = tl.load(SHRINK)
    return factor


@jit
def forward_kernel(Q, K, V, KEY_MASK, O, M, L, q_strides, k_strides, v_strides, o_strides,
                   H, T, S, window, scale,
                   D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """o, m and l of ROWS queries; keys come COLS at a time."""
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    first = tl.program_id(1) * ROWS
    row = first + tl.arange(0, ROWS)
    i = S - T + row                                                        # the queries' positions
    q = load(Q, q_strides, batch, head, first, row < T, D, D_PAD)          # (ROWS, D_PAD)

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, D_PAD), tl.float32)
    begin = tl.maximum(S - T + first - window + 1, 0)         # my first query's first key
    end = tl.minimum(S - T + first + ROWS, S)                 # my last query's own key, + 1
    for start in range(begin, end, COLS):
        j = start + tl.arange(0, COLS)
        key_ok = readable(KEY_MASK, batch, j, end, S)
        k = load(K, k_strides, batch, head, start, key_ok, D, D_PAD)       # (COLS, D_PAD)
        v = load(V, v_strides, batch, head, start, key_ok, D, D_PAD)
        gap = i[:, None] - j[None, :]
        seen = (gap >= 0) & (gap < window) & key_ok[None, :]               # `visible`, tile by tile

        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale         # (ROWS, COLS), no tf32
        s = tl.where(seen, s, float("-inf"))
        risen = tl.maximum(m, tl.max(s, 1))
        top = tl.where(risen == float("-inf"), 0.0, risen)    # nothing seen yet: no inf - inf
        p = tl.exp(s - top[:, None]).to(v.dtype)
        fade = tl.exp(m - top)
        l = l * fade + tl.sum(p.to(tl.float32), 1)            # of the p that v will meet
        o = o * fade[:, None] + tl.dot(p, v, input_precision="ieee")
        m = risen

    l = tl.where(l == 0.0, 1.0, l)                            # a row that reads nothing: o = 0
    store(O, o_strides, batch, head, first, row < T, o / l[:, None], D, D_PAD)
    line = tl.program_id(0).to(tl.int64) * T + row            # rows of M and L lie densely
    tl.store(M + line, tl.where(m == float("-inf"), 0.0, m), mask=row < T)
    tl.store(L + line, l, mask=row < T)


# delta equals Σ do · o, which would save the first sweep.  But in rows where one key has nearly all
# the weight, and GPT-Neo's unscaled scores make many of them, dp - delta is a small difference of
# large numbers: their rounding cancels only if delta is summed from the same dp.
@jit
def dq_kernel(Q, K, V, KEY_MASK, DO, M, L, DELTA, DQ,
              q_strides, k_strides, v_strides, do_strides, dq_strides,
              H, T, S, window, scale, SHRINK,
              D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """delta and dq of ROWS queries, in two sweeps over their keys."""
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    first = tl.program_id(1) * ROWS
    row = first + tl.arange(0, ROWS)
    i = S - T + row
    q = load(Q, q_strides, batch, head, first, row < T, D, D_PAD)          # (ROWS, D_PAD)
    do = load(DO, do_strides, batch, head, first, row < T, D, D_PAD)
    line = tl.program_id(0).to(tl.int64) * T + row
    m = tl.load(M + line, mask=row < T, other=0.0)
    inverse = 1.0 / tl.load(L + line, mask=row < T, other=1.0)

    delta = tl.zeros((ROWS,), tl.float32)
    dq = tl.zeros((ROWS, D_PAD), tl.float32)
    begin = tl.maximum(S - T + first - window + 1, 0)
    end = tl.minimum(S - T + first + ROWS, S)
    for sweep in tl.static_range(2):
        for start in range(begin, end, COLS):
            j = start + tl.arange(0, COLS)
            key_ok = readable(KEY_MASK, batch, j, end, S)
            k = load(K, k_strides, batch, head, start, key_ok, D, D_PAD)   # (COLS, D_PAD)
            v = load(V, v_strides, batch, head, start, key_ok, D, D_PAD)
            gap = i[:, None] - j[None, :]
            seen = (gap >= 0) & (gap < window) & key_ok[None, :]

            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale     # (ROWS, COLS)
            s = tl.where(seen, s, float("-inf"))
            p = tl.exp(tl.minimum(s - m[:, None], 0.0)) * inverse[:, None]
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            dp = tl.where(seen, dp, 0.0)
            if sweep == 0:
                delta += tl.sum(p * dp, 1)
            else:
                ds = p * (dp - delta[:, None])
                dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")

    tl.store(DELTA + line, delta, mask=row < T)
    store(DQ, dq_strides, batch, head, first, row < T, dq * scale * shrink(SHRINK), D, D_PAD)


@jit
def dkv_kernel(Q, K, V, KEY_MASK, DO, M, L, DELTA, DK, DV,
               q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
               H, T, S, window, scale, SHRINK,
               D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """dk and dv of ROWS keys, one key a row; the queries that read them come COLS at a time."""
    batch, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    first = tl.program_id(1) * ROWS
    j = first + tl.arange(0, ROWS)                                         # the keys' positions
    key_ok = readable(KEY_MASK, batch, j, S, S)
    k = load(K, k_strides, batch, head, first, key_ok, D, D_PAD)           # (ROWS, D_PAD)
    v = load(V, v_strides, batch, head, first, key_ok, D, D_PAD)

    dk = tl.zeros((ROWS, D_PAD), tl.float32)
    dv = tl.zeros((ROWS, D_PAD), tl.float32)
    begin = tl.maximum(first - (S - T), 0) // COLS * COLS     # where my first key's own query is
    end = tl.minimum(first + ROWS - 1 + window - (S - T), T)  # the last key's last query, + 1
    for start in range(begin, end, COLS):
        row = start + tl.arange(0, COLS)
        q = load(Q, q_strides, batch, head, start, row < T, D, D_PAD)      # (COLS, D_PAD)
        do = load(DO, do_strides, batch, head, start, row < T, D, D_PAD)
        line = tl.program_id(0).to(tl.int64) * T + row
        m = tl.load(M + line, mask=row < T, other=0.0)
        inverse = 1.0 / tl.load(L + line, mask=row < T, other=1.0)
        delta = tl.load(DELTA + line, mask=row < T, other=0.0)
        gap = (S - T + row)[None, :] - j[:, None]
        seen = (gap >= 0) & (gap < window) & key_ok[:, None] & (row < T)[None, :]

        s = tl.trans(tl.dot(q, tl.trans(k), input_precision="ieee")) * scale    # (ROWS, COLS)
        s = tl.where(seen, s, float("-inf"))
        p = tl.exp(tl.minimum(s - m[None, :], 0.0)) * inverse[None, :]
        dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
        dp = tl.trans(tl.dot(do, tl.trans(v), input_precision="ieee"))
        dp = tl.where(seen, dp, 0.0)
        ds = p * (dp - delta[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")

    store(DK, dk_strides, batch, head, first, j < S, dk * scale * shrink(SHRINK), D, D_PAD)
    store(DV, dv_strides, batch, head, first, j < S, dv * shrink(SHRINK), D, D_PAD)


INTERPRETED = triton is not None and not isinstance(forward_kernel, triton.JITFunction)

# ROWS, COLS, warps and stages of each kernel, by the padded width of a head: of the tiles that need
# no more registers than there are (python benchmark.py kernels), those that were fastest on an
# H200.  256 has not been timed, nor has 128 in float32, which uses no tensor cores.
HALF = {
    forward_kernel: {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
    dq_kernel:      {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 2)},
    dkv_kernel:     {64: (32, 64, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 1)},
}
FLOAT32 = {
    forward_kernel: {64: (32, 32, 4, 2), 128: (16, 16, 8, 2), 256: (16, 16, 8, 2)},
    dq_kernel:      {64: (32, 32, 4, 1), 128: (16, 16, 4, 2), 256: (16, 16, 4, 2)},
    dkv_kernel:     {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
}


def block_sizes(kernel, D, dtype):
    """Sizes of a kernel's tiles for heads D wide: keyword arguments of its launch."""
    D_PAD = max(16, 1 << (D - 1).bit_length())                             # what tl.dot multiplies
    tiles = (FLOAT32 if dtype == torch.float32 else HALF)[kernel]
    rows, cols, warps, stages = tiles[max(64, D_PAD)]
    return dict(D=D, D_PAD=D_PAD, ROWS=rows, COLS=cols, num_warps=warps, num_stages=stages)


def launch(kernel, rows, q, arguments):
    """Run one program for every pair of (batch row and head, block of `rows`)."""
    B, H, _, D = q.shape
    sizes = block_sizes(kernel, D, q.dtype)
    with torch.cuda.device_of(q):                          # Triton launches on the current device
        kernel[B * H, -(-rows // sizes["ROWS"])](*arguments, **sizes)


@torch.library.custom_op("window_attention::forward", mutates_args=())
def triton_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None,
                   scale: float, window: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o (B, H, T, D), and for every row its largest score m and its sum l, both (B, H, T).

    Both are kept, and not their log-sum-exp m + log l, whose rounding would make p less exact.
    """
    (B, H, T, _), S = q.shape, k.size(2)
    o = torch.empty_like(q)                # in q's layout: joining the heads later copies nothing
    m, l = (torch.empty(B, H, T, dtype=torch.float32, device=q.device) for _ in range(2))
    launch(forward_kernel, T, q, (q, k, v, key_mask, o, m, l, q.stride(), k.stride(), v.stride(),
                                  o.stride(), H, T, S, window, scale))
    return o, m, l


@triton_forward.register_fake
def _(q, k, v, key_mask, scale, window):
    m, l = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    return torch.empty_like(q), m, l


@torch.library.custom_op("window_attention::backward", mutates_args=())
def triton_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    key_mask: torch.Tensor | None, m: torch.Tensor, l: torch.Tensor,
                    do: torch.Tensor, scale: float, window: int
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq (B, H, T, D), dk and dv (B, H, S, D) from the gradient do (B, H, T, D)."""
    (_, H, T, _), S = q.shape, k.size(2)
    do, undo = magnified(do) if do.dtype == torch.float16 else (do, None)
    do = do if do.stride(-1) == 1 else do.contiguous()
    delta, dq, dk, dv = (torch.empty_like(x) for x in (m, q, k, v))
    inputs = (q, k, v, key_mask, do, m, l, delta)
    strides, sizes = [x.stride() for x in (q, k, v, do)], (H, T, S, window, scale, undo)
    launch(dq_kernel, T, q, (*inputs, dq, *strides, dq.stride(), *sizes))
    launch(dkv_kernel, S, q, (*inputs, dk, dv, *strides, dk.stride(), dv.stride(), *sizes))
    return dq, dk, dv


def magnified(do):
    """do times a power of two, and the inverse of that power as a tensor.

    float16 has few bits left for numbers below 6e-5, so that ds would lose most of a small
    gradient.  The largest element becomes at least 1/4; if it is already, nothing changes.
    Powers of two multiply without rounding.
    """
    _, exponent = torch.frexp(torch.linalg.vector_norm(do, math.inf, dtype=torch.float32))
    steps = (-1 - exponent).clamp(min=0)
    one = torch.ones((), device=do.device)
    return do * torch.ldexp(one, steps), torch.ldexp(one, -steps)


@triton_backward.register_fake
def _(q, k, v, key_mask, m, l, do, scale, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def save_for_backward(ctx, inputs, output):
    (q, k, v, key_mask, ctx.scale, ctx.window), (_, m, l) = inputs, output
    ctx.save_for_backward(q, k, v, key_mask, m, l)


def run_backward(ctx, do, dm, dl):
    """dq, dk, dv; computed by the definition if they are to be differentiated (create_graph)."""
    q, k, v, key_mask, m, l = ctx.saved_tensors
    if torch.is_grad_enabled():
        plain = functools.partial(naive, scale=ctx.scale, window=ctx.window, key_mask=key_mask,
                                  upcast=True)
        if key_mask is not None:                           # a query without a key gave 0
            seen = visible(q.size(2), k.size(2), ctx.window, q.device) & key_mask[:, None, None, :]
            do = do.masked_fill(~seen.any(-1, keepdim=True), 0.0)           # (B, 1, T, 1)
        gradients = torch.func.vjp(plain, q, k, v)[1](do)
    else:
        gradients = triton_backward(q, k, v, key_mask, m, l, do, ctx.scale, ctx.window)
    return *gradients, None, None, None


triton_forward.register_autograd(run_backward, setup_context=save_for_backward)


def triton_attention(q, k, v, *, scale, window=None, key_mask=None, dropout=0.0, upcast=False):
    """Our kernel, on a CUDA GPU or, slowly, in Triton's interpreter.

    Arguments and result are those of `attention`.  `upcast` changes nothing, since tl.dot sums in
    float32 for every dtype.  A query that may read nothing (padding) gives 0.  Raises ImportError
    without triton, and ValueError for dropout, which the kernel does not have, within torch.func
    and forward mode, where torch would return wrong tangents, and for tensors on a device, of a
    dtype or of a head width that it does not support.
    """
    import_triton()
    if not q.is_cuda and not INTERPRETED:
        raise ValueError("attention backend 'triton' runs on a CUDA GPU, got tensors on "
                         f"{q.device}; use 'sdpa', or set TRITON_INTERPRET=1 before Python starts "
                         "(slow)")
    check_tensors("triton", q, k, v, (torch.float32, torch.float16, torch.bfloat16))
    if not is_traced() and within_transform():
        raise ValueError("attention backend 'triton' works neither within torch.func (grad, jvp, "
                         "vmap, ...) nor in forward mode; use 'sdpa' or 'naive'")
    if dropout:
        raise ValueError(f"attention backend 'triton' has no dropout, got {dropout}; use 'sdpa', "
                         "or set the config's attention dropout to 0")
    dtype, S = v.dtype, k.size(2)
    if INTERPRETED and dtype == torch.bfloat16:            # the interpreter multiplies bit patterns
        q, k, v = q.float(), k.float(), v.float()          # of bfloat16; float32 holds each value
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    key_mask = None if key_mask is None else key_mask.contiguous()
    o, _, _ = triton_forward(q, k, v, key_mask, scale, S if window is None else min(window, S))
    return o.to(dtype)


def import_triton():
    """Raise ImportError, with the reason, where triton was not imported."""
    if triton is None:
        raise ImportError(f"attention backend 'triton' cannot run here: {no_triton}")


def check_tensors(backend, q, k, v, dtypes):
    """Raise ValueError for dtypes and head widths that a kernel does not support."""
    if q.dtype not in dtypes or not q.dtype == k.dtype == v.dtype:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"attention backend {backend!r} takes q, k and v of one dtype, of {known} "
                         f"on {q.device.type}, got {q.dtype}, {k.dtype}, {v.dtype}; use 'naive' or "
                         "'sdpa'")
    if q.size(-1) > 256:
        raise ValueError(f"attention backend {backend!r} takes heads up to 256 wide, got "
                         f"{q.size(-1)}; use 'naive' or 'sdpa'")


# ------------------------------------------------------------------------------------------------
# The same, by FlashAttention-2
# ------------------------------------------------------------------------------------------------

def flash(q, k, v, *, scale, window=None, key_mask=None, dropout=0.0, upcast=False):
    """The kernels of the flash-attn package (Dao 2023).  Arguments and result: see `attention`.

    They count the keys *before* the query, so our window W is their (W - 1, 0).  (transformers' own
    FlashAttention path of GPT-Neo passes no window at all: its local layers read every key.)
    `upcast` changes nothing, since these kernels sum in float32 too.  Padded batches are packed,
    and a padded query gives 0.  Raises ImportError without the package, and ValueError for tensors
    that it does not support and for padding with gaps in a local layer.
    """
    flash_attn = import_flash()
    check_flash(q, k, v)
    T, S = q.size(2), k.size(2)
    how = dict(softmax_scale=scale, causal=True, dropout_p=dropout)
    if window is not None and window < S:
        if not keeps_windows(q.device, q.dtype):
            raise ValueError("this flash-attn ignores window_size (its Triton backend does), so it "
                             "cannot run local layers; use 'sdpa' or 'triton'")
        how["window_size"] = (window - 1, 0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))          # flash-attn's order (B, T, H, D)
    if key_mask is None:
        return flash_attn.flash_attn_func(q, k, v, **how).transpose(1, 2)

    runs = (key_mask[:, 1:] & ~key_mask[:, :-1]).sum(1) + key_mask[:, 0]    # (B,) 1: without a gap
    if "window_size" in how and runs.gt(1).any():
        raise ValueError("attention backend 'flash' packs the keys of a padded batch side by side, "
                         "so a gap between them would change the window; use 'sdpa' or 'naive'")
    real = key_mask[:, S - T:]                                              # (B, T) not padding
    starts = [F.pad(x.sum(1).cumsum(0), (1, 0)).int() for x in (real, key_mask)]
    longest = [int(x.sum(1).max()) for x in (real, key_mask)]
    out = torch.zeros_like(q)
    out[real] = flash_attn.flash_attn_varlen_func(q[real], k[key_mask], v[key_mask], *starts,
                                                  *longest, **how)
    return out.transpose(1, 2)


def import_flash():
    """Return the module flash_attn.  Raises ImportError, with the reason, if importing it fails."""
    try:
        import flash_attn
        return flash_attn
    except Exception as error:
        raise ImportError("attention backend 'flash' (flash_attention_2) needs the flash-attn "
                          f"package and a CUDA GPU; importing it failed: {error}.  'sdpa' runs "
                          "anywhere") from error


def check_flash(q, k, v):
    """Raise ValueError for tensors that flash-attn cannot take."""
    if not q.is_cuda:
        raise ValueError("attention backend 'flash' (flash_attention_2) needs a CUDA GPU, got "
                         f"tensors on {q.device}; use 'sdpa'")
    check_tensors("flash", q, k, v, (torch.float16, torch.bfloat16))


@functools.lru_cache(maxsize=None)
def keeps_windows(device, dtype):
    """Does this flash-attn obey window_size?  With a window of one key the result must be v."""
    x = torch.eye(16, dtype=dtype, device=device)[None, :, None]            # (1, T, 1, D)
    attend = import_flash().flash_attn_func
    with torch.no_grad():
        return torch.equal(attend(x, x, x, causal=True, window_size=(0, 0)), x)


BACKENDS = {"naive": naive, "sdpa": sdpa, "triton": triton_attention, "flash": flash}
