"""GPT-Neo: EleutherAI's GPT-3-like models of 2021 (125M, 1.3B, 2.7B) and TinyStories.

    B  batch                        C  width of the model (hidden_size)
    T  new tokens                   H  heads
    S  tokens in view, S >= T       D  width of a head, C / H
    V  vocabulary                   P  learned positions

Read from top to bottom: config, attention, MLP, block, model, language model, task heads.
neox.py has the same parts in the same order under the same names; `diff neo.py neox.py` shows what
changed from this family to the next.

What sets GPT-Neo apart from GPT-2:
  * every second layer is local: a token sees itself and the window - 1 tokens before it;
  * attention scores are not divided by sqrt(D), and are computed in at least float32;
  * q, k and v are three matrices without bias.
Sources: EleutherAI/gpt-neo (models/gpt2/gpt2.py) and transformers (modeling_gpt_neo.py, v5.23.0).
With attn_implementation="naive" the results are transformers' own, to the last bit.
"""

import torch
import torch.nn as nn

from attention import attention
from base import (ACTIVATIONS, ModelOutput, PreTrainedModel, as_usual, check_inputs, key_mask_of,
                  next_token_loss)
from configs import GPTNeoRules, frozen
from sampling import generate
from task_heads import ForQuestionAnswering, ForSequenceClassification, ForTokenClassification


@frozen
class GPTNeoConfig(GPTNeoRules):
    """The architecture, under the names of the official config.json.  Defaults are transformers'.

    configs.py reads other spellings of these names and checks the values.
    """

    vocab_size: int = 50257
    max_position_embeddings: int = 2048     # P: a hard limit, the table has no more rows
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: tuple | list = ((("global", "local"), 12),)    # pairs (kinds, repetitions)
    num_heads: int = 16
    intermediate_size: int | None = None    # None: 4 * hidden_size
    window_size: int = 256                  # of local layers, in tokens, the query's own included
    activation_function: str = "gelu_new"
    resid_dropout: float = 0.0
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | list | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    num_labels: int | None = None           # of the task heads; None: as many as id2label, or 2
    id2label: dict | None = None
    problem_type: str | None = None         # of a sequence classifier; None: see task_heads.py

    model_type = "gpt_neo"                  # without annotation: not a field

    @property
    def windows(self):
        """For each layer how many tokens a query reads, its own included; None means no limit."""
        return [self.window_size if kind == "local" else None for kind in self.attention_layers]

    @property
    def position_limit(self):
        """The most tokens that a text can have, because each position is a row of a table."""
        return self.max_position_embeddings

    @property
    def num_hidden_layers(self):
        return self.num_layers

    @property
    def num_attention_heads(self):
        return self.num_heads

    @property
    def head_dim(self):
        return self.hidden_size // self.num_heads


class Attention(nn.Module):
    """Multi-head self-attention; in a local layer a query reads only the last `window` tokens."""

    def __init__(self, config, layer):
        super().__init__()
        C = config.hidden_size
        self.layer, self.window = layer, config.windows[layer]
        self.D = config.head_dim
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C, bias=False)
        self.out_proj = nn.Linear(C, C)                                        # this one has a bias

    def forward(self, x, *, key_mask=None, cache=None, backend="naive", return_weights=False):
        """x (B, T, C), key_mask (B, S) bool -> y (B, T, C) and the weights (B, H, T, S) or None."""
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.D).transpose(1, 2)           # each (B, H, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v, key_mask = cache.append(self.layer, k, v, key_mask)       # (B, H, S, D)
        # scale 1.0: the model was trained without 1/sqrt(D).  mesh-tensorflow put this factor into
        # the initial weights of q instead (fold_scaling_into_initializer).
        out = attention(q, k, v, scale=1.0, window=self.window, backend=backend, key_mask=key_mask,
                        dropout=self.attention_dropout if self.training else 0.0,
                        upcast=True, mask_twice=True, return_weights=return_weights)
        y, weights = out if return_weights else (out, None)                 # (B, H, T, D)
        y = y.transpose(1, 2).contiguous().view(B, T, -1)                   # concatenate the heads
        return self.out_proj(y), weights


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each token by itself."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACTIVATIONS[config.activation_function]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)))                    # (B, T, C)


