"""GPT-Neo once more, in JAX: a layer is a function, and its weights are a tree that it is given.

    B batch · T new tokens · S tokens in view · C width · H heads · D width of a head · V vocabulary
    R slots of a ring, the cache of one layer

The same parts in the same order as neo.py, with the same names of weights: `diff neo.py neo_jax.py`
shows the same model in another library.  What changes (weights, cache, random key) is an argument
and a result.  jax.jit compiles a function for each shape.  Compiled code cannot raise an error for
a value, so values are checked before, on the host.  The numbers are neo.py's, up to rounding.

transformers' own Flax classes (the last are in 4.57.6) differ a little: they multiply scores by
sqrt(D) and divide again, compute them in the model's dtype, keep the weights in the dtype of the
file, and fill what generate returns with padding up to max_length.
"""

import functools
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from base import GenerationConfig, ModelOutput, check_inputs, key_mask_of
from files import shown
from load_weights import FLAX_FIRST, choose_dtype, load_pretrained, save_flax
from neo import GPTNeoConfig, GPTNeoForCausalLM, GPTNeoModel  # noqa: F401  (the config is neo.py's)
from quantize import kind_of
from sampling import Settings, check_prompt, infer_mask

GenerateOutput = namedtuple("GenerateOutput", "sequences")       # (B * num_return_sequences, total)
einsum = functools.partial(jnp.einsum, precision="highest")      # a GPU would round float32
ACTIVATIONS = {"gelu": functools.partial(jax.nn.gelu, approximate=False),
               **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), jax.nn.gelu)}


def wide(x):
    """x in at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def linear(p, x):
    """p: weight (out, in), as in torch, and maybe a bias (out,).  x (..., in) -> (..., out)"""
    y = einsum("...i,oi->...o", x, p["weight"], preferred_element_type=wide(x).dtype)
    return (y + p["bias"] if "bias" in p else y).astype(x.dtype)


def layer_norm(p, x, config):
    """Each token to mean 0 and variance 1, then times a weight and plus a bias."""
    y = wide(x) - wide(x).mean(-1, keepdims=True)
    y = y * lax.rsqrt((y * y).mean(-1, keepdims=True) + config.layer_norm_epsilon)
    return (y * p["weight"] + p["bias"]).astype(x.dtype)


def held(last, R):
    """The position in each slot of a ring, (R,), if `last` is the newest; negative: empty slot.

    Position i is in slot i % R.
    """
    return last - (last - jnp.arange(R)) % R


def attention(p, x, config, window, i, key_mask, ring=None):
    """Multi-head self-attention; local layers look back only `window` tokens.

    i (T,): where in the text the tokens x (B, T, C) stand.  key_mask (B, whole text): 0 is padding.
    ring: keys and values (B*H, R, D) of what was read before; then x is one token.
    Returns (B, T, C), the weights (B, H, T, S), and the keys and values, with x's among them.
    """
    B, T, C = x.shape
    H, D = config.num_heads, config.head_dim
    q, k, v = (linear(p[name], x).reshape(B, T, H, D).swapaxes(1, 2).reshape(B * H, T, D)
               for name in ("q_proj", "k_proj", "v_proj"))
    j = i                                                               # where the keys stand
    if ring is not None:
        R = ring[0].shape[1]
        k, v = (lax.dynamic_update_slice_in_dim(old, new, i[0] % R, axis=1)
                for old, new in zip(ring, (k, v)))                      # (B*H, R, D)
        j = held(i[0], R)
    back = i[:, None] - j                                               # (T, S)
    visible = (0 <= j) & (0 <= back) & (back < (window or key_mask.shape[1]))
    visible = visible & (key_mask[:, None, None, jnp.maximum(j, 0)] != 0)    # (B, 1, T, S)
    # No scale: the model was trained without 1/sqrt(D), see neo.py.  Rows and heads are one axis,
    # as XLA multiplies them: it would copy a cache of another shape for every token.
    scores = einsum("ntd,nsd->nts", wide(q), wide(k)).reshape(B, H, T, -1)
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores).astype(v.dtype)
    y = einsum("nts,nsd->ntd", weights.reshape(B * H, T, -1), v)
    y = y.reshape(B, H, T, D).swapaxes(1, 2).reshape(B, T, C)           # heads side by side
    return linear(p["out_proj"], y), weights, (k, v)


def mlp(p, x, config):
    """Each token by itself: up to the inner width, through the activation, down again."""
    act = ACTIVATIONS[config.activation_function]
    return linear(p["down_proj"], act(wide(linear(p["up_proj"], x))).astype(x.dtype))


def block(p, x, config, *how):
    """x ─┬─ ln_1 ─ attn ─ + ─┬─ ln_2 ─ mlp ─ + ─→   one after the other, each added to its input
          └────────────────┘   └──────────────┘
    """
    a, weights, kv = attention(p["attn"], layer_norm(p["ln_1"], x, config), config, *how)
    x = a + x
    return x + mlp(p["mlp"], layer_norm(p["ln_2"], x, config), config), weights, kv


def gpt_neo_model(p, config, input_ids, key_mask, position_ids, i=None, rings=None):
    """Token ids (B, T) to an output with everything in it, and each layer's keys and values."""
    i = jnp.arange(input_ids.shape[1]) if i is None else i
    x = p["embed"]["weight"][input_ids] + p["pos_embed"]["weight"][position_ids]    # (B, T, C)
    hidden_states, attentions, kvs = [], [], []
    for layer, window in enumerate(config.windows):
        hidden_states.append(x)
        x, weights, kv = block(p["blocks"][str(layer)], x, config, window, i, key_mask,
                               rings and rings[layer])
        attentions.append(weights)
        kvs.append(kv)
    x = layer_norm(p["ln_f"], x, config)
    return ModelOutput(last_hidden_state=x, hidden_states=(*hidden_states, x),
                       attentions=tuple(attentions)), kvs


