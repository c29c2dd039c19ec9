"""generate: the reference's tokens, one for one, and a command line that behaves."""

import contextlib
import copy
import inspect
import io
import json
import pickle
import shutil
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import transformers

import generate
import sampling as G
from conftest import ROOT
from helpers import REFERENCE, ours, random_case, reference, saved
from load_weights import AutoModelForCausalLM, AutoTokenizer

LONG = {"max_position_embeddings": 600}


def long_case(family):
    """A model with room for 500 tokens and, for GPT-Neo, a window that they leave far behind."""
    case = random_case(300 if family == "gpt_neo" else 301)
    layers = {} if family == "gpt_neo" else {"num_hidden_layers": 2}         # in place of 4, which only takes longer
    return replace(case, settings=tuple((dict(case.settings) | LONG | layers).items()))


@pytest.fixture(scope="module", params=["gpt_neo", "gpt_neox"])
def pair(request):
    """(the reference, ours) in float32, ours with the backend that users get."""
    case = long_case(request.param)
    return reference(case), ours(case, backend="auto")


SETTINGS = [
    dict(),
    dict(max_length=30),
    dict(max_new_tokens=150, eos_token_id=None),
    dict(max_new_tokens=60, repetition_penalty=1.4, eos_token_id=None),
    dict(do_sample=True, max_new_tokens=100, eos_token_id=None),                       # top_k is 50
    dict(do_sample=True, max_new_tokens=100, eos_token_id=None, top_k=0, temperature=1.3),
    dict(do_sample=True, max_new_tokens=500, eos_token_id=None, temperature=0.8, top_k=20, top_p=0.9,
         repetition_penalty=1.3),
    dict(do_sample=True, max_new_tokens=50, num_return_sequences=3, eos_token_id=[5, 6, 7]),
    dict(do_sample=True, max_new_tokens=50, top_p=0.3, eos_token_id=5, pad_token_id=3),
    dict(do_sample=True, max_new_tokens=20, temperature=None, top_k=None, top_p=None),            # None: off
]


CONTROLS = [                                               # the settings that look at the text, alone and together
    dict(min_new_tokens=25, eos_token_id=[5, 6, 7, 8, 9, 10]), dict(min_length=30, eos_token_id=[*range(30)]),
    dict(min_length=200, min_new_tokens=3, eos_token_id=[*range(60)]), dict(no_repeat_ngram_size=1, eos_token_id=None),
    dict(no_repeat_ngram_size=2, eos_token_id=5), dict(no_repeat_ngram_size=3, repetition_penalty=0.7),
    dict(bad_words_ids=[[i] for i in range(0, 60, 3)] + [[5]], eos_token_id=5),
    dict(bad_words_ids=[[i, j] for i in range(0, 97, 8) for j in range(0, 97, 3)] + [[1, 2, 3]]),
    dict(suppress_tokens=[*range(0, 90, 2), 3000], eos_token_id=[2, 3]), dict(suppress_tokens=()),
    dict(begin_suppress_tokens=[*range(0, 80)]), dict(min_p=0.2), dict(min_p=0.05, top_k=0, temperature=2.0), dict(min_p=1.0),
    dict(min_p=0.3, top_p=0.8, top_k=9, temperature=0.7, repetition_penalty=1.3, no_repeat_ngram_size=2,
         suppress_tokens=[4, 5, 9], begin_suppress_tokens=[1], bad_words_ids=[[7], [8, 9]], min_new_tokens=9,
         eos_token_id=(5, 6, 7, 9), pad_token_id=3),
    dict(no_repeat_ngram_size=2, min_length=40, begin_suppress_tokens=[*range(50)], eos_token_id=[*range(40)], min_p=0.1),
]


@pytest.mark.filterwarnings("ignore:.*min_new_tokens")      # "both are set": said by both
@pytest.mark.parametrize("settings", CONTROLS, ids=lambda s: str(s)[:60])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_settings_that_look_at_the_text_are_the_references(pair, do_sample, settings):
    """Left-padded rows, which end at different times: the reference's ids at the same seed."""
    ids = torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :13], mask[1, :2] = 0, 0
    ids[mask == 0] = 0
    theirs, mine = both(pair, ids, mask, **{"do_sample": do_sample, "max_new_tokens": 40, **settings})
    assert torch.equal(mine, theirs)


