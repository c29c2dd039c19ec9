"""Official files in and out: every container, every spelling that lies on the hub, every size."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
import transformers
from safetensors.torch import load_file, save_file

import files
import load_weights
from helpers import good, widen
from load_weights import NAMES, AutoModelForCausalLM, AutoTokenizer, official_names, our_name
from neo import GPTNeoConfig, GPTNeoForCausalLM, GPTNeoModel
from neox import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ["gpt_neo", "gpt_neox"]
OURS = {"gpt_neo": GPTNeoForCausalLM, "gpt_neox": GPTNeoXForCausalLM}
OUR_BASE = {"gpt_neo": GPTNeoModel, "gpt_neox": GPTNeoXModel}
THEIRS = {"gpt_neo": transformers.GPTNeoForCausalLM, "gpt_neox": transformers.GPTNeoXForCausalLM}
THEIR_BASE = {"gpt_neo": transformers.GPTNeoModel, "gpt_neox": transformers.GPTNeoXModel}
THEIR_CONFIG = {"gpt_neo": transformers.GPTNeoConfig, "gpt_neox": transformers.GPTNeoXConfig}
P = 32                                                     # positions of the small models
SIZES = {"gpt_neo": dict(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
                         window_size=3, activation_function="gelu_new"),
         "gpt_neox": dict(num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu",
                          rotary_pct=0.5, rotary_emb_base=500.0)}
IDS = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------
# Small checkpoints
# ------------------------------------------------------------------------------------------------

@functools.cache
def saved(family, base=False):
    """Folder that the reference wrote."""
    config = THEIR_CONFIG[family](vocab_size=61, hidden_size=16, intermediate_size=48, bos_token_id=0,
                                  eos_token_id=0, max_position_embeddings=P, **SIZES[family])
    folder = Path(tempfile.mkdtemp(prefix="reference-"))
    widen((THEIR_BASE if base else THEIRS)[family](config), seed=7).save_pretrained(folder)
    return folder


def parts(family, base=False):
    """config.json and the official tensors of that folder, to be changed at will."""
    folder = saved(family, base)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def forward(model, ids=IDS):
    """Logits, or the last hidden state of a base model."""
    with torch.no_grad():
        out = model(ids)
    return out.last_hidden_state if getattr(out, "logits", None) is None else out.logits


@functools.cache
def expected(family, base=False, dtype=torch.float32):
    """The reference's own answer for its own files."""
    model = (THEIR_BASE if base else THEIRS)[family].from_pretrained(
        saved(family, base), dtype=dtype, attn_implementation="eager")
    return forward(model.eval())


def load(folder, family, base=False, **how):
    return (OUR_BASE if base else OURS)[family].from_pretrained(folder, attn_implementation="naive", **how)


def write(folder, config, tensors, container="safetensors"):
    """A checkpoint by hand.  Shards cut through layers, as in the 20B's index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind, _, how = container.partition("-")
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")

    def dump(part, name):
        if kind == "safetensors":
            save_file(part, folder / name)
        else:
            torch.save(part, folder / name, _use_new_zipfile_serialization=how != "before-1.6")

    if how != "sharded":
        dump(tensors, f"{stem}.{end}")
        return folder
    weight_map = {name: f"{stem}-0000{i % 3 + 1}-of-00003.{end}" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        dump({name: tensors[name] for name in tensors if weight_map[name] == shard}, shard)
    total = sum(t.nbytes for t in tensors.values())
    (folder / f"{stem}.{end}.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


# ------------------------------------------------------------------------------------------------
# Containers
# ------------------------------------------------------------------------------------------------

CONTAINERS = ["safetensors", "safetensors-sharded", "bin", "bin-sharded", "bin-before-1.6"]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_container(family, container, tmp_path):
    """A download that is whole and right, and does not load, or loads as another model."""
    write(tmp_path, *parts(family), container)
    assert torch.equal(forward(load(tmp_path, family)), expected(family))


@pytest.mark.parametrize("shard_size", ["1GB", "8KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_transformers_writes_them(family, shard_size, tmp_path):
    """The same, with the reference as the writer."""
    THEIRS[family].from_pretrained(saved(family)).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "8KB")
    assert torch.equal(forward(load(tmp_path, family)), expected(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_safetensors_go_before_bin(family, tmp_path):
    """Many hub pages hold both; reading the .bin is slower, and less safe."""
    config, tensors = parts(family)
    write(tmp_path, config, tensors)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert torch.equal(forward(load(tmp_path, family)), expected(family))


@pytest.mark.parametrize("container", CONTAINERS)
def test_training_does_not_reach_the_file(container, tmp_path):
    """Weights are mapped from disk: an optimizer step must not write through to the checkpoint."""
    write(tmp_path, *parts("gpt_neo"), container)
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    model = load(tmp_path, "gpt_neo")
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    assert before == {f: f.read_bytes() for f in tmp_path.iterdir()}


def test_config_by_itself():
    """What the model would get, and no other family's."""
    for family in FAMILIES:
        config = OURS[family].config_class.from_pretrained(saved(family))
        assert config == load(saved(family), family).config
        other = next(OURS[name] for name in FAMILIES if name != family)
        with pytest.raises(ValueError, match="model_type"):
            other.config_class.from_pretrained(saved(family))


