"""The documentation's examples run with their import lines changed, and a model is a module like any other.

The snippets stand here as they stand in the documentation, with the hub's names; to run, each name gives way
to a demo checkpoint.
"""

import copy
import dataclasses
import pickle
import sys
import types

import pytest
import torch
import transformers

import attention
import neo
import neox
from conftest import ROOT
from helpers import relative, widen

HUB = {"EleutherAI/gpt-neo-1.3B": "demo-neo", "EleutherAI/gpt-neo-2.7B": "demo-neo",
       "EleutherAI/gpt-neox-20b": "demo-neox"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRELUDE = f"""
import torch
from neo import (GPTNeoForCausalLM, GPTNeoForQuestionAnswering, GPTNeoForSequenceClassification,
                 GPTNeoForTokenClassification)
from neox import (GPTNeoXForCausalLM, GPTNeoXForQuestionAnswering, GPTNeoXForSequenceClassification,
                  GPTNeoXForTokenClassification)
from tokenizer import GPT2Tokenizer, GPTNeoXTokenizerFast
from load_weights import AutoModelForCausalLM, AutoTokenizer
prompt = "HAMLET. To be, or not to be"
device = {DEVICE!r}
"""

# --- the interface section of the design, which is the documentation's ------------------------------

GPT_NEO = '''
    model = GPTNeoForCausalLM.from_pretrained("EleutherAI/gpt-neo-1.3B")
    tokenizer = GPT2Tokenizer.from_pretrained("EleutherAI/gpt-neo-1.3B")
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    gen_tokens = model.generate(input_ids, do_sample=True, temperature=0.9, max_length=100)
    gen_text = tokenizer.batch_decode(gen_tokens)[0]
'''
GPT_NEOX_HALF = '''
    model = GPTNeoXForCausalLM.from_pretrained("EleutherAI/gpt-neox-20b").half().cuda()
'''
FLASH = '''
    model = AutoModelForCausalLM.from_pretrained("EleutherAI/gpt-neo-2.7B", torch_dtype=torch.float16, attn_implementation="flash_attention_2")
    model_inputs = tokenizer([prompt], return_tensors="pt").to(device)
    generated_ids = model.generate(**model_inputs, max_new_tokens=100, do_sample=True)
'''

# --- the rest of transformers' pages of the two models ----------------------------------------------

GPT_NEOX = '''
    model = GPTNeoXForCausalLM.from_pretrained("EleutherAI/gpt-neox-20b")
    tokenizer = GPTNeoXTokenizerFast.from_pretrained("EleutherAI/gpt-neox-20b")
    prompt = "GPTNeoX20B is a 20B-parameter autoregressive Transformer model developed by EleutherAI."
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    gen_tokens = model.generate(
        input_ids,
        do_sample=True,
        temperature=0.9,
        max_length=100,
    )
    gen_text = tokenizer.batch_decode(gen_tokens)[0]
'''
MOVED = '''
    model = AutoModelForCausalLM.from_pretrained("EleutherAI/gpt-neo-2.7B", torch_dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-2.7B")
    model_inputs = tokenizer([prompt], return_tensors="pt").to(device)
    model.to(device)
    generated_ids = model.generate(**model_inputs, max_new_tokens=100, do_sample=True)
    tokenizer.batch_decode(generated_ids)[0]
'''
BATCH = '''
    tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-1.3B", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    prompts = ["A list of colors: red, blue", "HAMLET."]
    model_inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
    model = AutoModelForCausalLM.from_pretrained("EleutherAI/gpt-neo-1.3B").to(device)
    generated_ids = model.generate(**model_inputs, max_new_tokens=20, pad_token_id=tokenizer.eos_token_id)
    texts = tokenizer.batch_decode(generated_ids, skip_special_tokens=True)
'''
LABELS = '''
    tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neox-20b")
    model = GPTNeoXForCausalLM.from_pretrained("EleutherAI/gpt-neox-20b")
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    outputs = model(**inputs, labels=inputs["input_ids"])
    loss = outputs.loss
    prediction_logits = outputs.logits
'''

# of the task heads; GPT-NeoX's have an X and another checkpoint
SEQUENCE = '''
    tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-1.3B")
    model = GPTNeoForSequenceClassification.from_pretrained("EleutherAI/gpt-neo-1.3B")
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_class_id = logits.argmax().item()
    label = model.config.id2label[predicted_class_id]
    num_labels = len(model.config.id2label)
    model = GPTNeoForSequenceClassification.from_pretrained("EleutherAI/gpt-neo-1.3B", num_labels=num_labels)
    labels = torch.tensor([1])
    loss = model(**inputs, labels=labels).loss
'''
SEVERAL = '''
    tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-1.3B")
    model = GPTNeoForSequenceClassification.from_pretrained("EleutherAI/gpt-neo-1.3B", problem_type="multi_label_classification")
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_class_ids = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]
    num_labels = len(model.config.id2label)
    model = GPTNeoForSequenceClassification.from_pretrained(
        "EleutherAI/gpt-neo-1.3B", num_labels=num_labels, problem_type="multi_label_classification"
    )
    labels = torch.sum(
        torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels), dim=1
    ).to(torch.float)
    loss = model(**inputs, labels=labels).loss
'''
TOKEN = '''
    tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-1.3B")
    model = GPTNeoForTokenClassification.from_pretrained("EleutherAI/gpt-neo-1.3B")
    inputs = tokenizer(
        "HuggingFace is a company based in Paris and New York", add_special_tokens=False, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_token_class_ids = logits.argmax(-1)
    label = [model.config.id2label[t.item()] for t in predicted_token_class_ids[0]]
    labels = predicted_token_class_ids
    loss = model(**inputs, labels=labels).loss
'''
QUESTION = '''
    tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-1.3B")
    model = GPTNeoForQuestionAnswering.from_pretrained("EleutherAI/gpt-neo-1.3B")
    question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"
    inputs = tokenizer(question, text, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    answer_start_index = outputs.start_logits.argmax()
    answer_end_index = outputs.end_logits.argmax()
    predict_answer_tokens = inputs.input_ids[0, answer_start_index : answer_end_index + 1]
    tokenizer.decode(predict_answer_tokens, skip_special_tokens=True)
    target_start_index = torch.tensor([14])
    target_end_index = torch.tensor([15])
    outputs = model(**inputs, start_positions=target_start_index, end_positions=target_end_index)
    loss = outputs.loss
'''


def run(code, before="", **names):
    """Run a snippet, and what has to stand before it; returns its variables."""
    code = before + (code if DEVICE == "cuda" else code.replace(".cuda()", ""))
    for name, folder in HUB.items():
        code = code.replace(f'"{name}"', repr(str(ROOT / "checkpoints" / folder)))
    lines = "\n".join(line.removeprefix("    ") for line in code.splitlines())
    exec(compile(PRELUDE + lines, "snippet", "exec"), names)
    return names


def test_gpt_neo():
    torch.manual_seed(0)
    found = run(GPT_NEO)
    assert found["gen_tokens"].shape[0] == 1 and found["gen_tokens"].shape[1] <= 100
    assert found["gen_text"].startswith("HAMLET. To be, or not to be") and len(found["gen_text"]) > 40


def test_gpt_neox():
    torch.manual_seed(0)
    found = run(GPT_NEOX)
    assert found["gen_text"].startswith(found["prompt"]) and len(found["gen_text"]) > len(found["prompt"])


def test_half_and_cuda():
    """The model comes back from .half(), is float16 all through, and writes, on a CPU too."""
    model = run(GPT_NEOX_HALF)["model"]
    assert type(model) is neox.GPTNeoXForCausalLM and model.device.type == DEVICE
    assert {p.dtype for p in model.parameters()} == {torch.float16} == {model.dtype}
    ids = torch.tensor([[5, 6, 7]], device=DEVICE)
    assert model(ids).logits.dtype == torch.float16
    text = model.generate(ids, max_new_tokens=20, eos_token_id=None)
    assert text.shape == (1, 23) and torch.equal(text[:, :3], ids)


TOKENIZER = '\n    tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-2.7B")\n'


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_flash_attention_2():
    assert run(FLASH, TOKENIZER)["generated_ids"].shape[0] == 1


@pytest.mark.parametrize("package", ["missing", "without its kernels"])
def test_flash_attention_2_on_a_cpu(monkeypatch, package):
    """The clear error, before a single token: nothing is put in flash-attn's place without a word."""
    stand_in = types.SimpleNamespace(flash_attn_interface=types.SimpleNamespace(USE_TRITON_ROCM=False))
    monkeypatch.setitem(sys.modules, "flash_attn", None if package == "missing" else stand_in)
    monkeypatch.setattr(attention, "INTERPRETED", False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    words = r"'flash' \(flash_attention_2\) needs .*CUDA GPU.*'sdpa'"
    with pytest.raises((ImportError, ValueError), match=words):
        run(FLASH.replace(".to(device)", ""), TOKENIZER)
    found = run(FLASH.replace("flash_attention_2", "sdpa").replace(".to(device)", ""), TOKENIZER)
    assert found["generated_ids"].shape[1] > found["model_inputs"].input_ids.shape[1]


def test_inputs_and_model_are_moved():
    found = run(MOVED)
    assert found["model"].dtype == torch.float16 and found["generated_ids"].device.type == DEVICE
    assert found["model_inputs"].attention_mask.device.type == DEVICE


def test_a_padded_batch_writes_what_its_rows_write_alone():
    found = run(BATCH)
    model, tokenizer = found["model"], found["tokenizer"]
    assert found["model_inputs"].attention_mask.sum(1).unique().numel() == 2
    for text, prompt in zip(found["texts"], found["prompts"]):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt").to(DEVICE), max_new_tokens=20)
        assert text == tokenizer.decode(alone[0], skip_special_tokens=True) and len(text) > len(prompt)


def test_labels():
    found = run(LABELS)
    found["loss"].backward()
    assert found["prediction_logits"].shape[:2] == found["inputs"]["input_ids"].shape
    assert all(p.grad is not None for p in found["model"].parameters())


@pytest.mark.filterwarnings("ignore:.*drawn at random")        # the demo checkpoints have no such head
@pytest.mark.parametrize("family", ["GPTNeo", "GPTNeoX"])
@pytest.mark.parametrize("code", [SEQUENCE, SEVERAL, TOKEN, QUESTION],
                         ids=["sequence", "several", "token", "question"])
def test_task_heads(code, family):
    """From a checkpoint without a head, whose labels nobody has named."""
    if family == "GPTNeoX":
        code = code.replace("GPTNeoFor", "GPTNeoXFor").replace("gpt-neo-1.3B", "gpt-neox-20b")
    torch.manual_seed(0)
    found = run(code)
    assert found["loss"].isfinite() and type(found["model"]).__name__.startswith(family + "For")
    assert found.get("num_labels", 2) == 2
    labels = found.get("label", [])
    assert ({labels} if isinstance(labels, str) else set(labels)) <= {"LABEL_0", "LABEL_1"}
    if "question" in found:
        folder = ROOT / "checkpoints" / {"GPTNeo": "demo-neo", "GPTNeoX": "demo-neox"}[family]
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert found["inputs"].input_ids[0].tolist() == theirs(found["question"], found["text"])["input_ids"]


# --- what people do with a module -------------------------------------------------------------------

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=64, max_position_embeddings=40, bos_token_id=1,
             eos_token_id=1, pad_token_id=0, num_labels=3)
CONFIGS = {"GPTNeo": neo.GPTNeoConfig(num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
                                      window_size=5, embed_dropout=0.2, **SIZES),
           "GPTNeoX": neox.GPTNeoXConfig(num_hidden_layers=2, num_attention_heads=2, hidden_dropout=0.2,
                                         **SIZES)}
HEADS = ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification",
         "ForQuestionAnswering"]
