"""The mistakes that ports of these models make, each made on purpose in our definition.

    MISTAKES          the table: id, family, what the mistake is, what it costs, how to put it right
    planted(patches)  a with-block in which our model makes a mistake
    variants(model)   every way to make every mistake of a model's family

    python mistakes.py            prints the table, with the cost measured anew

A mistake is a few patches, (object, attribute, value): a function is replaced by a wrong one, a
setting of a layer is changed, or a layer's output is rearranged.  Nothing is copied, so a mistake
costs no memory, and it is gone after the with-block.  Some mistakes can be made in several ways
(the base of the rotation can be any wrong number); each way is a variant with the same id.

diagnose.py looks for the mistake that gives a port's own numbers.  The tests plant every one of
them and see that the comparison with transformers notices it.

    B batch · T tokens · C width · H heads · D width of a head · R rotated dims · W window
"""

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import attention as attention_module
import neo
import neox
from attention import visible
from base import ACTIVATIONS
from commands import Parser, as_command
from neox import rotary_tables, rotate

NEO, NEOX = "gpt_neo", "gpt_neox"


@contextlib.contextmanager
def planted(patches):
    """Set each (object, attribute, value) within the block; after it everything is as before."""
    undo = []
    try:
        for thing, name, value in patches:
            own = name in vars(thing) or not hasattr(type(thing), name)
            undo.append((thing, name, getattr(thing, name), own))
            setattr(thing, name, value)
        yield
    finally:
        for thing, name, value, own in reversed(undo):
            if own:
                setattr(thing, name, value)
            else:
                delattr(thing, name)                       # a method of the class shows again


# ------------------------------------------------------------------------------------------------
# The places where mistakes are made
# ------------------------------------------------------------------------------------------------

def attentions(model):
    return [block.attn for block in model.transformer.blocks]


def mlps(model):
    return [block.mlp for block in model.transformer.blocks]


def norms(model):
    inner = [norm for block in model.transformer.blocks for norm in (block.ln_1, block.ln_2)]
    return [*inner, model.transformer.ln_f]


def module_of(model):
    """neo or neox: the module whose functions this model's layers call."""
    return {NEO: neo, NEOX: neox}[model.config.model_type]


def after(layer, change):
    """The patch that passes a layer's output through `change`."""
    forward = layer.forward
    return layer, "forward", lambda *args, **kwargs: change(forward(*args, **kwargs))


def with_attention(model, **changes):
    """The patch that calls attention with other arguments."""
    module = module_of(model)
    attention = module.attention
    return [(module, "attention", lambda q, k, v, **how: attention(q, k, v, **how | changes))]


# ------------------------------------------------------------------------------------------------
# Both families.  Each function yields the variants of one mistake, each a list of patches.
# ------------------------------------------------------------------------------------------------

def no_causal_mask(model):
    def everything(T, S, window=None, device=None):
        return torch.ones(T, S, dtype=torch.bool, device=device)

    def both_sides(T, S, window=None, device=None):
        i, j = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)[None]
        return everything(T, S, device=device) if window is None else (i - j).abs() < window

    def behind(T, S, window=None, device=None):
        i, j = torch.arange(S - T, S, device=device)[:, None], torch.arange(S, device=device)[None]
        return everything(T, S, device=device) if window is None else i - j < window

    yield [(attention_module, "visible", everything)]
    if any(model.config.windows):
        yield [(attention_module, "visible", both_sides)]
        yield [(attention_module, "visible", behind)]


def no_final_norm(model):
    yield [(model.transformer.ln_f, "forward", lambda x: x)]


def norm_eps(model):
    right = model.transformer.ln_f.eps
    for eps in (1e-5, 1e-6, 1e-12):
        if eps != right:
            yield [(norm, "eps", eps) for norm in norms(model)]


def norm_no_bias(model):
    yield [(norm, "bias", None) for norm in norms(model)]


def rms_norm(model):
    """Without a bias, as an RMSNorm is, and with it."""
    for has_bias in (False, True):
        yield [own_norm(norm, lambda x: 0.0, lambda x: x.square().mean(-1, keepdim=True), has_bias)
               for norm in norms(model)]


