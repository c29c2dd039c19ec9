"""The FlashAttention-2 path: the real package's real functions, and what is done where they fall short.

There is no GPU here, so the flash-attn package runs on its own Triton backend in Triton's interpreter
(conftest.py), and check_flash, which wants a GPU, is replaced.  That backend ignores windows without an
error; the path for local layers is therefore checked against a stand-in that does what the package's
documentation says.
"""

import sys
import types

import flash_attn
import flash_attn.flash_attn_interface as interface
import pytest
import torch

import attention as A
import generate
import load_weights
from attention_cases import LAYOUTS, WIDTHS, all_of, padding, tensors
from helpers import ours, random_case, relative

for name in ("_flash_attn_forward", "_flash_attn_backward", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
    operator = getattr(interface, name)                    # registered for "cuda" alone; the code is the same
    operator.register_kernel("cpu", operator._init_fn)


CHECK = A.check_flash


def check_on_a_cpu(q, k, v):
    """In place of check_flash, which wants a GPU.  (bfloat16 is wrong in the interpreter.)"""
    A.check_tensors("flash", q, k, v, (torch.float32, torch.float16))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(A, "check_flash", check_on_a_cpu)
    A.keeps_windows.cache_clear()
    yield
    A.keeps_windows.cache_clear()


def per_token(tensors, key_mask, S):
    """Leave out what belongs to padding, where results are unspecified."""
    return tensors if key_mask is None else [
        x * (key_mask if x.size(2) == S else key_mask[:, S - x.size(2):])[:, None, :, None] for x in tensors]


@pytest.mark.parametrize("D", [D if D == 80 else pytest.param(D, marks=pytest.mark.slow if i % 2 else pytest.mark.long)
                               for i, D in enumerate(WIDTHS)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float16, 2e-3)], ids=str)
def test_the_real_package_on_global_layers(dtype, bound, D):
    """Output and gradients against float64: T = S, T < S, one query; padding on either side."""
    for T, S, side in ((70, 70, None), (5, 70, None), (1, 33, None), (40, 40, "left"), (9, 40, "left"),
                       (40, 40, "right")):
        generator = torch.Generator().manual_seed(S + T + D)
        q, k, v, do = tensors(generator, 2, 2, T, S, D, dtype, LAYOUTS[D % 4])
        key_mask = padding(generator, 2, T, S, side)
        if key_mask is not None:                           # a padded query asks nothing
            do = do * key_mask[:, None, S - T:, None]
        how = dict(scale=D ** -0.5, window=None, key_mask=key_mask)
        truth = per_token(all_of("naive", q, k, v, do, how, torch.float64), key_mask, S)
        mine = per_token(all_of("flash", q, k, v, do, how), key_mask, S)
        assert max(relative(a, b) for a, b in zip(mine, truth)) <= bound


def test_a_backend_that_ignores_windows_is_refused():
    """The package's own Triton backend ignores them; a window that covers everything works."""
    q, k, v, _ = tensors(torch.Generator(), 1, 1, 9, 9, 16, torch.float32)
    assert torch.equal(*(flash_attn.flash_attn_func(q.mT, k.mT, v.mT, causal=True, window_size=w) for w in ((2, 0), (-1, -1))))
    with pytest.raises(ValueError, match="ignores window_size"):
        A.attention(q, k, v, scale=1.0, window=3, backend="flash")
    assert A.attention(q, k, v, scale=1.0, window=9, backend="flash").isfinite().all()


def documented_flash_attn():
    """A flash_attn whose functions do, slowly, what its documentation says: (B, T, H, D); with windows
    (left, right) query i reads keys i + S - T - left to i + S - T + right; sequences packed in varlen."""
    def flash_attn_func(q, k, v, *, softmax_scale=None, causal=False, dropout_p=0.0, window_size=(-1, -1)):
        T, S, (left, right) = q.size(1), k.size(1), window_size
        i, j = torch.arange(T)[:, None] + S - T, torch.arange(S)
        forbidden = (left >= 0) & (j < i - left) | (right >= 0) & (j > i + right) | causal & (j > i)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * (softmax_scale or q.size(-1) ** -0.5)
        return torch.einsum("bhts,bshd->bthd", scores.masked_fill(forbidden, -torch.inf).softmax(-1), v)

    def flash_attn_varlen_func(q, k, v, starts_q, starts_k, longest_q, longest_k, **how):
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert (longest_q, longest_k) == (starts_q.diff().max(), starts_k.diff().max())
        rows = zip(starts_q, starts_q[1:], starts_k, starts_k[1:])
        return torch.cat([flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], **how)[0] for a, b, c, d in rows])

    return types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func,
                                 flash_attn_interface=types.SimpleNamespace(USE_TRITON_ROCM=True))


