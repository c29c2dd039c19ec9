"""What the two families share around their architecture: activations, inputs, outputs, the loss.

Nothing here depends on the family: all differences between the two are in neo.py and neox.py.

    B batch · T new tokens · S tokens in view (cached + new) · C width · V vocabulary
"""

import copy
import dataclasses
import functools
import math
import operator
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import at_least_float32, choose_backend, is_traced
from fast.linear import RUNNERS, is_few, weight_first
from fast.slices import in_slices
from files import shown
from load_weights import load_pretrained, save_pretrained
from quantize import QuantizedLinear, kind_of
from transformers_arguments import SAVING, check_usual

# ------------------------------------------------------------------------------------------------
# Activations: four names for two functions, whose roundings differ
# ------------------------------------------------------------------------------------------------

@in_slices(2**18, on="cpu")
def gelu_new(x):
    """The tanh form of GELU, in the order of operations of transformers' NewGELUActivation."""
    c = math.sqrt(2.0 / math.pi)
    return 0.5 * x * (1.0 + torch.tanh(c * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x):
    """The same function in the order of transformers' FastGELUActivation, for GPT-NeoX-20B."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def gelu_pytorch_tanh(x):
    """The same function as one fused operation of torch."""
    return F.gelu(x, approximate="tanh")


# The exact GELU differs from the tanh form by up to 4.7e-4: enough to change the logits, too little
# to be seen in generated text.  The name in config.json decides, as in transformers, although
# Pythia was trained with the tanh form and its config says "gelu" (EleutherAI/gpt-neox,
# megatron/model/fused_bias_gelu.py).
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": gelu_new, "gelu_fast": gelu_fast,
               "gelu_pytorch_tanh": gelu_pytorch_tanh}


# ------------------------------------------------------------------------------------------------
# Outputs and the loss
# ------------------------------------------------------------------------------------------------

@dataclass(eq=False)
class ModelOutput(Mapping):
    """What a forward pass returns.  A field that was not asked for is None.

    loss () float32 · logits (B, T, V) · last_hidden_state (B, T, C)
    start_logits, end_logits (B, T)
    hidden_states: L + 1 tensors (B, T, C), the embeddings first, the last after the final norm
    attentions: L tensors (B, H, T, S)

    Like transformers' ModelOutput it is also a mapping of the fields that are not None, in this
    order: out["logits"] and "loss" in out work, and so do out[0], out[:2] and out.to_tuple().
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


torch.export.register_dataclass(ModelOutput)               # for torch.export


def next_token_loss(logits, labels):
    """Mean cross entropy of token t + 1 given the tokens up to t, in at least float32.

    logits (B, T, V); labels (B, T), usually the input ids themselves, with -100 for tokens that the
    loss leaves out -> ().  As in transformers' ForCausalLMLoss, the loss is NaN where all are left
    out.  Raises ValueError for labels of another shape and for ids outside the vocabulary.
    """
    check_labels(labels, logits)
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)          # label t + 1 at place t
    targets = targets.to(logits.device, torch.long)                         # (N,) with N = B * T
    log_p = log_probability(logits.reshape(-1, logits.size(-1)), targets)   # (N, 1)
    return F.nll_loss(log_p, targets.clamp(max=0), ignore_index=-100)       # log_p has one column


@in_slices(2**20)
def log_probability(logits, targets):
    """log p of each row's target: logits (N, V), targets (N,) -> (N, 1); -100 is read as id 0."""
    logits = logits.to(at_least_float32(logits.dtype))
    return logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])


def check_labels(labels, logits):
    """Raise ValueError for labels that do not fit logits (B, T, V)."""
    B, T, V = logits.shape
    check_tensor("labels", labels)
    if labels.shape != (B, T):
        raise ValueError(f"labels must have the shape of the logits' tokens {(B, T)}, "
                         f"got {tuple(labels.shape)} (labels and logits_to_keep "
                         "exclude each other)")
    if labels.is_floating_point():
        raise ValueError(f"labels must be token ids, int64 or int32, got {labels.dtype}")
    low, high = value_range(labels.where(labels != -100, 0), (0, 0))
    if low < 0 or high >= V:
        raise ValueError(f"labels range from {low} to {high}; they must be token ids from 0 to "
                         f"{V - 1}, or -100 to leave a token out of the loss")


# ------------------------------------------------------------------------------------------------
# Inputs, checked before any compute
# ------------------------------------------------------------------------------------------------

