"""The six task heads are the reference's: logits, losses, gradients, files."""

import functools
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import neo
import neox
import task_heads as heads
from conftest import ROOT
from helpers import FLOATS, FOLDER, random_case, relative, saved, widen
from load_weights import NAMES, AutoModelForCausalLM, AutoModelForSequenceClassification, our_name

TASKS = ["SequenceClassification", "TokenClassification", "QuestionAnswering"]
PAD = 96                                                    # the ids of random_case go from 1 to 96
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in FLOATS]
CASES = [random_case(seed) for seed in (0, 1, 4, 5)]        # two of each family
PREFIX = {"gpt_neo": "GPTNeoFor", "gpt_neox": "GPTNeoXFor"}
MODULES = {"gpt_neo": neo, "gpt_neox": neox}


@functools.cache
def head_folder(case, task, labels=3, **extra):
    """The reference's own files of a model with this head."""
    settings = dict(case.settings)
    config_class = {"gpt_neo": transformers.GPTNeoConfig, "gpt_neox": transformers.GPTNeoXConfig}[case.family]
    config = config_class(**settings | {"pad_token_id": PAD, "num_labels": labels} | extra)
    model = widen(getattr(transformers, PREFIX[case.family] + task)(config), case.seed)
    folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
    model.save_pretrained(folder)
    return folder


def theirs(case, task, folder, dtype=torch.float32):
    return getattr(transformers, PREFIX[case.family] + task).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager").eval()


def ours(case, task, folder, dtype=torch.float32, backend="naive", **how):
    return getattr(MODULES[case.family], PREFIX[case.family] + task).from_pretrained(
        folder, torch_dtype=dtype, attn_implementation=backend, **how)


def batch(case, side):
    """Three rows of different length, padded on a side.  -> ids, mask (3, 24)"""
    ids = torch.randint(1, 90, (3, 24), generator=torch.Generator().manual_seed(case.seed))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((15, 1, 0)):
        if side != "none":
            mask[row, slice(0, pads) if side == "left" else slice(24 - pads, 24)] = 0
    return ids.masked_fill(mask == 0, PAD), mask


PROBLEMS = {                                                # num_labels, problem_type, labels for three rows
    "regression": (1, None, torch.tensor([0.3, -1.0, 2.5])),
    "regression of three": (3, "regression", torch.tensor([[0.3, -1.0, 2.5]] * 3)),
    "single": (3, None, torch.tensor([2, 0, 1])),
    "single, one left out": (3, "single_label_classification", torch.tensor([2, -100, 1])),
    "multi": (3, None, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1]])),
}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{c.seed}")
def test_sequence_classification(case, problem, dtype, side):
    count, kind, labels = PROBLEMS[problem]
    folder = head_folder(case, TASKS[0], count, **({} if kind is None else {"problem_type": kind}))
    ids, mask = batch(case, side)
    labels = labels.to(dtype) if labels.is_floating_point() else labels
    with torch.no_grad():
        expected = theirs(case, TASKS[0], folder, dtype)(ids, attention_mask=mask, labels=labels)
        found = ours(case, TASKS[0], folder, dtype)(ids, attention_mask=mask, labels=labels)
    assert found.logits.shape == (3, count) and torch.equal(found.logits, expected.logits)
    assert found.loss.dtype == expected.loss.dtype and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{c.seed}")
def test_token_classification(case, dtype, side):
    """In evaluation, and in training mode with dropout from the same seed."""
    folder = head_folder(case, TASKS[1])
    ids, mask = batch(case, side)
    labels = (ids % 3).masked_fill(mask == 0, -100)
    expected, found = theirs(case, TASKS[1], folder, dtype), ours(case, TASKS[1], folder, dtype)
    for training in (False, True):
        outs = []
        for model in (expected, found):
            torch.manual_seed(0)
            with torch.no_grad():
                outs.append(model.train(training)(ids, attention_mask=mask, labels=labels))
        assert torch.equal(outs[1].logits[mask.bool()], outs[0].logits[mask.bool()])
        assert outs[1].loss.dtype == outs[0].loss.dtype and torch.equal(outs[1].loss, outs[0].loss)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{c.seed}")
