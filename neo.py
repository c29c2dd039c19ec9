"""GPT-Neo: EleutherAI's GPT-3-like models of 2021 (125M, 1.3B, 2.7B) and TinyStories.

    B  batch                        C  width of the model (hidden_size)
    T  new tokens                   H  heads
    S  tokens in view, S >= T       D  width of a head, C / H
    V  vocabulary                   P  learned positions

Read from top to bottom: config, attention, MLP, block, model, language model, task heads.  neox.py
has the same parts in the same order and names; `diff neo.py neox.py` shows what changed in a year.

What sets GPT-Neo apart from GPT-2:
  * every second layer is local: a token sees itself and the window - 1 tokens before it;
  * attention scores are not divided by sqrt(D), and are formed in float32 at least;
  * q, k and v are three matrices without bias.
Sources: EleutherAI/gpt-neo (models/gpt2/gpt2.py) and transformers (modeling_gpt_neo.py, v5.23.0),
whose results this file repeats to the bit when attention is the naive one.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn

from attention import attention, choose_backend
from base import ACTIVATIONS, ModelOutput, PreTrainedModel, check_inputs, key_mask_of, next_token_loss
from configs import GPTNeoRules
from sampling import generate
from task_heads import ForQuestionAnswering, ForSequenceClassification, ForTokenClassification


@dataclass(frozen=True)
class GPTNeoConfig(GPTNeoRules):
    """The architecture, under the names of the official config.json.  Defaults are transformers'.

    Other spellings of these names, and what each value may be: configs.py.
    """

    vocab_size: int = 50257
    max_position_embeddings: int = 2048     # P: a hard limit, there is no row for position P
    hidden_size: int = 2048
    num_layers: int = 24
    attention_types: tuple | list = ((("global", "local"), 12),)    # pairs (kinds, repetitions)
    num_heads: int = 16
    intermediate_size: int | None = None    # None: 4 * hidden_size
    window_size: int = 256                  # of local layers: keys in view, the query's own included
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
    num_labels: int | None = None           # of the task heads; None: as many as id2label has, else 2
    id2label: dict | None = None
    problem_type: str | None = None         # of a sequence classifier; None: see task_heads.py

    model_type = "gpt_neo"                  # no annotation, so not a field

    @property
    def windows(self):
        """For each layer how far back it sees: a number of tokens, or None for all."""
        return [self.window_size if kind == "local" else None for kind in self.attention_layers]

    @property
    def position_limit(self):
        """Most tokens that one text can have: positions are rows of a table."""
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
    """Multi-head self-attention; local layers look back only `window` tokens."""

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
        B, T, C = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.D).transpose(1, 2)           # each (B, H, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v, key_mask = cache.append(self.layer, k, v, key_mask)       # (B, H, S, D)
        # scale 1.0: the model was trained without 1/sqrt(D).  mesh-tensorflow folds it into the
        # initial q weights (fold_scaling_into_initializer), and training went on from there.
        out = attention(q, k, v, scale=1.0, window=self.window, backend=backend, key_mask=key_mask,
                        dropout=self.attention_dropout if self.training else 0.0,
                        upcast=True, mask_twice=True, return_weights=return_weights)
        y, weights = out if return_weights else (out, None)                 # (B, H, T, D)
        y = y.transpose(1, 2).contiguous().view(B, T, C)                    # heads side by side
        return self.out_proj(y), weights


class MLP(nn.Module):
    """Each token by itself: up to the inner width, through the activation, down again."""

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

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None,
                output_hidden_states=False, output_attentions=False, inputs_embeds=None):
        """input_ids (B, T) integer -> ModelOutput with last_hidden_state (B, T, C).

        attention_mask (B, S): 1 for real tokens, 0 for padding, the cached ones included.
        position_ids (B, T) or (1, T): by default counted on from the cache, whatever the mask says
        (as in transformers' forward; generate passes positions that skip left padding).
        cache: a KVCache, which this call extends by T tokens.
        inputs_embeds (B, T, C): what the token embedding would return, in place of input_ids.
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
               "backend": choose_backend(self.attn_implementation, output_attentions),
               "return_weights": output_attentions}

        x = self.dropout(x + self.pos_embed(position_ids))
        hidden_states, attentions = [], []
        for block in self.blocks:
            if output_hidden_states:                     # if nobody asked, memory can be freed
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
    """Hidden states to next-token logits, by the embedding matrix used once more."""

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

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, cache=None,
                logits_to_keep=0, output_hidden_states=False, output_attentions=False, inputs_embeds=None):
        """input_ids (B, T) integer -> ModelOutput with logits (B, T, V), and loss if labels are given.

        labels (B, T): token ids, -100 where not to be scored; the shift by one happens inside.
        logits_to_keep: n > 0 computes the logits of the last n tokens only.
        The rest is GPTNeoModel.forward's.
        """
        out = self.transformer(input_ids, attention_mask, position_ids, cache, output_hidden_states,
                               output_attentions, inputs_embeds)
        x, out.last_hidden_state = out.last_hidden_state, None
        out.logits = self.run(self.lm_head, x[:, -logits_to_keep:])                 # 0 keeps all
        if labels is not None:
            out.loss = next_token_loss(out.logits, labels)
        return out


class GPTNeoForSequenceClassification(ForSequenceClassification):
    """One label for a text, read off its last token."""

    config_class, backbone_class = GPTNeoConfig, GPTNeoModel


class GPTNeoForTokenClassification(ForTokenClassification):
    """A label for every token."""

    config_class, backbone_class = GPTNeoConfig, GPTNeoModel
    upcast_loss = False                     # in the logits' own dtype: modeling_gpt_neo.py has its own


class GPTNeoForQuestionAnswering(ForQuestionAnswering):
    """Where in the text an answer begins and ends."""

    config_class, backbone_class = GPTNeoConfig, GPTNeoModel
