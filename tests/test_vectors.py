"""Test vectors are right and the same on each run; the judge of answers is fooled by nothing."""

import json
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import compare
import vectors as V
from diagnose import trace
from mistakes import planted, variants


@pytest.fixture(scope="session")
def folder(vectors_folder):
    return vectors_folder


@pytest.fixture(scope="session")
def right(folder, tmp_path_factory):
    """The answers of a right port: those of the vectors themselves."""
    answers = tmp_path_factory.mktemp("right")
    for case in V.CASES:
        shutil.copytree(folder / case / "npy", answers / case)
        shutil.copy(folder / case / "npy" / "logits.npy", answers / case / "cached_logits.npy")
        shutil.copy(folder / case / "greedy.json", answers / case)
    for name in V.TOKENIZERS:
        cases = json.loads((folder / name / "cases.json").read_text())["cases"]
        (answers / name).mkdir()
        (answers / name / "ids.json").write_text(json.dumps([case["ids"] for case in cases]))
    return answers


@pytest.fixture
def answers(right, tmp_path):
    return shutil.copytree(right, tmp_path / "answers")


def check(folder, answers, capsys, *more):
    status = compare.main(["--check-vectors", str(folder), str(answers), *map(str, more)])
    out, err = capsys.readouterr()
    return status, out, err


# ------------------------------------------------------------------------------------------------
# What is written
# ------------------------------------------------------------------------------------------------

def test_the_same_bytes_at_each_run_and_few_of_them(folder, tmp_path):
    V.write_vectors(tmp_path / "again")
    files = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    again = [p.relative_to(tmp_path / "again") for p in sorted((tmp_path / "again").rglob("*"))
             if p.is_file()]
    assert files == again
    assert all((folder / p).read_bytes() == (tmp_path / "again" / p).read_bytes() for p in files)
    assert sum((folder / p).stat().st_size for p in files) <= 8e6


@pytest.mark.parametrize("case", V.CASES)
def test_answers_are_transformers_own(case, folder):
    """Logits and hidden states to the bit, greedy ids with transformers' cache and without ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / case, attn_implementation="eager").eval()
    saved = load_file(folder / case / "answers.safetensors")
    task = json.loads((folder / case / "greedy.json").read_text())
    with torch.no_grad():
        out = model(saved["input_ids"], output_hidden_states=True)
        ids = model.generate(torch.tensor([task["prompt"]]), max_new_tokens=V.NEW, do_sample=False)
    assert torch.equal(out.logits, saved["logits"])
    for i, x in enumerate(out.hidden_states):
        assert torch.equal(x, saved[f"hidden_states.{i}"])
    assert ids[0, V.PROMPT:].tolist() == task["continuation"] == task["cached_continuation"]
    assert task["smallest_lead"] > 0.02 and max(task["continuation"]) < V.TOKENS


@pytest.mark.parametrize("case", V.CASES)
def test_arrays_are_those_of_the_safetensors(case, folder):
    for suffix, dtype in (("", torch.float32), ("-float64", torch.float64)):
        saved = load_file(folder / case / f"answers{suffix}.safetensors")
        assert {p.stem for p in (folder / case / f"npy{suffix}").iterdir()} == saved.keys()
        for name, x in saved.items():
            array = torch.from_numpy(np.load(folder / case / f"npy{suffix}" / f"{name}.npy"))
            assert torch.equal(array, x[0]) and x.dtype in (dtype, torch.int64)
    single = load_file(folder / case / "answers.safetensors")["logits"]
    assert 0 < (single - saved["logits"]).norm() / saved["logits"].norm() < 2e-6


def test_the_cases_hide_nothing():
    configs = list(V.CASES.values())
    neo = [c for c in configs if c.model_type == "gpt_neo"]
    neox = [c for c in configs if c.model_type == "gpt_neox"]
    assert {c.head_dim for c in configs} == {12}
    assert {c.hidden_size for c in configs} == {36, 48, 60}
    assert {c.windows[0] for c in neo} == {c.windows[-1] for c in neo} == {None, 7}
    assert all(length % 7 for length in (V.T, V.PROMPT, V.PROMPT + V.NEW)) and V.T > 4 * 7
    assert {c.rotary_ndims for c in neox} == {4, 6, 12}
    assert {c.use_parallel_residual for c in neox} == {True, False}
    assert {c.attention_bias for c in neox} == {True, False}
    for family in (neo, neox):
        assert {c.tie_word_embeddings for c in family} == {True, False}
    assert ({c.activation_function for c in neo} | {c.hidden_act for c in neox}
            == {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"})
    assert V.ROWS > V.TOKENS and {c.vocab_size for c in configs} == {V.ROWS}
    assert all(c.intermediate_size != 4 * c.hidden_size for c in configs)


@pytest.mark.parametrize("case", V.CASES)
def test_rows_without_a_token_are_small_and_not_zero(case, folder):
    """As in official checkpoints, so that a port may choose among all rows or among the tokens."""
    logits = load_file(folder / case / "answers.safetensors")["logits"][0]
    assert logits.argmax(-1).max() < V.TOKENS and logits[:, V.TOKENS:].abs().min() > 0
    assert logits[:, V.TOKENS:].norm(dim=0).max() < 0.5 * logits.norm(dim=0).mean()


def test_tokenizer_cases_are_transformers_own(folder):
    for name in V.TOKENIZERS:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        for case in json.loads((folder / name / "cases.json").read_text())["cases"]:
            assert tokenizer.encode(case["text"]) == case["ids"], case["text"]


def made(model, ids, patches):
    with planted(patches):
        return V.answers(model, ids)["logits"]


@pytest.mark.parametrize("number, case", list(enumerate(V.CASES)))
def test_every_mistake_is_far_outside_the_tolerance(number, case):
    """The mildest one costs 2.5e-5; all but those that this case's config makes the same model."""
    seed, config = V.FIRST_SEED + number, V.CASES[case]
    model, ids = V.random_model(config, seed), V.make_ids(seed, 1, V.T, V.TOKENS)
    right = made(model, ids, [])
    for mistake, patches in variants(model):
        cost = ((made(model, ids, patches) - right).nan_to_num().norm() / right.norm()).item()
        same = case == "neox-sequential" and mistake.id in (
            "rotary-all-dims", "rotary-last-dims", "rotary-denominator")
        assert (cost == 0) if same else cost > 2 * V.TOLERANCE, mistake.id


