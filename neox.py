"""GPT-NeoX: EleutherAI's 20B of 2022, all of Pythia, and the models made like them.

    B  batch                        C  width of the model (hidden_size)
    T  new tokens                   H  heads
    S  tokens in view, S >= T       D  width of a head, C / H
    V  vocabulary                   R  rotated dims of a head, R <= D

Read from top to bottom: config, attention, MLP, block, model, language model, task heads.
neo.py has the same parts in the same order under the same names; `diff neo.py neox.py` shows what
changed from that family to this one.

What sets GPT-NeoX apart from GPT-Neo:
  * there is no position embedding: the first R dims of queries and keys are rotated instead;
  * q, k and v come from one matrix, interleaved head by head;
  * attention and MLP read the same x, in parallel, each with its own LayerNorm;
  * every layer is global, scores are divided by sqrt(D), the output head is not the embedding.
Sources: EleutherAI/gpt-neox (megatron/model) and transformers (modeling_gpt_neox.py, v5.23.0).
With attn_implementation="naive" the results are transformers' own, to the last bit.
"""

import torch
import torch.nn as nn

from attention import attention
from base import (ACTIVATIONS, ModelOutput, PreTrainedModel, as_usual, check_inputs, key_mask_of,
                  next_token_loss)
from configs import GPTNeoXRules, frozen
from sampling import generate
from task_heads import ForQuestionAnswering, ForSequenceClassification, ForTokenClassification


@frozen
class GPTNeoXConfig(GPTNeoXRules):
    """The architecture, under the names of the official config.json.  Defaults are transformers'.

    configs.py reads other spellings of these names and checks the values.
    """

    vocab_size: int = 50432
    max_position_embeddings: int = 2048     # length in training; rotation itself has no limit
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"                # exact in Pythia's config, "gelu_fast" in the 20B's
    rotary_pct: float = 0.25                # R / D
    rotary_emb_base: float = 10000
    use_parallel_residual: bool = True      # absent from old configs, so True must be the default
    attention_bias: bool = True
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    classifier_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | list | None = 2     # "!" in the 20B's tokenizer; its end of text is 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    num_labels: int | None = None           # of the task heads; None: as many as id2label, or 2
    id2label: dict | None = None
    problem_type: str | None = None         # of a sequence classifier; None: see task_heads.py

    model_type = "gpt_neox"                 # without annotation: not a field

    @property
    def windows(self):
        """For each layer how many tokens a query reads: here None, which means no limit."""
        return [None] * self.num_hidden_layers

    @property
    def position_limit(self):
        """The most tokens that a text can have: None, because rotation has no limit."""
        return None

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_ndims(self):
        """R, rounded down as in transformers, which takes int(D * rotary_pct)."""
        return int(self.head_dim * self.rotary_pct)


class Attention(nn.Module):
    """Multi-head self-attention with rotated positions; every layer is global."""

    def __init__(self, config, layer):
        super().__init__()
        C = config.hidden_size
        self.layer, self.window = layer, config.windows[layer]
        self.D = config.head_dim
        self.attention_dropout = config.attention_dropout
        self.qkv_proj = nn.Linear(C, 3 * C, bias=config.attention_bias)
        self.out_proj = nn.Linear(C, C, bias=config.attention_bias)

    def forward(self, x, *, cos, sin, key_mask=None, cache=None, backend="naive",
                return_weights=False):
        """x (B, T, C), key_mask (B, S) bool -> y (B, T, C) and the weights (B, H, T, S) or None."""
        B, T, _ = x.shape
        # The rows of the matrix are [q k v] of head 0, then [q k v] of head 1, and so on: split the
        # heads first, and then each head in q, k and v.  Splitting the whole in thirds fits every
        # shape too, but gives wrong results (EleutherAI/gpt-neox, megatron/model/transformer.py).
        qkv = self.qkv_proj(x).view(B, T, -1, 3 * self.D).transpose(1, 2)   # (B, H, T, 3D)
        q, k, v = qkv.chunk(3, dim=-1)                                      # each (B, H, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v, key_mask = cache.append(self.layer, k, v, key_mask)       # (B, H, S, D)
        out = attention(q, k, v, scale=self.D ** -0.5, window=self.window, backend=backend,
                        key_mask=key_mask, dropout=self.attention_dropout if self.training else 0.0,
                        return_weights=return_weights)
        y, weights = out if return_weights else (out, None)                 # (B, H, T, D)
        y = y.transpose(1, 2).contiguous().view(B, T, -1)                   # concatenate the heads
        return self.out_proj(y), weights


