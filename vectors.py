"""Test vectors: small checkpoints and the right answers, for ports in any language.

    python compare.py --vectors DIR                        writes them
    python compare.py --check-vectors DIR ANSWERS          judges what a port answered

DIR needs neither Python nor a network: checkpoints in the official format, ids, logits and hidden
states as .npy and .safetensors, greedy continuations and tokenizer cases as JSON, and a README that
says how to read and judge them.  The weights are wide random numbers and the shapes are odd, so
that no mistake hides: heads of width 12, a window that divides no length, rotary positions on part
of a head and on all of it, both forms of the residual, tied and untied heads, and vocabularies with
more rows than tokens.  examples/port.c is a port that answers them, and docs/checking-a-port.md
explains how to use them.

    T tokens · C width · V vocabulary (rows) · L layers
"""

import functools
import json
import os
import shutil
import tempfile
import tokenize
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from safetensors.torch import save_file

from commands import check_folder, not_a_command
from diagnose import as_dicts, diagnose, explained, make_ids, rows_of, tensors_of, trace
from files import error_line, plain, read_json, write_result
from load_weights import AutoModelForCausalLM, AutoTokenizer, read_tensors
from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM

T, PROMPT, NEW = 31, 9, 20                 # tokens of the ids, of the prompt, and new ones
TOKENS, ROWS = 101, 104                    # ids that a tokenizer gives, and rows of the vocabulary
FIRST_SEED = 7                             # with it the likeliest id is always clearly ahead
TOLERANCE = 1e-5
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"

SHARED = dict(vocab_size=ROWS, max_position_embeddings=64, intermediate_size=100, bos_token_id=0,
              eos_token_id=None)
NEO = SHARED | dict(num_layers=3, window_size=7)
NEOX = SHARED | dict(num_hidden_layers=3)
CASES = {
    "neo-global-first": GPTNeoConfig(
        **NEO, hidden_size=36, num_heads=3,
        attention_types=[[["global", "local", "global"], 1]]),
    "neo-local-first": GPTNeoConfig(
        **NEO, hidden_size=48, num_heads=4, tie_word_embeddings=False,
        attention_types=[[["local", "global", "local"], 1]]),
    "neox-parallel": GPTNeoXConfig(
        **NEOX, hidden_size=36, num_attention_heads=3, rotary_pct=0.5),
    "neox-parallel-tied": GPTNeoXConfig(
        **NEOX, hidden_size=48, num_attention_heads=4, rotary_pct=1 / 3, hidden_act="gelu_fast",
        tie_word_embeddings=True),
    "neox-sequential": GPTNeoXConfig(
        **NEOX, hidden_size=60, num_attention_heads=5, rotary_pct=1.0, rotary_emb_base=500,
        use_parallel_residual=False, attention_bias=False),
    "neox-sequential-biased": GPTNeoXConfig(
        **NEOX, hidden_size=36, num_attention_heads=3, rotary_pct=0.5, rotary_emb_base=500,
        use_parallel_residual=False, hidden_act="gelu_pytorch_tanh"),
}
TEXTS = ["HAMLET.", " to be, or not to be", "don't", "  two  spaces", "\n\n", "naïve café", "日本語",
         "🙂🙃", "x" * 40, "<|endoftext|>", "a<|endoftext|>b", "1234567890", "tab\tand\r\nline", "",
         "e\u0301", "\u00a0", "…"]


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------

