"""Test vectors: small checkpoints and the right answers, for ports in any language.

    python compare.py --vectors DIR                        writes them
    python compare.py --check-vectors DIR ANSWERS          judges what a port answered

DIR needs neither Python nor a network: checkpoints in the official format, ids, logits and hidden states
as .npy and .safetensors, greedy continuations and tokenizer cases as JSON, and a README that says how to
read and judge them.  The weights are wide random numbers and the shapes are odd, so that no mistake hides:
three heads of width 12, a window that divides no length, rotary positions on a part of a head and on all,
both forms of the residual, tied and untied heads, vocabularies with padded rows.

    T tokens · C width · V vocabulary · L layers
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from safetensors.torch import save_file

from diagnose import diagnose, make_ids, trace
from load_weights import AutoModelForCausalLM, AutoTokenizer, read_tensors
from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM

T, PROMPT, NEW = 31, 9, 20                                 # tokens of the ids, of the prompt, and new ones
TOLERANCE = 1e-5
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"

NEO = dict(vocab_size=101, max_position_embeddings=64, hidden_size=36, num_heads=3, num_layers=3,
           intermediate_size=100, window_size=7, bos_token_id=0, eos_token_id=None)
NEOX = dict(vocab_size=101, max_position_embeddings=64, hidden_size=36, num_attention_heads=3,
            num_hidden_layers=3, intermediate_size=100, bos_token_id=0, eos_token_id=None)
CASES = {
    "neo-global-first": GPTNeoConfig(**NEO, attention_types=[[["global", "local", "global"], 1]]),
    "neo-local-first": GPTNeoConfig(**NEO | dict(num_heads=4, hidden_size=48), tie_word_embeddings=False,
                                    attention_types=[[["local", "global", "local"], 1]]),
    "neox-parallel": GPTNeoXConfig(**NEOX, rotary_pct=0.5),
    "neox-parallel-tanh": GPTNeoXConfig(**NEOX | dict(num_attention_heads=4, hidden_size=48), rotary_pct=1 / 3,
                                        hidden_act="gelu_fast", tie_word_embeddings=True),
    "neox-sequential": GPTNeoXConfig(**NEOX, rotary_pct=1.0, rotary_emb_base=500, use_parallel_residual=False,
                                     attention_bias=False),
}
TEXTS = ["HAMLET.", " to be, or not to be", "don't", "  two  spaces", "\n\n", "naïve café", "日本語", "🙂🙃", "x" * 40,
         "<|endoftext|>", "a<|endoftext|>b", "1234567890", "tab\tand\r\nline", "", "e\u0301", "\u00a0", "…"]


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------

def wide(model, seed):
    """Matrices N(0, 0.2), biases away from 0, norm weights away from 1: nothing is neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.normal_(0, 0.2, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                p += 1
    return model.eval()


def random_model(config, seed):
    """A model of this shape with wide random weights and naive attention."""
    kind = GPTNeoForCausalLM if isinstance(config, GPTNeoConfig) else GPTNeoXForCausalLM
    return wide(kind(config, attn_implementation="naive"), seed)


def answers(model, ids):
    """{name: tensor}: logits (1, T, V) and hidden_states.0 to .L, each (1, T, C)."""
    *hidden, last_block, norm, logits = trace(model, ids)
    return {"logits": logits} | {f"hidden_states.{i}": x for i, x in enumerate([*hidden, norm])}


def greedy(model, prompt):
    """The continuation's ids, and the smallest lead of a chosen token over the second best."""
    ids = model.generate(prompt, max_new_tokens=NEW, eos_token_id=None)
    with torch.no_grad():
        best = model(ids[:, :-1]).logits[:, prompt.size(1) - 1:].topk(2).values
    return ids[0, prompt.size(1):].tolist(), (best[..., 0] - best[..., 1]).min().item()


def write_case(folder, config, seed):
    """One checkpoint with its ids and answers."""
    model = random_model(config, seed)
    model.save_pretrained(folder)
    ids = make_ids(seed, 1, T, config.vocab_size)
    right, truth = answers(model, ids), answers(random_model(config, seed).double(), ids)
    continuation, lead = greedy(model, ids[:, :PROMPT])
    save_file({"input_ids": ids, **right}, folder / "answers.safetensors")
    save_file({"input_ids": ids, **truth}, folder / "answers-float64.safetensors")
    (folder / "npy").mkdir()
    np.save(folder / "npy" / "input_ids.npy", ids[0].numpy())
    for name, x in right.items():
        np.save(folder / "npy" / f"{name}.npy", x[0].numpy())
    write_json(folder / "greedy.json", {"prompt": ids[0, :PROMPT].tolist(), "continuation": continuation,
                                        "smallest_lead": round(lead, 6)})


def write_tokenizer(folder, name):
    """A bundled tokenizer's files, and texts with their ids."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    tokenizer.save_pretrained(folder)
    write_json(folder / "cases.json", [{"text": text, "ids": tokenizer.encode(text)} for text in TEXTS])


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_vectors(folder):
    """Write the whole folder, or nothing.  The same bytes on every run on one machine."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: give a folder that does not exist or is empty")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    try:
        for seed, (name, config) in enumerate(CASES.items(), start=1):
            write_case(part / name, config, seed)
        for name in ("demo-neo", "demo-neox"):
            write_tokenizer(part / f"tokenizer-{name}", name)
        (part / "README.md").write_text(README, encoding="utf-8")
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


