"""The fast forms in fast/ give what their definitions give: all derivatives, under all transforms.

The sizes from which slices are taken are patched down, so that tiny tensors take them.
"""

import copy
import dataclasses
from threading import Event, Thread

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import torch.nn.utils.prune
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import base
import neo
import neox
from attention import KVCache, attention
from fast import linear, slices, step
from fast.linear import few_rows, weight_first
from helpers import ours, random_case, reference, relative, widen

TARGETS = torch.tensor([1, -100, 3, 2, 0, 1, 2])
X, V, W = torch.randn(3, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FUNCTIONS = {"gelu_new": base.gelu_new, "log_probability": lambda x: base.log_probability(x, TARGETS)}
SIZES = dict(vocab_size=31, hidden_size=16, intermediate_size=24, max_position_embeddings=40, pad_token_id=0)
CONFIGS = {"gpt_neo": neo.GPTNeoConfig(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
                                       window_size=3, **SIZES),
           "gpt_neox": neox.GPTNeoXConfig(num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu_new",
                                          **SIZES)}
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")     # vmap of sdpa: torch loops
CAUSAL = {"gpt_neo": neo.GPTNeoForCausalLM, "gpt_neox": neox.GPTNeoXForCausalLM}
IDS = torch.randint(1, 31, (3, 9), generator=torch.Generator().manual_seed(0))


def square(function):
    return lambda x: function(x).square().sum()


def first(function):
    x = X.clone().requires_grad_()
    return torch.autograd.grad(square(function)(x), x)[0]


def hessian_vector(function, times=1):
    """By create_graph=True, once or more often."""
    x = X.clone().requires_grad_()
    value = square(function)(x)
    for _ in range(times):
        value = (torch.autograd.grad(value, x, create_graph=True)[0] * V).sum()
    return torch.autograd.grad(value, x)[0]


def hooked(function):
    """A hook on the gradient acts once, in the gradient and in the gradient's own."""
    leaf = X.clone().requires_grad_()
    x = leaf * 1
    x.register_hook(lambda g: 2 * g)
    found, = torch.autograd.grad(square(function)(x), leaf, create_graph=True)
    return torch.stack([found, torch.autograd.grad((found * V).sum(), leaf)[0]]).detach()


def batched(function):
    x = X.clone().requires_grad_()
    y = function(x)
    several = torch.stack([torch.ones_like(y), y.detach(), y.detach() - 1])
    return torch.autograd.grad(y, x, several, is_grads_batched=True)[0]


def forward_mode(function):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(X, V))).tangent


def checkpointed(function, reentrant):
    x = X.clone().requires_grad_()
    checkpoint(square(function), x, use_reentrant=reentrant).backward()
    return x.grad


def compiled(function):
    torch.compiler.reset()
    return first(torch.compile(function, fullgraph=True, backend="aot_eager"))


WAYS = {
    "values": lambda f: f(X), "first": first, "second": hessian_vector, "third": lambda f: hessian_vector(f, 2),
    "hook": hooked, "batched": batched, "forward mode": forward_mode, "compiled": compiled,
    "checkpoint": lambda f: checkpointed(f, False), "reentrant": lambda f: checkpointed(f, True),
    "grad": lambda f: grad(square(f))(X), "grad of grad": lambda f: grad(lambda x: (grad(square(f))(x) * V).sum())(X),
    "jvp": lambda f: jvp(square(f), (X,), (V,))[1], "jvp of grad": lambda f: jvp(grad(square(f)), (X,), (V,))[1],
    "vjp": lambda f: vjp(square(f), X)[1](torch.tensor(2.0, dtype=X.dtype))[0], "hessian": lambda f: hessian(square(f))(X),
    "jacrev": lambda f: jacrev(f)(X), "jacfwd": lambda f: jacfwd(f)(X), "vmap": lambda f: vmap(f)(torch.stack([X, W])),
    "vmap of grad": lambda f: vmap(grad(square(f)))(torch.stack([X, W])),
    "functionalize": lambda f: torch.func.functionalize(f)(X), "functionalized gradient": lambda f: first(torch.func.functionalize(f)),
    "functionalized grad": lambda f: torch.func.functionalize(grad(square(f)))(X), "functionalize within grad": lambda f: grad(torch.func.functionalize(square(f)))(X),
    "functional": lambda f: torch.autograd.functional.vhp(square(f), X, V)[1],
}