def both(pair, ids, mask=None, **settings):
    results = []
    for model in pair:
        torch.manual_seed(11)
        results.append(model.generate(ids, attention_mask=mask, **settings))
    return results


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ids_are_the_references(pair, settings):
    """Greedy and sampled, up to 500 tokens, from the same seed."""
    ids = torch.randint(1, 97, (1, 7), generator=torch.Generator().manual_seed(1))
    theirs, mine = both(pair, ids, **settings)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("settings", [
    dict(max_new_tokens=100, eos_token_id=[5, 7]),
    dict(do_sample=True, max_new_tokens=100, top_p=0.9, repetition_penalty=1.2, eos_token_id=[5, 7],
         pad_token_id=3),
    dict(do_sample=True, max_new_tokens=100, num_return_sequences=2, eos_token_id=None),
], ids=str)
def test_left_padded_batches_are_the_references(pair, settings):
    """Rows that end early are filled with pad and still draw, so that the others' draws agree."""
    ids = torch.randint(1, 97, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :13], mask[1, :2] = 0, 0
    ids[mask == 0] = 0
    theirs, mine = both(pair, ids, mask, **settings)
    assert torch.equal(mine, theirs)


def test_rows_that_have_ended_are_no_longer_read(pair, monkeypatch):
    """The model is called with the going rows alone, and the text of all is that of the definition, which
    reads every row to the end."""
    model, sizes = pair[1], []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, *args, **how: (sizes.append(len(ids)),
                                                                                 forward(self, ids, *args, **how))[1])
    ids = torch.randint(1, 97, (6, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :13], mask[3, :2] = 0, 0
    settings = dict(attention_mask=mask, do_sample=True, temperature=2.0, max_new_tokens=80, repetition_penalty=1.2,
                    eos_token_id=[5, 6, 7], pad_token_id=3)
    texts = []
    for backend in ("auto", "naive"):
        model.set_attn_implementation(backend)
        sizes.clear()
        texts.append(model.generate(ids, generator=torch.Generator().manual_seed(4), **settings))
        ends = [next((i for i, t in enumerate(row) if t in (5, 6, 7)), 99) for row in texts[-1][:, 20:].tolist()]
        assert len(set(ends)) > 3, "rows must end at different times"
        assert sizes == ([6] * len(sizes) if backend == "naive" else [sum(end >= n for end in ends) for n in range(len(sizes))])
    model.set_attn_implementation("auto")
    assert torch.equal(*texts)


def test_a_long_prompt_is_read_in_chunks(pair, monkeypatch):
    """Pieces of CHUNK tokens with a short one at the end; the same text; the definition reads it whole."""
    model, calls = pair[1], []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, ids, *args, **how: (calls.append(ids.size(1)),
                                                                                 forward(self, ids, *args, **how))[1])
    monkeypatch.setattr(G, "CHUNK", 64)
    ids = torch.randint(1, 97, (2, 150), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :70] = 0                                       # a whole chunk of padding
    texts = []
    for backend, pieces in (("auto", [64, 64, 22]), ("naive", [150])):
        model.set_attn_implementation(backend)
        calls.clear()
        texts.append(model.generate(ids, mask, max_new_tokens=20, eos_token_id=None, pad_token_id=0))
        assert calls == pieces + [1] * 19
    model.set_attn_implementation("auto")
    assert torch.equal(*texts)


def test_mask_is_inferred_as_the_reference_infers_it(pair):
    """Without a mask, pad ids are padding only if pad cannot be an end of text."""
    ids = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[0, :4] = 3
    for settings in (dict(pad_token_id=3, eos_token_id=0), dict(pad_token_id=3, eos_token_id=3)):
        theirs, mine = both(pair, ids, max_new_tokens=10, **settings)
        assert torch.equal(mine, theirs)


