"""neo_jax.py beside neo.py: the same numbers, gradients, text, files and errors."""

import functools
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("jax", reason="neo_jax.py needs the optional package jax: pip install .[jax]")
import jax
import jax.numpy as jnp

import neo_jax
from conftest import ROOT
from helpers import ours, random_case, saved
from neo import GPTNeoConfig, GPTNeoForCausalLM, GPTNeoModel
from neo_jax import FlaxGPTNeoForCausalLM, FlaxGPTNeoModel
from tokenizer import GPT2Tokenizer

DEMO = ROOT / "checkpoints" / "demo-neo"
REAL = ROOT / "tests" / "data" / "gpt-neo-flax"              # written by FlaxGPTNeoForCausalLM
QUICK = range(6)
slow = pytest.mark.slow


def relative(mine, theirs, rows=None):
    """Norm of the difference over the norm, in float64; rows (B, T) bool: of these tokens alone."""
    mine, theirs = (np.asarray(x.detach() if torch.is_tensor(x) else x, np.float64) for x in (mine, theirs))
    if rows is not None:
        mine, theirs = mine[rows], theirs[rows]
    return np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)


def padding(case):
    """attention_mask and position_ids (B, T): each row with padding on the left, on the right, or without."""
    draw = np.random.RandomState(case.seed)
    mask = np.ones((case.B, case.T), int)
    for row in mask:
        n, side = draw.randint(case.T // 2), draw.randint(3)
        row[:n] = 0 if side == 0 else 1
        row[case.T - n:] = 0 if side == 1 else 1
    return mask, (mask.cumsum(1) - 1).clip(0)


@functools.lru_cache(maxsize=1)
def both(seed):
    case = random_case(seed, "gpt_neo")
    return case, ours(case), FlaxGPTNeoForCausalLM.from_pretrained(saved(case))


SEEDS = [pytest.param(s, marks=[] if s in QUICK else slow) for s in range(100)]


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_hidden_states(seed):
    """With and without padding, of texts longer than two windows; the bound is 1e-5."""
    case, model, mine = both(seed)
    mask, positions = padding(case)
    for inputs in ((), (mask, positions)):
        out = mine(case.ids.numpy(), *inputs, output_hidden_states=True)
        with torch.no_grad():
            expected = model(case.ids, *map(torch.from_numpy, inputs), output_hidden_states=True)
        rows = mask.astype(bool) if inputs else None
        assert len(out.hidden_states) == len(expected.hidden_states)
        for a, b in [(out.logits, expected.logits), *zip(out.hidden_states, expected.hidden_states)]:
            assert a.shape == b.shape and relative(a, b, rows) <= 1e-5
        assert np.isfinite(out.logits).all()


def loss(params, model, ids):
    logits = model(ids, params=params).logits[:, :-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], -1).mean()


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[] if s < 1 else slow if s < 40 else [slow, pytest.mark.long]) for s in range(100)])
def test_gradients(seed):
    """jax.grad of the loss against torch's, each weight by itself."""
    case, model, mine = both(seed)
    value, grads = jax.value_and_grad(loss)(mine.params, mine, jnp.array(case.ids.numpy()))
    out = model(case.ids, labels=case.ids)
    out.loss.backward()
    assert abs(float(value) - out.loss.item()) <= 1e-5 * out.loss.item()
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): x
            for path, x in jax.tree_util.tree_flatten_with_path(grads)[0]}
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert flat.keys() == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():                # a gradient of about 0 is rounding alone
        error = np.linalg.norm(np.asarray(flat[name], np.float64) - p.grad.double().numpy())
        assert error <= 1e-4 * max(p.grad.norm().item(), 1e-3 * whole), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more(dtype):
    """Of the error against float64, the definition's own in that dtype is the measure."""
    ids = torch.arange(150)[None] * 7 % 2000
    with torch.no_grad():
        exact = GPTNeoForCausalLM.from_pretrained(DEMO, dtype="float64")(ids).logits
        theirs = GPTNeoForCausalLM.from_pretrained(DEMO, dtype=dtype, attn_implementation="naive")(ids).logits
    name = str(dtype).removeprefix("torch.")
    mine = FlaxGPTNeoForCausalLM.from_pretrained(DEMO, dtype=getattr(jnp, name))(ids.numpy()).logits
    assert mine.dtype == name
    assert relative(mine.astype(jnp.float32), exact) <= 1.1 * relative(theirs.float(), exact)