README = f"""# Test vectors for GPT-Neo and GPT-NeoX

Small random checkpoints in the official Hugging Face format, with the answers that a right implementation
gives. They were written by `python compare.py --vectors DIR`; `python compare.py --check-vectors DIR ANSWERS`
judges a port's answers and names its mistake.

## What is here

| file | what |
|---|---|
| `CASE/config.json`, `CASE/model.safetensors` | a checkpoint of {len(CASES)} kinds, float32, as on the hub |
| `CASE/npy/input_ids.npy` | the ids, int64, ({T},) |
| `CASE/npy/logits.npy` | the logits, float32, ({T}, V) |
| `CASE/npy/hidden_states.I.npy` | float32, ({T}, C): I = 0 is the embeddings; I = 1 to L - 1 what block I - 1 returns; I = L what the final norm returns |
| `CASE/answers.safetensors` | the same tensors in one file, with a batch dimension of 1 |
| `CASE/answers-float64.safetensors` | the same, computed in float64: the truth |
| `CASE/greedy.json` | {PROMPT} ids and the {NEW} likeliest that follow; `smallest_lead` is how far the likeliest is ahead at the closest call |
| `tokenizer-NAME/` | a tokenizer in the official format; `cases.json` holds texts and their ids |

A `.npy` file is a header of text, whose length stands in bytes 8 and 9 (little-endian), and then the numbers.
A `.safetensors` file is 8 bytes with the length of a JSON header, the header, and then the numbers.

## What to answer

Lay what your port computes into `ANSWERS/CASE/`: `logits.npy`; if you can, `hidden_states.I.npy`, which show
where a mistake begins; `cached_logits.npy`, the same logits from decoding one token at a time with a cache; and
`greedy.json` with the key `continuation`. For tokenizers, `ANSWERS/tokenizer-NAME/ids.json` is a list of lists.
`answers.safetensors` may take the place of the `.npy` files. What is not there is not judged; the logits must be.

## How to judge

* Tensors: |difference| / |right answer|, norms over the whole tensor in float64, must be at most {TOLERANCE:g}. A right
  float32 port is near 2e-7. The mildest mistake that we know of is at 1.7e-5. A tolerance of 1e-3 lets a
  wrong GELU and a wrong rotation pass.
* Ids: equal. The lead in `greedy.json` is far above rounding.
* The checkpoints are meant to show everything: ids longer than four windows of 7, a window that divides no length,
  biases that are not 0, norm weights that are not 1, {len(CASES)} combinations of settings. Read all settings from
  config.json.
"""


# ------------------------------------------------------------------------------------------------
# Judging
# ------------------------------------------------------------------------------------------------

@dataclass
class Verdict:
    """One line of the table."""
    case: str
    what: str                              # logits, hidden_states.2, greedy, ids, ...
    passed: bool
    said: str                              # a difference, or what is wrong


def read_answers(folder):
    """{name: tensor without the batch dimension} of a port's folder."""
    found = {}
    if (path := folder / "answers.safetensors").is_file():
        found |= {name: x[0] if x.dim() == 3 else x for name, x in read_tensors(path)}
    for path in sorted(folder.glob("*.npy")):
        try:
            x = torch.from_numpy(np.array(np.load(path, allow_pickle=False)))
        except (ValueError, OSError, EOFError, TypeError) as error:
            raise ValueError(f"{path} is not a readable .npy file: {str(error).splitlines()[0]}") from None
        found[path.stem] = x[0] if x.dim() == 3 and len(x) == 1 else x
    return found


def off(x, right):
    """|x - right| / |right|, infinite where x has another shape or numbers that are not finite."""
    if x.shape != right.shape or not x.isfinite().all():
        return float("inf")
    return ((x.double() - right.double()).norm() / right.double().norm()).item()


def judge_tensors(case, theirs, right):
    """A Verdict for each tensor that the port has answered, logits in any case."""
    names = [name for name in right if name in theirs or name == "logits"]
    for name in [*names, *(["cached_logits"] if "cached_logits" in theirs else [])]:
        expected = right[name.removeprefix("cached_")]
        if name not in theirs:
            yield Verdict(case, name, False, "not answered")
        elif theirs[name].shape != expected.shape:
            yield Verdict(case, name, False, f"shape {tuple(theirs[name].shape)}, expected {tuple(expected.shape)}")
        else:
            difference = off(theirs[name], expected)
            yield Verdict(case, name, difference <= TOLERANCE, f"{difference:.1e}")


