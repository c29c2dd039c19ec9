"""Causal attention: the rule, the definition, the fast form, the dispatch, the cache.

    B  batch                        H  heads
    T  queries: the new tokens      S  keys in view: cached + new, S >= T
    D  width of one head            W  window of a local layer, in tokens

Every backend takes q (B, H, T, D) and k, v (B, H, S, D), where the T queries are the *last* T of
the S positions, and returns (B, H, T, D) in v's dtype.

    visible      which key may a query read?  One rule for prefill, decoding and everything between.
    naive        the definition.  Bit-identical to transformers' eager attention, and slow.
    sdpa         torch's fused kernel; on a local layer it never looks outside the window.
    attention    the one function that models call; picks the backend.
    KVCache      remembers keys and values; local layers remember only their window.
"""

import torch
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------
# The rule
# ------------------------------------------------------------------------------------------------

def visible(T, S, window=None, device=None):
    """May query row i read key column j?  -> (T, S) bool

    Query i and key j stand at positions of one common line; the answer is 0 <= i - j < window.
    So the window counts the query itself: `window` keys in all, not `window` keys before it.
    (mesh-tensorflow's local attention, (p - radius, p]; transformers' GPTNeoSelfAttention, which
    takes the exclusive or of two triangles to say the same.)

    Counting from the lower-right corner, the last query is the last position, makes one rule do
    for prefill (T == S), decoding (T == 1) and chunks on a filled cache (1 < T < S).
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
    return torch.promote_types(dtype, torch.float32)


def naive(q, k, v, *, scale, window=None, key_mask=None, dropout=0.0, upcast=False,
          return_weights=False):
    """softmax(q kᵀ · scale + mask) v, written as it is said.

    The order of operations is transformers' own, so that results agree to the last bit:
    GPT-Neo casts q and k up before the product (`upcast`), GPT-NeoX lets half precision stand
    until the softmax.  Forbidden scores become the lowest finite number rather than -inf: a padded
    row that may read nothing then averages everything, where -inf would make it NaN.
    """
    k, v = k.contiguous(), v.contiguous()        # as transformers' cache leaves them: other strides
    if upcast:                                   # would round differently in some shapes
        q, k = q.to(at_least_float32(q.dtype)), k.to(at_least_float32(k.dtype))
    scores = q @ k.transpose(-2, -1)                                       # (B, H, T, S)
    if scale != 1.0:
        scores = scores * scale
    allowed = visible(q.size(-2), k.size(-2), window, q.device)            # (T, S)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]                     # (B, 1, T, S)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=at_least_float32(scores.dtype)).to(v.dtype)
    weights = F.dropout(weights, dropout)                                  # every row summed to 1
    out = weights @ v                                                      # (B, H, T, D)
    return (out, weights) if return_weights else out


# ------------------------------------------------------------------------------------------------
# The same, fused
# ------------------------------------------------------------------------------------------------

def sdpa(q, k, v, *, scale, window=None, key_mask=None, dropout=0.0, upcast=False):
    """torch's scaled_dot_product_attention, which never writes the (T, S) scores to memory.

    Its kernels do not know windows.  A (T, S) mask would make the answer right and the work
    quadratic, so a local layer is cut into blocks of queries; a block of `window` queries needs
    the keys of its own block and of the one before it, and no others:

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
    if window is None or window >= S:
        return fused(q, k, v, scale, None, key_mask, dropout).to(dtype)

    block = max(window, 64)                               # smaller blocks are all overhead
    parts = []
    for rows in q.split(block, dim=-2):
        end = S - T + sum(part.size(-2) for part in parts) + rows.size(-2)   # the last row's key, + 1
        begin = max(0, end - rows.size(-2) - window + 1)                     # the first row's first key
        parts.append(fused(rows, k[:, :, begin:end], v[:, :, begin:end], scale, window,
                           None if key_mask is None else key_mask[:, begin:end], dropout))
    return torch.cat(parts, dim=-2).to(dtype)


def fused(q, k, v, scale, window, key_mask, dropout):
    """One call of torch's kernel, with the least mask that says what is visible."""
    T, S = q.size(-2), k.size(-2)
    square = T == S and (window is None or window >= S)
    everything = T == 1 and (window is None or window >= S)
    if key_mask is None and (square or everything):
        return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout,
                                              is_causal=square)
    allowed = visible(T, S, window, q.device)                               # (T, S)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]                      # (B, 1, T, S)
    return F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout,
                                          attn_mask=allowed)


# ------------------------------------------------------------------------------------------------
# The dispatch
# ------------------------------------------------------------------------------------------------

BACKENDS = {"naive": naive, "sdpa": sdpa}
REFERENCE_NAMES = {"eager": "naive"}                      # what transformers calls ours