@pytest.mark.filterwarnings("ignore:.*script_method")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_slices_are_the_function_in_every_derivative(name, way, monkeypatch):
    expected = WAYS[way](FUNCTIONS[name])
    taken, apply = [], slices.InSlices.apply
    monkeypatch.setattr(slices, "LARGE", 8)
    monkeypatch.setattr(slices.InSlices, "apply", lambda *args: (taken.append(args[1]), apply(*args))[1])
    found = WAYS[way](FUNCTIONS[name])
    assert set(taken) == (set() if way.startswith(("compiled", "functionalize")) else {1})         # slices of one row
    assert expected.abs().max() > 0 and torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["values", "first", "second", "reentrant", "checkpoint", "grad"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_slices_under_autocast(name, way, dtype, monkeypatch):
    with torch.autocast("cpu", dtype):
        expected = WAYS[way](FUNCTIONS[name])
        monkeypatch.setattr(slices, "LARGE", 8)
        found = WAYS[way](FUNCTIONS[name])
    assert found.dtype == expected.dtype and torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "compiled"])
def test_fused_attention_is_the_definition_in_every_derivative(way, padded):
    """torch's kernel has neither second derivatives nor forward mode; the default attention has both."""
    mask = torch.tensor([[True, True, False, True, True], [True] * 5]) if padded else None

    def heads(backend):
        def function(x):                                   # (7, 5) -> (7, 5): queries, keys and values of it
            q, k, v = (torch.stack([f(x).T, f(2 * x).T]).view(2, 5, 1, 7).transpose(1, 2) for f in (torch.sin, torch.cos, torch.tanh))
            return attention(q, k, v, scale=0.7, window=3, backend=backend, key_mask=mask).sum(0)[0].T
        return function
    expected, found = WAYS[way](heads("naive")), WAYS[way](heads("sdpa"))
    assert expected.abs().max() > 0 and torch.allclose(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("family", CAUSAL)
def test_second_derivatives_under_autocast(family):
    """In the forward pass alone, as is usual; and the gradient of a hook on attention's output counts once."""
    found = []
    for backend in ("naive", "auto"):
        model = model_of(family, torch.float32, attn_implementation=backend)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(IDS, labels=IDS).loss
        weight = model.transformer.blocks[0].attn.out_proj.weight
        slope, = torch.autograd.grad(loss, weight, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), model.transformer.embed.weight)[0])
    assert found[0].abs().max() > 0 and relative(found[1], found[0]) < 0.1        # 0.04 measured: rounding


# --- whole models -----------------------------------------------------------------------------------

def model_of(family, dtype=torch.float64, **how):
    return widen(CAUSAL[family](CONFIGS[family], **how), 0).eval().to(dtype)


def per_sample(model, parameters):
    """vmap(grad): each text's own gradient."""
    def loss(parameters, ids):
        return functional_call(model, parameters, (ids[None],), {"labels": ids[None]}).loss
    return vmap(grad(loss), in_dims=(None, 0))(parameters, IDS)


def curvature(model, parameters):
    """A Hessian-vector product, forward over reverse."""
    def loss(parameters):
        return functional_call(model, parameters, (IDS,), {"labels": IDS}).loss
    return jvp(grad(loss), (parameters,), ({name: p.cos() for name, p in parameters.items()},))[1]


