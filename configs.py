"""Reading, checking and writing config.json, in all spellings that official files use.

    Config            reading and writing, the same for both families
    GPTNeoRules       the values that GPT-Neo's fields may have; the fields are in neo.py
    GPTNeoXRules      the same for GPT-NeoX

A file means what it means to transformers 5.23.0 (configuration_utils.py, configuration_gpt_neo.py,
configuration_gpt_neox.py).  Refused, with the field's name, are values that transformers refuses,
and values that it ignores although they describe another model.
"""

import dataclasses
import json
import math
import types
import typing

from base import ACTIVATIONS
from files import shown
from load_weights import read_config

MOST_LAYERS = 1000                  # larger models would take minutes to build
LARGEST_SIZE = 2**28                # the bytes of a matrix of two such sizes fit into 64 bits


def frozen(cls):
    """dataclass(frozen=True), except that a field may be set to the value that it has.

    Scripts for transformers set config.use_cache = False before they train; that changes nothing
    here.  Raises FrozenInstanceError, which says what to do, for every other value.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)

    def set_field(config, name, value):
        usual = (*USUAL.get(name, ()), getattr(config, name, USUAL))
        if not any(type(value) is type(one) and value == one for one in usual):
            raise dataclasses.FrozenInstanceError(
                f"config field {name!r} cannot be set to {shown(value)} after loading: give it to "
                f"from_pretrained(..., {name}=...), or make another config with "
                "dataclasses.replace")
    cls.__setattr__ = set_field
    return cls


class Config:
    """The base of both config classes, which are frozen dataclasses."""

    def __post_init__(self):
        self.fill_in()
        check_fields(self)
        settle_labels(self)
        self.check()

    def fill_in(self):
        """Replace a None that stands for another value by that value."""

    @classmethod
    def from_pretrained(cls, name_or_folder, revision=None, **hub):
        """Read the config.json of a checkpoint: a folder, or a hub id.

        hub: cache_dir, local_files_only and token, as huggingface_hub takes them.
        Raises OSError where there is no such file, and ValueError, which names the file and the
        field, for a value that is not supported.
        """
        raw = read_config(name_or_folder, revision, **hub)
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{name_or_folder}/config.json: {error}") from None

    @classmethod
    def from_dict(cls, raw):
        """Make a config from the contents of a config.json, in old or new spelling.

        Fields that transformers' model does not read are ignored here too.
        Raises ValueError, naming the field, for a value that is not supported.
        """
        raw = dict(raw)
        if raw.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(f"config field 'model_type' is {shown(raw['model_type'])}; "
                             f"{cls.__name__} reads {cls.model_type!r}")
        refuse_other_models(raw)
        raw = cls.respelled(raw)
        return cls(**{k: v for k, v in raw.items() if k in cls.__dataclass_fields__})

    def to_dict(self):
        """The contents of a config.json that transformers 4 and 5 read.

        Labels are written as transformers writes them: id2label and its inverse label2id instead
        of num_labels, and none of them for the default, which is two labels without names.
        """
        fields = dataclasses.asdict(self)
        del fields["num_labels"]
        names = fields.pop("id2label")
        if fields["problem_type"] is None:
            del fields["problem_type"]
        if names != unnamed(2):
            fields |= {"id2label": {str(i): name for i, name in names.items()},
                       "label2id": {name: i for i, name in names.items()}}
        return {**fields, "model_type": self.model_type}


def refuse(field, value, supported):
    """Raise the ValueError for a field's value that is not supported."""
    raise ValueError(f"config field {field!r} is {shown(value)}; supported: {supported}")


# Fields that transformers obeys in every config, although neither family uses them: pruning, caches
# shared among layers (cache_utils.py), cross-attention.  If one of them is set, the file describes
# another model.
ABSENT = ("pruned_heads", "num_kv_shared_layers", "is_encoder_decoder", "add_cross_attention")

# Fields that change what transformers' forward pass does or returns, with the values at which they
# change nothing.  Only these are supported.
USUAL = {"is_causal": (True,), "use_cache": (True, False), "is_decoder": (True, False),
         "return_dict": (True,), "output_hidden_states": (False, None),
         "output_attentions": (False, None),
         "_attn_implementation": (None, "eager", "sdpa", "flash_attention_2"),
         # other masks (masking_utils.py), settings of single layers, models of several parts: for
         # these even 0 or an empty list has a meaning, or is an error
         **dict.fromkeys(["sliding_window", "attention_chunk_size", "layer_types",
                          "per_layer_config", "text_config", "experts_implementation"], (None,)),
         # attributes of transformers' own config classes, which a file must not replace
         **dict.fromkeys(["attribute_map", "sub_configs"], ())}


