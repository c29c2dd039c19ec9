"""llama.cpp beside us, for GPT-NeoX shapes (it has no GPT-Neo).  Optional, for the benchmark alone:

    pip install llama-cpp-python==0.3.36 gguf==0.19.0       (builds C++, a quarter of an hour)

    pip install xllamacpp==2026.10.11549 gguf==0.19.0       (prebuilt; for benchmark.py bits)

The weights go into a GGUF file under the names and in the order that llama.cpp reads (gptneox: QKV
of all heads first Q, then K, then V), with a stand-in vocabulary: token ids are all that a
benchmark needs.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.common import in_turns, ratio
from benchmarks.competitors import Ours
from benchmarks.shapes import write

LAYER = {"input_layernorm": "attn_norm", "attention.query_key_value": "attn_qkv",
         "attention.dense": "attn_output",
         "post_attention_layernorm": "ffn_norm", "mlp.dense_h_to_4h": "ffn_up",
         "mlp.dense_4h_to_h": "ffn_down"}


def thirds(x, heads):
    """Rows [q k v] of head 0, [q k v] of head 1, … -> all q, all k, all v."""
    return x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def add_settings(writer, config):
    """What llama.cpp must know of config.json, and a stand-in vocabulary."""
    import gguf
    heads, width, V = config["num_attention_heads"], config["hidden_size"], config["vocab_size"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(int(config["rotary_pct"] * (width // heads)))
    writer.add_head_count(heads)
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("olmo")
    writer.add_token_list([f"t{i}" for i in range(V)])
    writer.add_token_types([gguf.TokenType.NORMAL] * V)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def write_gguf(folder, file, dtype):
    """A GGUF file of the checkpoint's weights: matrices in dtype, norms and biases in float32.

    dtype: torch.float32, torch.bfloat16, or "Q8_0" or "Q4_0", blocks of 32 numbers with
    a scale, for which the package gguf has the rounding.
    """
    import gguf
    config = json.loads(Path(folder, "config.json").read_text())
    writer = gguf.GGUFWriter(file, "gptneox")
    add_settings(writer, config)
    with safe_open(Path(folder, "model.safetensors"), "pt") as weights:
        for name in weights.keys():
            x, (stem, tail) = weights.get_tensor(name).float(), name.rsplit(".", 1)
            if stem.startswith("gpt_neox.layers."):
                layer, part = stem.removeprefix("gpt_neox.layers.").split(".", 1)
                if part not in LAYER:
                    continue                               # masks and tables that old files carry
                if part == "attention.query_key_value":
                    x = thirds(x, config["num_attention_heads"])
                target = f"blk.{layer}.{LAYER[part]}.{tail}"
            else:
                target = {"gpt_neox.embed_in": "token_embd", "embed_out": "output",
                          "gpt_neox.final_layer_norm": "output_norm"}[stem] + f".{tail}"
            if x.dim() == 2 and dtype == torch.bfloat16:
                writer.add_tensor(target, x.bfloat16().view(torch.uint8).numpy(),
                                  raw_dtype=gguf.GGMLQuantizationType.BF16)
            elif x.dim() == 2 and isinstance(dtype, str):
                kind = gguf.GGMLQuantizationType[dtype]
                writer.add_tensor(target, gguf.quants.quantize(x.numpy(), kind), raw_dtype=kind)
            else:
                writer.add_tensor(target, x.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """The interface of competitors.py; one row."""

    def __init__(self, folder, dtype):
        import llama_cpp
        file = f"{folder}/{str(dtype).removeprefix('torch.')}.gguf"
        write_gguf(folder, file, dtype)
        threads = torch.get_num_threads()
        self.llama = llama_cpp.Llama(file, n_ctx=2100, n_batch=2048, n_ubatch=512,
                                     n_threads=threads,
                                     n_threads_batch=threads, logits_all=False, verbose=False)

    def prefill(self, ids, keep=1):
        self.llama.reset()
        self.llama.eval(ids[0].tolist())

    def fill_cache(self, ids, room):
        self.prefill(ids)
        self.context = ids.size(1)

    def decode(self, n):
        times = []
        for i in range(n):
            start = time.perf_counter()
            self.llama.eval([7 + i])
            times.append(time.perf_counter() - start)
        self.llama.n_tokens = self.context
        self.llama._ctx.kv_cache_seq_rm(-1, self.context, -1)
        return times


class LlamaServer:
    """llama.cpp with weights of the kind "Q8_0" or "Q4_0", by its server in this process.

    Its flash attention is turned off.  Left to itself it is on, and then a token at context 1900
    takes two and a half times as long on a processor.
    """

    def __init__(self, folder, kind):
        import xllamacpp
        write_gguf(folder, f"{folder}/{kind}.gguf", kind)
        how = xllamacpp.CommonParams()
        how.model.path, how.verbosity, how.warmup = f"{folder}/{kind}.gguf", 0, False
        how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        how.n_ctx, how.n_parallel, how.n_batch, how.n_ubatch = 2100, 1, 2048, 512
        how.cpuparams.n_threads = how.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server = xllamacpp.Server(how)

    def fill_cache(self, ids, room):
        self.ids = ids[0].tolist()

    def decode(self, n):
        """Seconds of a token, as the server tells them, without the prompt."""
        answer = self.server.handle_completions({
            "prompt": self.ids, "n_predict": n, "temperature": 0, "ignore_eos": True,
            "cache_prompt": True})
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        return [answer["timings"]["predicted_per_token_ms"] / 1000]


PAIRS = {"int8": "Q8_0", "int4": "Q4_0"}


def bits(rounds, contexts, new_tokens):
    """pythia-160m's shape, compiled, with int8 and int4 beside llama.cpp's q8_0 and q4_0."""
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        write("pythia-160m", folder)
        players = {kind: Ours(folder, torch.float32, compile=True, weights=kind) for kind in PAIRS}
        players |= {kind: LlamaServer(folder, kind) for kind in PAIRS.values()}
        for context in contexts:
            ids = torch.randint(1, 50000, (1, context), generator=torch.Generator().manual_seed(0))
            for player in players.values():
                player.fill_cache(ids, new_tokens)
            result[context] = in_turns({name: lambda p=p: statistics.median(p.decode(new_tokens))
                                        for name, p in players.items()}, rounds)
            for mine, theirs in PAIRS.items():
                speed = {name: 1 / statistics.median(result[context][name]) for name in players}
                print(f"context {context}: {mine} {speed[mine]:.1f} tokens/s, llama.cpp's {theirs} "
                      f"{speed[theirs]:.1f}, ratio {ratio(result[context], mine, theirs):.2f}",
                      flush=True)
    return result