def test_generation_config_is_obeyed(pair):
    """What generation_config.json says goes before the defaults, what the caller says before that."""
    theirs, mine = pair
    ids = torch.tensor([[4, 5, 6]])
    mine.generation_config = {"do_sample": True, "top_k": 5, "max_length": 40, "eos_token_id": 9}
    try:
        torch.manual_seed(5)
        found = mine.generate(ids)
        torch.manual_seed(5)
        assert torch.equal(found, theirs.generate(ids, do_sample=True, top_k=5, max_length=40, eos_token_id=9))
        assert mine.generate(ids, do_sample=False, max_new_tokens=2).shape[1] <= 5
    finally:
        mine.generation_config = {}


# --- every setting of the reference's: done, without effect, or refused by its name ------------------

IDS = torch.tensor([[4, 5, 6], [7, 8, 9]])
NEUTRAL = transformers.GenerationConfig._get_default_generation_params()


def stored(pair, settings):
    """Both models' ids when their checkpoint's generation_config.json says these settings; from one seed."""
    theirs, mine = pair
    before = theirs.generation_config
    theirs.generation_config, mine.generation_config = transformers.GenerationConfig(**settings), settings
    try:
        return both(pair, IDS)
    finally:
        theirs.generation_config, mine.generation_config = before, {}


@pytest.mark.parametrize("name", sorted(vars(transformers.GenerationConfig())))
def test_every_field_of_the_references_settings_is_known(pair, name):
    """At None and at its default each is accepted, by the caller and in the file, and the text is the same."""
    plain = pair[1].generate(IDS, max_new_tokens=4, eos_token_id=None)
    if name in ("_original_object_hash", "_mask_length") or name == "temperature":
        return
    assert torch.equal(pair[1].generate(IDS, **{"max_new_tokens": 4, "eos_token_id": None, name: None})[:, :7], plain)
    if name in NEUTRAL and name != "max_length":
        how = {"max_new_tokens": 4, "eos_token_id": None, name: NEUTRAL[name]}
        assert torch.equal(pair[1].generate(IDS, **how), plain)
        assert torch.equal(*stored(pair, {"max_new_tokens": 4, name: NEUTRAL[name]}))


def test_the_table_of_refused_settings_holds_nothing_else():
    """A name that the reference does not have would be a slip of the pen."""
    theirs = set(vars(transformers.GenerationConfig())) | set(inspect.signature(
        transformers.GPTNeoForCausalLM.generate).parameters) | set(inspect.signature(
        transformers.GPTNeoForCausalLM.forward).parameters) | {"_commit_hash", "assistant_tokenizer", "trust_remote_code"}
    known = {f.name for f in fields(G.Settings)} | G.REFUSED.keys() | G.WITHOUT_EFFECT
    assert known <= theirs | {"use_mtp"}
    assert not G.REFUSED.keys() & G.WITHOUT_EFFECT


REFUSED = dict(num_beams=4, num_beam_groups=2, guidance_scale=1.5, typical_p=0.9, top_h=0.4, epsilon_cutoff=3e-4,
               eta_cutoff=1e-3, encoder_repetition_penalty=1.2, encoder_no_repeat_ngram_size=2, penalty_alpha=0.6,
               renormalize_logits=True, remove_invalid_values=True, forced_eos_token_id=3, sequence_bias=[[[3], 2.0]],
               exponential_decay_length_penalty=[5, 1.1], watermarking_config={"bias": 2.0}, max_time=3.0,
               force_words_ids=[[3]], constraints=[3], prompt_lookup_num_tokens=3, token_healing=True,
               cache_implementation="quantized", dola_layers="high", diversity_penalty=0.5, forced_bos_token_id=4)


@pytest.mark.parametrize("name", REFUSED)
def test_other_settings_are_refused_by_name(pair, name):
    """From the caller and from the file; None in the call, or what is neutral, switches the file's off."""
    model = pair[1]
    with pytest.raises(ValueError, match=f"^{name}=.* is not supported here, only in transformers"):
        model.generate(IDS, do_sample=True, **{name: REFUSED[name]})
    model.generation_config = {name: REFUSED[name], "do_sample": True}
    try:
        with pytest.raises(ValueError, match=f"^generation_config.json: {name}=.* leave it out or set it to None"):
            model.generate(IDS)
        assert model.generate(IDS, **{name: None}, max_new_tokens=2).shape == (2, 5)
    finally:
        model.generation_config = {}


