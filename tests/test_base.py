"""What users of transformers expect of a model and its output."""

import copy
import dataclasses
import inspect
import sys

import numpy
import pytest
import torch
import transformers

from helpers import ours, random_case, reference, relative
from load_weights import NAMES, our_name

CASES = [random_case(seed) for seed in (0, 4, 5, 7)]        # two of each family, tied and untied heads
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{c.seed}")


@every_case
def test_outputs_are_mappings_and_tuples(case):
    """Names, positions and order are those of transformers' ModelOutput, its cache left out.

    The call is the plain one, with the reference's cache: without it the keys have other strides, and under
    some BLAS kernels (MKL_CBWR=COMPATIBLE) the reference's own last bits are others.
    """
    how = dict(labels=case.ids, output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        expected = reference(case)(case.ids, **how)
        expected = type(expected)(**{name: x for name, x in expected.items() if name != "past_key_values"})
        found = ours(case)(case.ids, **how)
    assert list(found) == list(expected.keys()) == list(found.keys()) and len(found) == len(expected)
    assert "loss" in found and "start_logits" not in found and found.get("start_logits") is None
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected["logits"])
    assert torch.equal(found["logits"], found.logits) and dict(**found)["loss"] is found.loss
    loss, logits = found[:2]
    assert loss is found.loss and logits is found.to_tuple()[1] and found[-1] is found.attentions
    alone = ours(case)(case.ids)
    assert torch.equal(alone[0], alone.logits) and len(alone) == 1
    with pytest.raises(KeyError, match="loss: this output has logits"):
        alone["loss"]


@every_case
def test_the_references_other_arguments_of_the_call(case):
    """Taken where they change nothing or are done; refused by their names otherwise, by every model of the family."""
    model, theirs = ours(case), reference(case)
    heads = [getattr(sys.modules[type(model).__module__], type(model).__name__.replace("CausalLM", kind))(model.config)
             for kind in ("SequenceClassification", "TokenClassification", "QuestionAnswering")]
    with torch.no_grad():
        expected = theirs(case.ids)
        plain = model(case.ids, use_cache=False, return_dict=True, past_key_values=None, token_type_ids=None, cache_position=None,
                      head_mask=None, num_items_in_batch=None, output_attentions=None, output_hidden_states=None)
        assert torch.equal(plain.logits, expected.logits)
        loss, logits = model(case.ids, labels=case.ids, return_dict=False)
        assert torch.equal(logits, expected.logits) and torch.equal(loss, theirs(case.ids, labels=case.ids).loss)
        chosen = torch.tensor([0, case.T - 1])
        assert torch.equal(model(case.ids, logits_to_keep=chosen).logits, theirs(case.ids, logits_to_keep=chosen).logits)
        for other in (model.transformer, *heads):
            assert isinstance(other(case.ids[:1], use_cache=False, return_dict=False), tuple)
    for other in (model, model.transformer, *heads):
        for name, value in (("use_cache", True), ("past_key_values", ((1, 2),)), ("token_type_ids", case.ids), ("num_items_in_batch", 3)):
            with pytest.raises(ValueError, match=f"^{name}=.* is not supported in the call of a model: ") as caught:
                other(case.ids[:1], **{name: value})
            assert "\n" not in str(caught.value)
        with pytest.raises(TypeError, match="nonsense"):
            other(case.ids[:1], nonsense=1)
    with pytest.raises(ValueError, match="logits_to_keep must be a whole number"):
        model(case.ids, logits_to_keep="all")
    assert list(inspect.signature(model.forward).parameters)[0] == "input_ids"       # as trainers read it


def test_settings_of_the_config_that_scripts_set():
    """config.use_cache = False stands in every script that fine-tunes; other values are refused with the advice."""
    config = ours(CASES[0]).config
    config.use_cache = False
    config.output_hidden_states, config.pad_token_id = False, config.pad_token_id
    assert "use_cache" not in config.to_dict()
    for name, value in (("pad_token_id", 5), ("output_attentions", True), ("hidden_size", 7), ("nonsense", 1)):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"'{name}' cannot be set to {value} .*from_pretrained\\(..., {name}="):
            setattr(config, name, value)


def test_usual_arguments_of_saving_and_loading(tmp_path):
    """At the values that scripts give them; refused by name at others."""
    model = ours(CASES[0])
    model.save_pretrained(tmp_path, safe_serialization=True, push_to_hub=False, is_main_process=True, max_shard_size="50GB")
    usual = dict(attn_implementation=None, proxies={}, disable_mmap=False, key_mapping={}, _fast_init=True, device="cpu")
    assert torch.equal(type(model).from_pretrained(tmp_path, **usual).lm_head.weight, model.lm_head.weight)
    for call, name, value in ((model.save_pretrained, "safe_serialization", False), (model.save_pretrained, "max_shard_size", "5GB"),
                              (model.save_pretrained, "nonsense", 1), (type(model).from_pretrained, "disable_mmap", True)):
        with pytest.raises(ValueError, match=f"_pretrained\\({name}={value!r}\\) is not supported: "):
            call(tmp_path, **{name: value})
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"^device '{device}' cannot be used here: ") as caught:
            type(model).from_pretrained(tmp_path, device=device)
        assert "\n" not in str(caught.value)


@every_case
def test_inputs_embeds(case):
    """The embeddings of ids are as good as the ids, and others give what they give in the reference."""
    model, theirs = ours(case), reference(case)
    embeds = model.get_input_embeddings()(case.ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(case.ids).logits)
    with torch.no_grad():
        expected = theirs(inputs_embeds=embeds.flip(-1), labels=case.ids)
        found = model(inputs_embeds=embeds.flip(-1), labels=case.ids)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    for wrong, words in ((dict(input_ids=case.ids, inputs_embeds=embeds), "exclude each other"),
                         (dict(inputs_embeds=embeds[..., 1:]), "inputs_embeds must have shape"),
                         (dict(inputs_embeds=embeds[:, :0]), "is empty"), (dict(), "input_ids must be a tensor")):
        with pytest.raises(ValueError, match=words):
            model(**wrong)