def value_range(tensor, unknown):
    """The least and the greatest value of a tensor, or `unknown` if its values cannot be read.

    That is so on the meta device, under torch.func.vmap, and while torch.compile or torch.export
    traces the model.
    """
    if is_traced() or tensor.is_meta:
        return unknown
    try:
        return tensor.min().item(), tensor.max().item()
    except RuntimeError:                                   # torch.func.vmap refuses .item()
        return unknown


def check_inputs(input_ids, position_ids, config, past=0, inputs_embeds=None):
    """Check input_ids or inputs_embeds, and position_ids, before any compute; return (B, T).

    Raises ValueError, with the numbers, for ids or positions outside the model's tables, for wrong
    shapes, and unless exactly one of input_ids and inputs_embeds is given.
    """
    vocab_size, limit = config.vocab_size, config.position_limit
    if inputs_embeds is None:
        check_ids(input_ids)
        B, T = input_ids.shape
    elif input_ids is not None:
        raise ValueError("input_ids and inputs_embeds were both given; they exclude each other")
    else:
        check_tensor("inputs_embeds", inputs_embeds)
        B, T, C = inputs_embeds.shape if inputs_embeds.dim() == 3 else (0, 0, 0)
        if C != config.hidden_size:
            raise ValueError("inputs_embeds must have shape (batch, tokens, "
                             f"{config.hidden_size}), got {tuple(inputs_embeds.shape)}")
    if B == 0 or T == 0:
        raise ValueError(f"the input is empty: shape {(B, T)}; give at least one token")
    if limit is not None and past + T > limit:
        raise ValueError(f"{past + T} tokens ({past} cached + {T} new) are more than the "
                         f"{limit} positions that this model has learned")
    if input_ids is not None:
        low, high = value_range(input_ids, (0, 0))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids range from {low} to {high}; this model's vocabulary has "
                             f"ids 0 to {vocab_size - 1}")
    if position_ids is not None:
        check_positions(position_ids, B, T, limit)
    return B, T


def check_positions(position_ids, B, T, limit):
    """Raise ValueError for position_ids that do not fit (B, T) tokens or the model's positions."""
    check_tensor("position_ids", position_ids)
    if position_ids.shape not in ((B, T), (1, T)):
        raise ValueError(f"position_ids must have shape {(B, T)}, got {tuple(position_ids.shape)}")
    if limit is None:                                      # rotation takes any number
        return
    if position_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError("position_ids must be int64 or int32 (.long() makes them so), got "
                         f"{position_ids.dtype}")
    low, high = value_range(position_ids, (0, 0))
    if low < 0 or high >= limit:
        raise ValueError(f"position_ids range from {low} to {high}; this model has positions "
                         f"0 to {limit - 1}")