def test_loading_draws_no_random_numbers():
    """The same seed gives the same text, however the model came into memory."""
    folder = saved("gpt_neo")                              # this one does, the first time
    state = torch.get_rng_state()
    load(folder, "gpt_neo")
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------
# Names that lie on the hub
# ------------------------------------------------------------------------------------------------

def attention_prefix(family, layer):
    return (f"transformer.h.{layer}.attn.attention" if family == "gpt_neo"
            else f"gpt_neox.layers.{layer}.attention")


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_neox_head_under_both_names(name, tmp_path):
    """transformers 5.14 renamed the module; files of both spellings are about."""
    config, tensors = parts("gpt_neox")
    tensors[name] = tensors.pop("embed_out.weight")
    write(tmp_path, config, tensors)
    assert torch.equal(forward(load(tmp_path, "gpt_neox")), expected("gpt_neox"))


@pytest.mark.parametrize("mask", [torch.bool, torch.uint8])
@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_of_old_files_are_ignored(family, mask, tmp_path):
    """Up to v4.34 masks and inverse frequencies were saved, the latter rounded to half precision."""
    config, tensors = parts(family)
    for layer in range(2):
        prefix = attention_prefix(family, layer)
        tensors[f"{prefix}.bias"] = torch.ones(1, 1, P, P).to(mask)        # wrong: it must not matter
        tensors[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        if family == "gpt_neox":
            tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.tensor([1.0, 0.25])
    write(tmp_path, config, tensors, "bin")
    assert torch.equal(forward(load(tmp_path, family)), expected(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_mask_is_ignored(family):
    """`attention.bias` is a mask; the biases of the projections end in the same letters."""
    projections = {"gpt_neo": ["out_proj"], "gpt_neox": ["query_key_value", "dense"]}[family]
    prefix = attention_prefix(family, 3)
    assert our_name(f"{prefix}.bias", NAMES[family]) is None
    assert all(our_name(f"{prefix}.{p}.bias", NAMES[family]) for p in projections)


@pytest.mark.parametrize("name", ["transformer.h.0.attn.bias", "transformer.h.0.ln_3.weight", "h.0.ln_1.gamma",
                                  "transformer.h.0.h.0.ln_1.weight", "transformer.ln_f", "ln_1.weight", ""])
def test_a_name_without_a_rule_is_an_error(name):
    """Guessing what an unknown tensor means is how a port goes wrong in silence."""
    with pytest.raises(KeyError):
        our_name(name, NAMES["gpt_neo"])


@pytest.mark.parametrize("container", ["safetensors", "bin", "bin-sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_files(family, container, tmp_path):
    """GPTNeoModel.save_pretrained writes the names without their prefix."""
    config, tensors = parts(family, base=True)
    assert not any(name.startswith(("transformer.", "gpt_neox.")) for name in tensors)
    write(tmp_path, config, tensors, container)
    assert torch.equal(forward(load(tmp_path, family, base=True)), expected(family, base=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_checkpoint_into_the_base_model(family):
    """The head is left out, nothing else is."""
    model = load(saved(family), family, base=True)
    theirs = THEIR_BASE[family].from_pretrained(saved(family), attn_implementation="eager")
    assert torch.equal(forward(model), forward(theirs))


def test_base_files_into_the_causal_model():
    """GPT-Neo's head is the embedding, so all is there; NeoX's is missing, and must not be random."""
    model = load(saved("gpt_neo", base=True), "gpt_neo")
    theirs = THEIRS["gpt_neo"].from_pretrained(saved("gpt_neo", base=True), attn_implementation="eager")
    assert torch.equal(forward(model), forward(theirs))
    with pytest.raises(ValueError, match=r"missing tensor embed_out.weight \(61, 16\)"):
        load(saved("gpt_neox", base=True), "gpt_neox")


@pytest.mark.parametrize("head", ["absent", "copy", "alias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_neo_head_is_the_embedding(head, dtype, tmp_path):
    """Old .bin files hold lm_head.weight as well, safetensors never do.  One matrix either way."""
    config, tensors = parts("gpt_neo")
    embed = tensors["transformer.wte.weight"]
    if head != "absent":
        tensors["lm_head.weight"] = embed.clone() if head == "copy" else embed
    write(tmp_path, config, tensors, "bin")
    model = load(tmp_path, "gpt_neo", torch_dtype=dtype)
    assert model.lm_head.weight is model.transformer.embed.weight
    assert torch.equal(forward(model), expected("gpt_neo", dtype=dtype))


@pytest.mark.parametrize("family, head", [("gpt_neo", "lm_head.weight"), ("gpt_neox", "embed_out.weight")])
def test_a_tied_head_that_differs_is_an_error(family, head, tmp_path):
    """Dropping either matrix in silence would be another model."""
    config, tensors = parts(family)
    tensors[head] = tensors["transformer.wte.weight" if family == "gpt_neo" else "gpt_neox.embed_in.weight"] + 1
    write(tmp_path, config | {"tie_word_embeddings": True}, tensors)
    with pytest.raises(ValueError, match="differs from the embedding.*tie_word_embeddings"):
        load(tmp_path, family)


# ------------------------------------------------------------------------------------------------
# Spellings of config.json
# ------------------------------------------------------------------------------------------------

V5 = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
ROPE = {
    "v4": {"rotary_pct": 0.5, "rotary_emb_base": 500, "rope_scaling": None},
    "v4.57, both": {"rotary_pct": 0.5, "rotary_emb_base": 500.0, "partial_rotary_factor": 0.5, "rope_theta": 500.0},
    "v5": {"rope_parameters": V5},
    "v5 over a stale v4": {"rope_parameters": V5, "rotary_pct": 0.25, "rotary_emb_base": 10000},
}


@pytest.mark.parametrize("spelling", ROPE)
def test_rotary_fraction_and_base(spelling, tmp_path):
    """Read under the wrong name they default to 0.25 and 10000, and every position is off a little."""
    config, tensors = parts("gpt_neox")
    for name in ("rope_parameters", "rotary_pct", "rotary_emb_base"):
        config.pop(name, None)
    write(tmp_path, config | ROPE[spelling], tensors)
    model = load(tmp_path, "gpt_neox")
    assert (model.config.rotary_pct, model.config.rotary_emb_base) == (0.5, 500)
    assert torch.equal(forward(model), expected("gpt_neox"))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_scaled_rotation_is_refused(key, kind):
    """Ignored, it would give a plausible model with wrong positions."""
    for spelling in ("type", "rope_type"):
        with pytest.raises(ValueError, match=f"rope_type.*{kind}.*supported: default"):
            GPTNeoXConfig.from_dict({key: {spelling: kind, "factor": 2.0}})


# GPT-NeoX-20B's config.json as transformers 4.19.0.dev0 wrote it in 2022; the sizes are those of
# EleutherAI/gpt-neox, configs/20B.yml.
NEOX_20B = dict(architectures=["GPTNeoXForCausalLM"], attention_probs_dropout_prob=0.1, bos_token_id=0,
                eos_token_id=2, hidden_act="gelu_fast", hidden_dropout_prob=0.1, hidden_size=6144,
                initializer_range=0.02, intermediate_size=24576, layer_norm_eps=1e-5,
                max_position_embeddings=2048, model_type="gpt_neox", num_attention_heads=64,
                num_hidden_layers=44, rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False,
                torch_dtype="float32", transformers_version="4.19.0.dev0", use_cache=True, vocab_size=50432)


def test_the_config_of_the_20b():
    """It says nothing of use_parallel_residual or attention_bias, which are true; its dropouts are read by nobody."""
    config = GPTNeoXConfig.from_dict(NEOX_20B)
    assert config.use_parallel_residual and config.attention_bias
    assert config.hidden_dropout == config.attention_dropout == 0.0
    assert (config.rotary_ndims, config.head_dim, config.hidden_act, config.eos_token_id) == (24, 96, "gelu_fast", 2)
    theirs = transformers.GPTNeoXConfig(**NEOX_20B)
    for name in ("use_parallel_residual", "attention_bias", "hidden_dropout", "attention_dropout",
                 "layer_norm_eps", "vocab_size", "intermediate_size"):
        assert getattr(config, name) == getattr(theirs, name), name


@pytest.mark.parametrize("change", [
    {},
    {"attention_types": None},                             # attention_layers alone
    {"attention_layers": None},
    {"num_layers": None, "num_hidden_layers": 2, "num_heads": None, "num_attention_heads": 2},
    {"intermediate_size": 48, "unknown_to_all": [1, 2]},
], ids=lambda change: ",".join(change) or "as written")
def test_spellings_of_neo(change, tmp_path):
    """attention_layers is what the reference's model reads, attention_types what people write."""
    config, tensors = parts("gpt_neo")
    config = {k: v for k, v in (config | change).items() if v is not None}
    write(tmp_path, config, tensors)
    model = load(tmp_path, "gpt_neo")
    assert model.config.attention_layers == ["global", "local"]
    assert torch.equal(forward(model), expected("gpt_neo"))


def test_intermediate_size_defaults_to_four_times():
    """null in every official GPT-Neo config."""
    assert GPTNeoConfig.from_dict({"hidden_size": 768, "intermediate_size": None, "num_heads": 12}
                                  ).intermediate_size == 3072


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_model_reads_the_family(family):
    """One import that loads anything here."""
    model = AutoModelForCausalLM.from_pretrained(saved(family), attn_implementation="naive")
    assert type(model) is OURS[family] and torch.equal(forward(model), expected(family))


# ------------------------------------------------------------------------------------------------
# dtype
# ------------------------------------------------------------------------------------------------

def in_dtype(family, dtype, folder, says=None):
    """The checkpoint with its weights in another dtype, and what config.json says of it."""
    config, tensors = parts(family)
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    return write(folder, config | (says or {}), {k: t.to(dtype) for k, t in tensors.items()})


@pytest.mark.parametrize("asked, dtype", [
    ({}, torch.float32), ({"torch_dtype": None}, torch.float32), ({"torch_dtype": "float16"}, torch.float16),
    ({"torch_dtype": torch.bfloat16}, torch.bfloat16), ({"dtype": "torch.float64"}, torch.float64),
    ({"dtype": "auto"}, torch.float16), ({"torch_dtype": "auto"}, torch.float16),
    ({"dtype": "float16", "torch_dtype": torch.float16}, torch.float16)], ids=str)
@pytest.mark.parametrize("says", [{}, {"dtype": "float16"}, {"torch_dtype": "float16"}], ids=str)
def test_dtype(asked, dtype, says, tmp_path):
    """None is float32 (Pythia's files are half), "auto" what the files hold."""
    model = load(in_dtype("gpt_neox", torch.float16, tmp_path, says), "gpt_neox", **asked)
    assert {p.dtype for p in model.parameters()} == {dtype} and model.dtype == dtype


def test_auto_means_what_config_says(tmp_path):
    """The 20B says float32 over half-precision weights; so does the reference load it."""
    folder = in_dtype("gpt_neox", torch.float16, tmp_path, {"torch_dtype": "float32"})
    theirs = THEIRS["gpt_neox"].from_pretrained(folder, dtype="auto")
    assert load(folder, "gpt_neox", torch_dtype="auto").dtype == theirs.dtype == torch.float32


def test_auto_of_mixed_files_is_one_dtype(tmp_path):
    """A model half in half precision fails in the middle of its first product."""
    config, tensors = parts("gpt_neox")
    config.pop("dtype", None)
    first, *others = sorted(tensors)
    tensors = {first: tensors[first].half(), **{name: tensors[name] for name in others}}
    model = load(write(tmp_path, config, tensors, "bin"), "gpt_neox", torch_dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float16}


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_dtype_of_the_config_that_is_none(field, tmp_path):
    """Only "auto" reads it, and then the message names the file and the field, not the caller's argument."""
    config, tensors = parts("gpt_neo")
    config = {name: value for name, value in config.items() if name != "dtype"} | {field: "int8"}
    write(tmp_path, config, tensors)
    assert load(tmp_path, "gpt_neo").dtype == torch.float32
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: config field '{field}' must be float32, .*got 'int8'$"):
        load(tmp_path, "gpt_neo", dtype="auto")


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_in_inference_mode(family):
    """The weights are ordinary ones, which can be trained outside of it."""
    with torch.inference_mode():
        model = load(saved(family), family)
    model(IDS, labels=IDS).loss.backward()
    assert torch.equal(model(IDS).logits, expected(family))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_is_the_references(family, dtype, stored, tmp_path):
    """Each weight and each logit, bit for bit, from any dtype to any other."""
    folder = in_dtype(family, stored, tmp_path)
    model = load(folder, family, torch_dtype=dtype)
    theirs = THEIRS[family].from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    named = {our_name(name, NAMES[family]): p for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        assert p.dtype == dtype and torch.equal(p, named[name]), name
    assert torch.equal(forward(model), forward(theirs))


@pytest.mark.parametrize("wrong, says", [
    ({"dtype": "float16", "torch_dtype": torch.float32}, "contradict"),
    ({"dtype": torch.bfloat16, "torch_dtype": "auto"}, "contradict"),
    ({"torch_dtype": "float17"}, "float17"), ({"torch_dtype": "int8"}, "int8"),
    ({"torch_dtype": torch.int64}, "int64"), ({"torch_dtype": "nn"}, "nn"), ({"dtype": 16}, "16")], ids=str)
def test_dtypes_that_mean_nothing(wrong, says, tmp_path):
    """Taking one of two at random, or casting weights to integers, would be a wrong answer."""
    folder = in_dtype("gpt_neo", torch.float32, tmp_path, {"dtype": "float32"})
    with pytest.raises(ValueError, match=says):
        load(folder, "gpt_neo", **wrong)


# ------------------------------------------------------------------------------------------------
# Saving
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("base", [False, True], ids=["causal", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_write(family, base, dtype, tmp_path):
    """What is trained here can be published: same names, same shapes, same bits, same logits."""
    model = load(saved(family, base), family, base, torch_dtype=dtype)
    model.save_pretrained(tmp_path / "ours")
    theirs = (THEIR_BASE if base else THEIRS)[family].from_pretrained(saved(family, base), dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, official = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert mine.keys() == official.keys()
    for name, tensor in official.items():
        assert tensor.dtype == mine[name].dtype and torch.equal(tensor, mine[name]), name

    again = (THEIR_BASE if base else THEIRS)[family].from_pretrained(
        tmp_path / "ours", dtype="auto", attn_implementation="eager")
    assert again.dtype == dtype
    assert torch.equal(forward(again.eval()), expected(family, base, dtype))
    assert torch.equal(forward(load(tmp_path / "ours", family, base, dtype="auto")), expected(family, base, dtype))


@pytest.mark.parametrize("container", ["safetensors", "safetensors-sharded", "bin"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_where_the_weights_are_mapped_from(family, container, tmp_path):
    """Writing over a mapped file turns the weights in memory to noise, or kills the process."""
    write(tmp_path, *parts(family), container)
    model = load(tmp_path, family)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert torch.equal(forward(model), expected(family))
        model = load(tmp_path, family)
        assert torch.equal(forward(model), expected(family))
    assert not [*tmp_path.glob("*.part")]


def test_a_save_over_shards_removes_them(tmp_path):
    """Programs that read the index first would go on with the old weights."""
    write(tmp_path, *parts("gpt_neo"), "safetensors-sharded")
    (tmp_path / "model-of-mine.safetensors").write_bytes(b"mine")
    model = load(tmp_path, "gpt_neo")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "model-of-mine.safetensors"}
    assert torch.equal(forward(load(tmp_path, "gpt_neo")), expected("gpt_neo"))


@pytest.mark.parametrize("base", [False, True])
def test_layers_that_share_weights_are_saved(base, tmp_path):
    """As in ALBERT; safetensors refuses tensors that share memory, in eight lines."""
    model = load(saved("gpt_neox", base), "gpt_neox", base)
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers[1] = layers[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(forward(load(tmp_path, "gpt_neox", base)), forward(model))


def test_weights_without_values_are_not_saved(tmp_path):
    model = load(saved("gpt_neo"), "gpt_neo").to("meta")
    with pytest.raises(ValueError, match="have no values"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_the_files_can_be_read_by_others(tmp_path):
    """safetensors makes files for their owner's eyes only: useless in a group's folder."""
    load(saved("gpt_neo"), "gpt_neo").save_pretrained(tmp_path)
    assert len({f.stat().st_mode for f in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("fails_at", ["save_file", "replace 1", "replace 2", "replace 3"])
def test_a_save_that_fails_leaves_whole_files(fails_at, tmp_path, monkeypatch):
    """A full disk or Ctrl-C in the middle of a save must not cost the last checkpoint."""
    load(saved("gpt_neo"), "gpt_neo").save_pretrained(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    model = load(tmp_path, "gpt_neo", torch_dtype=torch.float16)
    model.generation_config = {"eos_token_id": 5}
    count, replace = 0, os.replace

    def half_a_file(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def replace_or_fail(source, target):
        nonlocal count
        count += 1
        if fails_at == f"replace {count}":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_fail)
        if fails_at == "save_file":
            patch.setattr(load_weights, "save_file", half_a_file)
        with pytest.raises((OSError, KeyboardInterrupt)):
            model.save_pretrained(tmp_path)
    after = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert after.keys() == before.keys(), "a stray file"
    if fails_at in ("save_file", "replace 1"):
        assert after == before
    assert load(tmp_path, "gpt_neo").num_parameters() == model.num_parameters()
    model.save_pretrained(tmp_path)
    assert load(tmp_path, "gpt_neo", torch_dtype="auto").dtype == torch.float16


def test_generation_config_is_kept(tmp_path):
    """Where a chat model stops is written there; lost on saving, it talks for ever."""
    write(tmp_path, *parts("gpt_neox"))
    stored = {"eos_token_id": [3, 5], "temperature": 0.7, "do_sample": True, "future_setting": {"a": 1}}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    model = load(tmp_path, "gpt_neox")
    assert model.generation_config == stored
    model.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == stored
    assert load(tmp_path / "copy", "gpt_neox").generation_config == stored


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_generation_config_is_saved(family, tmp_path):
    """model.generation_config = GenerationConfig(...) is usual; what is not at its default is written."""
    for folder, model in (("ours", load(saved(family), family)), ("theirs", THEIRS[family].from_pretrained(saved(family)))):
        model.generation_config = transformers.GenerationConfig(max_new_tokens=5, eos_token_id=[3, 4], pad_token_id=0)
        model.save_pretrained(tmp_path / folder)
    files = [json.loads((tmp_path / folder / "generation_config.json").read_text()) for folder in ("ours", "theirs")]
    assert files[0] == files[1] and load(tmp_path / "ours", family).generation_config.to_dict() == files[1]


ADDED = {"weight_orig": lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
         "parametrizations.weight.original0": torch.nn.utils.parametrizations.weight_norm,
         "mine": lambda layer: layer.register_buffer("mine", torch.ones(1))}


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("base", [False, True])
def test_what_the_official_format_has_no_name_for_is_not_saved(name, base, tmp_path):
    """In one line that names the tensor; transformers writes it, and then neither reads the folder again."""
    model = load(saved("gpt_neox", base), "gpt_neox", base)
    ADDED[name]((model if base else model.transformer).blocks[1].mlp.up_proj)
    with pytest.raises(ValueError, match=rf"no tensor for transformer.blocks.1.mlp.up_proj.{name}: take out .*remove") as caught:
        model.save_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


def test_a_head_that_was_untied_by_hand_is_not_dropped(tmp_path):
    """A tied model is saved without its head: one that was trained apart must not vanish."""
    model = load(saved("gpt_neo"), "gpt_neo")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(ValueError, match="no longer the embedding"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------------------
# Every official size, on the meta device
# ------------------------------------------------------------------------------------------------

def neo_shapes(L, d, V=50257, positions=2048):
    """Names and shapes on the hub, written out by hand from transformers' modeling_gpt_neo.py."""
    f, shapes = 4 * d, {"transformer.wte.weight": (V, d), "transformer.wpe.weight": (positions, d),
                        "transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    for i in range(L):
        h = f"transformer.h.{i}"
        shapes |= {f"{h}.{ln}.{part}": (d,) for ln in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {f"{h}.attn.attention.{p}_proj.weight": (d, d) for p in ("q", "k", "v", "out")}
        shapes |= {f"{h}.attn.attention.out_proj.bias": (d,),
                   f"{h}.mlp.c_fc.weight": (f, d), f"{h}.mlp.c_fc.bias": (f,),
                   f"{h}.mlp.c_proj.weight": (d, f), f"{h}.mlp.c_proj.bias": (d,)}
    return shapes


def neox_shapes(L, d, V):
    """The same for GPT-NeoX, from modeling_gpt_neox.py."""
    f, shapes = 4 * d, {"gpt_neox.embed_in.weight": (V, d), "embed_out.weight": (V, d),
                        "gpt_neox.final_layer_norm.weight": (d,), "gpt_neox.final_layer_norm.bias": (d,)}
    for i in range(L):
        h = f"gpt_neox.layers.{i}"
        shapes |= {f"{h}.{ln}.{part}": (d,) for ln in ("input_layernorm", "post_attention_layernorm")
                   for part in ("weight", "bias")}
        shapes |= {f"{h}.attention.query_key_value.weight": (3 * d, d), f"{h}.attention.query_key_value.bias": (3 * d,),
                   f"{h}.attention.dense.weight": (d, d), f"{h}.attention.dense.bias": (d,),
                   f"{h}.mlp.dense_h_to_4h.weight": (f, d), f"{h}.mlp.dense_h_to_4h.bias": (f,),
                   f"{h}.mlp.dense_4h_to_h.weight": (d, f), f"{h}.mlp.dense_4h_to_h.bias": (d,)}
    return shapes


# Sizes: TransformerLensOrg/TransformerLens, docs/source/_static/model_properties_table.jsonl.
#                 L     d   H  weights in all, computed from the shapes
NEO_SIZES = {
    "gpt-neo-125m": (12, 768, 12, 125_198_592), "gpt-neo-1.3B": (24, 2048, 16, 1_315_575_808),
    "gpt-neo-2.7B": (32, 2560, 20, 2_651_307_520),
    "TinyStories-1M": (8, 64, 16, 3_745_984), "TinyStories-3M": (8, 128, 16, 8_278_400),
    "TinyStories-8M": (8, 256, 16, 19_702_528), "TinyStories-28M": (8, 512, 16, 51_987_968),
    "TinyStories-33M": (4, 768, 16, 68_514_048), "TinyStories-1Layer-21M": (1, 1024, 16, 66_155_520),
    "TinyStories-2Layers-33M": (2, 1024, 16, 78_748_672),
}
# Sizes: EleutherAI/gpt-neox configs/20B.yml, EleutherAI/pythia models/*/*.yml, Lightning-AI/litgpt litgpt/config.py,
# Stability-AI/StableLM configs, and the models' cards.
#                 L     d   H      V  rotated dims, weights in all, computed from the shapes (None: not computed)
NEOX_SIZES = {
    "gpt-neox-20b": (44, 6144, 64, 50432, 24, 20_554_567_680),
    "pythia-14m": (6, 128, 4, 50304, 8, 14_067_712), "pythia-31m": (6, 256, 8, 50304, 8, 30_494_720),
    "pythia-70m": (6, 512, 8, 50304, 16, 70_426_624), "pythia-160m": (12, 768, 12, 50304, 16, 162_322_944),
    "pythia-410m": (24, 1024, 16, 50304, 16, 405_334_016), "pythia-1b": (16, 2048, 8, 50304, 64, 1_011_781_632),
    "pythia-1.4b": (24, 2048, 16, 50304, 32, 1_414_647_808), "pythia-2.8b": (32, 2560, 32, 50304, 20, 2_775_208_960),
    "pythia-6.9b": (32, 4096, 32, 50432, 32, 6_857_302_016), "pythia-12b": (36, 5120, 40, 50688, 32, 11_846_072_320),
    "dolly-v2-3b": (32, 2560, 32, 50280, 20, 2_775_086_080), "dolly-v2-7b": (32, 4096, 32, 50280, 32, None),
    "dolly-v2-12b": (36, 5120, 40, 50280, 32, None),
    "RedPajama-INCITE-3B": (32, 2560, 32, 50432, 80, 2_775_864_320),
    "RedPajama-INCITE-7B": (32, 4096, 32, 50432, 128, 6_857_302_016),
    "stablelm-alpha-3b": (16, 4096, 32, 50688, 32, 3_637_321_728),
    "stablelm-alpha-7b": (16, 6144, 48, 50432, 32, 7_868_755_968),
    "stablecode-alpha-3b": (32, 2560, 32, 49152, 20, None),
    "polyglot-ko-1.3b": (24, 2048, 16, 30080, 64, 1_331_810_304),
    "polyglot-ko-3.8b": (32, 3072, 24, 30080, 64, 3_809_974_272),
    "polyglot-ko-5.8b": (28, 4096, 16, 30080, 64, 5_885_059_072),
    "polyglot-ko-12.8b": (40, 5120, 40, 30080, 64, 12_893_603_840),
    "open-calm-small": (12, 768, 12, 52224, 64, 165_272_064), "open-calm-medium": (24, 1024, 16, 52224, 64, None),
    "open-calm-large": (24, 1536, 16, 52224, 96, None), "open-calm-1b": (24, 2048, 16, 52224, 128, None),
    "open-calm-3b": (32, 2560, 32, 52224, 80, None), "open-calm-7b": (32, 4096, 32, 52224, 128, 6_871_982_080),
    "japanese-gpt-neox-3.6b": (36, 2816, 22, 32000, 128, 3_607_245_312),
    "oasst-sft-1-pythia-12b": (36, 5120, 40, 50688, 32, None),
}


def assert_shapes(model, shapes, total, family):
    state = model.state_dict()
    if family == "gpt_neo":
        assert state.pop("lm_head.weight").shape == state["transformer.embed.weight"].shape
    assert {name: tuple(t.shape) for name, t in official_names(state, NAMES[family]).items()} == shapes
    assert {our_name(name, NAMES[family]) for name in shapes} == state.keys()
    assert model.num_parameters() == total


@pytest.mark.parametrize("name", NEO_SIZES)
def test_official_sizes_of_neo(name):
    """The names, shapes and number of weights of the real checkpoint, without a byte of it."""
    L, d, H, total = NEO_SIZES[name]
    kinds = [[["global"], 1]] if L == 1 else [[["global", "local"], L // 2]]
    with torch.device("meta"):
        model = GPTNeoForCausalLM(GPTNeoConfig.from_dict(
            dict(num_layers=L, hidden_size=d, num_heads=H, attention_types=kinds, intermediate_size=None)))
    assert model.config.windows == [None, 256][:L] * max(1, L // 2)
    assert_shapes(model, neo_shapes(L, d), total, "gpt_neo")


@pytest.mark.parametrize("name", NEOX_SIZES)
def test_official_sizes_of_neox(name):
    """The same; the fraction that rotates is as in its config, and cut off as the reference cuts it."""
    L, d, H, V, rotated, total = NEOX_SIZES[name]
    D = d // H
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(
            dict(num_hidden_layers=L, hidden_size=d, num_attention_heads=H, vocab_size=V,
                 intermediate_size=4 * d, rotary_pct=rotated / D)))
    assert model.config.rotary_ndims == rotated and rotated / D in (0.25, 0.5, 1.0)
    assert_shapes(model, neox_shapes(L, d, V), total or 2 * V * d + L * (12 * d * d + 13 * d) + 2 * d, "gpt_neox")


# ------------------------------------------------------------------------------------------------
# Memory and time
# ------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, time, torch
if sys.argv[1] == "ours":
    import neo, load_weights
    load = neo.GPTNeoForCausalLM.from_pretrained
else:
    import transformers
    transformers.utils.logging.disable_progress_bar()
    load = transformers.GPTNeoForCausalLM.from_pretrained
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")              # forget the peak of the imports
start = time.perf_counter()
with torch.no_grad():
    model = load(sys.argv[2])
    ready = time.perf_counter() - start
    total = sum(p.sum().item() for p in model.parameters())
print(json.dumps({"peak": status("VmHWM") - before, "ready": ready, "read": time.perf_counter() - start,
                  "total": total}))
"""


def measure(who, folder):
    """Peak memory above the imports, and seconds, of loading and of reading every weight once."""
    run = subprocess.run([sys.executable, "-c", MEASURE, who, folder], cwd=ROOT, check=True,
                         capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(run.stdout)


def neo_of(folder, **sizes):
    """A random fp32 GPT-Neo on disk, and the size of its weights."""
    torch.manual_seed(0)
    GPTNeoForCausalLM(GPTNeoConfig(**sizes)).save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def test_one_copy_in_memory(tmp_path):
    """Loading a model twice its size kills the notebook that just holds it.  (30 M weights.)"""
    size = neo_of(tmp_path, num_layers=4, hidden_size=512, num_heads=8, attention_types=[[["global", "local"], 2]],
                  vocab_size=32000)
    peak = measure("ours", tmp_path)["peak"]
    print(f"peak {peak / 2**20:.0f} MiB for a file of {size / 2**20:.0f} MiB: {peak / size:.3f}")
    assert peak <= 1.1 * size


@pytest.mark.slow
def test_memory_and_time_of_the_125m(tmp_path):
    """One copy of the weights, every one of them read, in half the reference's time or less."""
    size = neo_of(tmp_path, num_layers=12, hidden_size=768, num_heads=12, attention_types=[[["global", "local"], 6]])
    runs = {who: [] for who in ("theirs", "ours")}
    for _ in range(3):
        for who in runs:
            runs[who].append(measure(who, tmp_path))
    for who, results in runs.items():
        print(f"{who}: peak {min(r['peak'] for r in results) / size:.3f} of the file, ready after "
              f"{min(r['ready'] for r in results):.3f} s, all read after {min(r['read'] for r in results):.3f} s")
    assert len({round(r["total"], 3) for results in runs.values() for r in results}) == 1
    assert max(r["peak"] for r in runs["ours"]) <= 1.1 * size
    for moment in ("ready", "read"):
        assert min(r[moment] for r in runs["ours"]) <= 0.5 * min(r[moment] for r in runs["theirs"]), moment


@pytest.mark.parametrize("named", [True, False], ids=["the tokenizer's class is named", "it is not"])
@pytest.mark.parametrize("family", ["gpt_neo", "gpt_neox"])
def test_config_json_is_read_once(family, named, tmp_path, monkeypatch):
    """By each of the two calls that load a model and its tokenizer."""
    folder, read = shutil.copytree(good(family), tmp_path / "copy"), []
    settings = Path(folder, "tokenizer_config.json")
    content = json.loads(settings.read_text()) if settings.exists() else {}
    content.pop("tokenizer_class", None)
    if named:
        content["tokenizer_class"] = {"gpt_neo": "GPT2Tokenizer", "gpt_neox": "GPTNeoXTokenizer"}[family]
    settings.write_text(json.dumps(content))

    def counted(path, original=files.read_json, **how):
        read.append(Path(path).name)
        return original(path, **how)
    for name, module in list(sys.modules.items()):
        if getattr(module, "read_json", None) is files.read_json and name != "files":
            monkeypatch.setattr(module, "read_json", counted)
    for load in (AutoModelForCausalLM, AutoTokenizer):
        read.clear()
        load.from_pretrained(folder)
        assert read.count("config.json") == 1, (load, read)
