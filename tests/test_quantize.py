"""Weights of 8 and 4 bits: what the integers mean, the two ways to multiply by them, models, files."""

import contextlib
import copy
import dataclasses
import json
import math
import pickle
import re
import shutil
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import benchmark
import generate
import load_weights
import quantize
import sampling
import score
from benchmarks import accuracy, competitors, llama_cpp, twenty
from benchmarks.common import in_fresh_process
from benchmarks.shapes import SHAPES as OFFICIAL
from benchmarks.shapes import pythia
from conftest import ROOT
from helpers import ours, random_case, relative, saved
from load_weights import AutoModelForCausalLM, AutoModelForSequenceClassification
from neox import GPTNeoXForCausalLM, GPTNeoXModel
from quantize import BITS, GROUP, PARTS, QuantizedLinear, dequantize, few_rows

KINDS = pytest.mark.parametrize("kind", BITS)
FAMILIES = pytest.mark.parametrize("family", ["gpt_neo", "gpt_neox"])
SHAPES = [(1, 1), (16, 64), (17, 63), (5, 65), (33, 128), (300, 200), (512, 40)]
compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
IDS = torch.randint(1, 97, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """So that the larger shapes here are more than one slice, as real ones are."""
    monkeypatch.setattr(quantize, "SLICE", 2**12)
    monkeypatch.setattr(quantize, "PRODUCT", 2**14)


def random_words(kind, N, K, seed=0):
    """A layer whose words are any bits at all, so also those whose sign bit is set."""
    layer, generator = QuantizedLinear(K, N, False, kind), torch.Generator().manual_seed(seed)
    layer.words.copy_(torch.randint(-2**31, 2**31, layer.words.shape, generator=generator))
    layer.scale.uniform_(0.01, 1, generator=generator)
    layer.zero.uniform_(-8, 1, generator=generator)
    return layer


def by_hand(layer, n, k):
    """One number of a layer's matrix, from the description of the layout in Python's own integers."""
    bits, per = BITS[layer.kind], 32 // BITS[layer.kind]
    word = layer.words[n // 16, k // per, n % 16].item() % 2**32
    group = k // GROUP[layer.kind] if GROUP[layer.kind] else 0
    integer = word >> k % per * bits & 2**bits - 1
    return layer.zero[n // 16, group, n % 16].item() + layer.scale[n // 16, group, n % 16].item() * integer


def model_of(family, kind, dtype=torch.float32, seed=0, **how):
    return AutoModelForCausalLM.from_pretrained(saved(random_case(seed, family)), weights=kind, torch_dtype=dtype, **how)


@contextlib.contextmanager
def reading_with(form):
    before = quantize.UNPACKER.set(form)
    yield
    quantize.UNPACKER.reset(before)


def unpacked(model, family, dtype=torch.float32, seed=0):
    """The same model, not quantized, with the numbers that the integers stand for."""
    whole = ours(random_case(seed, family), dtype)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            whole.get_submodule(name).weight = nn.Parameter(layer.dequantize(dtype))
    return whole


# --- what the integers mean ------------------------------------------------------------------------

@KINDS
@pytest.mark.parametrize("N, K", SHAPES[:5])
def test_the_layout_is_the_one_described(kind, N, K):
    layer = random_words(kind, N, K)
    expected = torch.tensor([[by_hand(layer, n, k) for k in range(K)] for n in range(N)])
    torch.testing.assert_close(layer.dequantize(), expected, rtol=1e-6, atol=1e-6)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("N, K", SHAPES)
def test_some_columns_at_a_time_are_the_whole_to_the_bit(kind, dtype, N, K):
    """Any bits in the words; computed at once from the integers, in float32, and rounded to the dtype at last."""
    layer, bits = random_words(kind, N, K), BITS[kind]
    words, scale, zero = (x.transpose(1, 2).flatten(0, 1)[:N] for x in (layer.words, layer.scale, layer.zero))
    q = torch.stack([words >> place & 2**bits - 1 for place in range(0, 32, bits)], -1).flatten(1)[:, :K]
    scale, zero = (x.repeat_interleave(GROUP[kind] or K, 1)[:, :K] for x in (scale, zero))
    assert torch.equal(layer.dequantize(dtype), (q.float() * scale + zero).to(dtype))


@KINDS
def test_every_integer_in_every_place(kind):
    """Rows that hold every level, turned by one column each: every integer stands once in every place."""
    levels = 2 ** BITS[kind]
    group = torch.arange(levels).repeat(4)[:GROUP[kind] or levels].float()
    w = torch.stack([group.roll(shift) for shift in range(32 // BITS[kind])])
    words, scale, zero = quantize.quantize(w, kind)
    assert (scale[0, :, :len(w)] == 1).all() and (zero == 0).all() and (words < 0).any()
    assert torch.equal(dequantize(words, scale, zero, w.shape, kind), w)
    x = torch.eye(w.size(1))
    assert torch.equal(few_rows(x, words, scale, zero, kind)[:, :len(w)].T, w)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("N, K", SHAPES)
def test_rounded_to_the_nearest_step_of_its_group(kind, dtype, N, K):
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(N)).to(dtype)
    layer = QuantizedLinear.of(nn.Linear(K, N, dtype=dtype), kind)
    assert {name: (getattr(layer, name).dtype) for name in PARTS} == PARTS
    parts = quantize.quantize(w, kind)
    assert all(getattr(layer, name).shape == part.shape for name, part in zip(PARTS, parts))
    found = dequantize(*parts, w.shape, kind)
    for n in (0, N // 2, N - 1):
        for start in range(0, K, GROUP[kind] or K):
            stop = min(start + (GROUP[kind] or K), K)
            row = w[n, start:stop].float()
            step = (row.max() - row.min()) / (2 ** BITS[kind] - 1)
            assert (found[n, start:stop] - row).abs().max() <= 0.5001 * step + 1e-7
            assert found[n, start + row.argmin()] == row.min()


@KINDS
def test_rows_of_zeros_and_constants_are_exact(kind):
    w = torch.cat([torch.zeros(3, 70), torch.full((2, 70), -1.7), torch.full((1, 70), 1e-42), torch.randn(4, 70)])
    w[-1] *= 1e30
    parts = quantize.quantize(w, kind)
    assert torch.equal(dequantize(*parts, w.shape, kind)[:6], w[:6])
    assert (parts[0][..., :5] == 0).all()                  # a scale of 0 divides nothing
    x = torch.randn(2, 70)
    found = few_rows(x, *parts, kind)
    assert (found[:, :3] == 0).all() and found.isfinite().all()
    torch.testing.assert_close(found[:, 3], -1.7 * x.sum(-1), rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38], ids=str)
@pytest.mark.parametrize("place", ["dense_4h_to_h.weight", "embed_out.weight"])
def test_what_integers_cannot_stand_for_is_refused_by_name(kind, value, place, tmp_path):
    folder = shutil.copytree(saved(random_case(1)), tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(place))
    tensors[name][0, 0], tensors[name][0, 1] = value, -3e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name} cannot become integers: it holds infinities") as error:
        AutoModelForCausalLM.from_pretrained(folder, weights=kind)
    assert "\n" not in str(error.value)


def test_what_is_no_matrix_of_numbers_is_refused():
    for tensor in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 2, dtype=torch.int8)):
        with pytest.raises(ValueError, match="a matrix of floating-point numbers is needed"):
            quantize.quantize(tensor, "int8")


# --- the two ways to multiply ----------------------------------------------------------------------

@KINDS
@pytest.mark.parametrize("N, K", SHAPES)
def test_both_forms_are_the_linear_layer_of_the_dequantized_matrix(kind, N, K):
    layer = random_words(kind, N, K)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(K))
    expected = F.linear(x.double(), layer.dequantize().double())
    assert relative(layer(x), expected) < 1e-6
    assert relative(few_rows(x, layer.words, layer.scale, layer.zero, kind)[:, :N], expected) < 2e-6


@KINDS
def test_the_form_for_one_token_is_what_is_compiled(kind, monkeypatch):
    """With few rows of x and not with more; biases, both half precisions, leading dimensions.  Traced alone:
    what the compiler makes of it is tested with models."""
    seen = []
    torch._dynamo.reset()

    def noted(x, words, *given):
        seen.append(len(x))
        assert words.dtype == torch.float32                # as int32 the compiler's code is 2 to 4 times as slow on AVX2
        return few_rows(x, words, *given)

    monkeypatch.setattr(quantize, "few_rows", noted)
    layer = QuantizedLinear.of(nn.Linear(96, 50), kind)
    compiled = torch.compile(layer, dynamic=False, backend="eager", fullgraph=True)
    with torch.no_grad():
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
            for shape in ((1, 1, 96), (quantize.FEW, 1, 96), (1, quantize.FEW + 1, 96)):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
                plain = layer.to(dtype)(x)
                assert plain.dtype == dtype and not torch.compiler.is_compiling()
                assert relative(compiled(x), plain) < bound
    assert seen and max(seen) == quantize.FEW


# --- the loop that a prompt compiles ---------------------------------------------------------------

@compiler
@pytest.mark.parametrize("kind, dtype", [("int4", torch.bfloat16), pytest.param("int8", torch.float32, marks=pytest.mark.slow)], ids=str)
def test_compiled_it_has_the_same_bits(kind, dtype):
    from fast.step import compiled_unpack
    for N, K in SHAPES[2:6]:
        layer = random_words(kind, N, K)
        expected = layer.dequantize(dtype)
        with reading_with(compiled_unpack):
            assert torch.equal(layer.dequantize(dtype), expected)


@KINDS
@pytest.mark.parametrize("N, K", SHAPES)
def test_memory_that_is_used_again_changes_no_bit(kind, N, K):
    """With gradients each slice of the matrix has its own, because the backward pass reads all of them."""
    layer, x = random_words(kind, N, K), torch.randn(3, K, generator=torch.Generator().manual_seed(0))
    memory = []                                            # kept, so that no address is given twice

    def noted(words, scale, zero, w, kind):
        memory.append(w)
        quantize.unpack(words, scale, zero, w, kind)

    with reading_with(noted):
        with torch.no_grad():
            found, again = layer(x), layer(x)
        assert len({w.untyped_storage().data_ptr() for w in memory}) == 2      # one for each call
        assert torch.equal(found, again)
        expected = layer(x)
        assert torch.equal(found, expected)
    kept = x.clone().requires_grad_()
    assert torch.equal(layer(kept), found)
    grad, = torch.autograd.grad(layer(kept).sum(), kept)
    assert relative(grad, layer.dequantize().sum(0).expand(3, -1)) < 1e-5


@compiler
@pytest.mark.slow
def test_compiled_for_one_token_no_partial_sums_are_stored():
    """They were 45 MB in a layer of the 20B, for each token.  int8 has one group in a row."""
    from torch._inductor.utils import run_and_get_code
    layer = random_words("int4", 512, 256)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad():
        y, code = run_and_get_code(torch.compile(layer, dynamic=False, fullgraph=True), x)
    assert relative(y, layer(x)) < 1e-6
    sizes = [math.prod(map(int, shape.replace(" ", "").strip(",").split(",")))
             for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", "".join(code))]
    assert sizes and max(sizes) <= 512


@KINDS
def test_a_state_has_integers_and_takes_them(kind):
    """Whatever the layer holds; old files have them too.  The bits survive NaN patterns, copies and casts."""
    layer = random_words(kind, 33, 128)
    words = layer.words.clone()
    state = layer.state_dict()
    assert {name: part.dtype for name, part in state.items()} == PARTS
    assert torch.equal(state["words"], words)
    for how in ({}, {"assign": True}):
        other = random_words(kind, 33, 128, seed=1)
        assert not torch.equal(other.words, words)
        other.load_state_dict(state, **how)
        assert torch.equal(other.words, words) and torch.equal(copy.deepcopy(other).half().double().words, words)
        for wrong in ({"words": words[:1]}, {"words": None}, {}):
            with pytest.raises(RuntimeError, match=r"\bwords\b") as raised:
                other.load_state_dict({"scale": layer.scale, "zero": layer.zero, **wrong}, **how)
            assert "as_float32" not in str(raised.value)
        other.load_state_dict({**state, "words": words.long()}, **how)
        assert torch.equal(other.words, words)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).words, words)


