"""config.json in every spelling: read as transformers reads it, or refused with the field's name."""

import ast
import itertools
import json

import pytest
import transformers
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXRotaryEmbedding

from conftest import ROOT
from neo import GPTNeoConfig
from neox import GPTNeoXConfig

transformers.logging.set_verbosity_error()
ABSENT = "absent"
NEOX = dict(model_type="gpt_neox", vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=16)
NEO = dict(model_type="gpt_neo", vocab_size=8, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=16,
           max_position_embeddings=16, attention_types=[[["global", "local"], 1]])

ROPE = dict(
    rotary_pct=(ABSENT, None, 0.5), rotary_emb_base=(ABSENT, None, 3), rope_theta=(ABSENT, None, 3),
    partial_rotary_factor=(ABSENT, None, 1.0), rope_scaling=(ABSENT, None, {"type": "linear", "factor": 2.0}),
    rope_parameters=(ABSENT, None, {"rope_type": "default", "rope_theta": 11.0, "partial_rotary_factor": 0.75}))
MORE_ROPE = dict(
    rotary_pct=(ABSENT, None, 0.5, 1.0), rotary_emb_base=(ABSENT, None, 3, 500.0),
    rope_theta=(ABSENT, None, 3, 10000), partial_rotary_factor=(ABSENT, None, 0.5, 1.0),
    rope_scaling=(ABSENT, None, {}, [], {"type": "default"}, {"rope_type": "default", "rope_theta": 7.0}),
    rope_parameters=(*ROPE["rope_parameters"], {}, [], {"rope_theta": None}, {"partial_rotary_factor": 0.5},
                     {"rope_type": None}))
SIZES = dict(num_layers=(ABSENT, None, 2, 4), num_hidden_layers=(ABSENT, None, 2, 4), num_heads=(ABSENT, None, 2, 4),
             num_attention_heads=(ABSENT, None, 2, 4))
LAYERS = dict(attention_types=(ABSENT, None, [[["global", "local"], 1]], [[["local"], 2]], [[["global"], 1]]),
              attention_layers=(ABSENT, None, ["global", "local"], ["local", "local"], ["global"]),
              num_layers=(ABSENT, 2, 1), num_hidden_layers=(ABSENT, 2))


def combinations(base, grid):
    for values in itertools.product(*grid.values()):
        given = {name: value for name, value in zip(grid, values) if value != ABSENT}
        yield json.loads(json.dumps({n: v for n, v in base.items() if n not in grid} | given))


def ours(cls, raw, read):
    """What read finds in our config, or None where it is refused: in one line that names a field."""
    try:
        config = cls.from_dict(raw)
    except ValueError as error:
        assert "config field" in str(error) and "\n" not in str(error) and len(str(error)) <= 300, error
        return None
    return read(config)


def rotation_of_ours(config):
    return float(config.rotary_emb_base), config.rotary_ndims


def rotation_of_theirs(raw):
    try:
        config = transformers.GPTNeoXConfig.from_dict(raw)
        rotary = GPTNeoXRotaryEmbedding(config)
        assert rotary.rope_type == "default"
        assert 2 * len(rotary.inv_freq) == GPTNeoXAttention(config, 0).rotary_ndims
        return float(config.rope_parameters["rope_theta"]), 2 * len(rotary.inv_freq)
    except Exception:                                      # anything: it does not load there
        return None


@pytest.mark.parametrize("grid", [ROPE, pytest.param(MORE_ROPE, marks=pytest.mark.slow)], ids=["small", "large"])
def test_every_combination_of_rotary_spellings(grid):
    """Another base or fraction is another model, whose text looks almost right."""
    equal = 0
    for raw in combinations(NEOX, grid):
        found = ours(GPTNeoXConfig, json.loads(json.dumps(raw)), rotation_of_ours)
        if found is not None:
            assert found == rotation_of_theirs(raw), raw
            equal += 1
    assert equal > 80                                      # not everything is refused


@pytest.mark.parametrize("rope", [
    {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_scaling": None},
    {"rotary_pct": 0.5, "rotary_emb_base": 500, "partial_rotary_factor": 0.5, "rope_theta": 500},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}])
def test_what_transformers_has_written_loads(rope):
    """Versions 4, 4.57 and 5."""
    assert rotation_of_ours(GPTNeoXConfig.from_dict(NEOX | rope)) == rotation_of_theirs(NEOX | rope) == (500, 4)


def shape_of_theirs(raw):
    try:
        config = transformers.GPTNeoConfig.from_dict(raw)
        assert config.hidden_size % config.num_heads == 0
        assert set(config.attention_layers) <= {"global", "local"}
        assert len(config.attention_layers) == config.num_layers        # validated before the alias is set
    except Exception:
        return None
    return config.num_layers, config.num_heads, list(config.attention_layers)