def judge_ids(case, what, theirs, right):
    """One Verdict for ids, which must be equal."""
    if theirs == right:
        return Verdict(case, what, True, "equal")
    first = next((i for i, (a, b) in enumerate(zip(theirs, right)) if a != b), min(len(theirs), len(right)))
    return Verdict(case, what, False, f"differs from number {first} on")


def their_json(path):
    """What a JSON file of a port holds; ValueError that names it where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {str(error).splitlines()[0]}") from None


def judge_case(folder, answered):
    """(verdicts, mistakes) of one checkpoint."""
    case = folder.name
    right = {name: x[0] for name, x in read_tensors(folder / "answers.safetensors")}
    ids = right.pop("input_ids")
    theirs = read_answers(answered) if answered.is_dir() else {}
    verdicts = list(judge_tensors(case, theirs, right))
    if (path := answered / "greedy.json").is_file():
        given = their_json(path)
        given = given.get("continuation") if isinstance(given, dict) else given
        verdicts.append(judge_ids(case, "greedy", given if isinstance(given, list) else [],
                                  their_json(folder / "greedy.json")["continuation"]))
    wrong = [v for v in verdicts if not v.passed and v.what in theirs]
    return verdicts, find_mistakes(folder, ids, theirs, right) if wrong else []


def find_mistakes(folder, ids, theirs, right):
    """What diagnose finds, where the answers have the right shapes."""
    layers = len(right) - 2
    fits = {name: x[None] for name, x in theirs.items()
            if name in right and x.shape == right[name].shape and x.is_floating_point()}
    if "logits" not in fits:
        return []
    hidden = [fits.get(f"hidden_states.{i}") for i in range(layers + 1)]
    rows = [*hidden[:-1], None, hidden[-1], fits["logits"]]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="naive")
    return diagnose(model, ids[None], rows, TOLERANCE)


def judge_tokenizer(folder, answered):
    """The Verdict of one tokenizer, if its ids were answered."""
    path = answered / "ids.json"
    if path.is_file():
        right = [case["ids"] for case in their_json(folder / "cases.json")]
        theirs = their_json(path)
        yield judge_ids(folder.name, "ids", theirs if isinstance(theirs, list) else [], right)


def check_vectors(folder, answers_folder):
    """-> (verdicts, {case: sets of mistakes that explain it})."""
    folder, answered = Path(folder), Path(answers_folder)
    cases = sorted(path.parent for path in folder.glob("*/answers.safetensors"))
    if not cases:
        raise ValueError(f"{folder} holds no test vectors: write them with --vectors {folder}")
    if not answered.is_dir():
        raise ValueError(f"no folder {answered} with a port's answers")
    verdicts, mistakes = [], {}
    for case in cases:
        more, mistakes[case.name] = judge_case(case, answered / case.name)
        verdicts += more
    for path in sorted(folder.glob("tokenizer-*")):
        verdicts += judge_tokenizer(path, answered / path.name)
    return verdicts, mistakes


def table(verdicts, mistakes):
    """The verdicts as text, the mistakes under the case that they explain."""
    width = max(len(v.what) for v in verdicts)
    lines = []
    for case in dict.fromkeys(v.case for v in verdicts):
        lines.append(case)
        lines += [f"  {v.what:{width}}  {'ok   ' if v.passed else 'WRONG'}  {v.said}"
                  for v in verdicts if v.case == case]
        found = mistakes.get(case, [])
        for f in found:
            lines += [f"  mistake: {m.id}: {m.sentence} {m.fix}" for m in f.mistakes]
        if len(found) > 1:
            lines.append("  (these ids cannot tell them apart)")
        if not found and any(not v.passed for v in verdicts if v.case == case and v.what != "ids"):
            lines.append("  none of the known mistakes gives these numbers")
    wrong = sum(not v.passed for v in verdicts)
    return "\n".join([*lines, "", f"{len(verdicts) - wrong} passed, {wrong} failed"])


def write_junit(verdicts, mistakes, path):
    """The verdicts as JUnit XML, which every CI shows."""
    wrong = sum(not v.passed for v in verdicts)
    suite = ElementTree.Element("testsuite", name="test vectors", tests=str(len(verdicts)), failures=str(wrong))
    for v in verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=v.case, name=v.what)
        if not v.passed:
            named = [m.id for f in mistakes.get(v.case, []) for m in f.mistakes]
            said = v.said + (f"; mistake: {', '.join(named)}" if named else "")
            ElementTree.SubElement(case, "failure", message=said)
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
