"""What the two families share around their architecture: activations, inputs, outputs, the loss.

Nothing here tells GPT-Neo from GPT-NeoX; what does is in neo.py and neox.py.

    B batch · T new tokens · S tokens in view (cached + new) · C width · V vocabulary
"""

import copy
import dataclasses
import functools
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import choose_backend
from fast.linear import WEIGHT_FIRST, Instead, is_few
from fast.slices import in_slices
from load_weights import load_pretrained, save_pretrained

# ------------------------------------------------------------------------------------------------
# Activations: four names for two functions, kept apart because their roundings differ
# ------------------------------------------------------------------------------------------------

@in_slices(2**18, on="cpu")
def gelu_new(x):
    """The tanh form of GELU, in the order of transformers' NewGELUActivation, the power included."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x):
    """The same function in the order of transformers' FastGELUActivation: GPT-NeoX-20B's."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_pytorch_tanh(x):
    """The same function once more, fused by torch."""
    return F.gelu(x, approximate="tanh")


# The exact one is up to 4.7e-4 away from the other three: enough to be another model, too little to
# see in the text.  So the name in config.json is obeyed, even though Pythia was trained with tanh
# and its config says "gelu" (EleutherAI/gpt-neox, megatron/model/fused_bias_gelu.py).
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": gelu_new, "gelu_fast": gelu_fast,
               "gelu_pytorch_tanh": gelu_pytorch_tanh}


# ------------------------------------------------------------------------------------------------
# Outputs and the loss
# ------------------------------------------------------------------------------------------------

@dataclass(eq=False)
class ModelOutput(Mapping):
    """What a forward pass returns; None is what was not asked for.

    loss () float32 · logits (B, T, V) · last_hidden_state (B, T, C) · start_logits, end_logits (B, T)
    hidden_states: L + 1 tensors (B, T, C), the embeddings first, the last after the final norm
    attentions: L tensors (B, H, T, S)

    Like transformers' ModelOutput it is also a mapping of what is not None, in this order:
    out["logits"], "loss" in out, and, counted by position, out[0], out[:2], out.to_tuple().
    """
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None               # question answering
    end_logits: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None

    def __getitem__(self, key):
        if not isinstance(key, str):
            return self.to_tuple()[key]
        value = vars(self).get(key)
        if value is None:
            raise KeyError(f"{key}: this output has {', '.join(self)}")
        return value

    def __iter__(self):
        return (name for name, value in vars(self).items() if value is not None)

    def __len__(self):
        return len(list(iter(self)))

    def to_tuple(self):
        """Everything that is not None, in the order of the fields."""
        return tuple(self.values())


torch.export.register_dataclass(ModelOutput)               # so that an exported model can return one


def next_token_loss(logits, labels):
    """Mean cross entropy of token t+1 given the tokens up to t, in at least float32.

    logits (B, T, V); labels (B, T), usually the input ids themselves, -100 where not to be scored
    (transformers' ForCausalLMLoss).  With nothing to score the mean of nothing is NaN, as there.
    Raises ValueError for labels of another shape and for ids outside the vocabulary.
    """
    check_labels(labels, logits)
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1).to(logits.device, torch.long)  # shifted left
    found = log_probability(logits.reshape(-1, logits.size(-1)), targets)
    return F.nll_loss(found, targets.clamp(max=0), ignore_index=-100)


@in_slices(2**20)
def log_probability(logits, targets):
    """Of each row's target id: logits (N, V), targets (N,) -> (N, 1).  For -100 something finite."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])


def check_labels(labels, logits):
    """Raise ValueError for labels that next_token_loss could not score."""
    B, T, V = logits.shape
    if labels.shape != (B, T):
        raise ValueError(f"labels must have the shape of the logits' tokens {(B, T)}, "
                         f"got {tuple(labels.shape)} (labels and logits_to_keep exclude each other)")
    if labels.is_floating_point():
        raise ValueError(f"labels must be token ids, int64 or int32, got {labels.dtype}")
    low, high = value_range(labels.where(labels != -100, 0), (0, 0))
    if low < 0 or high >= V:
        raise ValueError(f"labels range from {low} to {high}; they must be token ids from 0 to {V - 1}, "
                         "or -100 where a token is not to be scored")


# ------------------------------------------------------------------------------------------------
# Inputs, checked before any compute
# ------------------------------------------------------------------------------------------------

def value_range(tensor, unknown):
    """(least, greatest) of a tensor's values; `unknown` where they cannot be looked at: on the meta
    device, under torch.func.vmap, and while torch.compile or torch.export traces."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return unknown
    try:
        return tensor.min().item(), tensor.max().item()
    except RuntimeError:                                   # vmap's answer to .item()
        return unknown