@pytest.mark.parametrize("name, value", [("streamer", print), ("logits_processor", [print]), ("assistant_model", torch.nn.Linear(1, 1)),
                                         ("return_dict_in_generate", True), ("output_scores", True), ("token_type_ids", IDS),
                                         ("inputs_embeds", torch.zeros(1, 2, 3)), ("position_ids", IDS)])
def test_other_arguments_are_refused_by_name(pair, name, value):
    with pytest.raises(ValueError, match=f"^{name}=.* is not supported here"):
        pair[1].generate(IDS, **{name: value})


def test_an_unknown_setting_lists_the_known_ones(pair):
    with pytest.raises(ValueError, match="'temprature' is not a setting of generate; it knows .*temperature.*min_p"):
        pair[1].generate(IDS, temprature=0.5)


@pytest.mark.parametrize("settings", [
    dict(suppress_tokens=[*range(0, 90, 2)]), dict(no_repeat_ngram_size=2), dict(min_new_tokens=9, eos_token_id=[*range(50)]),
    dict(bad_words_ids=[[i] for i in range(60)]), dict(do_sample=True, min_p=0.3), dict(max_new_tokens=5, max_length=30),
    dict(do_sample=False, temperature=0.3, top_p=0.2, typical_p=0.2, top_k=3), dict(early_stopping=True, length_penalty=2.0),
    dict(do_sample=True, temperature=0.7, top_k=20), dict(repetition_penalty=1.5, begin_suppress_tokens=[*range(50)]),
    dict(eos_token_id=[*range(40)]), dict(eos_token_id=[*range(40)], pad_token_id=3), dict(top_k=5)], ids=str)
@pytest.mark.filterwarnings("ignore")                      # of two lengths, of settings that only sampling reads
def test_settings_in_the_checkpoint_are_the_references(pair, settings):
    """Without an end of text in generation_config.json there is none, whatever config.json says."""
    theirs, mine = stored(pair, settings)
    assert torch.equal(mine, theirs)


def with_files(case, folder, generation, config):
    """The case's checkpoint with another generation_config.json (None: without) and more in config.json."""
    shutil.copytree(saved(case), folder)
    path, old = folder / "generation_config.json", folder / "config.json"
    path.unlink() if generation is None else path.write_text(json.dumps(generation))
    old.write_text(json.dumps(json.loads(old.read_text()) | config))
    return folder


OLD = dict(top_k=5, do_sample=True, suppress_tokens=[*range(0, 60, 2)], repetition_penalty=1.3, max_length=40)


@pytest.mark.parametrize("generation, config", [
    (None, OLD), (None, {"no_repeat_ngram_size": 2, "eos_token_id": 7}), (None, {}), ({}, {}), ({}, OLD), ({"do_sample": True}, OLD),
    ({"eos_token_id": [*range(50)], "pad_token_id": 3}, {}), ({"eos_token_id": None, "top_k": 5}, {}),
    (None, {"eos_token_id": 7, "min_new_tokens": 12, "task_specific_params": {"text-generation": {"top_k": 1}}}),
    (None, {"num_beams": 1, "output_scores": False, "use_cache": True, "bad_words_ids": None, "early_stopping": False})], ids=str)
@pytest.mark.parametrize("seed", [300, 301], ids=["neo", "neox"])
def test_the_files_settings_are_the_references(seed, generation, config, tmp_path):
    """An old config.json's count only without generation_config.json; a saved copy says the same."""
    case = random_case(seed)
    folder = with_files(case, tmp_path / "a", generation, config)
    theirs = REFERENCE[case.family][1].from_pretrained(folder, attn_implementation="eager")
    mine = AutoModelForCausalLM.from_pretrained(folder)
    mine.save_pretrained(tmp_path / "b")
    texts = []
    for model in (theirs, mine, AutoModelForCausalLM.from_pretrained(tmp_path / "b")):
        torch.manual_seed(3)
        texts.append(model.generate(IDS))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[1], texts[2])