def gpt_neo_for_causal_lm(p, config, *inputs, row=None):
    """The same to next-token logits (B, T, V), or those of one row, by the embedding matrix."""
    out, kvs = gpt_neo_model(p["transformer"], config, *inputs)
    x, out.last_hidden_state = out.last_hidden_state, None
    x = x if row is None else lax.dynamic_slice_in_dim(x, row, 1, axis=1)
    out.logits = linear(p["transformer"]["embed"] if config.tie_word_embeddings else p["lm_head"],
                        x)
    return out, kvs


def forbid(scores, where):
    return jnp.where(where, -jnp.inf, scores)


def keep_top_p(scores, p):
    """-inf outside the smallest set of tokens that holds probability p, as in sampling.py."""
    order = scores.argsort(-1)
    drop = jax.nn.softmax(jnp.take_along_axis(scores, order, -1)).cumsum(-1) <= 1 - p
    return forbid(scores,
                  jnp.put_along_axis(drop, order, drop.at[:, -1].set(False), -1, inplace=False))


def penalize(scores, penalty, ids, written):
    """sampling.penalize, for those of ids (B, S) where `written` (B, S) is true."""
    rows, V = jnp.arange(len(ids))[:, None], scores.shape[1]
    seen = jnp.zeros(scores.shape, bool).at[rows, jnp.where(written, ids, V)].set(True, mode="drop")
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose(scores, how, key, ids, n, prompt, first):
    """One token for each row, from scores (B, V).

    ids (B, S): the text, which begins at slot first (B, 1) and ends before slot n.
    how: pairs of a setting and its value in sampling.STEPS's order, do_sample, eos, padding.
    """
    V, at, (steps, do_sample, eos, _) = scores.shape[1], jnp.arange(ids.shape[1]), how
    is_in = lambda some: jnp.isin(jnp.arange(V), jnp.array(some, int))
    functions = {
        "repetition_penalty": lambda s, x: penalize(s, x, ids, (first <= at) & (at < n)),
        "min_length": lambda s, x: forbid(s, is_in(eos) & (n < x)),
        "min_new_tokens": lambda s, x: forbid(s, is_in(eos) & (n - prompt < x)),
        "suppress_tokens": lambda s, x: forbid(s, is_in(x)),
        "begin_suppress_tokens": lambda s, x: forbid(s, is_in(x) & (n == prompt)),
        "temperature": lambda s, x: s / x,
        "top_k": lambda s, x: forbid(s, s < lax.top_k(s, min(x, V))[0][:, -1:]),
        "top_p": keep_top_p,
        "min_p": lambda s, x: forbid(s, s < s.max(-1, keepdims=True) + jnp.log(x))}
    for name, value in steps:
        scores = functions[name](scores, value)
    return jax.random.categorical(key, scores) if do_sample else scores.argmax(-1)