@pytest.mark.parametrize("how", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@every_case
def test_gradient_checkpointing(case, how):
    """Each block is computed twice; the gradients are the same bits, dropout included, and the reference's."""
    model = ours(case)
    model.transformer.dropout.p = 0.1
    for block in model.transformer.blocks:
        block.dropout.p = 0.1
    calls, grads = [], []
    model.transformer.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    for checkpointing in (False, True):
        (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)(
            *([how] if checkpointing else []))
        assert model.is_gradient_checkpointing == checkpointing
        torch.manual_seed(0)
        model.train().zero_grad()
        calls.clear()
        model(case.ids, labels=case.ids).loss.backward()
        assert len(calls) == 1 + checkpointing
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    calls.clear()
    model.eval()(case.ids, labels=case.ids).loss.backward()
    assert len(calls) == 1                                 # in training alone


@every_case
def test_gradients_of_checkpointing_are_the_reference_s(case):
    theirs, model = reference(case), ours(case).train()
    model.gradient_checkpointing_enable()
    theirs(case.ids, labels=case.ids).loss.backward()
    model(case.ids, labels=case.ids).loss.backward()
    found = dict(model.named_parameters())
    for name, p in theirs.named_parameters():
        assert torch.equal(found[our_name(name, NAMES[case.family])].grad, p.grad), name
    theirs.zero_grad()


@pytest.mark.parametrize("size, multiple, expected", [(104, None, 104), (101, 64, 128), (50, None, 50), (None, 8, 104)])
@every_case
def test_resize_token_embeddings(case, size, multiple, expected, tmp_path):
    """Old ids keep their rows, new ones get the mean; the config follows, and transformers loads what is saved."""
    model, before = ours(case), ours(case)
    old = before.get_input_embeddings().weight
    tied = model.lm_head.weight is model.transformer.embed.weight
    assert model.resize_token_embeddings(size, multiple) is model.get_input_embeddings()
    assert model.config.vocab_size == model.transformer.config.vocab_size == expected
    assert (model.lm_head.weight is model.transformer.embed.weight) == tied
    assert model.get_output_embeddings() is model.lm_head and model.lm_head.weight.shape[0] == expected
    new, kept = model.get_input_embeddings().weight, min(97, expected)
    assert new.shape[0] == expected and new.requires_grad and torch.equal(new[:kept], old[:kept])
    assert torch.allclose(new[kept:], old.mean(0).expand(expected - kept, -1), atol=1e-6)
    ids = case.ids % 50
    assert relative(model(ids).logits[..., :50], before(ids).logits[..., :50]) < 1e-6
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert theirs.config.vocab_size == expected
    with torch.no_grad():
        highest = torch.full_like(ids, expected - 1)
        assert torch.equal(model(highest).logits, theirs(highest).logits)
        assert torch.equal(type(model).from_pretrained(tmp_path, attn_implementation="naive")(highest).logits,
                           model(highest).logits)
    with pytest.raises(ValueError, match=f"0 to {expected - 1}"):
        model(torch.full_like(ids, expected))
    for how, words in (({"new_num_tokens": 0}, "at least 1, got 0"), ({"new_num_tokens": "120"}, "at least 1, got '120'"),
                       ({"new_num_tokens": 1e2}, "got 100.0"), ({"new_num_tokens": 120, "mean_resizing": False}, "mean_resizing=False"),
                       ({"new_num_tokens": torch.tensor(2.5)}, "got tensor"), ({"new_num_tokens": True}, "got True"),
                       ({"pad_to_multiple_of": -7}, "pad_to_multiple_of must be"), ({"pad_to_multiple_of": 2.5}, "got 2.5")):
        with pytest.raises(ValueError, match=words):
            model.resize_token_embeddings(**how)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == expected
    model.resize_token_embeddings(numpy.int64(60), mean_resizing=True)
    assert model.config.vocab_size == 60 and type(model.config.vocab_size) is int


@every_case
def test_embedding_and_head_are_replaced(case):
    """As in transformers, setting one does not tie it to the other."""
    logits = []
    for model in (ours(case), reference(case)):
        embed, head = model.get_input_embeddings(), model.get_output_embeddings()
        for layer, set_layer in ((embed, model.set_input_embeddings), (head, model.set_output_embeddings)):
            layer = copy.deepcopy(layer)
            layer.weight.data *= 1.5
            set_layer(layer)
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        logits.append(model(case.ids).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="has no layer for next-token logits"):
        ours(case).transformer.set_output_embeddings(torch.nn.Linear(1, 1))


@every_case
def test_arguments_that_are_no_tensors(case):
    """Named in one line, where transformers says that a list has no attribute 'shape'."""
    model, ids = ours(case), case.ids
    for how in (dict(input_ids=ids.tolist()), dict(attention_mask=torch.ones_like(ids).tolist()), dict(labels=ids.tolist()),
                dict(position_ids=[[0]])):
        with pytest.raises(ValueError, match=f"^{[*how][0]} must be a tensor, got list$"):
            model(**{"input_ids": ids} | how)
    with pytest.raises(ValueError, match="^attention_mask must be a tensor, got list$"):
        model.generate(ids, attention_mask=torch.ones_like(ids).tolist())
    if case.family == "gpt_neo":
        with pytest.raises(ValueError, match="position_ids must be int64 or int32 .*got torch.float32"):
            model(ids, position_ids=torch.zeros(ids.shape))
