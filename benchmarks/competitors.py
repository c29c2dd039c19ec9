"""The same interface for all that are compared: prefill, fill a cache, decode n tokens greedily.

All get the same weights, threads and dtype.  Each runs as its users run it: transformers with its
own default attention and cache; llama.cpp (benchmarks/llama_cpp.py) with the same numbers in a GGUF
file.
"""

import time

import torch

from attention import KVCache
from fast.step import Step
from load_weights import AutoModelForCausalLM


class Ours:
    def __init__(self, folder, dtype, compile=False, weights=None):
        self.model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype,
                                                          weights=weights)
        self.compile = compile

    @torch.no_grad()
    def prefill(self, ids, keep=1):
        self.model(ids, logits_to_keep=keep)

    @torch.no_grad()
    def fill_cache(self, ids, room):
        """Prefill ids (B, T) into a cache with room for more."""
        self.cache = KVCache(self.model.config, ids.size(0), ids.size(1) + room, self.model.dtype)
        self.mask = torch.ones(ids.size(0), ids.size(1) + room, dtype=torch.long)
        out = self.model(ids, cache=self.cache, logits_to_keep=1)
        self.new = out.logits[:, -1].argmax(-1, keepdim=True)
        self.context, self.step = ids.size(1), None
        if self.compile:
            self.step = Step(self.model, self.cache)

    @torch.no_grad()
    def decode(self, n):
        """Seconds of each of n tokens.

        Afterwards the cache has its old length again, so that the next turn does the same work.  (A
        local layer's oldest keys are then overwritten, which costs the same to read.)
        """
        times, new = [], self.new
        for i in range(n):
            start = time.perf_counter()
            mask = self.mask[:, :self.context + i + 1]
            position_ids = torch.full_like(new, self.context + i)
            if self.step is None:
                logits = self.model(new, mask, position_ids, cache=self.cache).logits[:, -1]
            else:
                logits = self.step(new, mask, position_ids)
            new = logits.argmax(-1, keepdim=True)
            times.append(time.perf_counter() - start)
        self.cache.length = self.context
        return times


class Transformers:
    def __init__(self, folder, dtype):
        import transformers
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.no_grad()
    def prefill(self, ids, keep=1):
        self.model(ids, logits_to_keep=keep, use_cache=False)

    @torch.no_grad()
    def fill_cache(self, ids, room):
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        self.cache, self.context = out.past_key_values, ids.size(1)
        self.new = out.logits[:, -1].argmax(-1, keepdim=True)

    @torch.no_grad()
    def decode(self, n):
        times, new = [], self.new
        for _ in range(n):
            start = time.perf_counter()
            out = self.model(new, past_key_values=self.cache, use_cache=True)
            new = out.logits[:, -1].argmax(-1, keepdim=True)
            times.append(time.perf_counter() - start)
        self.cache.crop(-n)
        return times


def competitor(name, folder, dtype):
    """One of: ours, compiled, transformers, llama.cpp."""
    if name == "llama.cpp":
        from benchmarks.llama_cpp import LlamaCpp
        return LlamaCpp(folder, dtype)
    if name == "transformers":
        return Transformers(folder, dtype)
    return Ours(folder, dtype, compile=name == "compiled")