def test_question_answering(case, dtype, side):
    """Positions inside, beyond the text (ignored), negative (0), with an extra dimension; all ignored is NaN."""
    folder = head_folder(case, TASKS[2])
    ids, mask = batch(case, side)
    expected, found = theirs(case, TASKS[2], folder, dtype), ours(case, TASKS[2], folder, dtype)
    real = mask.bool()
    for start, end in [([16, 3, 5], [20, 4, 5]), ([24, 3, -7], [99, 99, 5]), ([[1], [2], [3]], [[4], [5], [6]])]:
        positions = dict(start_positions=torch.tensor(start), end_positions=torch.tensor(end))
        with torch.no_grad():
            a, b = (model(ids, attention_mask=mask, **positions) for model in (expected, found))
        assert b.start_logits.shape == ids.shape and b.logits is None
        assert torch.equal(b.start_logits[real], a.start_logits[real])
        assert torch.equal(b.end_logits[real], a.end_logits[real])
        assert torch.equal(b.loss, a.loss)
    nowhere = torch.full((3,), 24)
    assert found(ids, attention_mask=mask, start_positions=nowhere, end_positions=nowhere).loss.isnan()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{c.seed}")
def test_gradients(case, task):
    """Every parameter's gradient, backbone and head, within 1e-6 of the reference's."""
    folder, (ids, mask) = head_folder(case, task), batch(case, "right")
    labels = {"SequenceClassification": dict(labels=torch.tensor([2, 0, 1])),
              "TokenClassification": dict(labels=(ids % 3).masked_fill(mask == 0, -100)),
              "QuestionAnswering": dict(start_positions=torch.tensor([1, 2, 3]), end_positions=torch.tensor([4, 4, 4]))}
    expected, found = theirs(case, task, folder), ours(case, task, folder)
    for model in (expected, found):
        model(ids, attention_mask=mask, **labels[task]).loss.backward()
    grads = {name: p.grad for name, p in found.named_parameters()}
    for name, p in expected.named_parameters():
        mine = grads[our_name(name, NAMES[case.family])]
        assert (mine is None) == (p.grad is None)
        if p.grad is not None and p.grad.norm() > 1e-5:
            assert relative(mine, p.grad) <= 1e-6, name


@pytest.mark.parametrize("case", CASES[:2], ids=lambda c: c.family)
def test_where_a_text_ends(case):
    """Padding is known by its id: an eos that is also the pad is skipped, alone it is the last token."""
    ids = torch.tensor([[5, 6, 7, PAD, PAD], [PAD, PAD, 5, 6, 7], [5, PAD, 6, 7, 8], [PAD] * 5])
    model = ours(case, TASKS[0], head_folder(case, TASKS[0]))
    assert model.last_token(ids, torch.zeros(4, 5, 1)).tolist() == [2, 4, 4, 0]
    alone = ours(case, TASKS[0], head_folder(case, TASKS[0], pad_token_id=None))
    assert alone.config.pad_token_id is None and alone.last_token(ids[:1], torch.zeros(1, 5, 1)).tolist() == [4]
    assert torch.equal(alone(ids[:1]).logits, theirs(case, TASKS[0], head_folder(case, TASKS[0], pad_token_id=None))(ids[:1]).logits)
    with pytest.raises(ValueError, match="2 texts at once need to know which token is padding.*pad_token_id"):
        alone(ids[:2])
    assert ours(case, TASKS[0], head_folder(case, TASKS[0], pad_token_id=None), pad_token_id=7)(ids).logits.shape == (4, 3)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", PREFIX)
def test_a_causal_checkpoint_gets_a_fresh_head(family, task):
    """And a warning that names it; everything else is the checkpoint's.  The same seed draws the same head."""
    case = random_case(3, family)
    head = {"SequenceClassification": "score.weight", "TokenClassification": "classifier.weight, classifier.bias",
            "QuestionAnswering": "qa_outputs.weight, qa_outputs.bias"}[task]
    models, folder = [], saved(case)
    for _ in range(2):
        torch.manual_seed(5)
        with pytest.warns(UserWarning, match=f"^{head}: not in .*, so drawn at random"):
            models.append(ours(case, task, folder, torch.bfloat16, num_labels=4, pad_token_id=0))
    model, state = models[0], AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]) and tensor.dtype == torch.bfloat16
        assert not name.startswith("transformer.") or torch.equal(tensor, state[name])
    fresh = getattr(model, model.head)
    assert fresh.weight.shape[0] == (2 if task == "QuestionAnswering" else 4)
    assert 0.3 * 0.02 < fresh.weight.float().std() < 3 * 0.02
    assert fresh.bias is None or not fresh.bias.any()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", PREFIX)
