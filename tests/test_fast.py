"""What replaces a definition to be faster is the definition: in every derivative, under every transform.

The sizes from which slices are taken are patched down, so that tiny tensors take them.
"""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import base
import neo
import neox
from fast import slices
from helpers import relative, widen

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
    assert set(taken) == (set() if way == "compiled" else {1})         # slices of one row
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


@pytest.mark.parametrize("way", [per_sample, curvature, double_backward], ids=lambda w: w.__name__)
@pytest.mark.parametrize("family", CAUSAL)
def test_derivatives_of_a_model_in_slices(family, way, monkeypatch):
    model = model_of(family, attn_implementation="naive")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = way(model, parameters)
    monkeypatch.setattr(slices, "LARGE", 8)
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
def test_a_model_in_slices_is_exported_and_compiled(family, monkeypatch):
    monkeypatch.setattr(slices, "LARGE", 8)
    torch.compiler.reset()
    model = model_of(family)
    with torch.no_grad():
        expected = model(IDS).logits
        exported = torch.export.export(model, (IDS,)).module()(IDS).logits
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS).logits
    assert relative(exported, expected) < 1e-12 and relative(whole, expected) < 1e-12