CLASSES = [getattr(module, family + head)
           for module, family in ((neo, "GPTNeo"), (neox, "GPTNeoX")) for head in HEADS]
CAUSAL = [neo.GPTNeoForCausalLM, neox.GPTNeoXForCausalLM]
IDS = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(0))

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
# Tracing takes its time: in the quick half the causal models and one other head of each family.
few_classes = pytest.mark.parametrize("cls", [c if c in (*CAUSAL, neo.GPTNeoForQuestionAnswering, neox.GPTNeoXForTokenClassification)
                                              else pytest.param(c, marks=pytest.mark.slow) for c in CLASSES],
                                      ids=lambda c: c.__name__)
causal = pytest.mark.parametrize("cls", CAUSAL, ids=lambda c: c.__name__)


def make(cls, seed=0):
    """A tiny model in eval mode, with weights that hide nothing."""
    return widen(cls(CONFIGS[cls.__name__.split("For")[0].removesuffix("Model")]), seed).eval()


def tensors(out):
    """What a forward pass returned, as a list of tensors."""
    return [value for field in dataclasses.fields(out) if torch.is_tensor(value := getattr(out, field.name))]


def results(model, ids=IDS, **how):
    with torch.no_grad():
        return tensors(model(ids, **how))


def assert_same(a, b):
    assert len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