@pytest.mark.parametrize("grid", [SIZES, LAYERS], ids=["sizes", "layers"])
def test_every_combination_of_names_for_gpt_neos_layers(grid):
    equal = 0
    for raw in combinations(NEO, grid):
        found = ours(GPTNeoConfig, json.loads(json.dumps(raw)),
                     lambda config: (config.num_layers, config.num_heads, config.attention_layers))
        if found is not None:
            assert found == shape_of_theirs(raw), raw
            equal += 1
    assert equal > 2


@pytest.mark.parametrize("base, cls", [(NEO, GPTNeoConfig), (NEOX, GPTNeoXConfig)], ids=["neo", "neox"])
@pytest.mark.parametrize("field, value", [
    ("quantization_config", {"quant_method": "gptq", "bits": 4}), ("pruned_heads", {"0": [1]}),
    ("sliding_window", 4), ("attention_chunk_size", 8), ("layer_types", ["sliding_attention"]),
    ("is_causal", False), ("is_encoder_decoder", True), ("per_layer_config", {"0": {}}),
    ("classifier_dropout", 9.0), ("tie_word_embeddings", None), pytest.param("vocab_size", 10**4500, id="huge"), ("hidden_size", 2**40),
    ("output_hidden_states", True), ("output_attentions", True), ("return_dict", False), ("use_cache", 1),
    ("sliding_window", 0), ("sliding_window", False), ("attention_chunk_size", []), ("layer_types", []), ("per_layer_config", 0),
    ("text_config", {}), ("experts_implementation", "gelu"), ("attribute_map", None), ("sub_configs", {}), ("auto_map", None),
    ("base_model_tp_plan", 2), ("num_labels", None), ("_attn_implementation", 1), ("is_causal", None),
    ("eos_token_id", [1, "a"]), ("initializer_range", 1),
    ("hidden_size", True), ("id2label", {"0": "a", "2": "b"}), ("problem_type", "\x1b[2J")])
def test_what_would_be_another_model_is_refused_by_name(base, cls, field, value):
    with pytest.raises(ValueError, match=f"config field '{field}'") as caught:
        cls.from_dict(base | {field: value})
    assert len(str(caught.value)) <= 300 and str(caught.value).isprintable()


@pytest.mark.parametrize("base, cls", [(NEO, GPTNeoConfig), (NEOX, GPTNeoXConfig)], ids=["neo", "neox"])
def test_neutral_values_are_accepted(base, cls):
    neutral = dict(quantization_config=None, pruned_heads={}, sliding_window=None, is_decoder=True, use_cache=False,
                   is_causal=True, is_encoder_decoder=False, chunk_size_feed_forward=0, output_attentions=False,
                   transformers_version="4.1", architectures=["X"], text_config=None, base_model_tp_plan={},
                   auto_map={"AutoModel": "x.Y"}, _attn_implementation="sdpa")
    assert cls.from_dict(base | neutral) == cls.from_dict(base)


def test_heads_of_another_width():
    """The reference takes head_dim for the rotation alone."""
    assert GPTNeoXConfig.from_dict(NEOX | {"head_dim": 8}).head_dim == 8
    with pytest.raises(ValueError, match="config field 'head_dim' is 4"):
        GPTNeoXConfig.from_dict(NEOX | {"head_dim": 4})


def test_very_many_layers_are_counted_before_they_are_written_out():
    with pytest.raises(ValueError, match="config field 'attention_types'"):
        GPTNeoConfig.from_dict(NEO | {"attention_types": [[["global"], 10**9]]})


@pytest.mark.parametrize("cls, name", [(GPTNeoConfig, "num_layers"), (GPTNeoXConfig, "num_hidden_layers")])
def test_a_model_that_would_take_minutes_to_build_is_refused(cls, name):
    with pytest.raises(ValueError, match=f"config field '{name}' must be at least 1 and at most 1000"):
        cls.from_dict({name: 10**6})


@pytest.mark.parametrize("base, cls", [(NEO, GPTNeoConfig), (NEOX, GPTNeoXConfig)], ids=["neo", "neox"])
def test_there_and_back(base, cls):
    config = cls.from_dict(base)
    assert cls.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("file", ["neo.py", "neox.py"])
def test_configs_have_fields_and_properties_only(file):
    """Spellings and checks are in configs.py, so that the first layer stands on the first page."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    config = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Config"))
    for part in config.body:
        if isinstance(part, ast.FunctionDef):
            assert [decorator.id for decorator in part.decorator_list] == ["property"], part.name
