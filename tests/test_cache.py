"""The KV cache: what it forgets must not be missed."""

import pytest
import torch

from attention import KVCache
from attention_cases import cached_errors
from helpers import ours, random_case
from neo import GPTNeoConfig
from neox import GPTNeoXConfig


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("seed", [200, 201, 202, 203, 204, 206])
def test_cached_equals_uncached_at_every_step(seed, padded, backend):
    """Through the window's edge, in any chunks, with left padding longer than the window."""
    case = random_case(seed)
    model, ids = ours(case, torch.float64, backend), case.ids.repeat(2, 40)[:2, :60]
    for sizes, error in cached_errors(model, ids, case.window, padded, seed):
        assert error < 1e-12, sizes


def test_bytes_at_2048_tokens():
    """Half the layers keep 256 of 2048 positions: (1 + 1/8) / 2 = 56.25 % of a cache of everything."""
    config = GPTNeoConfig(hidden_size=64, num_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]])
    everything = 2 * 4 * 2048 * 64 * 4                             # k and v, layers, positions, C, float32
    assert KVCache(config, 1, 2048).nbytes / everything == 0.5625
    assert KVCache(config, 3, 2048, torch.bfloat16).nbytes == 3 * 0.5625 * everything / 2
    short = KVCache(config, 1, 100)
    assert short.nbytes == 2 * 4 * 100 * 64 * 4                    # never more slots than positions
    config = GPTNeoXConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=2)
    assert KVCache(config, 1, 2048).nbytes == everything


def test_nothing_is_reallocated():
    """Decoding writes into the buffers of the first moment, past the window too."""
    case = random_case(200)
    model = ours(case)
    cache = KVCache(model.config, 1, 100)
    before = [x.data_ptr() for x in cache.keys + cache.values]
    with torch.no_grad():
        model(case.ids[:1, :5], cache=cache)
        for _ in range(60):
            model(case.ids[:1, :1], cache=cache)
    assert [x.data_ptr() for x in cache.keys + cache.values] == before
    local = cache.keys[model.config.attention_layers.index("local")]
    k, v, _ = cache.append(model.config.attention_layers.index("local"), local[:, :, :1], local[:, :, :1])
    assert k is local                                              # decoding reads it in place


def test_misuse():
    """Too long, another batch size, a mask of the wrong length: the numbers are in the message."""
    case = random_case(200)
    model, ids = ours(case), case.ids[:1]
    cache = KVCache(model.config, 1, 10)
    with torch.no_grad():
        with pytest.raises(ValueError, match="holds 0 of at most 10 tokens; 12 more"):
            model(ids[:, :12].repeat(1, 12)[:, :12], cache=cache)
        model(ids[:, :3], cache=cache)
        with pytest.raises(ValueError, match="batch of 1, got 2"):
            model(ids[:, :3].repeat(2, 1), cache=cache)
        with pytest.raises(ValueError, match=r"\(1, 5\), got \(1, 2\)"):
            model(ids[:, :2], cache=cache, attention_mask=torch.ones(1, 2))
        assert cache.length == 3                                   # a refused call leaves it as it was