@compiler
@FAMILIES
def test_only_a_prompt_with_compile_is_unpacked_by_it(family, monkeypatch):
    """Here not compiled; in this thread only, and never after it, also if the prompt was cut off by an error."""
    import fast.step
    calls, model = [], model_of(family, "int4")

    def noted(words, *given):
        calls.append(len(seen))
        assert words.dtype == torch.float32
        quantize.unpack(words, *given)

    monkeypatch.setattr(fast.step, "compiled_unpack", noted)
    seen, layers = [], sum(isinstance(layer, QuantizedLinear) for layer in model.modules())
    plain = model.generate(IDS, max_new_tokens=1, do_sample=False)
    assert not calls
    for compiled in (True, False, True):
        assert torch.equal(model.generate(IDS, max_new_tokens=1, do_sample=False, compile=compiled), plain)
        seen.append(compiled)
    assert calls.count(0) == calls.count(2) >= layers and not calls.count(1)
    calls.clear()
    monkeypatch.setattr(type(model.lm_head), "forward", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(IDS, max_new_tokens=1, compile=True)
    assert quantize.UNPACKER.get() is quantize.unpack_in_tiles


def test_more_compilations_than_torch_keeps(monkeypatch):
    """A prompt then drops those before, and an error of the compiler is one line."""
    import fast.step
    torch._dynamo.reset()
    monkeypatch.setattr(fast.step, "MOST", 1)
    monkeypatch.setattr(fast.step, "compiled_unpack", torch.compile(quantize.unpack, fullgraph=True, dynamic=True, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            layer = random_words("int4", 33, 128)
            with fast.step.Step.compiled_unpacking():
                found = layer.dequantize(dtype)
            assert torch.equal(found, layer.dequantize(dtype))
    monkeypatch.setattr(fast.step, "compiled_unpack", torch.compile(lambda *given: breakpoint(), fullgraph=True))
    with fast.step.Step.compiled_unpacking(), pytest.raises(RuntimeError, match="compile=True: torch.compile cannot take"):
        layer.dequantize()


def test_while_another_thread_compiles_nothing_changes(monkeypatch):
    """torch.compiler.is_compiling() is then true in this thread too."""
    layer, x = random_words("int4", 33, 128), torch.randn(1, 128, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    monkeypatch.setattr(quantize, "few_rows", None)
    assert torch.compiler.is_compiling() and torch.equal(layer(x), expected)


@KINDS
@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, lambda layer: layer.to(torch.float64)])
def test_a_cast_of_the_model_leaves_the_integers_alone(kind, move):
    layer = QuantizedLinear.of(nn.Linear(70, 20), kind)
    before = layer.dequantize()
    move(layer)
    assert torch.equal(layer.dequantize(), before)
    assert {name: getattr(layer, name).dtype for name in PARTS} == PARTS
    x = torch.randn(2, 70).to(layer.bias.dtype)
    assert layer(x).dtype == x.dtype


def test_where_half_precision_is_slow_the_product_is_float32(monkeypatch):
    """Closer to the exact one than a product in bfloat16 is, and still returned in bfloat16."""
    layer = QuantizedLinear.of(nn.Linear(256, 50), "int4").bfloat16()
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = F.linear(x.float(), layer.dequantize(), layer.bias.float())
    for slow in ({}, {torch.bfloat16}):
        monkeypatch.setattr(quantize, "SLOW", slow)
        assert torch.equal(layer(x), exact.bfloat16()) == bool(slow)
        assert relative(layer(x), exact) < 6e-3
    assert torch.float32 not in quantize.SLOW and quantize.INSTRUCTIONS.keys() >= quantize.SLOW


def test_gradients_pass_through_to_the_input():
    layer = QuantizedLinear.of(nn.Linear(70, 300), "int4")
    x = torch.randn(3, 70, requires_grad=True)
    grads = [torch.autograd.grad(y.square().sum(), x)[0]
             for y in (layer(x), F.linear(x, layer.dequantize(), layer.bias))]
    assert relative(*grads) < 1e-6


# --- models ----------------------------------------------------------------------------------------

@KINDS
@FAMILIES
@pytest.mark.parametrize("seed", [0, 1])
def test_a_model_is_the_naive_one_of_its_dequantized_weights(kind, family, seed):
    model = model_of(family, kind, seed=seed, attn_implementation="naive")
    whole = unpacked(model, family, seed=seed)
    assert model.weights == kind and whole.weights is None and not model.training
    assert model.num_parameters() == ours(random_case(seed, family)).num_parameters()
    count = sum(isinstance(layer, nn.Linear) for layer in whole.modules())
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == count
    assert not any(isinstance(layer, nn.Linear) for layer in model.modules())
    with torch.no_grad():
        assert relative(model(IDS).logits, whole(IDS).logits) < 1e-5


@KINDS
@FAMILIES
def test_shapes_on_the_meta_device(kind, family):
    """As an unquantized model gives them; torch cannot say there whether autocast is on."""
    ids = torch.ones(2, 5, dtype=torch.long, device="meta")
    model = model_of(family, kind)
    assert model.to("meta")(ids).logits.shape == (2, 5, model.config.vocab_size)


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_half_precision(family, dtype):
    model = model_of(family, "int4", dtype)
    assert model.dtype == dtype and model.transformer.blocks[0].mlp.up_proj.scale.dtype == torch.float32
    with torch.no_grad():
        assert relative(model(IDS).logits, unpacked(model, family, dtype)(IDS).logits) < (3e-2 if dtype == torch.bfloat16 else 4e-3)


def test_a_tied_head_becomes_integers_and_the_embedding_stays():
    model, whole = model_of("gpt_neo", "int8"), ours(random_case(0, "gpt_neo"))
    assert torch.equal(model.transformer.embed.weight, whole.transformer.embed.weight)
    assert isinstance(model.lm_head, QuantizedLinear) and model.config.tie_word_embeddings
    expected = quantize.quantize(whole.lm_head.weight, "int8")
    assert all(map(torch.equal, (model.lm_head.words, model.lm_head.scale, model.lm_head.zero), expected))


@compiler
@pytest.mark.parametrize("family, kind, dtype, B", [
    ("gpt_neo", "int4", torch.float32, 1),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("gpt_neox", "int8", torch.bfloat16, 3), ("gpt_neo", "int8", torch.float32, 3), ("gpt_neox", "int4", torch.float32, 6),
        ("gpt_neox", "int8", torch.float32, 1), ("gpt_neox", "int4", torch.float16, 1)))], ids=str)