def test_a_folder_that_holds_something_is_left_alone(folder, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (folder, tmp_path / "file"):
        assert compare.main(["--vectors", str(path)]) == 2
        assert "is there already" in capsys.readouterr().err
    assert not list(folder.parent.glob(".vectors.*"))


# ------------------------------------------------------------------------------------------------
# What is judged
# ------------------------------------------------------------------------------------------------

def test_right_answers_pass(folder, right, capsys, tmp_path):
    status, out, err = check(folder, right, capsys, "--junit", tmp_path / "report.xml")
    assert status == 0 and "WRONG" not in out and "56 passed, 0 failed" in out and not err
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()
    assert suite.attrib["tests"] == str(len(suite)) == "56" and suite.attrib["failures"] == "0"


def test_logits_in_float64_or_a_safetensors_file_pass(folder, tmp_path, capsys):
    for i, case in enumerate(V.CASES):
        (tmp_path / case).mkdir()
        saved = load_file(folder / case / "answers-float64.safetensors")
        if i % 2:
            save_file(saved, tmp_path / case / "answers.safetensors")
        else:
            big = saved["logits"][0].numpy().astype(">f8" if i else "<f4")
            np.save(tmp_path / case / "logits.npy", np.asfortranarray(big))
    assert check(folder, tmp_path, capsys)[0] == 0


@pytest.mark.parametrize("case, mistake", [("neo-local-first", "scaled-scores"),
                                           ("neox-parallel", "qkv-thirds")])
@pytest.mark.parametrize("names", [("logits",), ("cached_logits",), ("logits", "hidden_states")])
def test_a_mistake_is_named_in_the_table_and_in_xml(case, mistake, names, folder, answers, capsys,
                                                    tmp_path):
    """From all that was saved, from logits alone, and where only the cached form makes it."""
    number = list(V.CASES).index(case)
    model = V.random_model(V.CASES[case], V.FIRST_SEED + number)
    ids = V.make_ids(V.FIRST_SEED + number, 1, V.T, V.TOKENS)
    patches = next(patches for m, patches in variants(model) if m.id == mistake)
    with planted(patches):
        wrong = V.answers(model, ids)
    if "cached_logits" in names:
        np.save(answers / case / "cached_logits.npy", wrong["logits"][0].numpy())
    else:
        shutil.rmtree(answers / case)
        (answers / case).mkdir()
        for name, x in wrong.items():
            if name.startswith(names):
                np.save(answers / case / f"{name}.npy", x[0].numpy())
    status, out, _ = check(folder, answers, capsys, "--junit", tmp_path / "report.xml")
    assert status == 1 and out.count("mistake: ") == 1 and f"mistake: {mistake}: " in out
    failures = ElementTree.parse(tmp_path / "report.xml").findall("testcase/failure")
    assert failures and all(f"mistake: {mistake}" in f.attrib["message"] for f in failures)
    assert all("instead: " in f.text for f in failures)


def array(change):
    """An edit of logits.npy, given as a function of the array."""
    def edit(case):
        np.save(case / "logits.npy", change(np.load(case / "logits.npy")))
    return edit


def content(name, data):
    def edit(case):
        (case / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return edit


def spoilt(x, value):
    x[3, 4] = value
    return x


def as_folder(case):
    (case / "logits.npy").unlink()
    (case / "logits.npy").mkdir()


HEADER = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
ANSWERS = {
    "no logits": (lambda case: (case / "logits.npy").unlink(), "not answered"),
    "no folder": (shutil.rmtree, "not answered"),
    "a folder": (as_folder, "logits.npy cannot be read"),
    "empty": (content("logits.npy", ""), "logits.npy cannot be read"),
    "text": (content("logits.npy", "0.5 0.25"), "logits.npy cannot be read"),
    "a pickle": (content("logits.npy", b"\x80\x04K\x01."), "logits.npy cannot be read"),
    "a zip": (content("logits.npy", b"PK\x03\x04" + b"\0" * 60), "logits.npy cannot be read"),
    "half": (content("logits.npy", (HEADER % b"31, 104").ljust(127) + b"\n12345"), "cannot be read"),
    "huge": (content("logits.npy", (HEADER % b"31, 10**15").ljust(127) + b"\n"), "cannot be read"),
    "huger": (content("logits.npy", (HEADER % b"9999999999999, 9").ljust(127) + b"\n"), "cannot be read"),
    "header": (content("logits.npy", b"\x93NUMPY\x01\x00\x14\x00{'descr': '<f4', \n(("), "cannot be read"),
    "negative": (content("logits.npy", (HEADER % b"-1, 104").ljust(127) + b"\n"), "cannot be read"),
    "shape": (array(lambda x: x[:-1]), "shape (30, 104), expected (31, 104)"),
    "tokens only": (array(lambda x: x[:, :101]), "shape (31, 101), expected (31, 104)"),
    "flat": (array(np.ravel), "shape (3224,), expected (31, 104)"),
    "one number": (array(lambda x: x[0, 0]), "shape (), expected (31, 104)"),
    "nothing": (array(lambda x: x[:0]), "shape (0, 104), expected (31, 104)"),
    "transposed": (array(lambda x: x.T), "shape (104, 31), expected (31, 104)"),
    "NaN": (array(lambda x: spoilt(x, np.nan)), "holds NaN or infinite numbers"),
    "infinite": (array(lambda x: spoilt(x, np.inf)), "holds NaN or infinite numbers"),
    "integers": (array(lambda x: x.astype(np.int32)), "its numbers are torch.int32"),
    "complex": (array(lambda x: x + 0j), "its numbers are complex64, and float32 is expected"),
    "strings": (array(lambda x: x.astype("U4")), "its numbers are <U4, and float32 is expected"),
    "long double": (array(lambda x: x.astype(np.longdouble)), "and float32 is expected"),
    "half precision": (array(lambda x: x.astype(np.float16)), "WRONG  2."),
    "zeros": (array(np.zeros_like), "WRONG  1.0e+00"),
    "a typing error": (lambda case: (case / "hidden_states.1.npy").rename(case / "hidden_state.1.npy"),
                       "hidden_state.1   WRONG  no answer has this name"),
    "a layer more": (lambda case: shutil.copy(case / "hidden_states.3.npy", case / "hidden_states.4.npy"),
                     "hidden_states.4  WRONG  no answer has this name"),
    "other ids": (lambda case: np.save(case / "input_ids.npy", np.arange(31)), "these are not the ids"),
    "safetensors": (content("answers.safetensors", b"\xff" * 30), "answers.safetensors is not a whole"),
    "greedy text": (content("greedy.json", "{"), "greedy.json is not valid JSON"),
    "greedy bytes": (content("greedy.json", b"\xff\xfe"), "greedy.json is not valid JSON"),
    "greedy deep": (content("greedy.json", "[" * 100000), "greedy.json"),
    "greedy list": (content("greedy.json", "[1, 2]"), "greedy.json"),
    "greedy empty": (content("greedy.json", "{}"), "greedy.json has no continuation"),
    "greedy null": (content("greedy.json", '{"continuation": null}'), "greedy           WRONG  not a list"),
    "greedy other": (content("greedy.json", '{"continuation": [1e400, "a"]}'), "number 0 is Infinity, expected"),
    "greedy short": (content("greedy.json", '{"continuation": []}'), "number 0 is nothing, expected"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_bad_answers_are_failed_verdicts(name, folder, answers, capsys, tmp_path):
    """One line of the table names what is wrong; the other cases are judged all the same."""
    edit, said = ANSWERS[name]
    edit(answers / "neo-global-first")
    status, out, err = check(folder, answers, capsys, "--junit", tmp_path / "report.xml")
    assert status == 1 and said in out and not err and "mistake: " not in out
    if said == "not answered" or "shape" in said or "cannot be read" in said:
        assert "none of the known mistakes" not in out     # nothing was there to look at
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()
    failed = [case.attrib["classname"] for case in suite if case.find("failure") is not None]
    assert set(failed) == {"neo-global-first"} and suite.attrib["failures"] == str(len(failed))


@pytest.mark.parametrize("text, said", [
    ("[[1]]", "number 0 is [1], expected ["), ("{}", "not a list"), ("[", "ids.json"),
    ("null", "not a list"), ('["\\u0000\\ud800"]', "expected [")])
def test_bad_tokenizer_answers_are_failed_verdicts(text, said, folder, answers, capsys, tmp_path):
    (answers / "tokenizer-demo-neo" / "ids.json").write_text(text)
    status, out, _ = check(folder, answers, capsys, "--junit", tmp_path / "report.xml")
    assert status == 1 and said in out and out.count("WRONG") == 1
    assert len(ElementTree.parse(tmp_path / "report.xml").findall("testcase/failure")) == 1


def test_answers_of_unknown_cases_are_not_passed_over(folder, answers, capsys, tmp_path):
    (answers / "neo-global\x01\nlast").mkdir()
    (answers / "notes.txt").write_text("a file beside the cases is no answer")
    status, out, _ = check(folder, answers, capsys, "--junit", tmp_path / "report.xml")
    assert status == 1 and "has no case of this name" in out and out.count("WRONG") == 1
    ElementTree.parse(tmp_path / "report.xml")


@pytest.mark.parametrize("edit, named", [
    (lambda folder: (folder / "vectors.json").unlink(), "holds no test vectors"),
    (content("vectors.json", "["), "vectors.json is not valid JSON"),
    (content("vectors.json", "{}"), "vectors.json has no cases"),
    (content("neo-local-first/answers.safetensors", "nothing"), "answers.safetensors is not a whole"),
    (lambda folder: (folder / "neo-local-first/answers.safetensors").unlink(), "answers.safetensors"),
    (lambda folder: save_file({"logits": torch.ones(1, 2, 3)}, folder / "neo-local-first/answers.safetensors"),
     "answers.safetensors is not whole"),
    (content("neo-local-first/greedy.json", "{}"), "greedy.json has no continuation"),
    (content("tokenizer-demo-neo/cases.json", "[]"), "cases.json"),
    (content("tokenizer-demo-neo/cases.json", '{"cases": [3]}'), "cases.json"),
    (shutil.rmtree, "holds no test vectors"),
], ids=list("0123456789"))
def test_damaged_vectors_are_one_line(edit, named, folder, right, capsys, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "vectors")
    edit(damaged)
    status, out, err = check(damaged, right, capsys)
    assert status == 2 and not out and err.count("\n") == 1 and named in err


def test_bad_arguments_are_one_line(folder, tmp_path, capsys):
    status, out, err = check(folder, tmp_path / "none", capsys)
    assert status == 2 and "no folder" in err and not out
    with pytest.raises(SystemExit):
        compare.main(["--vectors", str(tmp_path / "v"), "--junit", "x.xml"])


def test_a_damaged_checkpoint_is_named(folder, answers, capsys, tmp_path):
    """It is read only to look for a mistake."""
    damaged = shutil.copytree(folder, tmp_path / "vectors")
    (damaged / "neox-parallel" / "config.json").write_text("{")
    path = answers / "neox-parallel" / "logits.npy"
    np.save(path, np.load(path) * 2)
    status, _, err = check(damaged, answers, capsys)
    assert status == 2 and "config.json" in err and err.count("\n") == 1


def test_trace_is_what_the_hidden_states_are(folder):
    """What block L - 1 returns before the final norm is not asked of a port."""
    model = V.random_model(V.CASES["neox-parallel"], V.FIRST_SEED)
    rows = trace(model, torch.tensor([[1, 2, 3]]))
    names = ["logits", *(f"hidden_states.{i}" for i in range(4))]
    assert list(V.answers(model, torch.tensor([[1, 2, 3]]))) == names and len(rows) == 6