def double_backward(model, parameters):
    leaves = list(model.parameters())
    grads = torch.autograd.grad(model(IDS, labels=IDS).loss, leaves, create_graph=True)
    found = torch.autograd.grad(sum((g * p.detach().cos()).sum() for g, p in zip(grads, leaves)), leaves)
    return dict(zip(dict(model.named_parameters()), found))


@pytest.mark.parametrize("backend", ["naive", "auto"])
@pytest.mark.parametrize("way", [per_sample, curvature, double_backward], ids=lambda w: w.__name__)
@pytest.mark.parametrize("family", CAUSAL)
def test_derivatives_of_a_model_in_slices(family, way, backend, monkeypatch):
    model = model_of(family, attn_implementation="naive")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = way(model, parameters)
    monkeypatch.setattr(slices, "LARGE", 8)
    model.set_attn_implementation(backend)
    found = way(model, parameters)
    for name, value in expected.items():
        assert value.abs().max() > 0 and relative(found[name], value) < 1e-10, name


@pytest.mark.parametrize("family", CAUSAL)
def test_each_text_has_its_own_gradient(family):
    """vmap(grad) is a loop over the texts; their ids and masks are then values that nobody can look at."""
    model = model_of(family)
    found = per_sample(model, {name: p.detach() for name, p in model.named_parameters()})
    for row, ids in enumerate(IDS):
        model.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        for name, p in model.named_parameters():
            assert relative(found[name][row], p.grad) < 1e-10, name


@pytest.mark.parametrize("family", CAUSAL)
def test_a_model_in_slices_on_the_meta_device(family, monkeypatch):
    """Shapes without numbers, and without autocast: as people count a large model's memory."""
    monkeypatch.setattr(slices, "LARGE", 8)
    out = model_of(family).to("meta")(IDS.to("meta"), labels=IDS.to("meta"))
    out.loss.backward()
    assert out.logits.shape == (3, 9, 31) and out.loss.shape == ()


@pytest.mark.parametrize("family", CAUSAL)
def test_a_model_in_slices_is_exported_and_compiled(family, monkeypatch):
    monkeypatch.setattr(slices, "LARGE", 8)
    torch.compiler.reset()
    model = model_of(family)
    with torch.no_grad():
        expected = model(IDS).logits
        exported = torch.export.export(model, (IDS,)).module()(IDS).logits
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS).logits
    assert relative(exported, expected) < 1e-12 and relative(whole, expected) < 1e-12


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", CAUSAL)
def test_one_exported_graph_serves_every_length(family, padded):
    """Shorter than the window, and longer than the blocks of sdpa, which a fixed graph could not count."""
    torch.compiler.reset()
    model = CAUSAL[family](dataclasses.replace(CONFIGS[family], max_position_embeddings=150)).eval().double()
    axes = {0: torch.export.Dim("B", min=1, max=8), 1: torch.export.Dim("T", min=2, max=150)}

    def inputs(T, B=3):
        ids = torch.randint(1, 31, (B, T), generator=torch.Generator().manual_seed(T))
        mask = torch.ones_like(ids)
        mask[0, :T // 3] = 0
        return dict(input_ids=ids, attention_mask=mask) if padded else dict(input_ids=ids)

    program = torch.export.export(model, (), inputs(9), dynamic_shapes=dict.fromkeys(inputs(9), axes)).module()
    for T in (2, 3, 64, 65, 150):
        real = inputs(T).get("attention_mask", torch.ones(3, T)).bool()
        assert relative(program(**inputs(T)).logits[real], model(**inputs(T)).logits[real]) < 1e-12


@pytest.mark.parametrize("window", [None, 3])
def test_a_compiled_function_of_torch_func(window):
    """grad of what wants a gradient itself is differentiated twice, which a fused kernel cannot be."""
    torch.compiler.reset()
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q.requires_grad_()

    def gradient(q):
        return grad(lambda q: attention(q, k, v, scale=0.5, window=window, backend="sdpa").square().sum())(q)

    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)(q)
    assert relative(compiled, gradient(q)) < 1e-12
    second = [torch.autograd.grad((g * k).sum(), q)[0] for g in (compiled, gradient(q))]
    assert relative(*second) < 1e-12