def test_compiled_decoding_is_the_same_within_rounding(family, kind, dtype, B):
    from attention import KVCache
    from fast.step import Step
    model = model_of(family, kind, dtype)
    ids = torch.randint(1, 97, (B, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        cache, logits = KVCache(model.config, B, 20, dtype), []
        with torch.no_grad():
            model(ids[:, :8], cache=cache)
            step = Step(model, cache) if compiled else lambda *given: model(*given, cache=cache).logits[:, -1]
            for t in range(8, 12):
                logits.append(step(ids[:, t:t + 1], torch.ones(B, t + 1), torch.full((B, 1), t)))
        found.append(torch.stack(logits))
    assert relative(found[1], found[0]) < {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]


@FAMILIES
def test_hooks_and_wrappers_see_every_layer_called(family):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x) + 1

    model, called = model_of(family, "int4"), []
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, args, out, name=name: called.append(name))
    with torch.no_grad():
        before = model(IDS).logits
        assert sorted(called) == sorted(layers)
        model.transformer.blocks[0].mlp.up_proj = Wrapper(model.transformer.blocks[0].mlp.up_proj)
        assert not torch.equal(model(IDS).logits, before)
    assert model.transformer.blocks[0].mlp.up_proj.calls == 1


def test_a_quantized_head_is_not_resized():
    with pytest.raises(ValueError, match="the output head is quantized, so it cannot get other rows"):
        model_of("gpt_neox", "int8").resize_token_embeddings(120)