@functools.lru_cache
def demo(cls=FlaxGPTNeoForCausalLM):
    return cls.from_pretrained(DEMO)


def test_greedy_text_past_the_window():
    """Window 64; 200 tokens from a prompt of 20, and of rows with padding on the left until each ends."""
    model = GPTNeoForCausalLM.from_pretrained(DEMO, attn_implementation="naive")
    ids = torch.arange(20)[None] * 31 % 2000
    expected = model.generate(ids, max_new_tokens=200, eos_token_id=None)
    out = demo().generate(ids.numpy(), max_new_tokens=200, eos_token_id=None).sequences
    assert np.array_equal(out, expected) and out.shape == (1, 220)


def tiny(seed=0, **changes):
    config = GPTNeoConfig(**{**dict(vocab_size=20, hidden_size=8, num_layers=2, num_heads=2, window_size=3,
                                    attention_types=[[["global", "local"], 1]], max_position_embeddings=90,
                                    eos_token_id=3, initializer_range=0.5), **changes})
    return FlaxGPTNeoForCausalLM(config, seed=seed)


@functools.lru_cache
def small():
    """A tiny model of each library with the same weights."""
    mine = tiny()
    torch.manual_seed(0)
    return mine, GPTNeoForCausalLM(mine.config, attn_implementation="naive").eval()


def test_a_seed_draws_the_same_weights_in_both():
    mine, model = small()
    assert relative(mine([[1, 2]]).logits, model(torch.tensor([[1, 2]])).logits) < 1e-6


def test_ring_equals_no_cache():
    """Each token written with the rings is the likeliest after a whole forward pass without them."""
    mine, _ = small()
    ids = mine.generate([[5, 6, 7]], max_new_tokens=60, eos_token_id=None).sequences
    assert np.array_equal(mine(ids).logits.argmax(-1)[:, 2:-1], ids[:, 3:])


SETTINGS = [dict(repetition_penalty=1.7, min_length=12, begin_suppress_tokens=list(range(15))),
            dict(min_new_tokens=9, suppress_tokens=[4, 5], eos_token_id=[3, 16], pad_token_id=0)]
SETTINGS += [pytest.param(how, marks=slow) for how in (
    dict(repetition_penalty=1.7), dict(min_length=12), dict(begin_suppress_tokens=list(range(15))), dict(pad_token_id=0))]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_settings_and_padding(settings):
    """Rows of different length that end at different times."""
    mine, model = small()
    ids = np.array([[0, 0, 5, 6], [9, 3, 8, 7], [0, 1, 2, 11]])
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    expected = model.generate(torch.tensor(ids), torch.tensor(mask), max_new_tokens=20, **settings)
    out = mine.generate(ids, mask, max_new_tokens=20, **settings).sequences
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("settings", [
    dict(temperature=1.5, top_k=6, top_p=0.7), dict(min_p=0.3), *(pytest.param(how, marks=slow) for how in (
        dict(), dict(temperature=0.5), dict(top_k=3), dict(top_p=0.6)))], ids=str)
def test_sampled_tokens_have_the_reference_s_probabilities(settings):
    """4000 first tokens: none that sampling.py forbids, and frequencies within 4.5 standard deviations."""
    mine, model = small()
    n = 4000
    drawn = mine.generate([[5, 6, 7]], do_sample=True, max_new_tokens=1, num_return_sequences=n,
                          **{"top_k": 0, **settings}).sequences[:, -1]
    from sampling import STEPS
    scores = model(torch.tensor([[5, 6, 7]])).logits[:, -1].detach()
    for name, off, step in STEPS:
        if settings.get(name, off) != off:
            scores = step(scores, settings[name], None)
    p = scores.softmax(-1)[0].numpy()
    counts = np.bincount(np.asarray(drawn), minlength=20)
    assert counts[p == 0].sum() == 0
    assert (abs(counts - n * p) <= 4.5 * np.sqrt(n * p * (1 - p)) + 1).all()


def test_the_key_decides_the_text():
    mine, _ = small()
    how = dict(do_sample=True, max_new_tokens=30, eos_token_id=None)
    a, b, c = (np.asarray(mine.generate([[5, 6]], **how, prng_key=key).sequences)
               for key in (None, jax.random.key(0), jax.random.key(1)))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_ties_at_the_edge_of_top_p():
    """Of equal scores the smallest set stays, as in sampling.keep_top_p."""
    kept = neo_jax.keep_top_p(jnp.zeros((1, 8)), 0.5)
    assert int(jnp.isfinite(kept).sum()) == 4