def generate(p, ids, mask, positions, prompt, total, key, *, config, how, width):
    """Continue ids (B, S), of which `prompt` tokens are the prompt.  -> (ids, length of the text)

    It ends at `total` tokens, or when all rows have ended.  The prefill reads the first `width`
    slots, the prompt and what fills it up.  mask (B, S) is 1 after the prompt.
    """
    S, first = ids.shape[1], mask.argmax(1)[:, None]

    def append(scores, rings, ids, n, position, done, key):
        draw, key = jax.random.split(key)
        token = choose(wide(scores), how, draw, ids, n, prompt, first)
        token = jnp.where(done, how[3], token).astype(ids.dtype)    # (B,)
        done = done | jnp.isin(token, jnp.array(how[2], ids.dtype))
        return rings, ids.at[:, n].set(token), n + 1, position + 1, done, key

    def step(state):
        rings, ids, n, position, *_ = state
        last = lax.dynamic_slice_in_dim(ids, n - 1, 1, axis=1)          # (B, 1)
        out, rings = gpt_neo_for_causal_lm(p, config, last, mask, position, n[None] - 1, rings)
        return append(out.logits[:, -1], rings, *state[1:])

    out, kvs = gpt_neo_for_causal_lm(p, config, *(x[:, :width] for x in (ids, mask, positions)),
                                     row=prompt - 1)
    rings = [tuple(x[:, jnp.maximum(held(prompt - 1, min(window or S, S)), 0)] for x in kv)
             for kv, window in zip(kvs, config.windows)]
    position = lax.dynamic_slice_in_dim(positions, prompt - 1, 1, axis=1)
    state = append(out.logits[:, -1], rings, ids, prompt, position, jnp.zeros(len(ids), bool), key)
    _, ids, n, *_ = lax.while_loop(lambda state: (state[2] < total) & ~state[4].all(), step, state)
    return ids, n


def on_host(name, x):
    """x as a torch tensor, which base.py can check; inside jax.jit its shape and dtype alone."""
    if isinstance(x, jax.core.Tracer):
        return torch.empty(x.shape, dtype=getattr(torch, x.dtype.name), device="meta")
    try:
        array = None if x is None else torch.from_numpy(np.array(x))
        if name == "attention_mask" or x is None or array.dtype in (torch.int32, torch.int64):
            return array
    except (TypeError, ValueError):                                  # texts, rows of unequal length
        pass
    raise ValueError(f"{name} must be an array of int32 or int64 of shape (batch, tokens), "
                     f"got {shown(x)}")


