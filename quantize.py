"""Fewer bits a weight: the matrices of linear layers as integers of 8 or 4 bits.

    model = AutoModelForCausalLM.from_pretrained("EleutherAI/gpt-neox-20b", weights="int4")
    python generate.py --model EleutherAI/gpt-neox-20b --weights int4 --compile "The dog"

    N  rows of a matrix, outputs of the layer (N/16 is rounded up) · K  columns, its inputs
    G  groups of a row · W  words of a group

Generating one token reads every weight once, so fewer bits a weight mean less memory and more
tokens a second.  The numbers of a group lie between its least number, `zero`, and its greatest.
This range is cut into 255 steps (int8) or 15 (int4), and each number is rounded to the nearest one:

    weight = zero + scale * integer          0 <= integer <= 255 or 15

A group is a whole row in int8 and 64 columns of a row in int4.  int4 needs the smaller groups,
because one number that is far from the others makes the steps of its whole group coarse.
Quantizing needs no data.  The README says how much accuracy is lost.

What becomes integers: every matrix of the blocks, and the output head.  If the head is tied to the
embedding, the head alone becomes integers and the embedding stays as it is, because for each token
the head reads all its rows and the embedding only one.  Biases, LayerNorms and task heads
also stay as they are.

`quantize` and `dequantize` say what the integers mean, and QuantizedLinear.definition is a linear
layer made of them.  Inside torch.compile, `few_rows` computes the same for up to 4 rows of x
without unpacking the matrix.  While compile=True reads a prompt, compiled code unpacks it.
"""

from contextvars import ContextVar
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import is_traced
from files import shown

BITS = {"int8": 8, "int4": 4}
PAIR = {"int8": torch.int16, "int4": torch.int8}        # two integers side by side
GROUP = {"int8": None, "int4": 64}      # columns that share scale and zero; None: a whole row
LANES = 16              # the words of 16 rows lie side by side: one load of AVX-512, two of AVX2
SLICE = 2**18           # about so many numbers are packed or unpacked at once, within the cache
PRODUCT = 2**23         # about so many are unpacked for one product; with few rows torch is slow
FEW = 4                 # few_rows is faster if x has at most this many rows
PARTS = {"words": torch.int32, "scale": torch.float32, "zero": torch.float32}  # in states and files
BUFFERS = "words_as_float32", "scale", "zero"          # in a layer; QuantizedLinear says why
METHOD = "words-of-gpt-neo-and-neox-from-scratch"      # `quant_method` in config.json
FILE = "quantized.safetensors"      # not model.safetensors, so that transformers refuses the folder

# The half-precision dtypes that this processor has no instructions for.  In those, torch's matrix
# product of a prompt takes 4 to 20 times as long as in float32, so the definition uses float32.
INSTRUCTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported",
                torch.float16: "_is_mkldnn_fp16_supported"}
SLOW = {dtype for dtype, name in INSTRUCTIONS.items()
        if not getattr(torch.ops.mkldnn, name, bool)()}

# ------------------------------------------------------------------------------------------------
# What the integers mean
# ------------------------------------------------------------------------------------------------