def refuse_other_models(raw):
    """Raise ValueError for fields with which the same weights would give another model."""
    quantized = raw.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(f"config field 'quantization_config': the weights were quantized by "
                         f"{shown(method)}, which this project does not read; take the checkpoint "
                         "that they were made from")
    for name in ABSENT:
        if raw.get(name):
            refuse(name, raw[name], "null")
    for name, usual in USUAL.items():
        if name in raw and not any(type(raw[name]) is type(v) and raw[name] == v for v in usual):
            refuse(name, raw[name], " or ".join(map(json.dumps, usual)) or "no such field")
    for name in ("auto_map", "base_model_tp_plan"):        # not used here
        if name in raw and not isinstance(raw[name], dict):
            refuse(name, raw[name], "an object")
    if "num_labels" in raw and raw["num_labels"] is None:
        refuse("num_labels", None, "a number, or no such field")


# ------------------------------------------------------------------------------------------------
# GPT-Neo
# ------------------------------------------------------------------------------------------------

class GPTNeoRules(Config):
    """What GPT-Neo's fields may be, and their other spellings."""

    SIZES = ("vocab_size", "max_position_embeddings", "hidden_size", "num_layers", "num_heads",
             "intermediate_size", "window_size")
    DROPOUTS = ("resid_dropout", "embed_dropout", "attention_dropout", "classifier_dropout")

    @staticmethod
    def respelled(raw):
        """Rename num_hidden_layers and num_attention_heads; read attention_layers if it is given.

        attention_layers is the list of all layers that attention_types abbreviates.
        Raises ValueError where two spellings of one setting contradict each other.
        """
        aliases = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
        for name, alias in aliases.items():
            if alias in raw:
                if name in raw and raw[name] != raw[alias]:
                    raise ValueError(f"config fields {name!r} ({shown(raw[name])}) and {alias!r} "
                                     f"({shown(raw[alias])}) contradict each other")
                raw[name] = raw[alias]
        written_out = raw.get("attention_layers")
        if raw.get("attention_types") is None:
            raw.pop("attention_types", None)
            if written_out is not None:
                raw["attention_types"] = [[written_out, 1]]
        elif written_out is not None and written_out != expanded(raw["attention_types"]):
            raise ValueError(f"config field 'attention_layers' ({shown(written_out)}) contradicts "
                             f"'attention_types' ({shown(raw['attention_types'])})")
        return raw

    @classmethod
    def from_dict(cls, raw):
        config = super().from_dict(raw)
        if "attention_layers" in raw and raw["attention_layers"] is None:
            refuse("attention_layers", None, "a list of global and local, or no such field")
        return config

    def fill_in(self):
        if self.intermediate_size is None and type(self.hidden_size) is int:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)

    def check(self):
        """Raise ValueError, naming the field, for values that contradict each other."""
        if self.hidden_size % self.num_heads:
            raise ValueError(f"config field 'hidden_size' ({self.hidden_size}) must be a multiple "
                             f"of 'num_heads' ({self.num_heads})")
        if self.activation_function not in ACTIVATIONS:
            refuse("activation_function", self.activation_function, ", ".join(ACTIVATIONS))
        kinds = self.attention_layers
        if unknown := sorted({shown(kind, 20).strip("'") for kind in kinds} - {"global", "local"}):
            raise ValueError(f"config field 'attention_types' names {', '.join(unknown[:5])}; "
                             "supported: global, local")
        if len(kinds) != self.num_layers:
            raise ValueError(f"config field 'attention_types' describes {len(kinds)} layers, but "
                             f"'num_layers' is {self.num_layers}")

    @property
    def attention_layers(self):
        """For each layer "global" or "local"."""
        return expanded(self.attention_types)

    def to_dict(self):
        return super().to_dict() | {"attention_layers": self.attention_layers}


def expanded(attention_types):
    """attention_types written out: [[["global", "local"], 2]] -> global, local, global, local."""
    problem = ValueError("config field 'attention_types' must be pairs of a list of kinds and a "
                         f"number, as [[['global', 'local'], 12]], got {shown(attention_types)}")
    try:
        if sum(len(kinds) * times for kinds, times in attention_types) > MOST_LAYERS:
            raise problem
        return [kind for kinds, times in attention_types for _ in range(times) for kind in kinds]
    except (TypeError, ValueError):
        raise problem from None


# ------------------------------------------------------------------------------------------------
# GPT-NeoX
# ------------------------------------------------------------------------------------------------