def draw_weights(model, seed):
    """Draw all weights with a standard deviation of 0.2, norm weights around 1: nothing is neutral.

    The rows of the vocabulary without a token are small, so that they are never the likeliest.  They
    are small in the official checkpoints too, because nothing has trained them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.normal_(0, 0.2, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                p += 1
            if len(p) == ROWS:
                p[TOKENS:] *= 0.1
    return model.eval()


def random_model(config, seed):
    """A model of this shape with wide random weights and naive attention."""
    kind = GPTNeoForCausalLM if isinstance(config, GPTNeoConfig) else GPTNeoXForCausalLM
    return draw_weights(kind(config, attn_implementation="naive"), seed)


def answers(model, ids):
    """{name: tensor}: logits (1, T, V) and hidden_states.0 to .L, each (1, T, C)."""
    return tensors_of(trace(model, ids))


@torch.no_grad()
def greedy(model, prompt):
    """The likeliest ids that follow the prompt (1, PROMPT), without a cache: a list of NEW ids.

    Also the smallest lead of a chosen logit over the second best.
    """
    ids, lead = prompt, float("inf")
    for _ in range(NEW):
        best = model(ids).logits[:, -1].topk(2)
        lead = min(lead, (best.values[0, 0] - best.values[0, 1]).item())
        ids = torch.cat([ids, best.indices[:, :1]], 1)
    return ids[0, PROMPT:].tolist(), lead


def write_case(folder, config, seed):
    """Write one checkpoint with its ids and answers."""
    model = random_model(config, seed)
    model.save_pretrained(folder)
    ids = make_ids(seed, 1, T, TOKENS)
    for suffix in ("", "-float64"):
        right = answers(model.double() if suffix else model, ids)
        write_result(folder / f"answers{suffix}.safetensors",
                     functools.partial(save_file, {"input_ids": ids, **right}))
        arrays = folder / f"npy{suffix}"
        arrays.mkdir()
        for name, x in {"input_ids": ids, **right}.items():
            np.save(arrays / f"{name}.npy", x[0].numpy())
    model = random_model(config, seed)
    prompt = ids[:, :PROMPT]
    continuation, lead = greedy(model, prompt)
    cached = model.generate(prompt, max_new_tokens=NEW, do_sample=False)[0, PROMPT:].tolist()
    write_json(folder / "greedy.json", {
        "prompt": prompt[0].tolist(), "continuation": continuation, "cached_continuation": cached,
        "smallest_lead": round(lead, 4)})


def write_tokenizer(folder, name):
    """Write a bundled tokenizer's files, and texts with their ids."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    tokenizer.save_pretrained(folder)
    cases = [{"text": text, "ids": tokenizer.encode(text)} for text in TEXTS]
    write_json(folder / "cases.json", {"cases": cases})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_vectors(folder):
    """Write the whole folder, or nothing; on one machine the same bytes in every run.

    Raises ValueError where the folder holds something, OSError where it cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{plain(folder)} is there already: name a new folder or an empty one")
    check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for seed, (name, config) in enumerate(CASES.items(), start=FIRST_SEED):
            write_case(part / name, config, seed)
        for name in TOKENIZERS:
            write_tokenizer(part / name, name.removeprefix("tokenizer-"))
        write_json(part / "vectors.json", ABOUT)
        (part / "README.md").write_text(README, encoding="utf-8")
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


TOKENIZERS = ["tokenizer-demo-neo", "tokenizer-demo-neox"]
REASON = f"""|difference| / |right answer|, norms over the whole tensor in float64, must be at most
  {TOLERANCE:g}. A float32 port that sums in another order is near 1e-6 (examples/port.c is at 1.0e-6).
  The mildest known mistake, rotary tables in bfloat16, moves the logits of one of these cases by
  2.5e-5. A tolerance of 1e-3 would let a wrong GELU pass."""
ABOUT = {"format": 1, "cases": {name: {"tokens": TOKENS, "rows": ROWS} for name in CASES},
         "tokenizers": TOKENIZERS,
         "tolerances": {"tensors": {"relative": TOLERANCE, "reason": " ".join(REASON.split())},
                        "ids": {"relative": 0, "reason": "smallest_lead in greedy.json is how far "
                                "the likeliest id is ahead at the closest call: above rounding"}}}
README = f"""# Test vectors for GPT-Neo and GPT-NeoX

Small random checkpoints in the official Hugging Face format, with the answers that a right
implementation gives. `python compare.py --vectors DIR` wrote them;
`python compare.py --check-vectors DIR ANSWERS` judges a port's answers and names its mistake.

## What is here