def check_inputs(input_ids, position_ids, config, past=0, inputs_embeds=None):
    """Return (B, T), or raise ValueError, with the numbers, for ids or positions that the model has
    no row for, and where not exactly one of input_ids and inputs_embeds is given."""
    vocab_size, limit = config.vocab_size, config.position_limit
    if inputs_embeds is None:
        check_ids(input_ids)
        B, T = input_ids.shape
    elif input_ids is not None:
        raise ValueError("input_ids and inputs_embeds were both given; they exclude each other")
    else:
        B, T, C = inputs_embeds.shape if inputs_embeds.dim() == 3 else (0, 0, 0)
        if C != config.hidden_size:
            raise ValueError(f"inputs_embeds must have shape (batch, tokens, {config.hidden_size}), "
                             f"got {tuple(inputs_embeds.shape)}")
    if B == 0 or T == 0:
        raise ValueError(f"the input is empty: shape {(B, T)}; give at least one token")
    if limit is not None and past + T > limit:
        raise ValueError(f"{past + T} tokens ({past} cached + {T} new) are more than the "
                         f"{limit} positions that this model has learned")
    if position_ids is not None and position_ids.shape not in ((B, T), (1, T)):
        raise ValueError(f"position_ids must have shape {(B, T)}, got {tuple(position_ids.shape)}")
    if input_ids is not None:
        low, high = value_range(input_ids, (0, 0))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids range from {low} to {high}; this model's vocabulary has ids "
                             f"0 to {vocab_size - 1}")
    if position_ids is not None and limit is not None:
        low, high = value_range(position_ids, (0, 0))
        if low < 0 or high >= limit:
            raise ValueError(f"position_ids range from {low} to {high}; this model has positions "
                             f"0 to {limit - 1}")
    return B, T