# --- one new token ----------------------------------------------------------------------------------

@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_are_a_linear_layer(rows, bias):
    """The other order of factors errs no more than torch's own; never where a gradient is wanted."""
    torch.manual_seed(rows)
    layer, x = torch.nn.Linear(768, 301, bias=bias), torch.randn(rows, 1, 768)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    plain = layer(x)
    with weight_first(layer):
        assert torch.equal(layer(x), plain)                # gradients are wanted
        with torch.no_grad():
            found = layer(x)
            assert torch.equal(found, few_rows(x[:, 0], layer.weight, layer.bias)[:, None])
    assert found.is_contiguous() and found.shape == plain.shape
    assert (found - exact).norm() <= 1.5 * (plain - exact).norm()


def layers_with_a_forward(module):
    return [name for name, layer in module.named_modules() if "forward" in vars(layer)]


@torch.no_grad()
def test_only_a_plain_linear_layer_adds_in_another_order():
    """And a layer is as before when the block is done, also after an error."""
    kinds = {"plain": lambda x: x, "subclass": louder, "forward of its own": own_forward, "wrapper": Lora,
             "parametrized": lambda x: torch.nn.utils.parametrize.register_parametrization(x, "weight", Doubled())}
    part = torch.nn.ModuleDict({name: make(torch.nn.Linear(768, 301)) for name, make in kinds.items()})
    x, before = torch.randn(1, 1, 768), layers_with_a_forward(part)
    with pytest.raises(RuntimeError, match="shapes"), weight_first(part):
        inside = {name: layer(x) for name, layer in part.items()}
        part["plain"](x[..., :5])
    assert layers_with_a_forward(part) == before == ["forward of its own"] and not linear.INSIDE
    plain = part["plain"]
    assert torch.equal(inside["plain"], few_rows(x[0], plain.weight, plain.bias)[None])
    for name in ("subclass", "forward of its own", "parametrized"):
        assert torch.equal(inside[name], part[name](x)), name
    assert relative(inside["wrapper"], part["wrapper"](x)) < 1e-6


@torch.no_grad()
def test_a_replaced_linear_of_torch_is_called(monkeypatch):
    layer, x = torch.nn.Linear(8, 4), torch.randn(1, 1, 8)
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x[..., :4] + 1)
    with weight_first(layer):
        assert torch.equal(layer(x), x[..., :4] + 1)


@torch.no_grad()
def test_two_threads_in_one_model():
    """The one that leaves first takes nothing from the other; a copy made inside is whole."""
    layer, x, entered, go_on = torch.nn.Linear(768, 301), torch.randn(1, 1, 768), Event(), Event()
    found = []

    @torch.no_grad()
    def other():
        with weight_first(layer):
            entered.set()
            go_on.wait()
            found.append(layer(x))

    thread = Thread(target=other, daemon=True)
    with weight_first(layer):
        thread.start()
        entered.wait()
        copied = copy.deepcopy(layer)
    assert layers_with_a_forward(layer)
    go_on.set()
    thread.join()
    assert torch.equal(found[0], few_rows(x[0], layer.weight, layer.bias)[None]) and not layers_with_a_forward(layer)
    assert torch.equal(copied(x), F.linear(x, layer.weight, layer.bias))       # and in the usual order
    copied.weight.zero_()
    assert torch.equal(copied(x)[0, 0], layer.bias) and not torch.equal(layer(x)[0, 0], layer.bias)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_reference_s_arithmetic_is_a_switch(family):
    """By default on with naive attention alone; it changes no attention, and attention does not change it."""
    model, taken = model_of(family, torch.float32, attn_implementation="naive"), []

    def uses_few_rows():
        taken.clear()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "few_rows", lambda *args: (taken.append(1), few_rows(*args))[1])
            model(IDS[:, :1])
        return bool(taken)

    assert model.exact and not uses_few_rows()
    model.set_attn_implementation("sdpa")
    assert not model.exact and uses_few_rows()
    model.set_reference_arithmetic(True)
    assert model.exact and not uses_few_rows() and model.attn_implementation == "sdpa"
    model.set_reference_arithmetic(False)
    model.set_attn_implementation("naive")
    assert not model.exact and uses_few_rows()