def test_other_models_of_the_same_checkpoint(tmp_path):
    """A base model, and a classifier, whose own head is to be trained and so stays as it is."""
    base = GPTNeoXModel.from_pretrained(saved(random_case(1)), weights="int4")
    assert base.weights == "int4" and isinstance(base.blocks[0].attn.qkv_proj, QuantizedLinear)
    with torch.no_grad():
        expected = base(IDS).last_hidden_state
        base.save_pretrained(tmp_path)
        assert torch.equal(GPTNeoXModel.from_pretrained(tmp_path)(IDS).last_hidden_state, expected)
    with pytest.warns(UserWarning, match="score.weight: not in"):
        classifier = AutoModelForSequenceClassification.from_pretrained(saved(random_case(1)), weights="int4")
    assert classifier.weights == "int4" and isinstance(classifier.score, nn.Linear)


# --- files -----------------------------------------------------------------------------------------

@KINDS
@FAMILIES
def test_saved_and_loaded_it_has_the_same_bits(kind, family, tmp_path):
    model = model_of(family, kind, torch.bfloat16)
    model.save_pretrained(tmp_path)
    for asked in (None, kind):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto", weights=asked)
        mine, theirs = model.state_dict(), again.state_dict()
        assert mine.keys() == theirs.keys() and again.config == model.config
        assert all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, again(IDS).logits)
    again.save_pretrained(tmp_path)                        # the folder that it is mapped from
    assert AutoModelForCausalLM.from_pretrained(tmp_path).weights == kind
    with pytest.raises(OSError, match="no file named model.safetensors"):              # refused, not misread
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("ending", ["shards", "bin"])
@FAMILIES
def test_shards_and_pickles_become_the_same_integers(family, ending, tmp_path):
    case = random_case(0, family)
    tensors = load_file(saved(case) / "model.safetensors")
    shutil.copy(saved(case) / "config.json", tmp_path)
    if ending == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        places = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(names)}
        for file in set(places.values()):
            save_file({name: tensors[name] for name in names if places[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    mine, theirs = (AutoModelForCausalLM.from_pretrained(x, weights="int4").state_dict() for x in (tmp_path, saved(case)))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="weights must be int8 or int4"):
        model_of("gpt_neo", "int3")
    with pytest.raises(ValueError, match="int4' quantizes"):
        AutoModelForCausalLM.from_pretrained(saved(random_case(1)), load_in_4bit=True)
    model = model_of("gpt_neox", "int4")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights='int8', but this checkpoint was saved as int4"):
        AutoModelForCausalLM.from_pretrained(tmp_path, weights="int8")
    with pytest.raises(ValueError, match="has model.safetensors, which other programs would read"):
        model.save_pretrained(shutil.copytree(saved(random_case(1)), tmp_path / "whole"))
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (({"group": 32}, "supported is what save_pretrained writes"), ({"weights": "int2"}, "int2"),
                          ({"quant_method": "gptq"}, "quantized by 'gptq', which this project does not read")):
        config["quantization_config"] = quantize.description("int4") | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words) as error:
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("embed_out.scale"), "missing tensor embed_out.scale"),
    (lambda t: t.update({"embed_out.words": t["embed_out.words"].float()}), "embed_out.words holds torch.float32, expected torch.int32"),
    (lambda t: t.update({"embed_out.zero": t["embed_out.zero"].half()}), "embed_out.zero holds torch.float16"),
    (lambda t: t.update({"embed_out.words": t["embed_out.words"][:1].clone()}), "embed_out.words has shape"),
    (lambda t: t.update({"embed_out.weight": torch.zeros(97, 8)}), "unexpected tensor embed_out.weight")])
