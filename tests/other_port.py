"""GPT-Neo and GPT-NeoX in plain NumPy, as a port's author would write them, with every mistake as a switch.

    Port(folder, "qkv-thirds")(ids)                 -> hidden states (L + 1 times (B, T, C)), logits (B, T, V)
    Port(folder, "qkv-order=vkq", "relu")           two mistakes, one of them in a variant
    Port(folder, dtype=np.float64, how="cached")    a right port: other precision, other order of operations

It shares no code with the project and knows nothing of mistakes.py: it reads config.json and the official
tensors' names, and what a mistake is was taken from its id alone.

    B batch · T tokens · C width · H heads · D width of a head · R rotated dims · V vocabulary
"""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

erf = np.vectorize(math.erf, otypes=[np.float64])


def to_bfloat16(x):
    """Round to the nearest bfloat16, ties to even, and keep the array's own dtype."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(x.dtype)


def to_float16(x):
    return x.astype(np.float16).astype(x.dtype)


def to_int8(x):
    """Each row as whole numbers in -127 … 127 times one scale."""
    scale = np.abs(x).max(-1, keepdims=True) / 127
    scale[scale == 0] = 1
    return (np.round(x / scale) * scale).astype(x.dtype)


ACTIVATIONS = {
    "gelu": lambda x: (0.5 * x * (1 + erf(x / math.sqrt(2)))).astype(x.dtype),
    "tanh": lambda x: 0.5 * x * (1 + np.tanh(x.dtype.type(math.sqrt(2 / math.pi)) * (x + 0.044715 * x * x * x))),
    "sigmoid": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


class Port:
    def __init__(self, folder, *mistakes, dtype=np.float32, how="plain", fault=None):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.neox = self.config["model_type"] == "gpt_neox"
        self.bad = dict((m.split("=") + [""])[:2] for m in mistakes)
        self.dtype, self.how, self.fault = dtype, how, fault
        self.w = {name: x.astype(dtype) for name, x in load_file(Path(folder) / "model.safetensors").items()}
        self.read_config()
        self.spoil_weights()

    # -------------------------------------------------------------------------------- what is loaded

    def read_config(self):
        c, bad = self.config, self.bad
        self.C = c["hidden_size"]
        self.H = c.get("num_heads") or c["num_attention_heads"]
        self.L = c.get("num_layers") or c["num_hidden_layers"]
        self.D = self.C // self.H
        self.eps = c.get("layer_norm_epsilon") or c["layer_norm_eps"]
        if "norm-eps" in bad:
            self.eps = float(bad["norm-eps"] or (1e-5 if self.eps == 1e-6 else 1e-6))
        name = c.get("activation_function") or c["hidden_act"]
        act = "gelu" if name == "gelu" else "tanh"
        for mistake, other in (("gelu-exact", "gelu"), ("gelu-tanh", "tanh"), ("gelu-sigmoid", "sigmoid"),
                               ("relu", "relu"), ("silu", "silu")):
            act = other if mistake in bad else act
        self.act = ACTIVATIONS[act]
        if self.neox:
            self.read_rotary()
        else:
            self.kinds = [kind for kinds, n in c["attention_types"] for _ in range(n) for kind in kinds]
            self.window = c["window_size"] + ("window-plus-one" in bad) - ("window-minus-one" in bad)
            if "all-global" in bad:
                self.kinds = ["global"] * self.L
            if "all-local" in bad:
                self.kinds = ["local"] * self.L
            if "local-first" in bad:
                self.kinds = ["local" if kind == "global" else "global" for kind in self.kinds]

    def read_rotary(self):
        c, bad = self.config, self.bad
        parameters = c.get("rope_parameters") or {}
        part = c.get("rotary_pct", parameters.get("partial_rotary_factor", 0.25))
        self.base = c.get("rotary_emb_base", parameters.get("rope_theta", 10000))
        self.R = int(self.D * part)
        if "rotary-all-dims" in bad:
            self.R = self.D
        if "rotary-base" in bad:
            self.base = float(bad["rotary-base"] or (1000 if self.base == 10000 else 10000))
        self.parallel = c.get("use_parallel_residual", True)
        if "sequential-residual" in bad:
            self.parallel = False
        if "parallel-residual" in bad:
            self.parallel = True

    def spoil_weights(self):
        w, bad = self.w, self.bad
        for mistake, round_ in (("weights-float16", to_float16), ("weights-bfloat16", to_bfloat16)):
            if mistake in bad:
                for name, x in w.items():
                    if bad[mistake] != "matrices" or x.ndim == 2:
                        w[name] = round_(x)
        if "weights-int8" in bad:
            for name, x in w.items():
                outer = any(part in name for part in ("wte", "wpe", "embed_in", "embed_out", "lm_head"))
                if x.ndim == 2 and not (outer and bad["weights-int8"] == "blocks") \
                        and not (("wte" in name or "wpe" in name or "embed_in" in name)
                                 and bad["weights-int8"] == "linears"):
                    w[name] = to_int8(x)
        if self.fault == "layers-exchanged":
            self.w = {(n.replace(".1.", ".@.", 1).replace(".2.", ".1.", 1).replace(".@.", ".2.", 1)): x
                      for n, x in w.items()}
        if self.fault == "matrix-of-another-layer":
            for name in list(w):
                if ".1." in name and ("c_fc.weight" in name or "h_to_4h.weight" in name):
                    w[name] = w[name.replace(".1.", ".0.", 1)]

    # -------------------------------------------------------------------------------- the parts

    def norm(self, x, name):
        mean = x.mean(-1, keepdims=True)
        bias = 0 if "no-norm-bias" in self.bad or self.bad.get("rms-norm") == "" else self.w[name + ".bias"]
        if "rms-norm" in self.bad:
            mean = self.dtype(0)
        square = ((x - mean) ** 2).sum(-1, keepdims=True)
        variance = square / (self.C - 1 if "norm-unbiased-variance" in self.bad else self.C)
        return (x - mean) / np.sqrt(variance + self.dtype(self.eps)) * self.w[name + ".weight"] + bias

    def linear(self, x, name, transposed=False, bias=True):
        W = self.w[name + ".weight"]
        W = W if transposed else W.T
        y = np.einsum("btc,co->bto", x, W) if self.how == "einsum" else x @ W
        return y + self.w[name + ".bias"] if bias and name + ".bias" in self.w else y

    def visible(self, layer, T):
        """May query i read key j?  (T, T)"""
        i, j = np.arange(T)[:, None], np.arange(T)[None]
        see = j <= i
        if "no-causal-mask" in self.bad:
            see = j >= 0
        if not self.neox and self.kinds[layer] == "local":
            W = self.window
            if "window-in-blocks" in self.bad:
                first = (i // W) * W if self.bad["window-in-blocks"] != "look-back" else (i // W - 1) * W
                return see & (j >= first)
            if "no-causal-mask" not in self.bad or self.bad["no-causal-mask"] == "window-kept":
                see = see & (i - j < W)
        return see

    def softmax(self, s):
        kind = self.bad.get("softmax-bfloat16")
        if kind in ("", "inputs", "both"):
            s = to_bfloat16(s)
        if kind == "inside":                               # every step in bfloat16
            e = to_bfloat16(np.exp(to_bfloat16(to_bfloat16(s) - to_bfloat16(s).max(-1, keepdims=True))))
            return to_bfloat16(e / to_bfloat16(e.sum(-1, keepdims=True)))
        e = np.exp(s - s.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
        return to_bfloat16(p) if kind in ("", "outputs", "both") else p

    def attend(self, q, k, v, layer, scale):
        """q (B, H, T, D), k and v (B, H, S, D), where the queries are the last T of S positions."""
        T, S = q.shape[2], k.shape[2]
        see = self.visible(layer, S)[S - T:]
        scores = np.einsum("bhtd,bhsd->bhts", q, k) if self.how == "einsum" else q @ k.swapaxes(2, 3)
        scores = np.where(see, scores * self.dtype(scale), -np.inf)
        if self.how == "blocks":
            return self.in_blocks(scores, v)
        p = self.softmax(scores)
        return np.einsum("bhts,bhsd->bhtd", p, v) if self.how == "einsum" else p @ v

    def in_blocks(self, scores, v, size=7):
        """The softmax with a running maximum and sum, `size` keys at a time."""
        m = np.full(scores.shape[:3] + (1,), -1e30, self.dtype)
        total, out = np.zeros_like(m), np.zeros(scores.shape[:3] + v.shape[3:], self.dtype)
        for j in range(0, scores.shape[3], size):
            part = scores[..., j:j + size]
            new = np.maximum(m, part.max(-1, keepdims=True))
            e = np.exp(part - new)
            total = total * np.exp(m - new) + e.sum(-1, keepdims=True)
            out = out * np.exp(m - new) + e @ v[:, :, j:j + size]
            m = new
        return out / total

    def heads(self, x):
        """(B, T, C) -> (B, H, T, D)"""
        B, T, _ = x.shape
        if self.bad.get("heads-not-transposed") == "in":
            return x.reshape(B, self.H, T, self.D)
        return x.reshape(B, T, self.H, self.D).swapaxes(1, 2)

    def join(self, y):
        """(B, H, T, D) -> (B, T, C)"""
        B, H, T, D = y.shape
        if self.bad.get("heads-not-transposed") in ("", "in"):
            return y.reshape(B, T, H * D)
        return y.swapaxes(1, 2).reshape(B, T, H * D)

    def mlp(self, x, up, down):
        kind = self.bad.get("no-mlp-bias")
        h = self.act(self.linear(x, up, bias=kind not in ("", "up")))
        return self.linear(h, down, bias=kind not in ("", "down"))

    # -------------------------------------------------------------------------------- GPT-Neo

    def neo_qkv(self, x, layer):
        name = f"transformer.h.{layer}.attn.attention."
        return [self.heads(self.linear(x, f"{name}{c}_proj", transposed=f"{c}-transposed" in self.bad))
                for c in "qkv"]

    def neo_block(self, x, layer, start, cache):
        h = f"transformer.h.{layer}."
        q, k, v = self.neo_qkv(self.norm(x, h + "ln_1"), layer)
        k, v = self.remember(cache, layer, k, v)
        scale = 1 / math.sqrt(self.D) if "scaled-scores" in self.bad else 1.0
        a = self.linear(self.join(self.attend(q, k, v, layer, scale)), h + "attn.attention.out_proj",
                        "out-transposed" in self.bad, "no-out-bias" not in self.bad)
        x = x + self.drop(a, layer)
        m = self.mlp(self.norm(x, h + "ln_2"), h + "mlp.c_fc", h + "mlp.c_proj")
        return (0.5 if self.fault == "residual-halved" and layer == 1 else 1) * x + m

    # -------------------------------------------------------------------------------- GPT-NeoX

    def neox_qkv(self, x, layer):
        B, T, C = x.shape
        qkv = self.linear(x, f"gpt_neox.layers.{layer}.attention.query_key_value", bias="no-qkv-bias" not in self.bad)
        if "qkv-thirds" in self.bad:
            return [self.heads(part) for part in np.split(qkv, 3, -1)]
        if self.bad.get("heads-not-transposed") == "in":
            qkv = qkv.reshape(B, self.H, T, 3 * self.D)
        else:
            qkv = qkv.reshape(B, T, self.H, 3 * self.D).swapaxes(1, 2)
        parts = np.split(qkv, 3, -1)
        order = self.bad.get("qkv-order") or ("kqv" if "qkv-order" in self.bad else "qkv")
        return [parts[order.index(c)] for c in "qkv"]

    def angles(self, positions):
        """(T, R/2)"""
        R, kind = self.R, self.bad.get("rotary-bfloat16")
        i = np.arange(0, R, 2, dtype=np.float64)
        frequencies = (self.base ** (-i / (self.D if "rotary-denominator" in self.bad else R))).astype(np.float32)
        positions = positions.astype(np.float32)
        if kind in ("", "all", "frequencies"):
            frequencies = to_bfloat16(frequencies)
        if kind in ("", "all", "positions"):
            positions = to_bfloat16(positions)
        angles = positions[:, None] * frequencies
        if kind in ("", "all", "angles"):
            angles = to_bfloat16(angles)
        return angles if "rotary-opposite-sign" not in self.bad else -angles

    def rotate(self, x, positions):
        if "no-rotary" in self.bad or self.R == 0:
            return x
        angles, R = self.angles(positions), self.R
        cos, sin = np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype)
        if self.bad.get("rotary-bfloat16") in ("all", "tables"):
            cos, sin = to_bfloat16(cos), to_bfloat16(sin)
        first = self.D - R if "rotary-last-dims" in self.bad else 0
        x, part = x.copy(), x[..., first:first + R]
        a, b = np.split(part, 2, -1)
        if "rotary-neighbours" in self.bad:
            a, b = part[..., ::2], part[..., 1::2]
        a, b = a * cos - b * sin, b * cos + a * sin
        if "rotary-neighbours" in self.bad:
            x[..., first:first + R:2], x[..., first + 1:first + R:2] = a, b
        else:
            x[..., first:first + R // 2], x[..., first + R // 2:first + R] = a, b
        return x

    def neox_block(self, x, layer, start, cache):
        h = f"gpt_neox.layers.{layer}."
        first, second = h + "input_layernorm", h + "post_attention_layernorm"
        if "norms-swapped" in self.bad:
            first, second = second, first
        if "one-norm" in self.bad:
            first = second = second if self.bad["one-norm"] == "second" else first
        q, k, v = self.neox_qkv(self.norm(x, first), layer)
        positions = np.arange(start, start + x.shape[1])
        q = self.rotate(q, positions) if self.bad.get("rotary-q-only") != "k" else q
        k = self.rotate(k, positions) if self.bad.get("rotary-q-only") in (None, "k") else k
        k, v = self.remember(cache, layer, k, v)
        scale = 1 / math.sqrt(self.C if "scale-by-width" in self.bad else self.D)
        a = self.linear(self.join(self.attend(q, k, v, layer, 1.0 if "no-scale" in self.bad else scale)),
                        h + "attention.dense", "out-transposed" in self.bad, "no-out-bias" not in self.bad)
        a = self.drop(a, layer)
        m = self.mlp(self.norm(x if self.parallel else x + a, second),
                     h + "mlp.dense_h_to_4h", h + "mlp.dense_4h_to_h")
        return (0.5 if self.fault == "residual-halved" and layer == 1 else 1) * x + a + m

    # -------------------------------------------------------------------------------- the model

    def drop(self, a, layer):
        """Faults that are in no table."""
        if layer == 1 and self.fault == "dropout":
            return a * (np.random.default_rng(0).random(a.shape) > 0.1) / self.dtype(0.9)
        return a * self.dtype(1.1) if layer == 1 and self.fault == "extra-scale" else a

    def remember(self, cache, layer, k, v):
        if cache is None:
            return k, v
        if layer in cache:
            k, v = (np.concatenate([old, new], 2) for old, new in zip(cache[layer], (k, v)))
        cache[layer] = k, v
        return k, v

    def embed(self, ids, start):
        root = self.dtype(math.sqrt(self.C)) if "embedding-scaled" in self.bad else 1
        x = self.w["gpt_neox.embed_in.weight" if self.neox else "transformer.wte.weight"][ids]
        if self.neox or "no-position-embedding" in self.bad:
            return x * root
        start += ("positions-from-one" in self.bad) + 2 * ("positions-from-two" in self.bad)
        rows = self.w["transformer.wpe.weight"][start:start + ids.shape[1]]
        return (x + rows) * root if self.bad.get("embedding-scaled") == "sum" else x * root + rows

    def forward(self, ids, start=0, cache=None):
        x, hidden = self.embed(ids, start), []
        for layer in range(self.L):
            hidden.append(x)
            x = (self.neox_block if self.neox else self.neo_block)(x, layer, start, cache)
        if "no-final-norm" not in self.bad:
            x = self.norm(x, "gpt_neox.final_layer_norm" if self.neox else "transformer.ln_f")
        embedding = self.w["gpt_neox.embed_in.weight" if self.neox else "transformer.wte.weight"]
        head = self.w.get("embed_out.weight", self.w.get("lm_head.weight", embedding))
        head = embedding if "head-tied" in self.bad else head
        return [*hidden, x], x @ head.T

    def __call__(self, ids):
        """ids (B, T) -> hidden states, logits."""
        ids = np.asarray(ids)
        if "extra-first-token" in self.bad:
            token = self.bad["extra-first-token"]
            token = self.config.get(token + "_token_id") if token in ("bos", "eos") else int(token or 0)
            ids = np.concatenate([np.full((len(ids), 1), token), ids], 1)
            hidden, logits = self.forward(ids)
            hidden, logits = [x[:, 1:] for x in hidden], logits[:, 1:]
        elif self.how == "cached":
            cache, steps = {}, []
            for t in range(ids.shape[1]):
                steps.append(self.forward(ids[:, t:t + 1], t, cache))
            hidden = [np.concatenate(xs, 1) for xs in zip(*(step[0] for step in steps))]
            logits = np.concatenate([step[1] for step in steps], 1)
        else:
            hidden, logits = self.forward(ids)
        kind = self.bad.get("logits-shifted")
        if kind is not None:                               # "" and "later": row t is that of token t - 1
            later = np.roll(logits, -1 if "earlier" in kind else 1, 1)
            later[:, -1 if "earlier" in kind else 0] = {"nan": np.nan, "zero": 0}.get(kind[-4:].strip("-"), 0) \
                if "roll" not in kind else later[:, -1 if "earlier" in kind else 0]
            logits = later
        return hidden, logits