def choose_backend(name="auto", return_weights=False):
    """Name of the backend that will run: a user's word is checked, "auto" is decided.

    Raises ValueError for an unknown name, or if attention weights are wanted from a fused backend
    (it never forms them).  Nothing is ever substituted for a backend asked for by name.
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
    return name


def attention(q, k, v, *, scale, window=None, backend="auto", key_mask=None, dropout=0.0,
              upcast=False, return_weights=False):
    """Causal attention of the last T of S positions.

    q (B, H, T, D); k, v (B, H, S, D); key_mask (B, S) bool, False where a key is padding.
    `scale` is required: GPT-Neo's is 1.0, and a default of 1/sqrt(D) would hide that.
    `window` None reads every key up to the query, else the last `window` of them.
    `dropout` drops attention weights with that probability (models pass 0.0 in eval mode).
    `upcast` forms the scores in at least float32 (GPT-Neo), else in q's dtype (GPT-NeoX).

    Returns (B, H, T, D) in v's dtype; with `return_weights` also the weights (B, H, T, S).
    Raises ValueError for shapes that do not fit and for a backend that is unknown or unable.
    """
    check_shapes(q, k, v, window, key_mask)
    backend = choose_backend(backend, return_weights)
    extra = {"return_weights": True} if return_weights else {}
    return BACKENDS[backend](q, k, v, scale=scale, window=window, key_mask=key_mask,
                             dropout=dropout, upcast=upcast, **extra)


def check_shapes(q, k, v, window, key_mask):
    """Raise ValueError, with the shapes, for arguments that no backend could answer rightly."""
    fits = (q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2]
            and q.size(-1) == k.size(-1) and 1 <= q.size(-2) <= k.size(-2))
    if not fits:
        raise ValueError("attention needs q (B, H, T, D) and k, v (B, H, S, D) with 1 <= T <= S, got "
                         f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
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
    """Keys and values of the tokens read so far, allocated once.

    A global layer has a slot for each of `max_length` positions.  A local layer has `window` slots
    and uses them as a ring, position p in slot p % window, since no later query can read further
    back: at 2048 tokens GPT-Neo needs 56.25 % of the bytes of a cache that keeps everything.

    `length` counts the tokens read.  It moves once per forward pass, after all layers.
    """

    def __init__(self, config, batch_size, max_length, dtype=torch.float32, device=None):
        """config: GPTNeoConfig or GPTNeoXConfig, which know heads, head width and windows."""
        self.length, self.max_length, self.batch_size = 0, max_length, batch_size
        H, D = config.num_attention_heads, config.head_dim
        slots = [max_length if w is None else min(w, max_length) for w in config.windows]
        self.keys = [torch.zeros(batch_size, H, n, D, dtype=dtype, device=device) for n in slots]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    @property
    def nbytes(self):
        """Bytes held, all layers."""
        return sum(x.nbytes for x in [*self.keys, *self.values])

    def check(self, B, T):
        """Raise ValueError, with the numbers, if T more tokens for B rows do not fit."""
        if B != self.batch_size:
            raise ValueError(f"the cache was made for a batch of {self.batch_size}, got {B}")
        if self.length + T > self.max_length:
            raise ValueError(f"the cache holds {self.length} of at most {self.max_length} tokens; "
                             f"{T} more do not fit")

    def append(self, layer, k, v, key_mask=None):
        """Store one layer's new k, v (B, H, T, D) and return what its T queries may need.

        Returns keys and values (B, H, S, D) and the columns of `key_mask` (B, length + T) that
        belong to them.  Keys stand in order of position, except for one new token on a full ring:
        there all of them are visible, and attention does not care in which order it reads them.
        """
        keys, values = self.keys[layer], self.values[layer]
        ring, past, T = keys.size(2), self.length, k.size(2)
        if past + T <= ring:                                       # nothing to forget yet
            keys[:, :, past:past + T], values[:, :, past:past + T] = k, v
            return keys[:, :, :past + T], values[:, :, :past + T], key_mask

        if T == 1:                                                 # the oldest makes room
            slot = past % ring
            keys[:, :, slot], values[:, :, slot] = k[:, :, 0], v[:, :, 0]
            if key_mask is not None:                               # mask columns in slot order
                key_mask = key_mask[:, -ring:].roll((past + 1) % ring, dims=1)
            return keys, values, key_mask

        # A chunk that crosses the edge: its first queries still need keys that its last ones push
        # out, so read (what is remembered, in order) + (the new), and only then overwrite.
        kept = min(past, ring)
        old = torch.arange(past - kept, past, device=k.device) % ring
        new = torch.arange(past + T - min(T, ring), past + T, device=k.device)
        seen_k = torch.cat([keys[:, :, old], k], dim=2) if kept else k      # (B, H, kept + T, D)
        seen_v = torch.cat([values[:, :, old], v], dim=2) if kept else v
        keys[:, :, new % ring] = k[:, :, new - past]
        values[:, :, new % ring] = v[:, :, new - past]
        return seen_k, seen_v, None if key_mask is None else key_mask[:, -(kept + T):]

    def advance(self, T):
        """T tokens have passed through every layer."""
        self.length += T