def test_the_file_is_named(tmp_path):
    """Where a setting that this project leaves out stands."""
    case = random_case(301)
    for generation, config, name in ((None, {"num_beams": 4}, "config.json"), ({"num_beams": 4}, {}, "generation_config.json")):
        folder = with_files(case, tmp_path / name, generation, config)
        with pytest.raises(ValueError, match=f"^{folder}/{name}: num_beams=4 is not supported here"):
            AutoModelForCausalLM.from_pretrained(folder).generate(IDS)


@pytest.mark.filterwarnings("ignore:both max_new_tokens")
def test_who_wins(pair):
    """The caller before an object, before the file; max_new_tokens before max_length wherever each stands."""
    theirs, mine = pair
    before = theirs.generation_config
    mine.generation_config = {"max_new_tokens": 5, "eos_token_id": 9, "top_k": 3, "do_sample": True}
    theirs.generation_config = transformers.GenerationConfig(**mine.generation_config)
    mixed = transformers.GenerationConfig(top_k=7, no_repeat_ngram_size=2)
    try:
        for how in (dict(max_length=30), dict(generation_config=mixed), dict(generation_config=mixed, top_k=2),
                    dict(eos_token_id=None), dict(do_sample=False), dict(top_k=None)):
            assert torch.equal(*both(pair, IDS, **how)), how
        assert torch.equal(mine.generate(IDS, do_sample=False, generation_config={"no_repeat_ngram_size": 2}),
                           theirs.generate(IDS, do_sample=False, no_repeat_ngram_size=2))
    finally:
        theirs.generation_config, mine.generation_config = before, {}


@pytest.mark.parametrize("eos", [5, [5, 6], (5, 6), torch.tensor(5), torch.tensor([5, 6]), np.array([5, 6]), np.int64(5)], ids=repr)
def test_ids_as_numbers_lists_tuples_tensors_and_arrays(pair, eos):
    as_list = np.asarray(eos).reshape(-1).tolist()
    how = dict(do_sample=True, max_new_tokens=60)
    found = [pair[1].generate(IDS, generator=torch.Generator().manual_seed(3), eos_token_id=ids, pad_token_id=pad, **how)
             for ids, pad in ((eos, torch.tensor(3)), (as_list, 3))]
    assert torch.equal(*found)


def test_settings_are_attributes_too():
    """As people write it for transformers; the object survives copying and pickling."""
    model = ours(random_case(301))
    assert model.generation_config.eos_token_id == 0 and model.generation_config.top_k is None
    model.generation_config.suppress_tokens = [*range(90)]
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.generate(IDS, max_new_tokens=5, eos_token_id=None)[:, 3:].min() >= 90
    assert copy.deepcopy(model).generation_config.suppress_tokens[-1] == 89
    file = io.BytesIO()
    torch.save(model.generation_config, file)
    file.seek(0)
    assert torch.load(file) == model.generation_config     # as the default, weights_only=True, takes it
    with pytest.raises(AttributeError):
        model.generation_config.__array__


@pytest.mark.parametrize("last, mask, rows, warns", [
    (3, None, 2, True), (3, None, 1, False), (4, None, 2, False), (4, [1, 1, 0], 2, True), (3, [1, 1, 1], 2, False)])