def norm_unbiased_variance(model):
    yield [own_norm(norm, lambda x: x.mean(-1, keepdim=True),
                    lambda x: x.var(-1, keepdim=True, correction=1)) for norm in norms(model)]


def own_norm(norm, mean, variance, has_bias=True):
    """The patch that computes a LayerNorm with another mean or variance."""
    def forward(x):
        y = (x - mean(x)) / (variance(x) + norm.eps).sqrt() * norm.weight
        return y + norm.bias if has_bias and norm.bias is not None else y
    return norm, "forward", forward


def activation(function):
    def variants(model):
        yield [(mlp, "act", function) for mlp in mlps(model)]
    return variants


def gelu_exact(model):
    if mlps(model)[0].act is not ACTIVATIONS["gelu"]:
        yield from activation(ACTIVATIONS["gelu"])(model)


def gelu_tanh(model):
    if mlps(model)[0].act is ACTIVATIONS["gelu"]:
        yield from activation(ACTIVATIONS["gelu_pytorch_tanh"])(model)


def no_out_bias(model):
    yield [(attn.out_proj, "bias", None) for attn in attentions(model)
           if attn.out_proj.bias is not None]


def no_mlp_bias(model):
    for names in (("up_proj", "down_proj"), ("up_proj",), ("down_proj",)):
        yield [(getattr(mlp, name), "bias", None) for mlp in mlps(model) for name in names]


def transposed(layer):
    """The patch that reads a square matrix the other way round."""
    return layer, "weight", nn.Parameter(layer.weight.detach().T)


def out_transposed(model):
    yield [transposed(attn.out_proj) for attn in attentions(model)]