@pytest.mark.parametrize("window", [1, 2, 7, 33, None])
@pytest.mark.parametrize("T, S, side", [(40, 40, None), (9, 40, None), (1, 40, None), (40, 40, "left"), (9, 40, "left"),
                                        (40, 40, "right")])
def test_local_layers_where_windows_are_kept(monkeypatch, T, S, side, window):
    """Our W is its (W - 1, 0), and packing a padded batch moves no window."""
    monkeypatch.setitem(sys.modules, "flash_attn", documented_flash_attn())
    generator = torch.Generator().manual_seed(T)
    q, k, v, do = tensors(generator, 3, 2, T, S, 8, torch.float32)
    key_mask = padding(generator, 3, T, S, side)
    if key_mask is not None:
        do = do * key_mask[:, None, S - T:, None]
    how = dict(scale=0.3, window=window, key_mask=key_mask)
    truth = per_token(all_of("naive", q, k, v, do, how, torch.float64), key_mask, S)
    for mine, true in zip(per_token(all_of("flash", q, k, v, do, how), key_mask, S), truth):
        assert relative(mine, true) < 1e-6 if true.any() else mine.abs().max() < 1e-6     # W = 1: dq is 0


def test_a_gap_in_the_keys_of_a_local_layer_is_refused(monkeypatch):
    """Packed, the keys before a gap would come nearer.  A global layer does not mind."""
    monkeypatch.setitem(sys.modules, "flash_attn", documented_flash_attn())
    q, k, v, do = tensors(torch.Generator().manual_seed(0), 1, 1, 9, 9, 8, torch.float32)
    key_mask = torch.tensor([[True, True, False, True, True, True, True, True, True]])
    with pytest.raises(ValueError, match="gap between them"):
        A.attention(q, k, v, scale=1.0, window=4, key_mask=key_mask, backend="flash")
    naive, flash = (A.attention(q, k, v, scale=1.0, key_mask=key_mask, backend=b)[:, :, 3:] for b in ("naive", "flash"))
    assert relative(flash, naive) < 1e-6


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_models(monkeypatch, seed):
    """GPT-NeoX through the real package, GPT-Neo with its windows through the stand-in; padded too."""
    case = random_case(seed)
    if case.family == "gpt_neo":
        monkeypatch.setitem(sys.modules, "flash_attn", documented_flash_attn())
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    ids = torch.randint(1, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for given in (None, mask):
            naive, flash = (ours(case, backend=name)(ids, given).logits[mask.bool()] for name in ("eager", "flash_attention_2"))
            assert relative(flash, naive) < 1e-5


def test_refusals(monkeypatch):
    """Each has an error of its own, before the package is called."""
    x = torch.zeros(1, 1, 4, 16)
    for tensor, message in ((x.bfloat16(), "of float32, float16 on cpu, got torch.bfloat16"),
                            (x.double(), "got torch.float64"), (torch.zeros(1, 1, 4, 264), "256 wide, got 264")):
        with pytest.raises(ValueError, match=message):
            A.attention(tensor, tensor, tensor, scale=1.0, backend="flash")
    monkeypatch.setattr(A, "check_flash", CHECK)
    with pytest.raises(ValueError, match="'flash' \\(flash_attention_2\\) needs a CUDA GPU, got tensors on cpu"):
        A.attention(x, x, x, scale=1.0, backend="flash")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="needs the flash-attn package"):
        A.choose_backend("flash_attention_2")


@pytest.mark.parametrize("broken", ["raise ValueError('not with this triton')", "import nothing_of_that_name"])
def test_an_import_that_fails_for_whatever_reason(tmp_path, broken, monkeypatch, capsys):
    """On the command line: one line, exit status 2, before any weight is read."""
    (tmp_path / "flash_attn.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(load_weights, "read_tensors", None)
    assert generate.main(["HAMLET.", "--backend", "flash_attention_2"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1
    assert out.err.startswith("error: attention backend 'flash' (flash_attention_2) needs the flash-attn package")
    assert ("not with this triton" in out.err) or ("nothing_of_that_name" in out.err)
