"""The checks themselves, checked: every classic mistake, planted one at a time, must be caught.

Mistakes of the forward pass, those that ports have made, come from mistakes.py, which plants them in
our own model.  Mistakes in the cache, in the kernel and in generation are planted by changing one line
of a copy of our source.  The very checks of the other tests then have to fail.  If a line is rewritten
so that a mistake no longer fits it, `changed_copy` says so.
"""

import importlib
import re
import sys

import pytest
import torch

import mistakes as M
from attention_cases import all_of, cached_errors, padding, tensors
from conftest import ROOT
from helpers import Case, assert_bit_equal, ours, reference, reference_output, relative

MODULES = ["attention", "fast", "fast.linear", "fast.slices", "files", "load_weights", "base", "sampling", "task_heads", "neo", "neox"]

# Slips of ours that the equality of whole forward passes cannot see: cache and padding.
CACHE_MISTAKES = {
    "ring mask in the wrong order": ("attention.py", ".roll((past + 1) % ring, dims=1)", ".roll(past % ring, dims=1)"),
    "overwritten before it was read": ("attention.py", "kept = min(past, ring)", "kept = min(past, ring - 2)"),
    "ring slot off by one": ("attention.py", "keys[:, :, new % ring] =", "keys[:, :, (new + 1) % ring] ="),
    "mask counted from the upper left": ("attention.py", "i = torch.arange(S - T, S,", "i = torch.arange(0, T,"),
    "positions start anew": ("neo.py", "torch.arange(past, past + T,", "torch.arange(0, T,"),
    "sdpa block one key short": ("attention.py", "rows.size(-2) - window + 1)", "rows.size(-2) - window + 2)"),
}
GENERATE_MISTAKES = {
    "positions count the padding": ("sampling.py", "(mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)",
                                    "torch.arange(mask.size(1)).expand(mask.shape)"),
    "padding is read": ("sampling.py", "prefill(self.model, new, self.mask, self",
                        "prefill(self.model, new, torch.ones_like(self.mask), self"),
    "ended rows do not draw": ("sampling.py", "token = choose(scores, settings, generator, text)",
                               "whole = text.ids, text.first; text.ids, text.first = (t[~text.done] for t in whole); "
                               "token = torch.zeros(len(scores), dtype=torch.long).masked_scatter(~text.done, choose("
                               "scores[~text.done], settings, generator, text)); text.ids, text.first = whole"),
    "penalty divides negative scores": ("sampling.py", "torch.where(seen < 0, seen * penalty, seen / penalty)",
                                        "seen / penalty"),
    "top-p leaves the boundary out": ("sampling.py", "cumsum(-1) <= 1 - p", "cumsum(-1) <= 1 - p + 0.05"),
}
# Slips in the Triton kernel; each line stands in one of the three kernels.
TRITON_MISTAKES = {
    "window one too long": ("attention.py", "(gap < window) & key_ok[None, :]  # `visible`",
                            "(gap <= window) & key_ok[None, :] #"),
    "band starts too late": ("attention.py", "window + 1, 0)  # my first query's", "window + 2, 0) #"),
    "band ends too early": ("attention.py", "first + ROWS, S)  # my last query's own",
                            "first + ROWS - 1, S) #"),
    "sum that does not fade": ("attention.py", "o = o * fade[:, None]", "o = o"),
    "padding is read": ("attention.py", "if KEY_MASK is not None:", "if False:"),
    "heads mixed up": ("attention.py", "+ head * strides[1]", "+ head * strides[2]"),
    "delta left out": ("attention.py", "ds = p * (dp - delta[:, None])", "ds = p * dp"),
    "dk not scaled": ("attention.py", "dk * scale", "dk"),
    "last reader forgotten": ("attention.py", "first + ROWS - 1 + window - (S - T)", "first + ROWS - 2 + window - (S - T)"),
    "queries counted from the first key": ("attention.py", "gap = (S - T + row)[None, :]", "gap = row[None, :]"),
    "columns beyond D": ("attention.py", "    return tl.load(at, mask=ok[:, None] & (tl.arange(0, D_PAD) < D)[None, :]",
                         "    return tl.load(at, mask=ok[:, None] & (tl.arange(0, D_PAD) <= D)[None, :]"),
}


@pytest.fixture
def changed_copy(tmp_path, monkeypatch):
    """changed_copy(file, old, new) -> our modules, imported from a copy in which `old` reads `new`."""
    def plant(file, old, new):
        (tmp_path / "fast").mkdir()
        for name in MODULES:                                 # all, before a line that fits nowhere ends this
            monkeypatch.delitem(sys.modules, name, raising=False)
        for name in MODULES:
            path = "fast/__init__.py" if name == "fast" else name.replace(".", "/") + ".py"
            source = re.sub(r" +#", "  #", (ROOT / path).read_text())       # comments stand in no column
            if path == file:
                assert source.count(old) == 1, f"{file} does not hold once:\n{old}"
                source = source.replace(old, new)
            source = source.replace('"window_attention::', '"planted_attention::')     # operators have one name
            (tmp_path / path).write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        modules = {name: importlib.import_module(name) for name in MODULES}
        assert modules["neo"].__file__.startswith(str(tmp_path))
        return {"gpt_neo": modules["neo"], "gpt_neox": modules["neox"], **modules}

    yield plant
    for name in MODULES:                                     # the real ones come back with monkeypatch
        sys.modules.pop(name, None)