def check_tensor(name, value):
    """Raise ValueError, with the name, unless the value of an argument is a tensor."""
    if not torch.is_tensor(value):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def at_least_one(name, value):
    """The value of an argument as an int; ValueError unless it is a whole number, 1 or more."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number and at least 1, got {shown(value)}")
    return number


def check_ids(input_ids):
    """Raise ValueError unless input_ids is a batch of token ids: int64 or int32 (B, T)."""
    check_tensor("input_ids", input_ids)
    if input_ids.dtype not in (torch.int64, torch.int32) or input_ids.dim() != 2:
        raise ValueError("input_ids must be int64 or int32 (.long() makes them so) of shape "
                         f"(batch, tokens), got {input_ids.dtype} of shape "
                         f"{tuple(input_ids.shape)}")


def key_mask_of(attention_mask, B, S):
    """attention_mask (B, S) of ones and zeros -> (B, S) bool, or None if nothing is masked.

    Raises ValueError for a mask of another shape.
    """
    if attention_mask is None:
        return None
    check_tensor("attention_mask", attention_mask)
    if attention_mask.shape != (B, S):
        raise ValueError(f"attention_mask must have shape (batch, cached + new tokens) = {(B, S)}, "
                         f"got {tuple(attention_mask.shape)}")
    mask = attention_mask.bool()
    least, _ = value_range(mask, (False, True))
    return None if least else mask


# Arguments of the reference's forward that this project does not have, with the values that change
# nothing.
NOT_SUPPORTED = {"use_cache": (None, False), "past_key_values": (None,), "cache_position": (None,),
                 "token_type_ids": (None,), "head_mask": (None,), "num_items_in_batch": (None,)}
OWN_CACHE = "make a cache with attention.KVCache and pass it as cache"
ADVICE = {"use_cache": OWN_CACHE, "past_key_values": OWN_CACHE}


def as_usual(forward):
    """Decorator: accept the other arguments of transformers' forward at their usual values.

    return_dict=False returns a tuple.  Raises ValueError, with the name, for any other value.
    """
    @functools.wraps(forward)
    def called(self, *args, return_dict=None, **kwargs):
        for name in [name for name in kwargs if name in NOT_SUPPORTED]:
            value = kwargs.pop(name)
            if not any(value is usual for usual in NOT_SUPPORTED[name]):
                raise ValueError(f"{name}={shown(value, 40)} is not supported in the call of a "
                                 "model: " + ADVICE.get(name, "leave it out"))
        out = forward(self, *args, **kwargs)
        return out if return_dict in (None, True) else out.to_tuple()
    return called


# ------------------------------------------------------------------------------------------------
# Configs and models
# ------------------------------------------------------------------------------------------------

class GenerationConfig(dict):
    """A checkpoint's settings for generate, as in generation_config.json: {name: value}.

    As in transformers each setting is also an attribute, None where it is not set:
    model.generation_config.pad_token_id = 0.
    """
    file = "generation_config.json"                       # where they were read: for error messages

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name, value):
        self[name] = value

    def to_dict(self):
        """The settings as a plain dict."""
        return dict(self)

    def __deepcopy__(self, memo):
        return GenerationConfig(copy.deepcopy(dict(self), memo))

    def __reduce__(self):
        """Pickle as an OrderedDict, which torch.load with weights_only=True accepts."""
        return OrderedDict, (), None, None, iter(self.items())


class PreTrainedModel(nn.Module):
    """A model with a config and an attention backend, which can be loaded and saved."""

    head = None                                      # name of a task head's linear layer
    shares = 1                                       # processes that share its weights: parallel.py

    def __init__(self, config, attn_implementation="auto"):
        super().__init__()
        self.config = config
        self.reference_arithmetic = None             # see `exact`
        self.gradient_checkpointing = None           # a dict of options switches it on
        self.generation_config = GenerationConfig()
        self.attn_implementation = attn_implementation
        choose_backend(attn_implementation)          # an unknown name fails here, not later

    @classmethod
    def from_pretrained(cls, name_or_folder, *, revision=None, torch_dtype=None, dtype=None,
                        device=None, attn_implementation="auto", weights=None, **changes):
        """Load an official checkpoint from a folder or, if there is none of that name, the hub.

        torch_dtype (or dtype, its newer name): a torch dtype or its name; None means float32, and
        "auto" the checkpoint's own dtype.  attn_implementation: see attention.choose_backend.
        weights: "int8" or "int4" rounds the matrices to integers while loading (quantize.py).
        changes: fields of the config to set, such as num_labels=3 or pad_token_id=0.  transformers'
        cache_dir, local_files_only, token and use_safetensors have the same meaning here; its other
        arguments are accepted at their usual values and refused otherwise; the table is LOADING in
        transformers_arguments.py.

        Returns the model in eval mode.  A task head that the checkpoint does not have is
        initialized randomly, with a warning that names its weights.  Raises OSError for files that
        are missing or cannot be downloaded, ValueError for files that are broken or belong to
        another model.
        """
        return load_pretrained(cls, name_or_folder, revision=revision, torch_dtype=torch_dtype,
                               dtype=dtype, device=device, attn_implementation=attn_implementation,
                               weights=weights, changes=changes)

    def save_pretrained(self, folder, **usual):
        """Write config.json, generation_config.json and model.safetensors for transformers.

        The integers of a quantized model go into another file, which only this project reads.
        usual: transformers' other arguments at their usual values; the table is SAVING in
        transformers_arguments.py.  Raises OSError if the folder cannot be written, and leaves its
        files unchanged; ValueError, with the name, for an argument at another value.
        """
        check_usual("save_pretrained", usual, SAVING)
        save_pretrained(self, folder)

    def set_attn_implementation(self, name):
        """Change the attention backend of this model and of the backbone in it."""
        choose_backend(name)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.attn_implementation = name

    @property
    def exact(self):
        """Does the model compute as transformers does, to the last bit?

        reference_arithmetic decides: True, False, or None, which means True if attention is naive.
        If not, the linear layers use a faster order of summation for one new token.
        """
        if self.reference_arithmetic is None:
            return choose_backend(self.attn_implementation) == "naive"
        return self.reference_arithmetic

    def set_reference_arithmetic(self, value):
        """Set reference_arithmetic (True, False or None; see `exact`) here and in the backbone."""
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.reference_arithmetic = value

    def run(self, part, x, **how):
        """Call a block or the output head, checkpointed or in a faster form where that applies.

        While fast/step.py computes a token in this thread, RUNNERS has what calls it, compiled.
        """
        if not is_traced() and self in (runners := RUNNERS.get()):
            return runners[self](part, x, **how)
        if self.gradient_checkpointing and self.training and how.get("cache") is None:
            return checkpoint(functools.partial(part, **how), x, **self.gradient_checkpointing)
        if is_few(x) and not self.exact:
            with weight_first(part):
                return part(x, **how)
        return part(x, **how)

    @staticmethod
    def tokens_to_keep(x, logits_to_keep):
        """The part of the hidden states x (B, T, C) whose logits are computed.

        logits_to_keep: the number of last tokens, 0 for all, or a tensor (n,) of indices, as in
        transformers.  Raises ValueError for anything else.
        """
        if torch.is_tensor(logits_to_keep):
            return x[:, logits_to_keep]
        if not hasattr(logits_to_keep, "__index__"):
            raise ValueError("logits_to_keep must be a whole number or a tensor of indices, got "
                             f"{shown(logits_to_keep)}")
        return x[:, -logits_to_keep:]                # -0: all

    @property
    def base_model(self):
        """The model without its head: itself, or the one inside."""
        return getattr(self, "transformer", self)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        """In training keep only the input of each block; the backward pass computes the rest again.

        gradient_checkpointing_kwargs: options of torch.utils.checkpoint.checkpoint, by default
        {"use_reentrant": False}.  A forward pass with a cache is not checkpointed.
        """
        options = gradient_checkpointing_kwargs or {"use_reentrant": False}
        self.base_model.gradient_checkpointing = options

    def gradient_checkpointing_disable(self):
        """Keep everything that the backward pass needs, which is the default."""
        self.base_model.gradient_checkpointing = None

    @property
    def is_gradient_checkpointing(self):
        return self.base_model.gradient_checkpointing is not None

    def get_input_embeddings(self):
        return self.base_model.embed

    def get_output_embeddings(self):
        """The layer from hidden states to next-token logits, or None if the model has none."""
        return getattr(self, "lm_head", None)

    def set_input_embeddings(self, layer):
        """Replace the token embedding.  tie_weights() ties the output head to the new one."""
        self.base_model.embed = layer

    def set_output_embeddings(self, layer):
        """Replace the layer from hidden states to next-token logits; ValueError without one."""
        if self.get_output_embeddings() is None:
            raise ValueError(f"{type(self).__name__} has no layer for next-token logits")
        self.lm_head = layer

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None,
                                mean_resizing=True):
        """Change the vocabulary to new_num_tokens ids and return the embedding.

        pad_to_multiple_of: round the number up to a multiple of this.
        New rows of the embedding, and of an untied output head, are the mean of the old rows, so
        that no new token is more likely than the others (transformers adds noise of 1e-9 of the
        variance); with fewer ids the last rows are removed.  config.vocab_size is changed as well.
        Raises ValueError, before anything is changed, for a size that is not a whole number or is
        below 1, for mean_resizing=False, and if the output head is quantized.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        size, multiple = (at_least_one(name, value) for name, value in (
            ("new_num_tokens", size), ("pad_to_multiple_of", multiple)))
        if not mean_resizing:
            raise ValueError("mean_resizing=False is not supported: new rows are the mean")
        size += -size % multiple
        embed, head = self.get_input_embeddings(), self.get_output_embeddings()
        if isinstance(head, QuantizedLinear):
            raise ValueError("the output head is quantized, so it cannot get other rows: resize "
                             "the model that was loaded without weights=, save it, "
                             "and quantize that")
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

    @property
    def weights(self):
        """"int8" or "int4" for a quantized model, else None."""
        return kind_of(self)

    def num_parameters(self):
        """Number of parameters, before quantization; a tied head is not counted again."""
        quantized = sum(layer.in_features * layer.out_features
                        for name, layer in self.named_modules()
                        if isinstance(layer, QuantizedLinear)
                        and not (name == "lm_head" and self.config.tie_word_embeddings))
        return quantized + sum(p.numel() for p in self.parameters())

    def init_weights(self, part=None):
        """Draw matrices from N(0, initializer_range²) and set biases to 0, as transformers does.

        LayerNorms keep torch's own 1 and 0.  part: initialize only this module.
        """
        for module in (part or self).modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def resize_rows(layer, name, size):
    """Give a layer's parameter `size` rows: the old rows, then their mean.  None stays None."""
    old = getattr(layer, name)
    if old is None or len(old) == size:
        return
    kept = old.detach()[:size]
    mean = old.detach().to(at_least_float32(old.dtype)).mean(0).to(old.dtype)
    new = torch.cat([kept, mean.expand(size - len(kept), *mean.shape)])
    setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))