class GPTNeoXRules(Config):
    """What GPT-NeoX's fields may be, and their other spellings."""

    SIZES = ("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers",
             "num_attention_heads", "intermediate_size")
    DROPOUTS = ("attention_dropout", "hidden_dropout", "classifier_dropout")

    @staticmethod
    def respelled(raw):
        """Read the rotation in its three spellings, as configuration_gpt_neox.py does.

        transformers 5 writes a dict rope_parameters; if there is a dict rope_scaling, it reads that
        one instead.  What the dict does not have is read from rotary_emb_base and rotary_pct.
        transformers 4.57 also wrote the two values as rope_theta and partial_rotary_factor;
        transformers 5 ignores these, so they are refused if they have other values.
        """
        for name in ("rope_scaling", "rope_parameters"):
            if raw.get(name) is not None and not isinstance(raw[name], dict):
                raise ValueError(f"config field {name!r} must be an object or null, "
                                 f"got {shown(raw[name])}")
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            refuse("rope_type", kind, "default")
        for field, newer, default in (("rotary_pct", "partial_rotary_factor", 0.25),
                                      ("rotary_emb_base", "rope_theta", 10000.0)):
            value = rope.get(newer, raw.get(field, default))
            if raw.get(newer) not in (None, value):
                raise ValueError(f"config field {newer!r} is {shown(raw[newer])}, which "
                                 "transformers ignores in a gpt_neox config; it uses "
                                 f"{shown(value)}: set {field!r}")
            raw[field] = value
        if raw.get("head_dim") not in (None, head_width(raw)):
            refuse("head_dim", raw["head_dim"], "hidden_size / num_attention_heads")
        return raw

    def check(self):
        """Raise ValueError, naming the field, for values that contradict each other."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"config field 'hidden_size' ({self.hidden_size}) must be a multiple "
                             f"of 'num_attention_heads' ({self.num_attention_heads})")
        if self.hidden_act not in ACTIVATIONS:
            refuse("hidden_act", self.hidden_act, ", ".join(ACTIVATIONS))
        if not math.isfinite(self.rotary_pct):
            refuse("rotary_pct", self.rotary_pct, "above 0, up to 1")
        if not 0 < self.rotary_pct <= 1 or self.rotary_ndims % 2 or self.rotary_ndims == 0:
            raise ValueError(f"config field 'rotary_pct' ({self.rotary_pct}) makes "
                             f"{self.rotary_ndims} of {self.head_dim} dims rotate; "
                             "supported: an even number from 2")
        if not 0 < self.rotary_emb_base < math.inf:
            refuse("rotary_emb_base", self.rotary_emb_base, "a number above 0")


def head_width(raw):
    """hidden_size // num_attention_heads where both are integers, else None."""
    C, H = raw.get("hidden_size"), raw.get("num_attention_heads")
    return C // H if type(C) is int and type(H) is int and H > 0 else None


# ------------------------------------------------------------------------------------------------
# Fields
# ------------------------------------------------------------------------------------------------

def check_fields(config):
    """Raise ValueError, naming the field, for a value of the wrong type or out of range."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = [typing.get_origin(kind) or kind for kind in kinds]
        if float in kinds and not field.name.startswith(("layer_norm", "initializer")):
            kinds.append(int)                   # here transformers accepts integers too
        if type(value) not in kinds:                       # not isinstance: True is no int here
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise ValueError(f"config field {field.name!r} must be {names}, got {shown(value)}")
        most = MOST_LAYERS if field.name in ("num_layers", "num_hidden_layers") else LARGEST_SIZE
        if field.name in config.SIZES and not 1 <= value <= most:
            raise ValueError(f"config field {field.name!r} must be at least 1 and at most {most}, "
                             f"got {shown(value)}")
        if field.name == "eos_token_id" and isinstance(value, list):
            if any(type(token) is not int for token in value):
                raise ValueError("config field 'eos_token_id' must hold integers, "
                                 f"got {shown(value)}")
        if field.name in config.DROPOUTS and not 0 <= value <= 1:
            raise ValueError(f"config field {field.name!r} must be from 0 to 1, got {shown(value)}")


PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def unnamed(count):
    """id2label of labels without names: LABEL_0, LABEL_1, ..."""
    return {i: f"LABEL_{i}" for i in range(count)}


def settle_labels(config):
    """Set num_labels and id2label from each other, as transformers does.

    num_labels is the length of id2label, or 2 where neither is given; labels without names get
    LABEL_0, LABEL_1, ...  In JSON the ids of id2label are strings; here they become integers.
    Raises ValueError where num_labels and id2label contradict each other.
    """
    names, count = config.id2label, config.num_labels
    if names is not None:
        try:
            names = {int(i): str(name) for i, name in names.items()}
        except ValueError:
            names = {}
        if not names or sorted(names) != list(range(len(names))):
            raise ValueError("config field 'id2label' must name the ids 0, 1, ... without a gap, "
                             f"got {shown(config.id2label)}")
        if count not in (None, len(names)) and names != unnamed(len(names)):
            raise ValueError(f"config field 'num_labels' is {shown(count)}, but 'id2label' names "
                             f"{len(names)}")
    if count is None:
        count = len(names) if names else 2
    if count < 1:
        raise ValueError(f"config field 'num_labels' must be at least 1, got {shown(count)}")
    object.__setattr__(config, "num_labels", count)
    names = names if names and len(names) == count else unnamed(count)
    object.__setattr__(config, "id2label", names)
    if config.problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"config field 'problem_type' is {shown(config.problem_type)}; "
                         f"supported: {', '.join(PROBLEM_TYPES)}")