def plain_case(family, T=60, **settings):
    """64 wide, 4 heads; Neo 4 layers with a window of 8, NeoX 3 layers; and the given settings."""
    shared = (("vocab_size", 97), ("hidden_size", 64), ("max_position_embeddings", 128))
    if family == "gpt_neo":
        sizes = (("num_layers", 4), ("num_heads", 4), ("window_size", 8),
                 ("attention_types", ((("global", "local"), 2),)))
        return Case(1, family, shared + sizes, 1, T, 8)
    sizes = (("num_hidden_layers", 3), ("num_attention_heads", 4), ("intermediate_size", 256))
    return Case(1, family, shared + sizes + tuple(settings.items()), 1, T, None)


@pytest.mark.parametrize("family, settings", [
    ("gpt_neo", {}), ("gpt_neox", {}),
    ("gpt_neox", dict(use_parallel_residual=False, hidden_act="gelu_fast"))], ids=["neo", "neox", "neox-sequential"])
def test_equality_catches(family, settings):
    """The right model passes; with each mistake it fails, and by more than the 1e-5 of the usual bound."""
    case = plain_case(family, **settings)
    model, right = ours(case), reference_output(case, torch.float32)[0]
    assert_bit_equal(case, torch.float32, model)
    for mistake, patches in M.variants(model):
        with M.planted(patches), torch.no_grad():
            difference = relative(model(case.ids).logits.nan_to_num(), right)
            print(f"{family}: {mistake.id}: {difference:.1e} relative")
            assert difference > 1e-5, mistake.id
            with pytest.raises((AssertionError, RuntimeError)):
                assert_bit_equal(case, torch.float32, model)


@pytest.mark.parametrize("mistake", ["local-first", "all-global", "window-plus-one"])
def test_a_text_within_the_window_proves_nothing(mistake):
    """Why every test here is longer than two windows: at T = 8 = W these are exactly the right model."""
    case = plain_case("gpt_neo", T=8)
    model = ours(case)
    with M.planted(next(M.BY_ID[mistake].plant(model))):
        assert_bit_equal(case, torch.float32, model)


@pytest.mark.parametrize("name", [None, *CACHE_MISTAKES], ids=str)
def test_cache_tests_catch(name, changed_copy):
    """The check of test_cache.py, run on the copy."""
    modules = changed_copy(*(CACHE_MISTAKES[name] if name else ("neo.py", "import torch\n", "import torch\n")))

    def run():
        case = plain_case("gpt_neo")
        model, ids = ours(case, torch.float64, "naive", modules), case.ids.repeat(2, 1)
        for padded in (False, True):
            for sizes, error in cached_errors(model, ids, 8, padded, 0, modules["attention"]):
                assert error < 1e-12, sizes
        with torch.no_grad():
            case = plain_case("gpt_neo", T=100)
            naive, sdpa = (ours(case, torch.float64, backend, modules)(case.ids).logits
                           for backend in ("naive", "sdpa"))
            assert relative(sdpa, naive) < 1e-12

    if name is None:
        run()
    else:
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            run()


@pytest.mark.parametrize("name", [None, *TRITON_MISTAKES], ids=str)
def test_kernel_tests_catch(name, changed_copy):
    """Output and gradients against float64, as test_triton.py compares them.

    With a window of 22 the last reader of a block of keys is the first query of its own block, so
    that a kernel which forgets it leaves out a block.
    """
    modules = changed_copy(*(TRITON_MISTAKES[name] if name else ("neo.py", "import torch\n", "import torch\n")))
    assert kernels_are_right(modules["attention"]) == (name is None)


def kernels_are_right(A):
    """False at the first output or gradient that is wrong: a mistake shows in one of three calls."""
    for window, side in ((22, None), (2, None), (None, "left")):
        generator = torch.Generator().manual_seed(0)
        call = tensors(generator, 1, 2, 40, 60, 20, torch.float32, "part of a larger one")
        how = dict(scale=0.3, window=window, key_mask=padding(generator, 2, 40, 60, side)[1:] if side else None)
        truth = all_of("naive", *call, how, torch.float64, A)
        if not all(relative(mine, true) < 1e-5 for mine, true in zip(all_of("triton", *call, how, A=A), truth)):
            return False
    return True


@pytest.mark.parametrize("name", [None, *GENERATE_MISTAKES], ids=str)
def test_generation_tests_catch(name, changed_copy):
    """Ids of a left-padded, penalised, sampled batch against the reference's."""
    modules = changed_copy(*(GENERATE_MISTAKES[name] if name else ("neo.py", "import torch\n", "import torch\n")))
    case = plain_case("gpt_neo")
    ids = torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :13], mask[1, :2] = 0, 0
    ids[mask == 0] = 0
    results = []
    for model in (reference(case), ours(case, modules=modules)):
        torch.manual_seed(11)
        results.append(model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=60, top_p=0.9,
                                      top_k=0, temperature=3.0, repetition_penalty=5.0, eos_token_id=[5, 6, 7, 8], pad_token_id=3))
    same = results[0].shape == results[1].shape and torch.equal(*results)
    assert same == (name is None)