def test_damaged_files_are_refused_by_name(change, words, tmp_path):
    model_of("gpt_neox", "int4", seed=1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / quantize.FILE)
    change(tensors)
    save_file(tensors, tmp_path / quantize.FILE)
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("width, heads", [(384, 6), pytest.param(6144, 64, marks=pytest.mark.slow)])
def test_a_slice_of_20b_is_the_naive_one_of_its_dequantized_weights(width, heads, monkeypatch, tmp_path):
    """Four layers as `benchmark.py 20b` makes and reads them: four shards, one file on the disk."""
    config = dataclasses.replace(OFFICIAL["gpt-neox-20b"], num_hidden_layers=4, hidden_size=width, num_attention_heads=heads,
                                 intermediate_size=4 * width, vocab_size=509)
    twenty.write_folder(config, tmp_path)
    assert len({path.stat().st_ino for path in tmp_path.glob("*-of-00006.safetensors")}) == 3
    monkeypatch.setattr(load_weights, "read_tensors", twenty.read_shard)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, weights="int4", attn_implementation="naive")
    assert torch.equal(model.transformer.blocks[0].mlp.up_proj.words, model.transformer.blocks[3].mlp.up_proj.words)
    with torch.no_grad():
        found = model(IDS).logits
        for layer in [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]:
            layer.forward = lambda x, layer=layer: F.linear(x, layer.dequantize(), layer.bias)
        assert relative(found, model(IDS).logits) < 1e-5