def rotary_tables(position_ids, R, base, dtype):
    """Cosine and sine of every angle position * base^(-2i/R).

    position_ids (B, T) integer -> two tensors (B, 1, T, R/2) of dtype.  Angles are float32 in every
    model: bfloat16 cannot tell position 2047 from 2048 (EleutherAI/gpt-neox issue 1003).  Only the
    finished tables are rounded to the model's dtype.
    """
    inv_freq = 1.0 / base ** (torch.arange(0, R, 2, dtype=torch.float32) / R)       # (R/2,)
    angles = position_ids[..., None].float() * inv_freq.to(position_ids.device)    # (B, T, R/2)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(x, cos, sin):
    """Rotate the first R dims of every head by the token's position; the other D - R stay.

    x (B, H, T, D), cos and sin (B, 1, T, R/2) -> (B, H, T, D).  Dims i and i + R/2 form a pair:
    halves of the R dims, not neighbours as in GPT-J.
    """
    half = cos.size(-1)                                                            # R/2
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)         # (B, H, T, D)


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each token by itself."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACTIVATIONS[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)))                    # (B, T, C)


class Block(nn.Module):
    """x ─┬─ ln_1 ─ attn ─┐
          ├─ ln_2 ─ mlp ──┼─ + ─→   in parallel; RedPajama and open-calm do it as in GPT-Neo
          └───────────────┘
    """

    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.use_parallel_residual
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x, **how):
        a, weights = self.attn(self.ln_1(x), **how)
        a = self.dropout(a)
        if self.parallel:
            return self.dropout(self.mlp(self.ln_2(x))) + a + x, weights    # this order: rounding
        x = a + x
        return self.dropout(self.mlp(self.ln_2(x))) + x, weights


class GPTNeoXModel(PreTrainedModel):
    """Token ids to hidden states."""

    config_class = GPTNeoXConfig

    def __init__(self, config, attn_implementation="auto"):
        super().__init__(config, attn_implementation)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
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
        x = self.dropout(x)
        cos, sin = rotary_tables(position_ids, self.config.rotary_ndims,
                                 self.config.rotary_emb_base, x.dtype)
        how = {"key_mask": key_mask_of(attention_mask, B, past + T), "cache": cache,
               "backend": self.attn_implementation,
               "return_weights": output_attentions, "cos": cos, "sin": sin}

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


class GPTNeoXForCausalLM(PreTrainedModel):
    """Hidden states to next-token logits, through a matrix of its own (untied weights)."""

    config_class = GPTNeoXConfig
    generate = generate

    def __init__(self, config, attn_implementation="auto"):
        super().__init__(config, attn_implementation)
        self.transformer = GPTNeoXModel(config, attn_implementation)
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
        The other arguments and errors are those of GPTNeoXModel.forward.
        """
        out = self.transformer(input_ids, attention_mask, position_ids, cache, output_hidden_states,
                               output_attentions, inputs_embeds)
        x, out.last_hidden_state = out.last_hidden_state, None              # not among the outputs
        out.logits = self.run(self.lm_head, self.tokens_to_keep(x, logits_to_keep))     # (B, T, V)
        if labels is not None:
            out.loss = next_token_loss(out.logits, labels)
        return out


class GPTNeoXForSequenceClassification(ForSequenceClassification):
    """One label for a whole text, from the hidden state of its last token."""

    config_class, backbone_class = GPTNeoXConfig, GPTNeoXModel


class GPTNeoXForTokenClassification(ForTokenClassification):
    """A label for every token."""

    config_class, backbone_class = GPTNeoXConfig, GPTNeoXModel
    upcast_loss = True                      # in float32, as in loss_utils.py


class GPTNeoXForQuestionAnswering(ForQuestionAnswering):
    """Where in the text an answer begins and ends."""

    config_class, backbone_class = GPTNeoXConfig, GPTNeoXModel