def test_lengths_share_what_is_compiled():
    mine, sizes = small()[0], []                           # in which other tests compile too
    for T in (1, 33):
        mine(np.ones((1, T), int))
        mine.generate(np.ones((1, T), int), max_new_tokens=4, eos_token_id=None)
        sizes.append((mine.run._cache_size(), mine.write._cache_size()))
    assert sizes[0] == sizes[1]


def test_the_loop_copies_no_cache():
    """In the compiled loop every cache is written in place: a copy of one for each token costs more than
    the attention itself."""
    mine = tiny(hidden_size=128, num_heads=2, window_size=70, max_position_embeddings=2048)
    ints = jax.ShapeDtypeStruct((1, 960), jnp.int32)
    n = jax.ShapeDtypeStruct((), jnp.int32)
    text = mine.write.lower(mine.params, ints, ints, ints, n, n, jax.random.key(0), width=64,
                            how=((), False, (), 0)).compile().as_text()
    assert "f32[2,960,64]" in text and "f32[2,70,64]" in text       # else this would look for nothing
    body = [part for part in text.split("\n\n") if "region" in part.split("(")[0]]
    assert any("while/body" in part for part in body)
    assert not [line for part in body for line in part.splitlines()
                if re.search(r"= f32\[2,(960|70),64\]\S* (copy|fusion)\(", line) and "copy" in line]


def test_base_model_attentions_and_mapping():
    ids = np.arange(70)[None]
    out = demo(FlaxGPTNeoModel)(ids, output_attentions=True)
    expected = GPTNeoModel.from_pretrained(DEMO)(torch.from_numpy(ids), output_attentions=True)
    assert list(out) == list(expected) == ["last_hidden_state", "attentions"]
    assert relative(out.last_hidden_state, expected.last_hidden_state) < 1e-5
    for a, b in zip(out.attentions, expected.attentions, strict=True):
        assert a.shape == b.shape and relative(a, b) < 1e-5


def test_a_whole_call_can_be_traced():
    """Under jax.jit values cannot be looked at, and shapes still are."""
    mine, _ = small()
    out = jax.jit(lambda ids: mine(ids).logits)(jnp.array([[1, 2]]))
    assert relative(out, mine([[1, 2]]).logits) < 1e-6
    with pytest.raises(ValueError, match="91 tokens"):
        jax.jit(lambda ids: mine(ids).logits)(jnp.ones((1, 91), int))


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def leaves(params):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def assert_same_weights(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, dtype, tied):
    """The same bits here and in neo.py; a base model too."""
    torch.manual_seed(1)
    config = small()[0].config.__class__(vocab_size=20, hidden_size=8, num_layers=2, num_heads=2,
                                         attention_types=[[["local"], 2]], tie_word_embeddings=tied)
    mine = FlaxGPTNeoForCausalLM(config, dtype=dtype)
    mine.save_pretrained(tmp_path)
    again = FlaxGPTNeoForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert_same_weights(mine.params, again.params)
    model = GPTNeoForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert_same_weights(mine.params, neo_jax.tree_of(model))
    base = FlaxGPTNeoModel.from_pretrained(tmp_path, dtype="auto")
    base.save_pretrained(tmp_path / "base")
    assert_same_weights(base.params, FlaxGPTNeoModel.from_pretrained(tmp_path / "base", dtype="auto").params)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPTNeoForCausalLM"]
    assert sorted(p.name for p in tmp_path.glob("*.*")) == ["config.json", "flax_model.msgpack",
                                                           "generation_config.json"]


def test_other_files(tmp_path):
    """.bin, shards of safetensors, and shards of msgpack: the same tree."""
    from safetensors.torch import load_file, save_file
    mine, model = small()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()

    def check():
        assert_same_weights(mine.params, FlaxGPTNeoForCausalLM.from_pretrained(tmp_path).params)

    torch.save(state, tmp_path / "pytorch_model.bin")
    check()
    (tmp_path / "pytorch_model.bin").unlink()
    parts = [dict(list(state.items())[i::2]) for i in (0, 1)]
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"{i}.safetensors", metadata={"format": "pt"})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: f"{i}.safetensors" for i in (0, 1) for n in parts[i]}}))
    check()
    index.unlink()
    from originals.flax import write_flax
    for i, part in enumerate(parts):
        write_flax(tmp_path / f"{i}.msgpack", part)
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(
        {"weight_map": {n.replace(".", "/"): f"{i}.msgpack" for i in (0, 1) for n in parts[i]}}))
    check()