def test_files_in_both_directions(family, task, tmp_path):
    """Ours opens in transformers and theirs here, labels and all, without a word of warning."""
    case = random_case(3, family)
    folder = head_folder.__wrapped__(case, task, 3, id2label={0: "comedy", 1: "tragedy", 2: "history"},
                                     label2id={"comedy": 0, "tragedy": 1, "history": 2})
    ids = torch.randint(1, 90, (1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = ours(case, task, folder)
        model.save_pretrained(tmp_path)
        again = ours(case, task, tmp_path)
    assert model.config.num_labels == 3 and model.config.id2label[2] == "history"
    assert again.config == model.config
    back = theirs(case, task, tmp_path)
    assert back.config.id2label == model.config.id2label and back.config.label2id["history"] == 2
    with torch.no_grad():
        expected, found = theirs(case, task, folder)(ids), back(ids)
    for name in ("logits", "start_logits"):
        if getattr(expected, name, None) is not None:
            assert torch.equal(getattr(found, name), getattr(expected, name))
            assert torch.equal(getattr(again(ids), name), getattr(expected, name))
    # the backbone of a classifier by itself, as the reference reads it
    base = getattr(MODULES[family], PREFIX[family].removesuffix("For") + "Model").from_pretrained(folder)
    assert base(ids).last_hidden_state.shape[:2] == ids.shape


@pytest.mark.parametrize("family", PREFIX)
def test_labels_of_a_config(family):
    config_class = MODULES[family].__dict__[PREFIX[family].removesuffix("For") + "Config"]
    assert config_class().num_labels == 2 and "id2label" not in config_class().to_dict()
    assert config_class(num_labels=5).to_dict()["id2label"]["4"] == "LABEL_4"
    assert config_class.from_dict({"id2label": {"0": "a", "1": "b", "2": "c"}}).num_labels == 3
    for bad, words in [(dict(num_labels=0), "'num_labels' must be at least 1"), (dict(id2label={1: "a"}), "without a gap"),
                       (dict(id2label={"x": "a"}), "without a gap"), (dict(num_labels=3, id2label={0: "a"}), "names 1"),
                       (dict(problem_type="ranking"), "supported: regression"), (dict(id2label=["a"]), "must be dict or null")]:
        with pytest.raises(ValueError, match=words):
            config_class(**bad)


def test_bad_labels_and_arguments():
    """Errors in words, with the numbers."""
    case = CASES[0]
    ids, mask = batch(case, "none")
    sequence, token, answer = (ours(case, task, head_folder(case, task)) for task in TASKS)
    for call, words in [
            (lambda: sequence(ids, labels=torch.tensor([0, 3, 1])), "labels must be 0 to 2.*got 3"),
            (lambda: sequence(ids, labels=torch.tensor([0, 1])), r"one class id each of \(batch,\) = \(3,\)"),
            (lambda: sequence(ids, labels=torch.tensor([0.0, 1.0, 1.0])), r"shape \(3, 3\) of the logits"),
            (lambda: token(ids, labels=torch.tensor([0, 1, 2])), r"\(batch, tokens\) = \(3, 24\)"),
            (lambda: answer(ids, start_positions=torch.tensor([1]), end_positions=torch.tensor([1])), "one index for each of 3"),
            (lambda: sequence(ids, labels=torch.ones(3, 3) > 0), r"must be 0.0 and 1.0 \(.float\(\) .*got torch.bool"),
            (lambda: sequence(ids, labels=[0, 1, 2]), "^labels must be a tensor, got list"),
            (lambda: token(ids, labels=ids.tolist()), "^labels must be a tensor, got list"),
            (lambda: answer(ids, start_positions=[1, 1, 1], end_positions=[1, 1, 1]), "^start_positions must be a tensor"),
            (lambda: ours(case, TASKS[0], saved(case), labels=3), "takes no labels"),
            (lambda: ours(case, TASKS[0], head_folder(case, TASKS[0]), num_labels=5), r"score.weight has shape \(3, .*expected \(5")]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("family", PREFIX)
def test_auto_model(family):
    case = random_case(3, family)
    model = AutoModelForSequenceClassification.from_pretrained(head_folder(case, TASKS[0]))
    assert type(model).__name__ == PREFIX[family] + TASKS[0] and isinstance(model, heads.ForSequenceClassification)
    fused = ours(case, TASKS[0], head_folder(case, TASKS[0]))
    ids, mask = batch(case, "left")
    assert relative(model(ids, attention_mask=mask).logits, fused(ids, attention_mask=mask).logits) < 1e-5


def test_changes_of_the_config():
    """What the file says of the same thing in other words does not stand against them."""
    folder = ROOT / "checkpoints" / "demo-neo"
    model = AutoModelForCausalLM.from_pretrained(folder, attention_types=[[["local"], 4]], window_size=8)
    assert model.config.windows == [8] * 4
    with pytest.raises(ValueError, match="takes no window, and GPTNeoConfig has no such field"):
        AutoModelForCausalLM.from_pretrained(folder, window=8)