class Lora(torch.nn.Module):
    """A wrapper that has the weights of what it wraps, and adds something."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Louder(torch.nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def replaced(model, path, make):
    parent, name = path.rsplit(".", 1)
    parent = model.get_submodule(parent)
    setattr(parent, name, make(getattr(parent, name)))


def louder(layer):
    other = Louder(layer.in_features, layer.out_features, bias=layer.bias is not None)
    other.load_state_dict(layer.state_dict())
    return other


def own_forward(layer):
    layer.forward = lambda x: 2 * torch.nn.Linear.forward(layer, x)
    return layer


BLOCK = "transformer.blocks.1"
UP, NORM, MLP = f"{BLOCK}.mlp.up_proj", f"{BLOCK}.ln_2", f"{BLOCK}.mlp"
CHANGES = {
    "hook": lambda m: m.get_submodule(UP).register_forward_hook(lambda module, args, out: 3 * out),
    "pre-hook": lambda m: m.get_submodule(UP).register_forward_pre_hook(lambda module, args: (3 * args[0],)),
    "hook on a norm": lambda m: m.get_submodule(NORM).register_forward_hook(lambda module, args, out: 3 * out),
    "hook on a block": lambda m: m.get_submodule(BLOCK).register_forward_hook(lambda b, args, out: (out[0].roll(1, -1), out[1])),
    "hook on the embedding": lambda m: m.transformer.embed.register_forward_hook(lambda b, args, out: out.roll(1, -1)),
    "hook on the model": lambda m: m.transformer.register_forward_hook(
        lambda b, args, out: setattr(out, "last_hidden_state", out.last_hidden_state.roll(1, -1))),
    "hook on the head": lambda m: m.lm_head.register_forward_hook(lambda module, args, out: out.roll(5, -1)),
    "wrapper": lambda m: replaced(m, UP, Lora),
    "wrapped head": lambda m: setattr(m, "lm_head", Lora(m.lm_head)),
    "subclass": lambda m: replaced(m, UP, louder),
    "forward of its own": lambda m: replaced(m, UP, own_forward),
    "head": lambda m: setattr(m, "lm_head", torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(),
                                                                torch.nn.Linear(16, 31))),
    "parametrization": lambda m: torch.nn.utils.parametrize.register_parametrization(m.get_submodule(UP), "weight", Doubled()),
    "weight norm": lambda m: torch.nn.utils.parametrizations.weight_norm(
        m.get_submodule(UP)).parametrizations.weight.original0.data.mul_(2),
    "old weight norm": lambda m: torch.nn.utils.weight_norm(m.get_submodule(UP)).weight_g.data.mul_(2),
    "pruning": lambda m: torch.nn.utils.prune.random_unstructured(m.get_submodule(UP), "weight", 0.5),
    "norm": lambda m: replaced(m, NORM, lambda old: torch.nn.RMSNorm(16)),
    "MLP": lambda m: replaced(m, MLP, lambda old: torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(),
                                                                      torch.nn.Linear(8, 16))),
    "MLP that nobody knows": lambda m: replaced(m, MLP, lambda old: Lora(torch.nn.Linear(16, 16))),
}

@pytest.fixture(scope="module", params=["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def traced_parts(request):
    """What is traced for the unchanged models is kept for all tests, as a user's process keeps it."""
    torch.compiler.reset()
    yield {name: torch.compile(getattr(step, f"{name}_forms"), fullgraph=True, backend=request.param)
           for name in ("block", "head")}
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch, traced_parts):
    """Compiled decoding as far as PyTorch's tracer, without the minute of a C++ compiler."""
    for name, part in traced_parts.items():
        monkeypatch.setattr(step, f"compiled_{name}", part)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("change", CHANGES)