def test_padding_on_the_right_warns(pair, last, mask, rows, warns):
    """By the mask where there is one, else by the ids, of a batch; the reference says so at the same prompts."""
    ids = torch.tensor([[5, 6, 7], [5, 6, last]])[2 - rows:]
    mask = None if mask is None else torch.tensor([[1, 1, 1], mask])[2 - rows:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair[1].generate(ids, mask, pad_token_id=3, eos_token_id=5, max_new_tokens=1)
    assert any("ends in padding" in str(w.message) for w in caught) == warns


@pytest.mark.filterwarnings("ignore")
def test_what_follows_padding_on_the_right_is_the_references(pair):
    """Wrong as a text, but the same: both go on from position 0, which the padding has."""
    ids = torch.randint(1, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 6:], mask[1, 9:] = 0, 0
    theirs, mine = pair[0], ours(long_case(pair[0].config.model_type))      # naive: these rows are the definition's alone
    expected, found = (model.generate(ids, attention_mask=mask, pad_token_id=1, eos_token_id=None, max_new_tokens=20)
                       for model in (theirs, mine))
    assert torch.equal(found, expected)


def test_inputs_is_another_name(pair):
    expected = pair[1].generate(IDS)
    assert torch.equal(pair[1].generate(inputs=IDS), expected) and torch.equal(pair[1].generate(input_ids=IDS), expected)
    with pytest.raises(ValueError, match="two names"):
        pair[1].generate(IDS, inputs=IDS)


WRONG = [("eos_token_id", "x"), ("eos_token_id", ["a", "b"]), ("eos_token_id", [[3]]), ("eos_token_id", True), ("eos_token_id", -1),
         ("eos_token_id", 1.5), ("pad_token_id", "x"), ("pad_token_id", [3]), ("bos_token_id", "x"), ("suppress_tokens", "x"),
         ("suppress_tokens", ["x"]), ("suppress_tokens", [True]), ("suppress_tokens", 5), ("begin_suppress_tokens", [-1]),
         ("bad_words_ids", []), ("bad_words_ids", [3]), ("bad_words_ids", [[]]), ("bad_words_ids", [["x"]]), ("bad_words_ids", [[97]]),
         ("temperature", "hot"), ("top_k", "all"), ("top_k", True), ("top_p", "x"), ("min_p", 1.5), ("min_p", "x"),
         ("repetition_penalty", "x"), ("no_repeat_ngram_size", -1), ("no_repeat_ngram_size", 2.5), ("max_new_tokens", "x"),
         ("max_new_tokens", 2.5), ("max_length", "x"), ("min_length", -1), ("min_new_tokens", "x"), ("do_sample", "yes"),
         ("do_sample", 1), ("stop_strings", 5), ("stop_strings", [""]), ("stop_strings", ""), ("num_return_sequences", "x"),
         ("eos_token_id", {"a": 1}), ("max_new_tokens", True)]


@pytest.mark.parametrize("name, value", WRONG, ids=str)
def test_values_of_the_wrong_kind_name_the_setting(pair, name, value):
    """In one line, before anything is computed, with the file where it stands there."""
    model = pair[1]
    how = {} if name == "do_sample" else {"do_sample": True}
    with pytest.raises(ValueError, match=f"^{name} (must be|has) .*") as caught:
        model.generate(IDS, **how, **{name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    if name == "bad_words_ids" and value == [[97]]:
        return
    model.generation_config = {name: value, **how}
    try:
        with pytest.raises(ValueError, match=f"^generation_config.json: {name} must be"):
            model.generate(IDS)
    finally:
        model.generation_config = {}


@pytest.mark.parametrize("how, words", [
    (dict(max_length=3), "within a total length of max_length=3"), (dict(do_sample=True, suppress_tokens=[*range(97)]), "suppress_tokens forbid all"),
    (dict(do_sample=True, eos_token_id=None, no_repeat_ngram_size=1, bad_words_ids=[[i] for i in range(97)]), "bad_words_ids and no_repeat_ngram_size forbid all")])
def test_settings_that_leave_nothing_are_named(pair, how, words):
    with pytest.raises(ValueError, match=words):
        pair[1].generate(IDS, **{"max_new_tokens": None if "max_length" in how else 3} | how)


def test_padding_that_the_model_has_no_row_for(pair):
    """Only a batch is ever padded."""
    with pytest.raises(ValueError, match="pad_token_id is 97"):
        pair[1].generate(IDS, pad_token_id=97, eos_token_id=5)
    assert pair[1].generate(IDS[:1], pad_token_id=97, eos_token_id=5).size(0) == 1


TOGETHER = dict(do_sample=True, max_new_tokens=30, min_p=0.02, no_repeat_ngram_size=2, repetition_penalty=1.2,
                suppress_tokens=[3, 4], min_new_tokens=4, eos_token_id=[5, 6, 7, 8], pad_token_id=0)


def test_the_compiled_step_sees_the_same_settings(pair, monkeypatch):
    """The loop around it, with a step that is not compiled in its place: ended rows stay in."""
    def in_its_place(model, cache):
        def step(new, mask, position_ids):
            return model(new, mask, position_ids, cache=cache, logits_to_keep=1).logits[:, -1]
        step.compiled_unpacking = contextlib.nullcontext
        return step

    monkeypatch.setattr(G, "compiled_step", in_its_place)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    plain, compiled = (pair[1].generate(IDS, mask, compile=compile, generator=torch.Generator().manual_seed(1), **TOGETHER)
                       for compile in (False, True))
    assert torch.equal(plain, compiled)


@pytest.mark.slow
def test_compiled_with_settings_that_look_at_the_text(pair):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    theirs, mine = (model.generate(IDS, attention_mask=mask, **how, **TOGETHER) for model, how in (
        (pair[0], {}), (pair[1], {"compile": True})) if torch.manual_seed(1))
    assert torch.equal(theirs, mine)


# --- stop texts --------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["demo-neo", "demo-neox"])
def demo(request):
    """(the reference and its tokenizer, ours and ours) of a checkpoint that writes words."""
    folder = ROOT / "checkpoints" / request.param
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return ((theirs, transformers.AutoTokenizer.from_pretrained(folder)),
            (AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)))


STOPS = ["the", [" the ", ".\n"], ["e"], ["\n\n"], [":", "zzzz"], ["é", "?"], ["—"]]
WAYS = [dict(), dict(do_sample=True, no_repeat_ngram_size=3, num_return_sequences=2), dict(eos_token_id=None)]


@pytest.mark.parametrize("stops, how", [pytest.param(stops, how, marks=[pytest.mark.slow] * (i % 3 != j))
                                        for i, stops in enumerate(STOPS) for j, how in enumerate(WAYS)], ids=str)
def test_stop_strings_are_the_references(demo, stops, how):
    """A row ends with the token that completes a stop text, which may begin in the token's middle or end there."""
    prompts = ["HAMLET. To be, or not to be", "KING. What is the", "O,"]
    results = []
    for model, tokenizer in demo:
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        torch.manual_seed(2)
        results.append(model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40,
                                      stop_strings=stops, tokenizer=tokenizer, **{"pad_token_id": tokenizer.eos_token_id, **how}))
    assert torch.equal(*results)


def test_stop_strings_need_a_tokenizer(demo):
    with pytest.raises(ValueError, match="stop_strings .* tokenizer="):
        demo[1][0].generate(torch.tensor([[5]]), stop_strings="x")


def test_tokens_that_hold_a_stop_text_in_their_middle():
    """Where in the last token the text begins and ends, and ids without a token, made by hand."""
    class Words:
        words = ["las", "topper", "st", "op", "opera", "x stop y", "", "s", "top", "pped", "to"]

        def convert_ids_to_tokens(self, ids):
            return [self.words[i] if i < len(self.words) else None for i in ids]
    for row, ends in [([0, 1], True), ([2, 3], True), ([2, 4], True), ([2, 3, 7], False), ([5], True), ([7, 8], True),
                      ([7, 10, 9], True), ([2, 6], False), ([2, 3, 6], False), ([2, 99, 3], False), ([99, 2, 3], True)]:
        text = torch.tensor([row])
        assert G.ends_in(text, [b"stop"], Words()).tolist() == [ends], row


def test_a_generator_of_ones_own(pair):
    """The same generator state gives the same text and leaves torch's global one alone."""
    ids, before = torch.tensor([[4, 5, 6]]), torch.get_rng_state()
    texts = [pair[1].generate(ids, do_sample=True, max_new_tokens=30, eos_token_id=None,
                              generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_stream_gives_each_token_when_it_is_chosen(pair):
    """One forward pass a token: nothing is computed ahead of what was asked for."""
    model, ids = pair[1], torch.tensor([[4, 5, 6]])
    settings = G.Settings.of(model, dict(max_new_tokens=10, eos_token_id=None))
    whole = model.generate(ids, max_new_tokens=10, eos_token_id=None)[0, 3:].tolist()
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        for i, token in enumerate(G.stream(model, ids, settings=settings)):
            assert token.tolist() == whole[i:i + 1] and len(passes) == i + 1
    finally:
        hook.remove()


def test_rows_without_a_token_are_not_chosen(pair, monkeypatch):
    """A model's matrix has more rows than its tokenizer has tokens; the command line leaves them out,
    generate does not, as the reference."""
    model, ids = pair[1], torch.tensor([[4, 5, 6]])
    settings = G.Settings.of(model, dict(do_sample=True, top_k=0, max_new_tokens=200, eos_token_id=None))
    draws = {real: [token.item() for token in G.stream(model, ids, settings=settings, real_vocab=real,
                                                       generator=torch.Generator().manual_seed(0))]
             for real in (None, 50)}
    assert max(draws[None]) >= 50 > max(draws[50])

    seen, stream = [], G.stream
    monkeypatch.setattr(generate, "stream", lambda *a, **k: seen.append(k["real_vocab"]) or stream(*a, **k))
    assert generate.main(["HAMLET.", "--model", str(ROOT / "checkpoints" / "demo-neox"), "--max-new-tokens", "1"]) == 0
    assert seen == [1472]


# --- choosing a token, with scores made by hand ---------------------------------------------------

def drawn(scores, n=2000, **settings):
    """The set of ids that n draws from these scores give."""
    settings = G.Settings(do_sample=True, **settings)
    generator = torch.Generator().manual_seed(0)
    return set(G.choose(scores.expand(n, -1), settings, generator).tolist())


SCORES = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]]))