def tied(model):
    return model.lm_head.weight is model.transformer.embed.weight


@every_class
@pytest.mark.parametrize("cast, dtype", [
    (lambda m: m.half(), torch.float16), (lambda m: m.bfloat16(), torch.bfloat16),
    (lambda m: m.to(torch.bfloat16), torch.bfloat16), (lambda m: m.to(dtype=torch.float16), torch.float16),
    (lambda m: m.to("cpu", torch.float64), torch.float64), (lambda m: m.double(), torch.float64),
    (lambda m: m.half().float(), torch.float32)],
    ids=["half", "bfloat16", "to bfloat16", "to dtype", "to both", "double", "half float"])
def test_casts(cls, cast, dtype):
    """In place, as torch does it, and near what was (the weights are wide, so half precision is coarse)."""
    model, before = make(cls), results(make(cls))
    assert cast(model) is model and {p.dtype for p in model.parameters()} == {dtype} == {model.dtype}
    for mine, exact in zip(results(model), before):
        assert mine.dtype == dtype
        assert torch.allclose(mine.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    if hasattr(model, "generate"):
        assert model.generate(IDS, max_new_tokens=5, eos_token_id=None).shape == (2, 17)
        assert tied(model) == model.config.tie_word_embeddings


@every_class
def test_devices(cls):
    model, before = make(cls), results(make(cls))
    assert model.to("cpu") is model and model.device.type == "cpu"
    assert_same(results(model.to(torch.device("cpu"))), before)
    assert model.to("meta").device.type == "meta"
    assert [x.shape for x in results(model, IDS.to("meta"))] == [x.shape for x in before]
    with torch.device("meta"):
        assert {p.device.type for p in cls(model.config).parameters()} == {"meta"}


@every_class
def test_state_dict(cls, tmp_path):
    """Into another model of the same shape, by memory and by file; one that lacks a weight is refused."""
    model, other = make(cls), make(cls, seed=1)
    assert not torch.equal(results(model)[0], results(other)[0])
    assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    assert_same(results(other), results(model))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    third = make(cls, seed=2)
    third.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(results(third), results(model))
    if hasattr(third, "lm_head"):
        assert tied(third) == third.config.tie_word_embeddings
    state = model.state_dict()
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        third.load_state_dict(state)


@every_class
def test_copies(cls, tmp_path):
    """copy.deepcopy, pickle, torch.save of the whole: the same results, a tie kept, weights of their own."""
    model = make(cls)
    torch.save(model, tmp_path / "model.pt")
    before = results(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                  torch.load(tmp_path / "model.pt", weights_only=False)):
        assert type(other) is cls and other.config == model.config and not other.training
        assert_same(results(other), before)
        if hasattr(other, "lm_head"):
            assert tied(other) == tied(model)
            assert torch.equal(other.generate(IDS, max_new_tokens=5), model.generate(IDS, max_new_tokens=5))
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
    assert_same(results(model), before)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configs(config):
    named = type(config)(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
                         | dict(id2label={0: "comedy", 1: "tragedy", 2: "history"}))
    for each in (config, named):
        for other in (pickle.loads(pickle.dumps(each)), copy.copy(each), copy.deepcopy(each),
                      type(each).from_dict(each.to_dict())):
            assert type(other) is type(each) and other == each
    assert dataclasses.replace(config, hidden_size=64).head_dim == 32 and config.head_dim == 16
    assert dataclasses.replace(config, num_labels=5).id2label[4] == "LABEL_4"
    assert named.id2label[2] == "history" and named.num_labels == len(named.id2label) == 3
    assert "hidden_size=32" in repr(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 64


@every_class
def test_train_and_eval(cls):
    """Dropout acts in one and not in the other, all through the model."""
    model = make(cls)
    before = results(model)
    assert model.train() is model and all(m.training for m in model.modules())
    assert not torch.equal(results(model)[0], results(model)[0])
    assert model.eval() is model and not any(m.training for m in model.modules())
    assert_same(results(model), before)


@every_class
def test_parameters(cls):
    """Each once, a tied one too; trainable, and freezable; an optimizer's step changes every one of them."""
    model = make(cls)
    parameters = [*model.parameters()]
    assert len({p.data_ptr() for p in parameters}) == len(parameters) == len([*model.named_parameters()])
    assert model.num_parameters() == sum(p.numel() for p in parameters)
    assert all(p.requires_grad and p.is_leaf for p in parameters) and not [*model.buffers()]
    before = [p.detach().clone() for p in parameters]
    sum(x.square().mean() for x in tensors(model(IDS))).backward()
    torch.optim.SGD(parameters, lr=1.0).step()
    assert not any(torch.equal(a, b) for a, b in zip(parameters, before))
    model.requires_grad_(False)
    assert not tensors(model(IDS))[0].requires_grad


@every_class
def test_repr(cls):
    text = repr(make(cls))
    assert text.startswith(cls.__name__ + "(") and "(q_proj)" in text or "(qkv_proj)" in text
    assert "(embed): Embedding(97, 32)" in text and "(1): Block(" in text or "2 x Block" in text


@causal
def test_contexts(cls):
    """inference_mode, autocast, a hook, a forward with other weights."""
    model = make(cls)
    before = results(model)[0]
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, before)
        text = model.generate(IDS, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(text, model.generate(IDS, max_new_tokens=5, eos_token_id=None))
    with torch.autocast("cpu", torch.bfloat16):
        found = results(model)[0].float()
    assert torch.allclose(found, before, rtol=0.1, atol=0.1 * before.abs().max().item())
    seen = []
    block = model.transformer.blocks[1]
    handle = block.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    model(IDS)
    handle.remove()
    assert seen == [(2, 12, 32)]
    others = {name: p.detach() for name, p in make(cls, seed=1).named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(model, others, (IDS,)).logits
    assert torch.equal(found, results(make(cls, seed=1))[0]) and torch.equal(results(model)[0], before)


@few_classes
def test_torch_compile_takes_a_model_whole(cls):
    """No graph break, with the default attention, without a mask and with one."""
    torch.compiler.reset()
    model = make(cls)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    for how in ({}, {"attention_mask": mask}):
        for mine, plain in zip(results(compiled, **how), results(model, **how)):
            real = mask.bool() if how and mine.shape[:2] == mask.shape else ...
            assert torch.allclose(mine[real], plain[real], rtol=1e-5, atol=1e-5)


@causal
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")      # within torch
def test_torch_compile(cls):
    """Through inductor, as everyone calls it: logits, gradients; generate is the model's own."""
    torch.compiler.reset()
    model, outs, grads = make(cls), [], []
    for module in (model, compiled := torch.compile(model)):
        model.zero_grad()
        outs.append(module(IDS, labels=IDS))
        outs[-1].loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(outs[1].logits, outs[0].logits) <= 1e-5 and relative(*grads) <= 1e-5
    how = dict(max_new_tokens=5, eos_token_id=None)
    assert torch.equal(compiled.generate(IDS, **how), model.generate(IDS, **how))


@few_classes
def test_torch_export(cls):
    """A graph without Python, for the exported shape and, with a dynamic dimension, for others.

    GPT-Neo's default attention takes another way for texts within the window of 5, so one graph is for longer
    ones alone.
    """
    model = make(cls)
    with torch.no_grad():
        program = torch.export.export(model, (IDS,))
        length = torch.export.Dim("length", min=6, max=40)
        flexible = torch.export.export(model, (IDS,), dynamic_shapes={"input_ids": {1: length}})
    longer = torch.cat([IDS, IDS.flip(1)], dim=1)
    for exported, ids in ((program, IDS), (flexible, IDS), (flexible, IDS[:, :7]), (flexible, longer)):
        found = exported.module()(ids)
        assert type(found).__name__ == "ModelOutput"
        for mine, plain in zip(tensors(found), results(model, ids)):
            assert torch.allclose(mine, plain, rtol=1e-5, atol=1e-5)
