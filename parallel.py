"""One model shared among several processes: tensor parallelism.

    torchrun --nproc-per-node 2 generate.py --model EleutherAI/gpt-neox-20b "Hello"

    model = GPTNeoXForCausalLM.from_pretrained(name, tp_plan="auto")    # reads its share alone
    model = parallelize(GPTNeoXForCausalLM.from_pretrained(name))       # cuts a whole model

    B batch · T new tokens · C width · H heads · D width of a head · V vocabulary · N processes

Every nonlinear step has a matrix before it and a matrix after it: attention has q, k, v and
out_proj, the activation has up_proj and down_proj.  The steps themselves compute each head, or each
number, by itself.  So each process takes H / N heads and an N-th of the MLP's inner width:

    first matrix    cut by rows:     x (B, T, C) whole -> this process's heads or inner numbers
    second matrix   cut by columns:  those -> this process's part of a sum, (B, T, C)

and one all-reduce adds the parts of all processes.  LayerNorms, embeddings and the residual stream
are whole in every process.  (Shoeybi et al. 2019, Megatron-LM, on which
EleutherAI/gpt-neox is built.)

Why GPT-NeoX's q, k and v are interleaved head by head: a process's heads are then consecutive rows
of the one matrix, so that cutting it by rows cuts it by heads.  Of [all q, all k, all v] the first
half would be q and half of k.

GPT-Neo adds attention to the stream before the MLP reads it, so it needs two all-reduces a layer.
In GPT-NeoX both read the same x: what they return is added first and reduced once.

This is for generating and evaluating with a model that does not fit into one process's memory.  The
weights get no gradients.  Training on several processes is train.py's, with a whole model in each.
"""

import types

import torch
import torch.distributed as dist

ROWS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "up_proj", "lm_head")
COLUMNS = ("out_proj", "down_proj")


def parallelize(model):
    """Cut a model to this process's share, in place, and let the shares add up -> the model.

    The processes must be connected (torch.distributed.init_process_group), and each must call the
    model with the same ids at the same time; ids that differ raise RuntimeError in all of them.
    Logits (B, T, V) and hidden states are whole in every process.  Raises RuntimeError where no
    processes are connected, ValueError for a model that cannot be cut into so many parts.
    """
    check_connected()
    if model.shares > 1:
        raise ValueError(f"this model is already shared among {model.shares} processes")
    check_parts(model.config)
    if any(hasattr(module, "words") for module in model.modules()):
        raise ValueError("a quantized model cannot be cut: load it by from_pretrained(weights=..., "
                         "tp_plan='auto'), where each process quantizes its own share")
    cut(model)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    add_up(model)
    return model


def cut(model):
    """Let a model have this process's share of every weight, also on the meta device."""
    for name, old in list(model.named_parameters()):
        layer, attribute = name.rpartition(".")[::2]
        layer = model.get_submodule(layer)
        kept = piece(name, old.detach(), model.config)
        setattr(layer, attribute, torch.nn.Parameter(kept, requires_grad=False))
        if isinstance(layer, torch.nn.Linear) and attribute == "weight":
            layer.out_features, layer.in_features = layer.weight.shape
    for module in model.modules():
        if hasattr(module, "shares"):                      # this model and the one inside it
            module.shares = dist.get_world_size()


def check_connected():
    """Raise RuntimeError if no processes are connected."""
    if not dist.is_initialized():
        raise RuntimeError("a model is shared among processes, and none are connected: start "
                           "Python by torchrun and call torch.distributed.init_process_group")


def check_parts(config):
    """Raise ValueError where heads, inner width or vocabulary do not divide by the processes."""
    N = dist.get_world_size()
    sizes = {"attention heads": config.num_attention_heads,
             "numbers of the MLP's inner width": config.intermediate_size}
    if not config.tie_word_embeddings:
        sizes["rows of the output head (the vocabulary)"] = config.vocab_size
    for what, size in sizes.items():
        if size % N:
            raise ValueError(f"a model of {size} {what} cannot be shared among {N} processes: "
                             f"{size} must be a multiple of their number")


def piece(name, tensor, config):
    """The part of one weight that this process keeps.  name: our name of the weight."""
    layer, kind = name.split(".")[-2:]
    N, i = dist.get_world_size(), dist.get_rank()
    if layer in ROWS and not (layer == "lm_head" and config.tie_word_embeddings):
        return tensor.chunk(N)[i].clone()                 # a bias too has one number a row
    if layer in COLUMNS and kind == "weight":
        return tensor.chunk(N, dim=1)[i].clone()
    if layer in COLUMNS and i > 0:
        return torch.zeros_like(tensor)                   # the sum over processes has the bias once
    return tensor


# ------------------------------------------------------------------------------------------------
# What the processes tell each other
# ------------------------------------------------------------------------------------------------

def add_up(model):
    """Change the model's forward passes so that they add up what the processes have."""
    base = model.base_model
    base.register_forward_pre_hook(check_call, with_kwargs=True)
    for block in base.blocks:
        if getattr(block, "parallel", False):              # GPT-NeoX, except RedPajama's form
            block.forward = types.MethodType(one_sum, block)
        else:
            for layer in (block.attn.out_proj, block.mlp.down_proj):
                layer.register_forward_hook(lambda layer, inputs, y: summed(y))
    head = model.get_output_embeddings()
    if head is not None and not model.config.tie_word_embeddings:
        head.register_forward_hook(lambda layer, inputs, y: side_by_side(y))


def one_sum(block, x, **how):
    """forward of a Block of neox.py with parallel residuals: one all-reduce for both."""
    a, weights = block.attn(block.ln_1(x), **how)
    return summed(block.mlp(block.ln_2(x)) + a) + x, weights


def summed(y):
    """The sum of the processes' tensors (B, T, C), with the same bits in every process."""
    y = y.contiguous()
    dist.all_reduce(y)
    return y


def side_by_side(y):
    """The processes' logits (B, T, V / N), joined -> (B, T, V)."""
    parts = [torch.empty_like(y) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, y.contiguous())
    return torch.cat(parts, dim=-1)


def check_call(module, inputs, named):
    """Before the model runs: have all processes been given the same ids?"""
    if named.get("output_attentions") or any(value is True for value in inputs[5:6]):
        raise ValueError("output_attentions is not supported for a model that is shared among "
                         "processes: each has only some of the heads")
    ids = inputs[0] if inputs else named.get("input_ids")
    if ids is None:
        return
    weights = torch.arange(1, ids.numel() + 1, device=ids.device)
    mine = torch.tensor([*ids.shape, (ids.reshape(-1) * weights).sum()], device=ids.device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    if any(not torch.equal(part, mine) for part in parts):
        raise RuntimeError("the processes that share this model were given different ids: give "
                           "each the same prompt, the same settings and the same seed")