| file | what |
|---|---|
| `vectors.json` | the names of the {len(CASES)} cases and of the tokenizers, and the tolerances with their reasons |
| `CASE/config.json`, `CASE/model.safetensors` | a checkpoint, float32, as on the hub |
| `CASE/npy/input_ids.npy` | the ids, int64, ({T},) |
| `CASE/npy/logits.npy` | the logits, float32, ({T}, V) |
| `CASE/npy/hidden_states.I.npy` | float32, ({T}, C): I = 0 is the embeddings; I = 1 to L - 1 what block I - 1 returns; I = L what the final norm returns |
| `CASE/npy-float64/` | the same, computed in float64: the truth (the angles of rotary positions stay float32, as in the reference) |
| `CASE/answers.safetensors`, `CASE/answers-float64.safetensors` | the same tensors in one file each, with a batch dimension of 1 |
| `CASE/greedy.json` | {PROMPT} ids (`prompt`), the {NEW} likeliest that follow, without a cache (`continuation`) and with one (`cached_continuation`); `smallest_lead` is how far the likeliest logit is ahead at the closest call |
| `tokenizer-NAME/` | a tokenizer in the official format; `cases.json` holds texts and their ids |

A `.npy` file is a header of text, whose length stands in bytes 8 and 9 (little-endian), and then
the numbers. A `.safetensors` file is 8 bytes with the length of a JSON header (little-endian), the
header, and then the numbers.

Every vocabulary has V = {ROWS} rows for {TOKENS} tokens, since official checkpoints are padded too. The
rows without a token belong to the logits. None of them is ever the likeliest, so it does not matter
whether your port leaves them out when it chooses.

## What to answer

Put what your port computes into `ANSWERS/CASE/`:

| file | what |
|---|---|
| `logits.npy` | for the ids in `input_ids.npy`; the only one that must be there |
| `hidden_states.I.npy` | they show where a mistake begins |
| `cached_logits.npy` | the same logits, from decoding one token at a time with a cache |
| `greedy.json` | an object with `continuation`, `cached_continuation` or both |
| `ANSWERS/tokenizer-NAME/ids.json` | a list of lists: the ids of each text in `cases.json` |

`answers.safetensors` may take the place of the `.npy` files. Optional answers that are not there are
not judged; a name that is not in this list is reported as wrong, so that nothing is passed over.

## How to judge

* Tensors: {REASON}
* Ids: equal.
* The checkpoints are meant to show every mistake: ids longer than four windows of 7, a window that
  divides no length, biases that are not 0, norm weights that are not 1, {len(CASES)} combinations of
  settings. Read all settings from config.json.
