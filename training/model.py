"""A model with fresh weights, and how its weights are updated: learning rate, parameter groups."""

import math

import torch

from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM


def new_model(family, *, vocab_size, context, hidden_size, layers, heads, window, dropout):
    """A model of this shape with fresh float32 weights; family is "neo" or "neox"."""
    shape = dict(vocab_size=vocab_size, max_position_embeddings=context, hidden_size=hidden_size)
    if family == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(
            **shape, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * hidden_size, hidden_dropout=dropout,
            bos_token_id=0, eos_token_id=0))                # the class default for eos, 2, is "!"
    kinds = [["global", "local"], layers // 2], [["global"], layers % 2]
    end = vocab_size - 1
    model = GPTNeoForCausalLM(GPTNeoConfig(
        **shape, num_layers=layers, num_heads=heads, window_size=window,
        attention_types=[[names, times] for names, times in kinds if times],
        resid_dropout=dropout, embed_dropout=dropout, bos_token_id=end, eos_token_id=end))
    with torch.no_grad():
        # GPT-Neo's scores have no 1/sqrt(D); its authors folded it into the first q weights
        # (mesh-tensorflow, fold_scaling_into_initializer).  And an embedding must not be small
        # beside what the blocks add to it, which starts at about 0.1, so embeddings start there too
        # and not at 0.02.  The demo's mean loss of steps 201 to 250 is 4.70 with both, 4.73 with
        # only the second, 4.93 with only the first.
        for block in model.transformer.blocks:
            block.attn.q_proj.weight *= model.config.head_dim ** -0.5
        model.transformer.embed.weight *= 5
    return model


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up from peak / warmup to peak, then half a cosine, 0 after the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def parameter_groups(model, weight_decay, fresh):
    """AdamW's parameter groups, each with its share of the learning rate.

    Weight decay is for the matrices of linear layers.  Biases are few, and LayerNorm weights belong
    near 1 and not 0.  A row of an embedding has a gradient only when its token occurs, but would
    shrink at every step, so decay would make rare tokens vanish.  GPT-Neo's output matrix is its
    embedding and has no decay either.

    A fresh GPT-Neo's q weights have 1/sqrt(D) folded in (new_model).  AdamW moves a weight by about
    the learning rate whatever its size, so their learning rate is multiplied by 1/sqrt(D) too.
    Together that is the training of a model that divides its scores, except that clipping and
    Adam's epsilon see other gradients.
    """
    embedded = {id(p) for module in model.modules() if isinstance(module, torch.nn.Embedding)
                for p in module.parameters()}
    folded = {id(p) for name, p in model.named_parameters()
              if fresh and name.endswith("q_proj.weight")}
    groups = {"decayed": [], "kept": [], "folded": []}
    for p in model.parameters():
        matrix = p.ndim >= 2 and id(p) not in embedded
        groups["folded" if id(p) in folded else "decayed" if matrix else "kept"].append(p)
    share = model.config.head_dim ** -0.5
    return [dict(params=groups["decayed"], weight_decay=weight_decay, share=1.0),
            dict(params=groups["kept"], weight_decay=0.0, share=1.0),
            dict(params=groups["folded"], weight_decay=weight_decay / share, share=share)]
