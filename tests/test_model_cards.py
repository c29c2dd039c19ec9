"""The examples of published model cards run with their imports changed, and give what transformers gives.

They stand here as on the cards of Pythia, TinyStories, rinna's japanese-gpt-neox-3.6b and Databricks' dolly-v2-3b
(huggingface.co), down to the hub's names: a cache of the hub is laid out that holds small random weights under
these names, with the tokenizers of the demo checkpoints.
"""

import textwrap

import huggingface_hub.constants
import pytest
import torch
import transformers

from conftest import ROOT
from helpers import widen
from load_weights import AutoTokenizer
from neo import GPTNeoConfig, GPTNeoForCausalLM
from neox import GPTNeoXConfig, GPTNeoXForCausalLM

PYTHIA = '''
    from neox import GPTNeoXForCausalLM
    from load_weights import AutoTokenizer

    model = GPTNeoXForCausalLM.from_pretrained(
      "EleutherAI/pythia-70m-deduped",
      revision="step3000",
      cache_dir="./pythia-70m-deduped/step3000",
    )

    tokenizer = AutoTokenizer.from_pretrained(
      "EleutherAI/pythia-70m-deduped",
      revision="step3000",
      cache_dir="./pythia-70m-deduped/step3000",
    )

    inputs = tokenizer("Hello, I am", return_tensors="pt")
    tokens = model.generate(**inputs)
    text = tokenizer.decode(tokens[0])
'''
TINY_STORIES = '''
    from load_weights import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained('roneneldan/TinyStories-33M')

    tokenizer = AutoTokenizer.from_pretrained("EleutherAI/gpt-neo-125M")

    prompt = "Once upon a time there was"

    input_ids = tokenizer.encode(prompt, return_tensors="pt")

    # Generate completion
    output = model.generate(input_ids, max_length = 60, num_beams=1)

    # Decode the completion
    output_text = tokenizer.decode(output[0], skip_special_tokens=True)
'''
RINNA = '''
    import torch
    from load_weights import AutoTokenizer, AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained("rinna/japanese-gpt-neox-3.6b", use_fast=False)
    model = AutoModelForCausalLM.from_pretrained("rinna/japanese-gpt-neox-3.6b")

    if torch.cuda.is_available():
        model = model.to("cuda")

    text = "西田幾多郎は、"
    token_ids = tokenizer.encode(text, add_special_tokens=False, return_tensors="pt")

    with torch.no_grad():
        output_ids = model.generate(
            token_ids.to(model.device),
            max_new_tokens=100,
            min_new_tokens=100,
            do_sample=True,
            temperature=0.8,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id
        )

    output = tokenizer.decode(output_ids.tolist()[0])
'''
# The card's loading, then what its pipeline does with them (instruct_pipeline.py, beside the weights).
DOLLY = '''
    import torch
    from load_weights import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("databricks/dolly-v2-3b", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained("databricks/dolly-v2-3b", device_map="auto", torch_dtype=torch.bfloat16)

    prompt = "### Instruction:\\nExplain the difference.\\n\\n### Response:\\n"
    inputs = tokenizer(prompt, return_tensors="pt")
    end_key_token_id = tokenizer.encode("HAMLET")[0]
    generated_sequence = model.generate(
        input_ids=inputs["input_ids"].to(model.device),
        attention_mask=inputs["attention_mask"].to(model.device),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True, max_new_tokens=64, top_p=0.92, top_k=0, eos_token_id=end_key_token_id,
    )
'''


def folder_of(family, path):
    """Small random weights, and the tokenizer of the demo checkpoint."""
    common = dict(hidden_size=32, bos_token_id=0, eos_token_id=0)
    if family == "demo-neo":
        model = GPTNeoForCausalLM(GPTNeoConfig(vocab_size=2048, num_layers=2, num_heads=4, window_size=8,
                                               attention_types=[[["global", "local"], 1]], **common))
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=1472, num_hidden_layers=2, num_attention_heads=4,
                                                 intermediate_size=64, **common))
    widen(model, seed=1).save_pretrained(path)
    AutoTokenizer.from_pretrained(ROOT / "checkpoints" / family).save_pretrained(path)
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, family, revision, cache): lays a repository into a cache of the hub, which is out of reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def lay(name, family, revision="main", cache="cache"):
        commit = "0123456789abcdef0123456789abcdef01234567"
        repo = tmp_path / cache / f"models--{name.replace('/', '--')}"
        folder_of(family, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / revision).write_text(commit)
        return repo / "snapshots" / commit
    return lay


def run(card):
    torch.manual_seed(0)
    names = {}
    exec(compile(textwrap.dedent(card), "card", "exec"), names)
    return names


def theirs(folder, inputs, **settings):
    """The reference's ids from the same seed; eager attention, as ours in float32 agrees with."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    torch.manual_seed(0)
    return model.generate(**inputs, **settings)


def test_pythia(hub):
    folder = hub("EleutherAI/pythia-70m-deduped", "demo-neox", "step3000", "pythia-70m-deduped/step3000")
    found = run(PYTHIA)
    assert found["text"].startswith("Hello, I am")
    assert torch.equal(found["tokens"], theirs(folder, found["inputs"]))


def test_tiny_stories(hub):
    folder = hub("roneneldan/TinyStories-33M", "demo-neo")
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / file).unlink()                           # its own folder on the hub has none either
    hub("EleutherAI/gpt-neo-125M", "demo-neo")
    found = run(TINY_STORIES)
    assert found["output_text"].startswith(found["prompt"]) and found["output"].size(1) == 60
    assert torch.equal(found["output"], theirs(folder, {"inputs": found["input_ids"]}, max_length=60))


def test_rinna(hub):
    folder = hub("rinna/japanese-gpt-neox-3.6b", "demo-neox")
    found = run(RINNA)
    assert found["output"].startswith(found["text"])
    assert found["output_ids"].size(1) == found["token_ids"].size(1) + 100
    tokenizer = found["tokenizer"]
    assert torch.equal(found["output_ids"], theirs(
        folder, {"inputs": found["token_ids"]}, max_new_tokens=100, min_new_tokens=100, do_sample=True, temperature=0.8,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))


def test_dolly(hub):
    hub("databricks/dolly-v2-3b", "demo-neox")
    found = run(DOLLY)
    assert found["model"].dtype == torch.bfloat16
    ids, T = found["generated_sequence"][0], found["inputs"]["input_ids"].size(1)
    assert torch.equal(ids[:T], found["inputs"]["input_ids"][0]) and T < len(ids) <= T + 64