"""


# ------------------------------------------------------------------------------------------------
# Reading what a port answered
# ------------------------------------------------------------------------------------------------

@dataclass
class Verdict:
    """One line of the table."""
    case: str
    what: str                              # logits, hidden_states.2, greedy, ids, ...
    passed: bool
    said: str                              # a difference, or what is wrong


def read_array(path):
    """The tensor in a .npy file; ValueError where there is none."""
    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
            raise ValueError(f"its numbers are {array.dtype}, and float32 is expected")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except (ValueError, OSError, EOFError, TypeError, MemoryError, OverflowError,
            SyntaxError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(f"{plain(path, 1000)} cannot be read: {error_line(error)}") from None


def read_answers(folder):
    """{name: tensor without the batch dimension, or a sentence that says why there is none}."""
    answers = {}
    if (path := folder / "answers.safetensors").exists():
        try:
            answers |= dict(read_tensors(path))
        except (ValueError, OSError) as error:
            answers["answers.safetensors"] = f"{plain(path, 1000)}: {error_line(error)}"
    for path in sorted(folder.glob("*.npy")):
        try:
            answers[path.stem] = read_array(path)
        except ValueError as error:
            answers[path.stem] = str(error)
    return {name: x[0] if torch.is_tensor(x) and x.dim() > 1 and len(x) == 1 else x
            for name, x in answers.items()}


def read_right(folder):
    """(ids (T,), {name: tensor without the batch dimension}) of a case; ValueError if damaged."""
    path = folder / "answers.safetensors"
    right = {name: x[0] for name, x in read_tensors(path) if x.dim() > 1}
    if not {"input_ids", "logits", "hidden_states.0"} <= right.keys():
        raise ValueError(f"{path} is not whole: write the vectors anew")
    return right.pop("input_ids"), right


def read_field(path, name, kind=list):
    """A field of a JSON file of the vectors; ValueError if damaged."""
    value = read_json(path).get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{path} has no {name}: write the vectors anew")
    return value


# ------------------------------------------------------------------------------------------------
# Judging
# ------------------------------------------------------------------------------------------------

def compared(x, right):
    """(passed, what there is to say) of one tensor of a port."""
    if isinstance(x, str):
        return False, x
    if x.shape != right.shape:
        return False, f"shape {tuple(x.shape)}, expected {tuple(right.shape)}"
    if not x.is_floating_point():
        return False, f"its numbers are {x.dtype}, and float32 is expected"
    if not x.isfinite().all():
        return False, "holds NaN or infinite numbers"
    difference = ((x.double() - right.double()).norm() / right.double().norm()).item()
    return difference <= TOLERANCE, f"{difference:.1e}"


def judge_tensors(case, theirs, ids, right):
    """A Verdict for each tensor that the port has answered, and for the logits in any case."""
    expected = right | {"cached_logits": right["logits"]}
    for name, x in {"logits": "not answered", **theirs}.items():
        if name in expected:
            yield Verdict(case, name, *compared(x, expected[name]))
        elif name == "input_ids":                          # not asked for, but it may be there
            same = torch.is_tensor(x) and x.shape == ids.shape and bool((x == ids).all())
            yield Verdict(case, name, same, "equal" if same else "these are not the ids")
        else:
            yield Verdict(case, name, False, x if isinstance(x, str) else "no answer has this name")


def judge_ids(case, what, theirs, right):
    """One Verdict for a list, which must be equal."""
    if not isinstance(theirs, list):
        return Verdict(case, what, False, "not a list")
    pairs = enumerate(zip(theirs, right))
    first = next((i for i, (a, b) in pairs if a != b), min(len(theirs), len(right)))
    if first == len(theirs) == len(right):
        return Verdict(case, what, True, "equal")
    said = [plain(json.dumps(x[first]), 60) if first < len(x) else "nothing"
            for x in (theirs, right)]
    return Verdict(case, what, False, f"number {first} is {said[0]}, expected {said[1]}")


def judge_greedy(case, folder, answered):
    """A Verdict for each of the two continuations that the port has answered."""
    right = {"continuation": "greedy", "cached_continuation": "cached greedy"}
    if not (path := answered / "greedy.json").exists():
        return
    try:
        theirs = read_json(path)
    except (ValueError, OSError) as error:
        yield Verdict(case, "greedy", False, str(error))
        return
    if not right.keys() & theirs.keys():
        yield Verdict(case, "greedy", False, f"{plain(path, 1000)} has no continuation")
    for key, what in right.items():
        if key in theirs:
            yield judge_ids(case, what, theirs[key], read_field(folder / "greedy.json", key))


def judge_case(folder, answered):
    """(verdicts, mistakes) of one checkpoint; None for mistakes where none were looked for."""
    ids, right = read_right(folder)
    theirs = read_answers(answered)
    verdicts = [*judge_tensors(folder.name, theirs, ids, right),
                *judge_greedy(folder.name, folder, answered)]
    wrong = {v.what for v in verdicts if not v.passed}
    if wrong & right.keys():
        return verdicts, find_mistakes(folder, ids, theirs, right)
    if "cached_logits" in wrong:                           # the logits without a cache are right
        return verdicts, find_mistakes(folder, ids, {"logits": theirs["cached_logits"]}, right)
    return verdicts, None


def find_mistakes(folder, ids, theirs, right):
    """What diagnose finds; None where the logits are missing or have another shape."""
    fits = {name: theirs[name][None].to(torch.promote_types(theirs[name].dtype, torch.float32))
            for name, x in right.items() if torch.is_tensor(theirs.get(name))
            and theirs[name].shape == x.shape and theirs[name].is_floating_point()}
    if "logits" not in fits:
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="naive")
    return diagnose(model, ids[None], rows_of(fits, model.config.num_hidden_layers), TOLERANCE)


def judge_tokenizer(folder, answered):
    """The Verdict of one tokenizer, if its ids were answered."""
    if not (path := answered / "ids.json").exists():
        return
    right = [case.get("ids") if isinstance(case, dict) else None
             for case in read_field(folder / "cases.json", "cases")]
    if None in right:
        raise ValueError(f"{folder / 'cases.json'} has a case without ids: write the vectors anew")
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        yield Verdict(folder.name, "ids", False, f"{plain(path, 1000)}: {error_line(error)}")
        return
    yield judge_ids(folder.name, "ids", theirs, right)


def check_vectors(folder, answers_folder):
    """(verdicts, {case: sets of mistakes that explain it}); a case that is right is not in the dict.

    Raises ValueError or OSError where the vectors are damaged or there is no folder of answers;
    what is wrong with an answer is a Verdict.
    """
    folder, answered = Path(folder), Path(answers_folder)
    if not (folder / "vectors.json").is_file():
        raise ValueError(f"{folder} holds no test vectors: write them with --vectors {folder}")
    if not answered.is_dir():
        raise ValueError(f"no folder {answered} with a port's answers")
    cases = read_field(folder / "vectors.json", "cases", dict)
    tokenizers = read_field(folder / "vectors.json", "tokenizers")
    verdicts, mistakes = [], {}
    for name in cases:
        more, found = judge_case(folder / name, answered / name)
        verdicts += more
        if found is not None:
            mistakes[name] = found
    for name in tokenizers:
        verdicts += judge_tokenizer(folder / name, answered / name)
    unknown = {path.name for path in answered.iterdir() if path.is_dir()} - {*cases, *tokenizers}
    verdicts += [Verdict(name, "folder", False, f"{folder} has no case of this name")
                 for name in sorted(unknown)]
    return verdicts, mistakes


# ------------------------------------------------------------------------------------------------
# What is shown
# ------------------------------------------------------------------------------------------------

def explanation(found):
    """Lines: the mistakes that explain a case, and whether more than one set of them does."""
    yield from explained(as_dicts(found))
    if len(found) > 1:
        yield "(these ids cannot tell them apart)"


def table(verdicts, mistakes):
    """The verdicts as text, the mistakes under the case that they explain."""
    width = max(len(v.what) for v in verdicts)
    lines = []
    for case in dict.fromkeys(v.case for v in verdicts):
        own = [v for v in verdicts if v.case == case]
        lines.append(plain(case))
        lines += [f"  {plain(v.what):{width}}  {'ok   ' if v.passed else 'WRONG'}  {v.said}"
                  for v in own]
        lines += [f"  {line}" for line in explanation(mistakes.get(case, []))]
        if mistakes.get(case) == []:
            lines.append("  none of the known mistakes gives these numbers")
    wrong = sum(not v.passed for v in verdicts)
    return "\n".join([*lines, "", f"{len(verdicts) - wrong} passed, {wrong} failed"])


def write_junit(verdicts, mistakes, path):
    """The verdicts as JUnit XML, which every CI shows."""
    wrong = sum(not v.passed for v in verdicts)
    suite = ElementTree.Element("testsuite", name="test vectors", tests=str(len(verdicts)),
                                failures=str(wrong), errors="0", skipped="0")
    for v in verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=plain(v.case),
                                      name=plain(v.what))
        if not v.passed:
            found = mistakes.get(v.case, [])
            named = ", ".join(m["id"] for m in as_dicts(found))
            said = f"{v.said}; mistake: {named}" if named else v.said
            ElementTree.SubElement(case, "failure", message=said).text = "\n".join(explanation(found))
    write_result(path, ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))


if __name__ == "__main__":
    not_a_command("python compare.py --vectors DIR, or --check-vectors DIR ANSWERS")