def test_compiled_decoding_calls_what_stands_in_the_model(change, traced):
    """After the unchanged model was compiled: the logits are those without the compiler."""
    family = "gpt_neo" if len(change) % 2 else "gpt_neox"
    model = model_of(family, torch.float32)
    before = step_logits(model, False)
    assert relative(step_logits(model, True), before) < 1e-5
    torch.manual_seed(0)
    CHANGES[change](model)
    expected = step_logits(model, False)
    assert relative(expected, before) > 1e-3               # it acts
    assert relative(step_logits(model, True), expected) < 1e-5


def test_a_model_that_is_compiled_as_a_whole_is_refused():
    """Its blocks are then never called one by one, so the compiled step would be passed over."""
    model = model_of("gpt_neox", torch.float32)
    model.compile(backend="eager")
    with pytest.raises(RuntimeError, match="already compiles this model as a whole"):
        step_logits(model, True)


def test_more_compilations_than_torch_keeps(traced, monkeypatch):
    """Many models in one process: those before are dropped, and nothing is refused."""
    monkeypatch.setattr(step, "MOST", 2)
    with torch._dynamo.config.patch(recompile_limit=2):
        for family in ("gpt_neo", "gpt_neox"):
            for dtype in (torch.float32, torch.bfloat16):
                model = model_of(family, dtype)
                assert relative(step_logits(model, True), step_logits(model, False)) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_another_thread_computes_as_always_while_one_decodes(family, monkeypatch):
    """The same model, in the middle of a compiled step: neither its compiled forms nor its cache are used."""
    model, found = model_of(family, torch.float32), []
    with torch.no_grad():
        expected = model(IDS).logits

    def beside():
        with torch.no_grad():
            found.append(model(IDS).logits)

    def block(*given):
        thread = Thread(target=beside)
        thread.start()
        thread.join()
        return step.block_forms(*given)

    monkeypatch.setattr(step, "compiled_block", block)
    monkeypatch.setattr(step, "compiled_head", step.head_forms)
    assert relative(step_logits(model, True), step_logits(model, False)) < 1e-5
    assert len(found) == len(model.transformer.blocks) and all(torch.equal(logits, expected) for logits in found)