@pytest.fixture
def tiny_20b(monkeypatch):
    """GPT-NeoX-20B's shape with a width of 64, decoded without the compiler."""
    config = dataclasses.replace(OFFICIAL["gpt-neox-20b"], num_hidden_layers=3, hidden_size=64, num_attention_heads=2,
                                 intermediate_size=256, vocab_size=509)
    monkeypatch.setitem(OFFICIAL, "gpt-neox-20b", config)
    monkeypatch.setattr(twenty, "bandwidth", lambda: 1e10)
    monkeypatch.setattr(twenty, "stream", lambda *given, compile, **how: sampling.stream(*given, **how))


@pytest.mark.parametrize("layers", [None, 2])
def test_the_command_20b_prints_its_figures_as_they_come(layers, tiny_20b, capsys, tmp_path):
    benchmark.main(["20b", "--new-tokens", "3", "--json", str(tmp_path / "found.json"),
                    *(["--layers", str(layers)] if layers else [])])
    found, out = json.loads((tmp_path / "found.json").read_text())["20b"], capsys.readouterr().out
    assert all(value > 0 for value in found.values())
    shown = [line for line in out.splitlines() if line[:40].rstrip() in found]
    assert [line[:40].rstrip() for line in shown] == list(found)
    count = layers or 3
    assert f"{count} layers, int4" in out and f"shard {count + 2} of {count + 2}" in out and "token 5 after" in out
    assert load_weights.read_tensors is not twenty.read_shard
    sizes = {2: (64 * 12 * 64 * 2 + 64 * 512), 3: (64 * 12 * 64 * 3 + 64 * 512)}         # N is rounded up to 16
    assert found["bytes of a step, GiB"] * 2**30 == sizes[count] * 5 / 8