@pytest.mark.parametrize("settings, expected", [
    (dict(top_k=0), {0, 1, 2, 3, 4}), (dict(top_k=None), {0, 1, 2, 3, 4}), (dict(top_k=2), {0, 1}),
    (dict(top_k=99), {0, 1, 2, 3, 4}), (dict(top_p=0.4), {0}), (dict(top_p=0.6), {0, 1}),
    (dict(top_p=0.76), {0, 1, 2}), (dict(top_p=1e-9), {0}), (dict(temperature=1e-4), {0}),
    (dict(top_k=3, top_p=0.99), {0, 1, 2}),
])
def test_which_tokens_can_be_drawn(settings, expected):
    """The smallest set with mass p, its boundary token included; k larger than V is all."""
    assert drawn(SCORES, **settings) == expected


def test_ties_with_the_kth_stay():
    assert drawn(torch.tensor([[2.0, 1, 1, 1, 0]]), top_k=2) == {0, 1, 2, 3}


def test_temperature_scales_the_odds():
    settings = G.Settings(do_sample=True, temperature=0.5, top_k=0)
    ids = G.choose(SCORES.expand(20000, -1), settings, torch.Generator().manual_seed(0))
    share = (ids == 0).float().mean().item()
    expected = (SCORES / 0.5).softmax(-1)[0, 0].item()                 # 0.25 / 0.3458 = 0.72
    assert abs(share - expected) < 0.012                               # 4 standard deviations


def test_penalty_pushes_down_both_signs_once():
    """A negative score is multiplied, a positive one divided, however often the id stands there;
    ids in padding do not count."""
    scores = torch.tensor([[2.0, -2.0, 2.0, 2.0]])
    found = G.penalize(scores, torch.tensor([[3, 0, 0, 1]]), torch.tensor([1]), 2.0)
    assert found.tolist() == [[1.0, -4.0, 2.0, 2.0]]


# --- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("pieces, stops, expected", [
    (["ab", "cSTOPd", "e"], ["STOP"], "abc"), (["abS", "T", "OPd"], ["STOP"], "ab"),
    (["abS", "Tx"], ["STOP"], "abSTx"), (["abST"], ["STOP"], "abST"), (["aab"], ["ab", "a"], ""),
    (["x\n", "\ny"], ["\n\n"], "x"), (["abc"], [], "abc"), (["SSTOP"], ["STOP"], "S"),
])
def test_stop_texts(pieces, stops, expected):
    """Found across pieces, never half shown, not shown themselves."""
    assert "".join(generate.text_until(iter(pieces), stops)) == expected