def test_what_was_saved_is_read_before_other_files(tmp_path):
    """A folder with safetensors that a trained model is saved into: the Flax classes take their own file first."""
    mine, model = small()
    model.save_pretrained(tmp_path)
    changed = jax.tree.map(lambda x: x + 1, mine.params)
    mine.save_pretrained(tmp_path, params=changed)
    assert_same_weights(changed, FlaxGPTNeoForCausalLM.from_pretrained(tmp_path).params)


def test_real_flax_checkpoint():
    """Logits, hidden states and text of a file that transformers 4.57.6's own class wrote; see its README."""
    ref, ids = np.load(REAL / "ref.npz"), np.load(REAL / "ids.npy")
    mine = FlaxGPTNeoForCausalLM.from_pretrained(REAL)
    out = mine(ids, output_hidden_states=True)
    assert relative(out.logits, ref["logits"]) <= 1e-5
    for i, x in enumerate(out.hidden_states):
        assert relative(x, ref[f"h{i}"]) <= 1e-5
    mask = ref["mask"]
    assert relative(mine(ids, mask).logits, ref["masked"], mask.astype(bool)) <= 1e-5
    greedy = np.load(REAL / "flax_greedy.npy")
    assert np.array_equal(mine.generate(ids[:, :10], max_length=greedy.shape[1]).sequences, greedy)


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------

CALLS = [
    (([[1, 20]],), "input_ids range from 1 to 20; this model's vocabulary has ids 0 to 19"),
    (([[1, -1]],), "input_ids range from -1 to 1"),
    ((np.array([[2**32]]),), "input_ids range from 4294967296"),        # 0 in JAX's int32
    (([[1.0]],), "input_ids must be an array of int32 or int64"),
    (([["a"]],), "input_ids must be an array of int32 or int64"),
    (([[1, 2], [3]],), "input_ids must be an array of int32 or int64"),
    ((None,), "input_ids must be"),
    (([1, 2],), "input_ids must be int64 or int32"),
    ((np.zeros((1, 0), int),), "the input is empty"),
    ((np.zeros((1, 91), int),), "91 tokens .* more than the 90 positions"),
    (([[1, 2]], [[1]]), "attention_mask must have shape"),
    (([[1, 2]], None, [[0, 90]]), "position_ids range from 0 to 90; this model has positions 0 to 89"),
    (([[1, 2]], None, [[0, -1]]), "position_ids range from -1"),
    (([[1, 2]], None, [[0.5, 1]]), "position_ids must be an array of int32 or int64"),
]


@pytest.mark.parametrize("inputs, message", CALLS, ids=[message[:30] for _, message in CALLS])
def test_bad_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        small()[0](*inputs)
    if len(inputs) < 3:
        with pytest.raises(ValueError, match=message.replace("91 tokens .* more", "91 .*more")):
            small()[0].generate(*inputs)


@pytest.mark.parametrize("settings, message", [
    (dict(max_new_tokens=0), "max_new_tokens must be"), (dict(max_length=2), "leaves nothing to generate"),
    (dict(max_new_tokens=88), "more than the 90 positions"), (dict(do_sample=True, temperature=0), "temperature must"),
    (dict(do_sample=True, top_p=0), "top_p must be"), (dict(num_beams=2), "num_beams=2 is not supported"),
    (dict(no_repeat_ngram_size=2), "no_repeat_ngram_size is not supported in neo_jax.py"),
    (dict(stop_strings="a"), "stop_strings is not"), (dict(bad_words_ids=[[1]]), "bad_words_ids is not"),
    (dict(nonsense=1), "'nonsense' is not a setting")], ids=lambda x: str(x)[:30])
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        small()[0].generate([[1, 2, 4]], **settings)