@pytest.mark.parametrize("family", CAUSAL)
def test_what_another_thread_compiles_changes_no_bit(family, monkeypatch):
    """torch.compiler.is_compiling() is then true in this thread too."""
    model = model_of(family, torch.float32)
    before = step_logits(model, False), *torch.autograd.grad(model(IDS, labels=IDS).loss, [model.lm_head.weight])
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    after = step_logits(model, False), *torch.autograd.grad(model(IDS, labels=IDS).loss, [model.lm_head.weight])
    assert all(map(torch.equal, before, after))
    with monkeypatch.context() as patch:                   # few_rows is used all the same
        patch.setattr(linear, "few_rows", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step_logits(model, False)


def check_that_a_hook_acts_until_it_is_removed():
    model = model_of("gpt_neox", torch.float32)
    before = step_logits(model, True)
    handle = CHANGES["hook"](model)
    expected = step_logits(model, False)
    assert relative(expected, before) > 1e-3 and relative(step_logits(model, True), expected) < 1e-5
    handle.remove()
    assert torch.equal(step_logits(model, True), before)


def test_a_hook_acts_in_compiled_decoding_and_acts_no_more_when_removed(traced):
    check_that_a_hook_acts_until_it_is_removed()


@pytest.mark.slow
def test_a_hook_acts_with_the_compiler_itself():
    check_that_a_hook_acts_until_it_is_removed()


def step_logits(model, compile):
    """Of the last token of IDS, the others being cached."""
    cache = KVCache(model.config, *IDS.shape)
    with torch.no_grad():
        model(IDS[:, :-1], cache=cache)
        mask, places = torch.ones_like(IDS), torch.full((len(IDS), 1), IDS.size(1) - 1)
        if compile:
            return step.Step(model, cache)(IDS[:, -1:], mask, places)
        return model(IDS[:, -1:], mask, places, cache=cache).logits[:, -1]


def test_what_the_compiler_cannot_take_is_one_clear_error(traced):
    model = model_of("gpt_neo", torch.float32)

    def hook(module, args, out):
        torch._dynamo.graph_break()

    handle = model.get_submodule(UP).register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="compile=True: torch.compile cannot take this model") as error:
        model.generate(IDS, max_new_tokens=3, compile=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert "run" not in vars(model) and "run" not in vars(model.transformer)       # the model is as it was
    handle.remove()
    model.train()
    assert step_logits(model, True).isfinite().all()       # without any dropout, training mode is the same
    model.transformer.dropout.p = 0.5
    with pytest.raises(RuntimeError, match="in training mode; call model.eval"):
        model.generate(IDS, max_new_tokens=3, compile=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", CAUSAL)
def test_tools_that_look_for_linear_layers_find_them(family, traced):
    """By the exact class, as torch.ao.quantization does; the quantized model writes, and compiled it is refused."""
    model = model_of(family, torch.float32)
    count = sum(type(m) is torch.nn.Linear for m in model.modules())
    assert count == 2 * (6 if family == "gpt_neo" else 4) + 1
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    assert sum("quantized.dynamic" in type(m).__module__ for m in quantized.modules()) == count
    text = quantized.generate(IDS, max_new_tokens=3, eos_token_id=None)
    assert text.shape == (3, 12)
    with pytest.raises(RuntimeError, match="compile=True: torch.compile cannot take this model"):
        quantized.generate(IDS, max_new_tokens=3, eos_token_id=None, compile=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", CAUSAL)
def test_generating_under_autocast(family, dtype):
    """A prompt longer than the window, for the reference's logits at every step and so its text."""
    case = random_case(0, family)
    prompt = case.ids[:1].repeat(1, 30)[:, :30]
    with torch.autocast("cpu", dtype), torch.no_grad():
        how = dict(max_new_tokens=8, eos_token_id=None, do_sample=False, pad_token_id=0)
        theirs = reference(case).generate(prompt, **how, output_logits=True, return_dict_in_generate=True)
        for backend in ("naive", "sdpa"):
            model = ours(case, backend=backend)
            text = model.generate(prompt, **how)
            if backend == "naive":
                assert torch.equal(text, theirs.sequences)
            cache = KVCache(model.config, 1, 38)
            logits = [model(prompt, cache=cache).logits[:, -1]]
            for token in theirs.sequences[0, 30:-1]:
                logits.append(model(token[None, None], cache=cache).logits[:, -1])
            assert relative(torch.stack(logits), torch.stack(theirs.logits)) < (0 if backend == "naive" else 0.1) + 1e-12


@pytest.mark.parametrize("set_default, value, back", [(torch.set_default_device, "cpu", None),
                                                      (torch.set_default_dtype, torch.bfloat16, torch.float32)])
def test_defaults_of_torch_do_not_disturb_compiled_decoding(set_default, value, back, traced):
    model = model_of("gpt_neox", torch.float32)
    how = dict(max_new_tokens=5, eos_token_id=None)
    expected = model.generate(IDS, **how)
    set_default(value)
    try:
        assert torch.equal(model.generate(IDS, compile=True, **how), expected)
        assert torch.equal(model.generate(IDS, **how), expected)
    finally:
        set_default(back)