def filled(x, length):
    """x (B, T) as int32, filled with ones to a multiple of 64, so that 64 lengths share a program.

    Nothing reads the ones.
    """
    x = jnp.asarray(x).astype(jnp.int32)
    return jnp.pad(x, ((0, 0), (0, -(-length // 64) * 64 - x.shape[1])), constant_values=1)


def tree_of(model):
    """neo.py's weights, {"embed": {"weight": array}, "blocks": {"0": ...}}; a tied head once."""
    if model.dtype == torch.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype float64 needs jax.config.update('jax_enable_x64', True) first")
    root = {}
    for name, tensor in model.state_dict().items():
        *path, leaf = name.split(".")
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            node = functools.reduce(lambda node, part: node.setdefault(part, {}), path, root)
            node[leaf] = jnp.from_dlpack(tensor.contiguous())
    return root


class FlaxGPTNeoModel:
    """Token ids to hidden states: a config, the tree `params`, the functions above, compiled."""

    function, torch_class = staticmethod(gpt_neo_model), GPTNeoModel

    def __init__(self, config, input_shape=(1, 1), seed=0, dtype="float32", params=None):
        """Without params they are what neo.py draws after torch.manual_seed(seed)."""
        self.config, self.generation_config, self.params = config, GenerationConfig(), params
        if params is None:
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                self.params = tree_of(self.torch_class(config).to(choose_dtype(dtype, None, {})))
        self.dtype = jax.tree.leaves(self.params)[0].dtype
        def run(p, *x, keep):
            out, _ = self.function(p, config, *x)
            return {name: y for name, y in out.items() if name in keep}

        self.run = jax.jit(run, static_argnames="keep")
        self.write = jax.jit(functools.partial(generate, config=config),
                             static_argnames=["how", "width"])

    @classmethod
    def from_pretrained(cls, name_or_folder, *, revision=None, dtype="float32", **changes):
        """base.PreTrainedModel.from_pretrained, with flax_model.msgpack before the other files."""
        model = load_pretrained(cls.torch_class, name_or_folder, revision=revision, dtype=dtype,
                                changes=changes, names=FLAX_FIRST)
        if changes.get("tp_plan") or kind_of(model):
            raise ValueError(f"{name_or_folder}: quantized and shared weights are not "
                             "supported in neo_jax.py")
        self = cls(model.config, params=tree_of(model))
        self.generation_config = model.generation_config
        return self

    def save_pretrained(self, folder, params=None):
        """Write flax_model.msgpack and config.json, as transformers 4's Flax classes do."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(params or self.params)
        save_flax(self,
                  {jax.tree_util.keystr(path, simple=True, separator="."): torch.from_dlpack(x)
                   for path, x in leaves}, folder)

    def __call__(self, input_ids, attention_mask=None, position_ids=None, params=None, train=False,
                 output_hidden_states=False, output_attentions=False, return_dict=True):
        """neo.py's forward, with its errors, for arrays of any library.

        params: weights to use instead of self.params.  Inside jax.jit the values of the inputs are
        not checked.
        """
        if train or return_dict is False:
            raise ValueError("train=True (dropout) and return_dict=False are not "
                             "supported in neo_jax.py")
        B, T = check_inputs(on_host("input_ids", input_ids), on_host("position_ids", position_ids),
                            self.config)
        key_mask_of(on_host("attention_mask", attention_mask), B, T)
        mask = jnp.ones((B, T)) if attention_mask is None else jnp.asarray(attention_mask) != 0
        positions = jnp.arange(T)[None] if position_ids is None else position_ids
        asked = output_hidden_states and "hidden_states", output_attentions and "attentions"
        out = self.run(params or self.params, *(filled(x, T) for x in (input_ids, mask, positions)),
                       keep=("logits", "last_hidden_state", *asked))
        return ModelOutput(**jax.tree.map(lambda x: x[:, :T] if x.ndim == 3 else x[:, :, :T, :T],
                                          out))


class FlaxGPTNeoForCausalLM(FlaxGPTNeoModel):
    """Hidden states to next-token logits, and text."""

    function, torch_class = staticmethod(gpt_neo_for_causal_lm), GPTNeoForCausalLM

    def generate(self, input_ids=None, attention_mask=None, *, prng_key=None, params=None,
                 generation_config=None, **settings):
        """neo.py's generate, in one compiled program.

        The same prng_key, by default jax.random.key(0), draws the same text.  Returns an object
        with `sequences`, which are prompt and continuation.
        """
        settings = Settings.of(self, settings, generation_config)
        ids, mask = on_host("input_ids", input_ids), on_host("attention_mask", attention_mask)
        check_prompt(self, ids, mask, settings)
        for name in ("no_repeat_ngram_size", "bad_words_ids", "stop_strings"):
            if getattr(settings, name):
                raise ValueError(f"{name} is not supported in neo_jax.py: leave it "
                                 "out, or use neo.py")
        steps = tuple((name, tuple(x) if isinstance(x, list) else x)
                      for name, x, _ in settings.steps)
        T, total = ids.shape[1], settings.total_length(ids.shape[1], self.config)
        mask = infer_mask(ids, mask, settings)
        inputs = (filled(x.repeat_interleave(settings.num_return_sequences, 0).numpy(), total)
                  for x in (ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)))
        ids, n = self.write(
            params or self.params, *inputs, T, total,
            jax.random.key(0) if prng_key is None else prng_key, width=-(-T // 64) * 64,
            how=(steps, settings.do_sample, tuple(settings.eos_ids), settings.pad or 0))
        return GenerateOutput(ids[:, :n])