def test_what_was_found_is_printed_before_it_is_interrupted(tiny_20b, capsys, monkeypatch):
    monkeypatch.setattr(twenty, "generate", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    assert benchmark.main(["20b"]) == 130
    out = capsys.readouterr().out
    assert "load, seconds" in out and "bytes of a step" in out and "tokens/s" not in out


def test_the_command_bits(capsys, monkeypatch, tmp_path):
    """Ours, not compiled here, beside a stand-in that takes a second a token."""
    class Slow:
        def __init__(self, folder, kind):
            self.kind = kind

        def fill_cache(self, ids, room):
            pass

        def decode(self, n):
            return [1.0]

    monkeypatch.setitem(OFFICIAL, "pythia-160m", pythia(1, 16, 2))
    monkeypatch.setattr(llama_cpp, "LlamaServer", Slow)
    monkeypatch.setattr(competitors, "Step", lambda model, cache: lambda *given: model(*given, cache=cache).logits[:, -1])
    benchmark.main(["bits", "--contexts", "5", "--new-tokens", "2", "--rounds", "1", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["bits"]["5"]
    assert [*found] == ["int8", "int4", "Q8_0", "Q4_0"] and found["int4"][0] < 1 == found["Q4_0"][0]
    assert "llama.cpp's Q4_0 1.0, ratio" in capsys.readouterr().out


def test_llama_cpp_runs_as_fast_as_it_can(monkeypatch):
    """Without its flash attention, and with as many threads as we have.  A stand-in: the package is optional."""
    some, off = types.SimpleNamespace, object()
    stand_in = some(CommonParams=lambda: some(model=some(), cpuparams=some(), cpuparams_batch=some()), Server=lambda how: how,
                    llama_flash_attn_type=some(LLAMA_FLASH_ATTN_TYPE_DISABLED=off))
    monkeypatch.setitem(sys.modules, "xllamacpp", stand_in)
    monkeypatch.setattr(llama_cpp, "write_gguf", lambda *given: None)
    how = llama_cpp.LlamaServer("folder", "Q4_0").server
    assert how.flash_attn_type is off and how.model.path == "folder/Q4_0.gguf"
    assert how.cpuparams.n_threads == how.cpuparams_batch.n_threads == torch.get_num_threads()


def test_the_command_accuracy(capsys, monkeypatch, tmp_path):
    """The demo checkpoints on texts of our own, and a small model in place of pythia-160m's shape."""
    monkeypatch.setattr(accuracy, "read_plays", lambda folder: dict.fromkeys(accuracy.HELD_OUT, f"{folder} HAMLET.\nO!\n"))
    monkeypatch.setitem(OFFICIAL, "pythia-160m", pythia(1, 16, 2))
    benchmark.main(["accuracy", "--texts", "ACT I.", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["accuracy"]
    assert [*found] == ["demo-neo", "demo-neox", "pythia-160m"] and all([*x] == [*BITS] for x in found.values())
    for rows in found.values():
        assert 0 < rows["int8"]["error"] < rows["int4"]["error"] < 0.2
    assert len(found["demo-neo"]["int4"]["bits"]) == 2 and found["pythia-160m"]["int4"]["bits"] == []
    assert sum(line.startswith("| ") for line in capsys.readouterr().out.splitlines()) == 1 + 6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_peak_is_the_quantized_model_and_one_tensor(dtype, tmp_path):
    """In a process of its own, above what a tiny model needs; one file, whatever its dtype.  The largest tensor is
    the embedding, which is kept besides."""
    config = pythia(12, 1024, 16)
    GPTNeoXForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    code = ("from load_weights import AutoModelForCausalLM as Auto\n"
            f"Auto.from_pretrained({str(saved(random_case(1)))!r}, weights='int4')\n"
            "before = peak()\n"
            f"model = Auto.from_pretrained({str(tmp_path)!r}, weights='int4', torch_dtype='float16')\n"
            "size = sum(x.nbytes for x in model.state_dict().values())")
    peak, size = in_fresh_process(code, "[peak() - before, size]")
    tensor = config.vocab_size * 1024 * (4 if dtype == "float32" else 2)
    print(f"{dtype}: peak {peak / 1e6:.0f} MB, quantized model {size / 1e6:.0f}, one tensor {tensor / 1e6:.0f}")
    assert peak < 1.1 * (size + tensor)


def test_what_is_lost_is_measured():
    """The figures of benchmark.py accuracy: none beside itself, and those of int8 smaller than those of int4."""
    whole = AutoModelForCausalLM.from_pretrained(ROOT / "checkpoints" / "demo-neox")
    ids = torch.randint(0, 1400, (600,), generator=torch.Generator().manual_seed(0))
    found = [accuracy.differences(whole, other, ids) for other in (whole, *(
        AutoModelForCausalLM.from_pretrained(ROOT / "checkpoints" / "demo-neox", weights=kind) for kind in BITS))]
    assert found[0]["error"] == found[0]["KL"] == 0 and found[0]["top-1"] == 1
    for key, sign in (("error", 1), ("KL", 1), ("top-1", -1)):
        assert sign * found[0][key] < sign * found[1][key] < sign * found[2][key]
    loss = -score.log_probs(whole, ids).double().sum().item()
    assert found[1]["nats"][0] == pytest.approx(loss, rel=1e-5) and found[1]["nats"][1] != found[1]["nats"][0]


def test_on_the_command_line(capsys, tmp_path):
    """Text, a score, a folder that was saved; the demo checkpoint's text is still Shakespeare."""
    (tmp_path / "text").write_text((ROOT / "LICENSE").read_text()[:300])
    assert generate.main(["HAMLET.", "--weights", "int4", "--greedy", "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr()
    assert out.out.startswith("HAMLET.") and "3.8 M weights as int4" in out.err
    found = []
    for kind in ([], ["--weights", "int8"]):
        assert generate.main(["--score", str(tmp_path / "text"), *kind]) == 0
        found.append(float(capsys.readouterr().out.split()[1]))
    assert found[0] != found[1] and abs(found[0] - found[1]) < 0.01