def quantize(weight, kind):
    """weight (N, K) -> words (N/16, K/8 or K/4, 16) int32, scale and zero (N/16, G, 16) float32.

    A word holds 8 integers of 4 bits, or 4 of 8, of consecutive columns, the first in the lowest
    bits.  words[b, j, r] belongs to row 16 b + r, so the words of 16 rows stand side by side.  N is
    rounded up by rows of zeros, and K by repeating the last column, which widens no range.
    Raises ValueError for numbers that are not finite, or too far apart for float32.
    """
    if not weight.is_floating_point() or weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"a matrix of floating-point numbers is needed, got {weight.dtype} "
                         f"of shape {tuple(weight.shape)}")
    (N, K), where = weight.shape, weight.device
    parts = [torch.empty(shape, dtype=dtype, device=where)
             for shape, dtype in zip(shapes(N, K, kind), PARTS.values())]
    step = rows_at_once(K, SLICE)
    # Each slice is written to its place, because joining them afterwards needs twice the memory.
    for start in range(0, N, step):
        rows = weight.detach()[start:start + step].float()
        for part, piece in zip(parts, quantize_slice(rows, kind)):
            part[start // LANES:][:len(piece)] = piece
    return parts


def shapes(N, K, kind):
    """The shapes of words, scale and zero of a matrix (N, K)."""
    blocks, per = -(-N // LANES), 32 // BITS[kind]
    G = -(-K // GROUP[kind]) if GROUP[kind] else 1
    words = G * GROUP[kind] // per if GROUP[kind] else -(-K // per)
    return (blocks, words, LANES), (blocks, G, LANES), (blocks, G, LANES)


def rows_at_once(K, numbers):
    """How many rows of K numbers are about so many numbers: a multiple of 16, and at least 64."""
    return max(4 * LANES, numbers // K // LANES * LANES)


def quantize_slice(w, kind):
    """`quantize` for a few rows w (n, K) in float32, so that the tensors in between stay small."""
    bits, levels = BITS[kind], 2 ** BITS[kind] - 1
    N, K = w.shape
    group = GROUP[kind] or K + -K % (32 // bits)
    if K % group:
        w = torch.cat([w, w[:, -1:].expand(-1, -K % group)], 1)
    if N % LANES:
        w = F.pad(w, (0, 0, 0, -N % LANES))
    w = w.view(-1, LANES, w.size(1) // group, group)                           # (b, 16, G, group)
    zero, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if not (high - zero).isfinite().all():
        raise ValueError("it holds infinities, NaN or numbers beyond float32, which integers "
                         "cannot stand for")
    scale = (high - zero) / levels
    q = (w - zero).div_(scale.masked_fill(scale == 0, 1)).round_().clamp_(0, levels)
    pairs = q.flatten(2).to(torch.int16).view(torch.int32)         # two integers, 16 bits apart
    words = (pairs | pairs >> 16 - bits).to(PAIR[kind]).view(torch.int32)
    return [x.transpose(1, 2) for x in (words, scale.squeeze(-1), zero.squeeze(-1))]


def dequantize(words, scale, zero, shape, kind, dtype=torch.float32, room=None):
    """The matrix of this shape (N, K) that the integers stand for, in dtype.

    The inverse of `quantize`; words may also be the same bits as float32.  room: memory for the
    result, of this dtype, a number for each integer of the words or more.  The result is a view of
    it, so the next call with the same room overwrites it.
    """
    (N, K), (blocks, G, _), per = shape, scale.shape, 32 // BITS[kind]
    numbers = words.numel() * per
    w = words.new_empty(numbers, dtype=dtype) if room is None else room[:numbers]
    w = w.view(G, -1, per, blocks, LANES)
    words, scale, zero = (x.view(blocks, G, -1, LANES).permute(1, 2, 0, 3)[:, :, None]
                          for x in (words, scale, zero))       # (G, W or 1, 1, N/16, 16)
    # Inside torch.compile the compiler makes one loop of `unpack` by itself.
    unpacker = unpack if is_traced() else UNPACKER.get()
    unpacker(words, scale, zero, w, kind)
    return w.flatten(3).flatten(0, 2)[:K, :N].T


def unpack(words, scale, zero, w, kind):
    """Write the numbers that the words stand for to w (G, W, 8 or 4, N/16, 16), of any float dtype.

    words (G, W, 1, N/16, 16) int32, or the same bits as float32; scale and zero (G, 1, 1, N/16, 16)
    or expanded to the shape of words.
    """
    places = torch.arange(0, 32, BITS[kind], device=words.device, dtype=torch.int32)
    q = (words.view(torch.int32) >> places[:, None, None]).bitwise_and_(2 ** BITS[kind] - 1)
    w.copy_(q.float().mul_(scale).add_(zero))


def unpack_in_tiles(words, scale, zero, w, kind):
    """`unpack`, some columns at a time, so that q stays in the processor's cache."""
    # Copied once into the order of w: otherwise each step would have to reorder its numbers.
    words, scale, zero = words.contiguous(), scale.contiguous(), zero.contiguous()
    parts = words, scale.expand_as(words), zero.expand_as(words), w
    count = -(-w.numel() // SLICE)
    dim = 0 if len(w) > 1 else 1                       # into groups, or into words of the only one
    for tile in zip(*(x.chunk(count, dim) for x in parts)):
        unpack(*tile, kind)


# The function that `dequantize` unpacks with.  While compile=True reads a prompt, fast/step.py sets
# its compiled one; a ContextVar, so that other threads keep theirs.
UNPACKER = ContextVar("UNPACKER", default=unpack_in_tiles)


# ------------------------------------------------------------------------------------------------
# One new token
# ------------------------------------------------------------------------------------------------

def few_rows(x, words, scale, zero, kind):
    """x (rows, K) times the matrix, (rows, N rounded up to 16) float32: the form to be compiled.

        y_n = sum over groups of ( sum of integer * x * scale  +  zero * sum of x )

    torch's compiler makes one loop of this: it loads the words of 16 rows at once, takes each
    integer out, converts it and multiplies.  Taking an integer out with a shift and a mask would be
    two steps.  The mask alone gives the integer times a power of two, so x is divided by that power
    beforehand, which is exact.  Only the highest place is shifted: a mask would touch its sign.
    words: int32, or the same bits as float32, which the layer passes.
    """
    words, bits = words.view(torch.int32), BITS[kind]
    per, mask = 32 // bits, 2 ** bits - 1
    x = F.pad(x.float(), (0, per * words.size(1) - x.size(1)))
    x = x.view(len(x), -1, per)                                               # (rows, G W, per)
    sums = whole(x.reshape(len(x), scale.size(1), -1).sum(-1))                 # (rows, G)
    powers = [2.0 ** (-bits * place) for place in range(per - 1)] + [1.0]
    x = whole(x * torch.tensor(powers, device=x.device))
    taken = [(words & mask << bits * place).float() for place in range(per - 1)]
    taken.append((words >> 32 - bits & mask).float())                      # each (N/16, G W, 16)
    outputs = []
    for row, total in zip(x, sums):
        y = (zero * total[:, None]).sum(1)                                         # (N/16, 16)
        for first in range(0, per, 4):     # with more places the compiler would store the products
            products = sum(taken[place] * row[:, place, None] for place in range(first, first + 4))
            products = products.view(len(words), scale.size(1), -1, LANES)     # (N/16, G, W, 16)
            # Scaled before the sum, so that it is one sum over G and W.  With a sum over W first,
            # the compiler would store the sums of all groups.
            y = y + (products * scale[:, :, None]).sum((1, 2))
        outputs.append(y.flatten())
    return torch.stack(outputs)


def whole(x):
    """x itself.  torch's compiler computes it once, before the loops that read it.

    Without this it would compute x again for every row of the matrix.
    """
    return x.as_strided(x.shape, x.stride())


# ------------------------------------------------------------------------------------------------
# The layer
# ------------------------------------------------------------------------------------------------

class QuantizedLinear(nn.Module):
    """A linear layer whose matrix is integers; its bias is a parameter in the model's dtype.

    The buffer words_as_float32 has the bits of the words under another dtype; `words` shows them as
    int32.  The reason is AVX2: there the code that torch's compiler makes copies int32 to the stack
    before it loads them, and a product takes 2 to 4 times as long (`benchmark.py ceilings`; in
    torch 2.13, Vectorized<int32_t>::loadu(ptr, count) in ATen/cpu/vec/vec256/vec256_int.h).
    """

    def __init__(self, in_features, out_features, bias, kind, dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        for name, shape in zip(BUFFERS, shapes(out_features, in_features, kind)):
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32, device=device))
        values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if values is None else nn.Parameter(values)

    @property
    def words(self):
        return self.words_as_float32.view(torch.int32)

    @words.setter
    def words(self, words):
        self.words_as_float32 = words.to(torch.int32).view(torch.float32)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """A state has words as int32, so that files do not depend on how a layer holds them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        words = destination.pop(prefix + "words_as_float32")
        destination[prefix + "words"] = words.view(torch.int32)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        """The inverse of _save_to_state_dict, also in what it finds wrong."""
        if prefix + "words" in state_dict:
            words = state_dict.pop(prefix + "words")
            if torch.is_tensor(words):
                words = words.to(torch.int32).view(torch.float32)
            state_dict[prefix + "words_as_float32"] = words
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for wrong in rest[-3:]:                            # missing, unexpected, and messages
            wrong[:] = [text.replace("words_as_float32", "words") for text in wrong]

    @classmethod
    def of(cls, linear, kind):
        """The layer that an nn.Linear becomes when its matrix is rounded."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, kind,
                    linear.weight.dtype, linear.weight.device)
        layer.bias = linear.bias
        if not linear.weight.is_meta:
            layer.words, layer.scale, layer.zero = quantize(linear.weight, kind)
        return layer

    def dequantize(self, dtype=torch.float32, rows=slice(None), room=None):
        """The matrix (N, K) that the integers stand for, or the given rows of it.

        `rows` must begin at a multiple of 16.  room: as in the function `dequantize`.
        """
        start, stop, _ = rows.indices(self.out_features)
        blocks = slice(start // LANES, -(-stop // LANES))
        return dequantize(self.words_as_float32[blocks], self.scale[blocks], self.zero[blocks],
                          (stop - start, self.in_features), self.kind, dtype, room)

    def forward(self, x):
        """x (..., K) -> (..., N), in x's dtype: F.linear with the dequantized matrix."""
        few = is_traced() and x.numel() <= FEW * x.size(-1)
        if few and not torch.is_autocast_enabled(x.device.type):       # not known for meta
            parts = self.words_as_float32, self.scale, self.zero
            y = few_rows(x.reshape(-1, x.size(-1)), *parts, self.kind)
            y = y[:, :self.out_features].to(x.dtype).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return self.definition(x)

    def definition(self, x):
        """x (..., K) -> (..., N), by unpacking and multiplying some rows of the matrix at a time.

        Without gradients all slices are unpacked into the same memory, because the system takes as
        long to give new memory as it takes to unpack into it.  With gradients each slice has its
        own, because the backward pass reads all of them.
        """
        traced = is_traced()
        step = self.out_features if traced else rows_at_once(self.in_features, PRODUCT)
        dtype = torch.float32 if x.device.type == "cpu" and x.dtype in SLOW else x.dtype
        room = None
        if not traced and not torch.is_grad_enabled():
            numbers = self.words[:step // LANES].numel() * 32 // BITS[self.kind]
            room = self.words.new_empty(numbers, dtype=dtype)
        outputs = []
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            bias = None if self.bias is None else self.bias[rows].to(dtype)
            outputs.append(F.linear(x.to(dtype), self.dequantize(dtype, rows, room), bias))
        return torch.cat(outputs, -1).to(x.dtype)

    def _apply(self, function, recurse=True):
        """What .half() and .to(dtype) call: the buffers change device, but never dtype."""
        kept = {name: getattr(self, name) for name in BUFFERS}
        super()._apply(function, recurse)
        if self.scale.dtype != torch.float32:
            for name, buffer in kept.items():
                setattr(self, name, buffer.to(self.scale.device))
        return self

    def extra_repr(self):
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}, weights={self.kind}")


# ------------------------------------------------------------------------------------------------
# A model
# ------------------------------------------------------------------------------------------------

def replace_layers(model, kind):
    """Replace every linear layer of the blocks, and the output head, by a QuantizedLinear.

    Returns {name: new layer}.
    """
    layers = {name: QuantizedLinear.of(layer, kind) for name, layer in model.named_modules()
              if type(layer) is nn.Linear and (".blocks." in f".{name}" or name == "lm_head")}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def kind_of(model):
    """ "int8" or "int4" for a quantized model, else None."""
    layers = (layer for layer in model.modules() if isinstance(layer, QuantizedLinear))
    return next((layer.kind for layer in layers), None)


def description(kind):
    """What config.json says of the weights of a quantized model."""
    return {"quant_method": METHOD, "weights": kind, "group": GROUP[kind], "file": FILE}


def what_to_load(raw, asked):
    """For from_pretrained(weights=asked): (kind, stored, raw without quantization_config).

    raw is config.json as a dict; stored is True if the files hold the integers themselves.
    Raises ValueError for a kind that does not exist and for one that the files do not have.
    """
    if asked not in (None, *BITS):
        raise ValueError(f"weights must be {' or '.join(BITS)}, or None for those of the "
                         f"checkpoint, got {shown(asked)}")
    stored = raw.get("quantization_config")
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        return asked, False, raw                           # configs.py refuses any other method
    kind = stored.get("weights")
    if kind not in BITS or stored != description(kind):
        raise ValueError(f"config field 'quantization_config' is {shown(stored)}; supported is "
                         f"what save_pretrained writes, such as {description('int4')}")
    if asked not in (None, kind):
        raise ValueError(f"weights={asked!r}, but this checkpoint was saved as {kind}: take the "
                         "one that it was made from")
    return kind, True, {key: value for key, value in raw.items() if key != "quantization_config"}


def check_folder(folder, names):
    """Raise ValueError if the folder already has other weights.

    A quantized model is not saved beside them, because transformers would read those instead.
    """
    if found := [name for name in names if (Path(folder) / name).exists()]:
        raise ValueError(f"{folder} has {found[0]}, which other programs would read in place of "
                         "the quantized weights: save into another folder")