def test_other_arguments():
    mine = small()[0]
    assert mine([[1]], train=False, return_dict=True).logits.shape == (1, 1, 20)
    with pytest.raises(ValueError, match="train=True"):
        mine([[1]], train=True)
    with pytest.raises(ValueError, match="dtype must be"):
        FlaxGPTNeoForCausalLM.from_pretrained(DEMO, dtype="int8")
    with pytest.raises(ValueError, match="jax_enable_x64"):
        FlaxGPTNeoForCausalLM.from_pretrained(DEMO, dtype=np.float64)
    with pytest.raises(ValueError, match="gpt_neox checkpoint"):
        FlaxGPTNeoForCausalLM.from_pretrained(ROOT / "checkpoints" / "demo-neox")


def test_tokenizer_for_jax():
    """The documentation's two examples."""
    tokenizer = GPT2Tokenizer.from_pretrained(DEMO)
    out = demo(FlaxGPTNeoModel)(**tokenizer("Hello, my dog is cute", return_tensors="jax"))
    inputs = tokenizer("Hello, my dog is cute", return_tensors="np")
    assert isinstance(tokenizer("a", return_tensors="jax").input_ids, jax.Array)
    assert out.last_hidden_state.shape == (*inputs.input_ids.shape, 256)
    assert demo()(**inputs).logits[:, -1].shape == (1, 2048)


# ------------------------------------------------------------------------------------------------
# The real classes
# ------------------------------------------------------------------------------------------------

REAL_CLASS = """
import sys, numpy as np, jax, jax.numpy as jnp
from transformers import FlaxGPTNeoForCausalLM
folder, out = sys.argv[1:]
model = FlaxGPTNeoForCausalLM.from_pretrained(folder)
given = np.load(folder + "/given.npz")
logits = model(given["ids"], output_hidden_states=True)
masked = model(given["ids"], given["mask"], given["positions"])
how = dict(do_sample=True, temperature=0.9, top_k=12, top_p=0.8, max_length=60, eos_token_id=None, pad_token_id=0)
sampled = model.generate(given["ids"][:, :10], prng_key=jax.random.PRNGKey(5), **how).sequences
greedy = model.generate(given["ids"][:, :10], max_length=60, eos_token_id=None, pad_token_id=0).sequences
np.savez(out, logits=logits.logits, masked=masked.logits, sampled=sampled, greedy=greedy,
         **{f"h{i}": h for i, h in enumerate(logits.hidden_states)})
"""


@slow
def test_against_the_real_class(tmp_path):
    """FlaxGPTNeoForCausalLM of transformers 4.57.6 reads our file, in an environment of its own, and gives the
    same numbers.  With the same key it draws the same tokens."""
    import subprocess
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    made = subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "jax==0.10.2",
                           "jaxlib==0.10.2", "flax==0.12.8", "transformers==4.57.6"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"transformers 4.57.6 with Flax cannot be installed here: {made.stderr.strip()[-200:]}")
    config = GPTNeoConfig(vocab_size=97, hidden_size=64, num_layers=4, num_heads=4, window_size=8,
                          attention_types=[[["global", "local"], 2]], max_position_embeddings=64,
                          initializer_range=0.1, eos_token_id=0, bos_token_id=0)
    mine = FlaxGPTNeoForCausalLM(config)
    mine.save_pretrained(tmp_path)
    ids = np.random.RandomState(0).randint(1, 97, (2, 50))
    mask = np.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clip(0)
    np.savez(tmp_path / "given.npz", ids=ids, mask=mask, positions=positions)
    done = subprocess.run([python, "-c", REAL_CLASS, tmp_path, tmp_path / "out.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "out.npz")
    out = mine(ids, output_hidden_states=True)
    assert relative(out.logits, theirs["logits"]) <= 1e-5
    assert all(relative(h, theirs[f"h{i}"]) <= 1e-5 for i, h in enumerate(out.hidden_states))
    assert relative(mine(ids, mask, positions).logits, theirs["masked"], mask.astype(bool)) <= 1e-5
    how = dict(max_length=60, eos_token_id=None)
    assert np.array_equal(mine.generate(ids[:, :10], **how).sequences, theirs["greedy"])
    sampled = mine.generate(ids[:, :10], **how, do_sample=True, temperature=0.9, top_k=12, top_p=0.8,
                            prng_key=jax.random.PRNGKey(5)).sequences
    assert np.array_equal(sampled, theirs["sampled"])
    shutil.rmtree(tmp_path / "venv")