class Block(nn.Module):
    """x ─┬─ ln_1 ─ attn ─ + ─┬─ ln_2 ─ mlp ─ + ─→   one after the other, each added to its input
          └────────────────┘   └──────────────┘
    """

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x, **how):
        a, weights = self.attn(self.ln_1(x), **how)
        x = self.dropout(a) + x
        return x + self.dropout(self.mlp(self.ln_2(x))), weights


class GPTNeoModel(PreTrainedModel):
    """Token ids to hidden states."""

    config_class = GPTNeoConfig

    def __init__(self, config, attn_implementation="auto"):
        super().__init__(config, attn_implementation)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos_embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.init_weights()

    @as_usual
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None,
                output_hidden_states=False, output_attentions=False, inputs_embeds=None):
        """input_ids (B, T) integer -> ModelOutput with last_hidden_state (B, T, C).

        attention_mask (B, S): 1 for real tokens, 0 for padding, the cached ones included.
        position_ids (B, T) or (1, T): by default they continue from the cached tokens and ignore
        the mask, as in transformers' forward; generate passes positions that skip left padding.
        cache: a KVCache, to which this call adds T tokens.
        inputs_embeds (B, T, C): used as the output of the token embedding; then give no input_ids.
        Raises ValueError for ids, positions, masks or lengths outside the model's range.
        """
        past = 0 if cache is None else cache.length
        B, T = check_inputs(input_ids, position_ids, self.config, past, inputs_embeds)
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds       # (B, T, C)
        if cache is not None:
            cache.check(B, T)
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=x.device)[None]
        how = {"key_mask": key_mask_of(attention_mask, B, past + T), "cache": cache,
               "backend": self.attn_implementation,
               "return_weights": output_attentions}

        x = self.dropout(x + self.pos_embed(position_ids))
        hidden_states, attentions = [], []
        for block in self.blocks:
            if output_hidden_states:                     # kept only on request: they take memory
                hidden_states.append(x)
            x, weights = self.run(block, x, **how)
            attentions.append(weights)
        if cache is not None:
            cache.advance(T)
        x = self.ln_f(x)
        return ModelOutput(last_hidden_state=x,
                           hidden_states=(*hidden_states, x) if output_hidden_states else None,
                           attentions=tuple(attentions) if output_attentions else None)


class GPTNeoForCausalLM(PreTrainedModel):
    """Hidden states to next-token logits, through the embedding matrix (tied weights)."""

    config_class = GPTNeoConfig
    generate = generate

    def __init__(self, config, attn_implementation="auto"):
        super().__init__(config, attn_implementation)
        self.transformer = GPTNeoModel(config, attn_implementation)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights(self.lm_head)
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.embed.weight

    @as_usual
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None,
                cache=None, logits_to_keep=0, output_hidden_states=False, output_attentions=False,
                inputs_embeds=None):
        """input_ids (B, T) integer -> ModelOutput with logits (B, T, V), and loss if labels given.

        labels (B, T): token ids, usually input_ids itself, since the shift by one happens inside;
        -100 leaves a token out of the loss.
        logits_to_keep: the number of last tokens whose logits are computed; 0 means all.
        The other arguments and errors are those of GPTNeoModel.forward.
        """
        out = self.transformer(input_ids, attention_mask, position_ids, cache, output_hidden_states,
                               output_attentions, inputs_embeds)
        x, out.last_hidden_state = out.last_hidden_state, None              # not among the outputs
        out.logits = self.run(self.lm_head, self.tokens_to_keep(x, logits_to_keep))     # (B, T, V)
        if labels is not None:
            out.loss = next_token_loss(out.logits, labels)
        return out


class GPTNeoForSequenceClassification(ForSequenceClassification):
    """One label for a whole text, from the hidden state of its last token."""

    config_class, backbone_class = GPTNeoConfig, GPTNeoModel


class GPTNeoForTokenClassification(ForTokenClassification):
    """A label for every token."""

    config_class, backbone_class = GPTNeoConfig, GPTNeoModel
    upcast_loss = False                     # in the logits' own dtype, as in modeling_gpt_neo.py


class GPTNeoForQuestionAnswering(ForQuestionAnswering):
    """Where in the text an answer begins and ends."""

    config_class, backbone_class = GPTNeoConfig, GPTNeoModel