def heads_not_transposed(model):
    """After attention, where (B, H, T, D) is read as (B, T, H * D); before it; in both places."""
    module, H = module_of(model), model.config.num_attention_heads
    attention = module.attention

    def joined(q, k, v, **how):
        out = attention(q, k, v, **how)
        y = out[0] if how.get("return_weights") else out                   # (B, H, T, D)
        B, H, T, D = y.shape
        y = y.reshape(B, T, H, D).transpose(1, 2)
        return (y, out[1]) if how.get("return_weights") else y

    def split(y):                                              # (B, T, H * D) or (B, T, 3C)
        B, T, width = y.shape
        return y.view(B, H, T, width // H).transpose(1, 2).reshape(B, T, width)

    names = ("q_proj", "k_proj", "v_proj") if model.config.model_type == NEO else ("qkv_proj",)
    before = [after(getattr(attn, name), split) for attn in attentions(model) for name in names]
    yield [(module, "attention", joined)]
    yield [(module, "attention", joined), *before]
    yield before


def softmax_bfloat16(model):
    softmax = torch.Tensor.softmax

    def rounding(scores, weights):
        def wrong(x, dim, dtype=None):
            x = x.bfloat16() if scores == "all" else x.bfloat16().float() if scores else x
            x = softmax(x, dim)
            return (x.bfloat16() if weights else x).float()
        return [(torch.Tensor, "softmax", wrong)]

    def each_step(x, dim, dtype=None):
        x = x.bfloat16()
        powers = (x - x.amax(dim, keepdim=True)).exp()
        return (powers / powers.sum(dim, keepdim=True)).float()

    if model.dtype == torch.float32:
        yield [(torch.Tensor, "softmax", each_step)]
        yield rounding(scores="all", weights=True)
        yield rounding(scores=True, weights=False)
        yield rounding(scores=False, weights=True)


def with_weights(model, change, kinds=(nn.Linear, nn.Embedding, nn.LayerNorm)):
    """The patches that pass every weight and bias of these kinds of layers through `change`.

    Each layer's are changed only while it runs, since a copy of all would double the memory.
    """
    def changed(layer, forward):
        def wrong(x):
            names = [name for name in ("weight", "bias") if getattr(layer, name, None) is not None]
            with planted([(layer, name, nn.Parameter(change(getattr(layer, name)), False))
                          for name in names]):
                return forward(x)
        return wrong
    return [(layer, "forward", changed(layer, layer.forward))
            for layer in model.modules() if isinstance(layer, kinds)]


def weights_rounded_to(dtype):
    def variants(model):
        if model.dtype == torch.float32:
            yield with_weights(model, lambda w: w.to(dtype).to(w.dtype))
            yield with_weights(model, lambda w: w.to(dtype).to(w.dtype) if w.dim() > 1 else w)
    return variants


def to_int8(weight):
    """Rounded to integers from -127 to 127 times a scale for each row."""
    if weight.dim() == 1:
        return weight
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


def weights_int8(model):
    everywhere = with_weights(model, to_int8, (nn.Linear, nn.Embedding))
    linear = with_weights(model, to_int8, (nn.Linear,))
    yield linear
    yield [patch for patch in linear if patch[0] is not model.lm_head]
    yield everywhere
    positions = getattr(model.transformer, "pos_embed", None)
    yield [patch for patch in everywhere if patch[0] is not positions]


def embedding_scaled(model):
    root = math.sqrt(model.config.hidden_size)
    token = after(model.transformer.embed, lambda x: x * root)
    yield [token]
    if model.config.model_type == NEO:
        yield [token, after(model.transformer.pos_embed, lambda x: x * root)]


def extra_first_token(model):
    forward, config = model.transformer.forward, model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for first in sorted({0, config.bos_token_id, *ends} & set(range(config.vocab_size))):
        def wrong(input_ids, *args, first=first, **kwargs):
            out = forward(F.pad(input_ids, (1, 0), value=first), *args, **kwargs)
            out.last_hidden_state = out.last_hidden_state[:, 1:]
            return out
        yield [(model.transformer, "forward", wrong)]


def logits_shifted(model):
    """Row i holds the logits of position i + 1, or of i - 1.

    The row without logits is NaN, since a port may have anything there.
    """
    def later(logits):
        return F.pad(logits[:, 1:], (0, 0, 0, 1), value=math.nan)

    def earlier(logits):
        return F.pad(logits[:, :-1], (0, 0, 1, 0), value=math.nan)

    yield [after(model.lm_head, later)]
    yield [after(model.lm_head, earlier)]


# ------------------------------------------------------------------------------------------------
# GPT-Neo
# ------------------------------------------------------------------------------------------------

def windows(change):
    """Other windows: `change` turns the window of a layer, or None, into another."""
    def variants(model):
        W = model.config.window_size
        yield [(attn, "window", change(attn.window, W)) for attn in attentions(model)]
    return variants


def window_in_blocks(model):
    def wrong(blocks_back):
        def seen(T, S, window=None, device=None):
            rule = visible(T, S, None, device)
            if window is None:
                return rule
            i = torch.arange(S - T, S, device=device)[:, None]
            j = torch.arange(S, device=device)[None]
            return rule & (i // window - j // window <= blocks_back)
        return [(attention_module, "visible", seen)]
    yield wrong(0)
    yield wrong(1)


def scaled_scores(model):
    yield with_attention(model, scale=model.config.head_dim ** -0.5)


def no_position_embedding(model):
    yield [after(model.transformer.pos_embed, torch.zeros_like)]


def positions_from(first):
    def variants(model):
        table = model.transformer.pos_embed
        forward, last = table.forward, table.num_embeddings - 1
        yield [(table, "forward", lambda ids: forward((ids + first).clamp(max=last)))]
    return variants


def projection_transposed(name):
    def variants(model):
        yield [transposed(getattr(attn, name)) for attn in attentions(model)]
    return variants


# ------------------------------------------------------------------------------------------------
# GPT-NeoX
# ------------------------------------------------------------------------------------------------

def qkv_thirds(model):
    H = model.config.num_attention_heads
    def wrong(y):                                                          # (B, T, 3C)
        return y.unflatten(-1, (3, H, -1)).transpose(-3, -2).flatten(-3)
    yield [after(attn.qkv_proj, wrong) for attn in attentions(model)]


def qkv_order(model):
    H = model.config.num_attention_heads
    for order in ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        def wrong(y, order=list(order)):                                   # (B, T, 3C)
            return y.unflatten(-1, (H, 3, -1))[..., order, :].flatten(-3)
        yield [after(attn.qkv_proj, wrong) for attn in attentions(model)]


def no_qkv_bias(model):
    yield [(attn.qkv_proj, "bias", None) for attn in attentions(model)
           if attn.qkv_proj.bias is not None]


def one_norm(model):
    blocks = model.transformer.blocks
    yield [(block, "ln_2", block.ln_1) for block in blocks]
    yield [(block, "ln_1", block.ln_2) for block in blocks]


def norms_swapped(model):
    yield [(block, name, norm) for block in model.transformer.blocks
           for name, norm in (("ln_1", block.ln_2), ("ln_2", block.ln_1))]


def residual(parallel):
    def variants(model):
        yield [(block, "parallel", parallel) for block in model.transformer.blocks
               if block.parallel is not parallel]
    return variants


def with_tables(tables):
    """`tables(model, position_ids, R, base)` returns cosines and sines instead of rotary_tables."""
    def variants(model):
        def wrong(position_ids, R, base, dtype):
            cos, sin = tables(model, position_ids, R, base)
            return cos.to(dtype), sin.to(dtype)
        yield [(neox, "rotary_tables", wrong)]
    return variants


def right_tables(position_ids, R, base):
    return rotary_tables(position_ids, R, base, torch.float32)


rotary_all_dims = with_tables(
    lambda model, ids, R, base: right_tables(ids, model.config.head_dim, base))
rotary_opposite_sign = with_tables(
    lambda model, ids, R, base: (right_tables(ids, R, base)[0], -right_tables(ids, R, base)[1]))


def rotary_denominator(model):
    """base^(-2i/D) in place of base^(-2i/R): the same as another base."""
    D = model.config.head_dim
    yield from with_tables(lambda model, ids, R, base: right_tables(ids, R, base ** (R / D)))(model)


def rotary_base(model):
    own, D, R = model.config.rotary_emb_base, model.config.head_dim, model.config.rotary_ndims
    for wrong in (10, 100, 500, 1000, 2000, 5000, 10000, 20000, 25000, 40000, 50000, 100000, 160000,
                  200000, 250000, 500000, 1000000, 5000000, 10000000):
        if wrong not in (own, own ** (R / D)):             # the second is rotary-denominator
            yield from with_tables(
                lambda model, ids, R, base, wrong=wrong: right_tables(ids, R, wrong))(model)


def rotary_bfloat16(model):
    """Positions and frequencies, angles, or the finished tables in bfloat16, and combinations."""
    def rounded(x, yes):
        return x.bfloat16().float() if yes else x

    for inputs, angle, table in ((1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1),
                                 (1, 0, 1)):
        def tables(model, ids, R, base, inputs=inputs, angle=angle, table=table):
            frequencies = 1.0 / base ** (torch.arange(0, R, 2, dtype=torch.float32) / R)
            angles = rounded(ids[..., None].float(), inputs) * rounded(frequencies, inputs)
            angles = rounded(angles, angle)[:, None]                       # (B, 1, T, R/2)
            return rounded(angles.cos(), table), rounded(angles.sin(), table)
        yield from with_tables(tables)(model)


def with_rotate(wrong):
    def variants(model):
        yield [(neox, "rotate", wrong)]
    return variants


def neighbours(x, cos, sin):
    """Pair i is dims (2i, 2i + 1), as in GPT-J."""
    R = 2 * cos.size(-1)
    a, b, rest = x[..., 0:R:2], x[..., 1:R:2], x[..., R:]
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([pairs, rest], dim=-1)


def last_dims(x, cos, sin):
    first = x.size(-1) - 2 * cos.size(-1)
    return torch.cat([x[..., :first], rotate(x[..., first:], cos, sin)], dim=-1)


def rotary_q_only(model):
    rotate = neox.rotate
    for turns in ((True, False), (False, True)):           # the model rotates q first, then k
        calls = []
        def wrong(x, cos, sin, turns=turns, calls=calls):
            calls.append(None)
            return rotate(x, cos, sin) if turns[(len(calls) - 1) % 2] else x
        yield [(neox, "rotate", wrong)]


def no_scale(model):
    yield with_attention(model, scale=1.0)


def scale_by_width(model):
    yield with_attention(model, scale=model.config.hidden_size ** -0.5)


def head_tied(model):
    if model.lm_head.weight is not model.transformer.embed.weight:
        yield [(model.lm_head, "weight", model.transformer.embed.weight)]


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Mistake:
    """One row of the table.

    rounds: the mistake rounds within the computation, so a port that makes it in another order of
    operations agrees less closely than to float32's rounding.  whole_text: a position depends on
    later ones, so the beginning of a text cannot be computed alone.
    """
    id: str
    family: str | None                     # None: both
    sentence: str                          # what the mistake is
    fix: str                               # how to put it right in a port
    plant: Callable                        # model -> variants, each a list of patches
    cost: dict                             # {family: relative difference of the logits}: `measured`
    rounds: bool = False
    whole_text: bool = False


MISTAKES = [
    # --- both families
    Mistake("no-causal-mask", None, "Queries read keys that come after them.",
            "Let query i read key j only where j <= i.", no_causal_mask, whole_text=True,
            cost={NEO: 0.93, NEOX: 0.36}),
    Mistake("no-final-norm", None, "The LayerNorm after the last block is left out.",
            "Apply ln_f (final_layer_norm) once before the head.", no_final_norm,
            cost={NEO: 7.7, NEOX: 5.5}),
    Mistake("norm-eps", None,
            "LayerNorm adds another epsilon to the variance than config.json names.",
            "Read layer_norm_epsilon (GPT-Neo) or layer_norm_eps (GPT-NeoX); it is 1e-5.", norm_eps,
            cost={NEO: 0.00023, NEOX: 0.00011}),
    Mistake("norm-unbiased-variance", None, "LayerNorm divides the sum of squares by C - 1.",
            "Divide by C: LayerNorm takes the biased variance.", norm_unbiased_variance,
            cost={NEO: 0.017, NEOX: 0.0097}),
    Mistake("gelu-exact", None, "GELU is computed with erf where config.json names the tanh form.",
            "gelu_new, gelu_fast and gelu_pytorch_tanh all mean "
            "0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).",
            gelu_exact,
            cost={NEO: 0.00048, NEOX: 0.0002}),
    Mistake("gelu-tanh", None, "GELU is computed with tanh where config.json names the exact form.",
            '"gelu" means 0.5 x (1 + erf(x / sqrt(2))).', gelu_tanh,
            cost={NEOX: 0.00019}),
    Mistake("gelu-sigmoid", None, "GELU is approximated as x sigmoid(1.702 x).",
            "Use the form that config.json names; this approximation is another function.",
            activation(lambda x: x * torch.sigmoid(1.702 * x)),
            cost={NEO: 0.022, NEOX: 0.0093}),
    Mistake("relu", None,
            "The activation is ReLU.", "Use the GELU that config.json names.", activation(F.relu),
            cost={NEO: 0.18, NEOX: 0.1}),
    Mistake("no-out-bias", None, "The bias of attention's output projection is not added.",
            "Add out_proj.bias (GPT-NeoX: dense.bias).", no_out_bias,
            cost={NEO: 0.2, NEOX: 0.071}),
    Mistake("no-mlp-bias", None, "A bias of the MLP is not added.",
            "Both matrices of the MLP have a bias.", no_mlp_bias,
            cost={NEO: 0.31, NEOX: 0.15}),
    Mistake("out-transposed", None,
            "The matrix of attention's output projection is read transposed.",
            "Files hold (outputs, inputs): y = x Wᵀ + b.", out_transposed,
            cost={NEO: 1.3, NEOX: 0.73}),
    Mistake("heads-not-transposed", None,
            "The heads' outputs (B, H, T, D) are joined without being "
            "transposed to (B, T, H, D).", "Transpose heads and tokens before joining the heads.",
            heads_not_transposed, whole_text=True,
            cost={NEO: 1.3, NEOX: 0.69}),
    Mistake("softmax-bfloat16", None, "The softmax over the scores is computed in bfloat16.",
            "Compute scores and softmax in float32.", softmax_bfloat16, rounds=True,
            cost={NEO: 0.021, NEOX: 0.0021}),
    Mistake("weights-float16", None, "The weights were rounded to float16.",
            "Keep the weights in the dtype of the file.", weights_rounded_to(torch.float16),
            cost={NEO: 0.0035, NEOX: 0.0007}),
    Mistake("weights-bfloat16", None, "The weights were rounded to bfloat16.",
            "Keep the weights in the dtype of the file.", weights_rounded_to(torch.bfloat16),
            cost={NEO: 0.029, NEOX: 0.0059}),
    Mistake("weights-int8", None,
            "The matrices were rounded to 8-bit integers with a scale for each row.",
            "Compare before quantizing, or compare with a tolerance that allows for it.",
            weights_int8,
            cost={NEO: 0.075, NEOX: 0.015}),
    Mistake("embedding-scaled", None, "The embedding is multiplied by sqrt(C).",
            "Neither family scales its embedding.", embedding_scaled,
            cost={NEO: 1.1, NEOX: 0.31}),
    Mistake("extra-first-token", None, "A token that is not in the ids stands before them.",
            "Neither tokenizer adds a first token; compare the same ids.", extra_first_token,
            cost={NEO: 1.1, NEOX: 0.22}),
    Mistake("logits-shifted", None, "The logits stand one position too early or too late.",
            "Row i of the logits is what the model says after reading token i.", logits_shifted,
            cost={NEO: 1.1, NEOX: 0.97}),
    # The next two: github.com/nntile/nntile, pull request 359.
    Mistake("no-norm-bias", None, "The biases of the LayerNorms are not added.",
            "Every LayerNorm has a weight and a bias.", norm_no_bias,
            cost={NEO: 0.73, NEOX: 0.34}),
    Mistake("rms-norm", None,
            "RMSNorm stands in the place of LayerNorm: the mean is not subtracted.",
            "LayerNorm: (x - mean) / sqrt(variance + eps) * weight + bias.", rms_norm,
            cost={NEO: 0.88, NEOX: 0.38}),
    # --- GPT-Neo
    Mistake("local-first", NEO, "Global and local layers have changed places.",
            "attention_types [[['global', 'local'], n]]: even layers are global, odd ones local.",
            windows(lambda own, W: None if own else W),
            cost={NEO: 0.97}),
    Mistake("all-global", NEO, "Local layers read the whole text.",
            "In a local layer query i reads keys j with 0 <= i - j < window_size.",
            windows(lambda own, W: None),
            cost={NEO: 0.55}),
    Mistake("all-local", NEO, "Global layers have a window too.",
            "Only the layers that attention_types calls local have a window.",
            windows(lambda own, W: W),
            cost={NEO: 0.94}),
    Mistake("window-plus-one", NEO, "The window of local layers is one key too long.",
            "The window counts the query itself: i - j < window_size, not <=.",
            windows(lambda own, W: own and own + 1),
            cost={NEO: 0.26}),
    Mistake("window-minus-one", NEO, "The window of local layers is one key too short.",
            "The window counts the query itself: window_size keys in all.",
            windows(lambda own, W: own and max(1, own - 1)),
            cost={NEO: 0.28}),
    Mistake("window-in-blocks", NEO,
            "Local layers read blocks of keys in place of a window that moves with the query.",
            "In a local layer query i reads keys j with 0 <= i - j < window_size.",
            window_in_blocks,
            cost={NEO: 0.52}),
    Mistake("scaled-scores", NEO, "Attention scores are divided by sqrt(D).",
            "GPT-Neo does not scale its scores; it was trained without a scale.", scaled_scores,
            cost={NEO: 0.54}),
    Mistake("no-position-embedding", NEO, "The position embedding is not added.",
            "The first hidden state is wte[ids] + wpe[positions].", no_position_embedding,
            cost={NEO: 1.1}),
    Mistake("positions-from-one", NEO, "Positions are counted from 1.", "Count positions from 0.",
            positions_from(1),
            cost={NEO: 1.1}),
    Mistake("positions-from-two", NEO, "Positions are counted from 2.", "Count positions from 0.",
            positions_from(2),
            cost={NEO: 1.1}),
    Mistake("q-transposed", NEO, "The matrix of q is read transposed.",
            "Files hold (outputs, inputs): q = x Wᵀ.", projection_transposed("q_proj"),
            cost={NEO: 1.1}),
    Mistake("k-transposed", NEO, "The matrix of k is read transposed.",
            "Files hold (outputs, inputs): k = x Wᵀ.", projection_transposed("k_proj"),
            cost={NEO: 1.1}),
    Mistake("v-transposed", NEO, "The matrix of v is read transposed.",
            "Files hold (outputs, inputs): v = x Wᵀ.", projection_transposed("v_proj"),
            cost={NEO: 1.3}),
    # --- GPT-NeoX
    Mistake("qkv-thirds", NEOX, "The rows of query_key_value are cut into thirds for q, k and v.",
            "Cut the rows by heads first, then each head's 3 D rows into q, k and v.", qkv_thirds,
            cost={NEOX: 0.75}),
    Mistake("qkv-order", NEOX, "q, k and v of each head are taken in another order.",
            "Each head's 3 D rows are q, then k, then v.", qkv_order,
            cost={NEOX: 0.78}),
    Mistake("no-qkv-bias", NEOX, "The bias of query_key_value is not added.",
            "Add query_key_value.bias, unless attention_bias is false.", no_qkv_bias,
            cost={NEOX: 0.13}),
    Mistake("one-norm", NEOX, "Attention and MLP share one LayerNorm.",
            "input_layernorm belongs to attention, post_attention_layernorm to the MLP.", one_norm,
            cost={NEOX: 0.41}),
    Mistake("norms-swapped", NEOX, "The two LayerNorms of a block have changed places.",
            "input_layernorm belongs to attention, post_attention_layernorm to the MLP.",
            norms_swapped,
            cost={NEOX: 0.54}),
    Mistake("sequential-residual", NEOX,
            "The MLP reads attention's result where it should read the block's input.",
            "use_parallel_residual true (the default): x + attn(ln_1(x)) + mlp(ln_2(x)).",
            residual(False),
            cost={NEOX: 0.94}),
    Mistake("parallel-residual", NEOX,
            "The MLP reads the block's input where it should read attention's result.",
            "use_parallel_residual false: a = x + attn(ln_1(x)), then a + mlp(ln_2(a)).",
            residual(True),
            cost={NEOX: 0.94}),
    Mistake("rotary-all-dims", NEOX, "All D dims of each head are rotated.",
            "Rotate the first R = int(D * rotary_pct) dims; the others pass through.",
            rotary_all_dims,
            cost={NEOX: 0.38}),
    Mistake("rotary-neighbours", NEOX,
            "The rotation pairs neighbouring dims (2i, 2i + 1), as GPT-J does.",
            "Pair dims i and i + R/2.", with_rotate(neighbours),
            cost={NEOX: 0.27}),
    Mistake("rotary-last-dims", NEOX, "The last R dims of each head are rotated.",
            "Rotate the first R dims.", with_rotate(last_dims),
            cost={NEOX: 0.35}),
    Mistake("rotary-q-only", NEOX,
            "Only one of q and k is rotated.", "Rotate q and k.", rotary_q_only,
            cost={NEOX: 0.24}),
    Mistake("rotary-opposite-sign", NEOX, "The rotation turns in the other direction.",
            "(a, b) becomes (a cos - b sin, b cos + a sin).", rotary_opposite_sign,
            cost={NEOX: 0.26}),
    Mistake("rotary-base", NEOX, "The rotation has another base than config.json names.",
            "Read rotary_emb_base (rope_theta); it is 10000 in EleutherAI's models.", rotary_base,
            cost={NEOX: 0.23}),
    Mistake("rotary-denominator", NEOX, "The frequencies are base^(-2i/D).",
            "They are base^(-2i/R): the denominator is the number of rotated dims.",
            rotary_denominator,
            cost={NEOX: 0.28}),
    Mistake("rotary-bfloat16", NEOX, "Angles or tables of the rotation are rounded to bfloat16.",
            "Compute positions, frequencies, angles, sines and cosines in float32.",
            rotary_bfloat16,
            rounds=True,
            cost={NEOX: 0.0006}),
    Mistake("no-rotary", NEOX, "q and k are not rotated.",
            "Rotate the first R dims of q and k by their positions.",
            with_rotate(lambda x, cos, sin: x),
            cost={NEOX: 0.26}),
    Mistake("no-scale", NEOX, "Attention scores are not divided by sqrt(D).",
            "Multiply the scores by D^-0.5.", no_scale,
            cost={NEOX: 0.32}),
    Mistake("scale-by-width", NEOX, "Attention scores are divided by sqrt(C).",
            "Divide by sqrt(D), D the width of one head.", scale_by_width,
            cost={NEOX: 0.21}),
    Mistake("head-tied", NEOX, "The embedding is used as the head.",
            "embed_out.weight is a matrix of its own, unless tie_word_embeddings is true.",
            head_tied,
            cost={NEOX: 1.4}),
]
BY_ID = {mistake.id: mistake for mistake in MISTAKES}


def variants(model):
    """Yield (mistake, patches) for every way to make every mistake of this model's family.

    Within planted(...), their patches are made on top of what is planted there.
    """
    for mistake in MISTAKES:
        if mistake.family in (None, model.config.model_type):
            for patches in mistake.plant(model):
                if patches:
                    yield mistake, patches


# ------------------------------------------------------------------------------------------------
# What each costs
# ------------------------------------------------------------------------------------------------

def example_models():
    """Small models with wide random weights: with the usual ones, many mistakes change nothing."""
    shared = dict(vocab_size=97, hidden_size=64, max_position_embeddings=128, bos_token_id=0,
                  eos_token_id=0)
    yield neo.GPTNeoForCausalLM(neo.GPTNeoConfig(
        **shared, num_layers=4, num_heads=4, window_size=8,
        attention_types=[[["global", "local"], 2]]), "naive")
    for parallel, act in ((True, "gelu"), (False, "gelu_fast")):
        yield neox.GPTNeoXForCausalLM(neox.GPTNeoXConfig(
            **shared, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
            use_parallel_residual=parallel, hidden_act=act), "naive")


@torch.no_grad()
def measured():
    """{id: {family: relative difference of the logits}} of each mistake's first variant.

    The text has 60 tokens.
    """
    costs = {}
    for model in example_models():
        generator, family = torch.Generator().manual_seed(0), model.eval().config.model_type
        for name, p in model.named_parameters():
            p.normal_(0, 0.2, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                p += 1
        ids = torch.randint(97, (1, 60), generator=generator)
        right = model(ids).logits
        for mistake, patches in variants(model):
            if family not in costs.setdefault(mistake.id, {}):
                with planted(patches):
                    gap = model(ids).logits - right
                rows = ~gap.isnan().any(-1)                # logits-shifted leaves one row empty
                costs[mistake.id][family] = (gap[rows].norm() / right[rows].norm()).item()
    return costs


@as_command
def main(argv=None):
    """Print the table as Markdown."""
    Parser(description="Print every known mistake as a row of a Markdown table, with its cost, "
                       "which is measured in small models.").parse_args(argv)
    if sys.stdout is None:
        raise ValueError("standard output is closed: there is nowhere to write the table")
    costs = measured()
    print("| id | mistake | instead | GPT-Neo | GPT-NeoX |\n|---|---|---|---|---|")
    for m in MISTAKES:
        cells = [f"{costs[m.id][family]:.1e}" if family in costs[m.id] else ""
                 for family in (NEO, NEOX)]
        print(f"| {m.id} | {m.sentence} | {m.fix} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