def check_ids(input_ids):
    """Raise ValueError for what is not a batch of token ids."""
    if not torch.is_tensor(input_ids):
        raise ValueError("input_ids must be a tensor of shape (batch, tokens), got "
                         f"{type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32) or input_ids.dim() != 2:
        raise ValueError("input_ids must be int64 or int32 (.long() makes them so) of shape "
                         f"(batch, tokens), got {input_ids.dtype} of shape {tuple(input_ids.shape)}")


def key_mask_of(attention_mask, B, S):
    """attention_mask (B, S) of ones and zeros -> bool, or None where nothing is masked."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (B, S):
        raise ValueError(f"attention_mask must have shape (batch, cached + new tokens) = {(B, S)}, "
                         f"got {tuple(attention_mask.shape)}")
    mask = attention_mask.bool()
    least, _ = value_range(mask, (False, True))
    return None if least else mask


# ------------------------------------------------------------------------------------------------
# Configs and models
# ------------------------------------------------------------------------------------------------

class GenerationConfig(dict):
    """A checkpoint's settings for generate, as generation_config.json has them: {name: value}.

    As in transformers each is an attribute too, None where it is not set:
    model.generation_config.pad_token_id = 0.
    """
    file = "generation_config.json"                        # where they stand, for error messages

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name, value):
        self[name] = value

    def __deepcopy__(self, memo):
        return GenerationConfig(copy.deepcopy(dict(self), memo))

    def __reduce__(self):
        """Stored as a mapping that torch.load takes with weights_only=True, which is its default."""
        return OrderedDict, (), None, None, iter(self.items())


class PreTrainedModel(nn.Module):
    """A module that knows its config, its backend, and how to come from and go to a folder."""

    head = None                                            # name of the layer that a task trains, if any

    def __init__(self, config, attn_implementation="auto"):
        super().__init__()
        self.config = config
        self.reference_arithmetic = None                   # see `exact`
        self.gradient_checkpointing = None                 # how, or None for not at all
        self.generation_config = GenerationConfig()
        self.attn_implementation = attn_implementation
        choose_backend(attn_implementation)                # an unknown name fails here, not later

    @classmethod
    def from_pretrained(cls, name_or_folder, *, revision=None, torch_dtype=None, dtype=None,
                        device=None, attn_implementation="auto", **changes):
        """Load an official checkpoint from a folder or, if there is none of that name, the hub.

        torch_dtype (or dtype, its newer name): a torch dtype or its name; None is float32 and
        "auto" the checkpoint's own.  attn_implementation: see attention.choose_backend.
        changes: fields of the config to set, as num_labels=3 or pad_token_id=0.  The reference's cache_dir,
        local_files_only, token and use_safetensors mean the same here; its others are taken at their usual
        values (load_weights.LOADING) and refused by name otherwise.
        Returns the model in eval mode; a task head that the checkpoint does not have is drawn afresh,
        with a warning that names its weights.  Raises OSError for files that are missing or cannot be
        had, ValueError for files that are broken or belong to another model.
        """
        return load_pretrained(cls, name_or_folder, revision=revision, torch_dtype=torch_dtype,
                               dtype=dtype, device=device, attn_implementation=attn_implementation,
                               changes=changes)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors under the official names, for transformers too."""
        save_pretrained(self, folder)

    def set_attn_implementation(self, name):
        """Change the attention backend of this model and of the model inside it."""
        choose_backend(name)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.attn_implementation = name

    @property
    def exact(self):
        """Does the model keep to the reference's arithmetic, to the last bit?

        reference_arithmetic says so: True or False; None is yes where attention is the naive one.
        Otherwise the linear layers multiply one new token in an order that is faster.
        """
        if self.reference_arithmetic is None:
            return choose_backend(self.attn_implementation) == "naive"
        return self.reference_arithmetic

    def set_reference_arithmetic(self, value):
        """Set reference_arithmetic (True, False or None; see `exact`) here and in the model inside."""
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.reference_arithmetic = value

    def run(self, part, x, **how):
        """part(x, **how): a block or the output head.  fast/step.py puts its own in this one's place."""
        if self.gradient_checkpointing and self.training and how.get("cache") is None:
            return checkpoint(functools.partial(part, **how), x, **self.gradient_checkpointing)
        if is_few(x) and not self.exact:
            with Instead(WEIGHT_FIRST):
                return part(x, **how)
        return part(x, **how)

    @property
    def base_model(self):
        """The model without its head: itself, or the one inside."""
        return getattr(self, "transformer", self)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        """In training, keep of each block its input alone and compute the rest again in the backward pass.

        gradient_checkpointing_kwargs: options of torch.utils.checkpoint.checkpoint, by default
        {"use_reentrant": False}.  A forward pass with a cache is not checkpointed.
        """
        self.base_model.gradient_checkpointing = gradient_checkpointing_kwargs or {"use_reentrant": False}

    def gradient_checkpointing_disable(self):
        """Keep everything that the backward pass needs, as is the default."""
        self.base_model.gradient_checkpointing = None

    @property
    def is_gradient_checkpointing(self):
        return self.base_model.gradient_checkpointing is not None

    def get_input_embeddings(self):
        return self.base_model.embed

    def get_output_embeddings(self):
        """The layer from hidden states to logits of tokens, or None where there is none."""
        return getattr(self, "lm_head", None)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None):
        """Let the vocabulary have new_num_tokens ids, rounded up to the multiple; returns the embedding.

        New rows of the embedding, and of a head of its own, are the mean of the old rows, so that no
        new token stands out (transformers adds a noise of 1e-9 of the variance); fewer ids cut rows off.
        config.vocab_size follows.  Raises ValueError for a size below 1.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        size += -size % (pad_to_multiple_of or 1)
        if size < 1:
            raise ValueError(f"the vocabulary must have at least 1 token, got {size}")
        embed, head = self.get_input_embeddings(), self.get_output_embeddings()
        tied = head is not None and head.weight is embed.weight
        resize_rows(embed, "weight", size)
        embed.num_embeddings = size
        if embed.padding_idx is not None and embed.padding_idx >= size:
            embed.padding_idx = None
        if head is not None:
            for name in ("weight", "bias"):
                resize_rows(head, name, size)
            if tied:
                head.weight = embed.weight
            head.out_features = size
        config = dataclasses.replace(self.config, vocab_size=size)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
        return embed

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def num_parameters(self):
        """Number of distinct weights: a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def init_weights(self, part=None):
        """Matrices N(0, initializer_range), biases 0, LayerNorms 1 and 0, as transformers does."""
        for module in (part or self).modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def resize_rows(layer, name, size):
    """Give a layer's parameter `size` rows: the old ones, then their mean.  None stays None."""
    old = getattr(layer, name)
    if old is None or len(old) == size:
        return
    kept = old.detach()[:size]
    mean = old.detach().to(torch.promote_types(old.dtype, torch.float32)).mean(0).to(old.dtype)
    new = torch.cat([kept, mean.expand(size - len(kept), *mean.shape)])
    setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
