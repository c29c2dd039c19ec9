"""The hub's side of from_pretrained, against a small server: what is fetched, kept, and said."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers import good
from hub_server import Hub, Processes
from load_weights import AutoModelForCausalLM

IDS = torch.tensor([[5, 6, 7, 8]])
# huggingface_hub waits 23 s in all before it gives up.
QUICK = "import time; time.sleep = lambda seconds: None\n"
LOAD = QUICK + """
import json, sys, torch
from load_weights import AutoModelForCausalLM, AutoTokenizer
name, how, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
try:
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="naive", **how)
    tokens = AutoTokenizer.from_pretrained(name, **how).encode("hi")
except (OSError, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
with torch.no_grad():
    torch.save({"logits": model(torch.tensor([[5, 6, 7, 8]])).logits, "tokens": tokens,
                "generation_config": model.generation_config}, out)
"""
GENERATE = QUICK + "import sys, generate; sys.exit(generate.main(sys.argv[1:]))"


@pytest.fixture
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def processes():
    with Processes() as running:
        yield running


@pytest.fixture
def client(hub, processes, tmp_path):
    """Runs code as a user of that hub with a cache of their own."""
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
           "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
    return lambda code, *args, **more: processes.run(code, *args, **env | more)


def logits_of(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="naive")(IDS).logits


def loaded(client, tmp_path, name, how=None, first="", **env):
    """What a fresh process loads under that name; `first` is code that it runs before."""
    out = tmp_path / "out.pt"
    out.unlink(missing_ok=True)
    run = client(first + LOAD, name, json.dumps(how or {}), out, **env)
    assert run.returncode == 0, run.stderr
    return torch.load(out)


def last_line(run):
    assert "Traceback" not in run.stderr, run.stderr
    return run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("family", ["gpt_neo", "gpt_neox"])
def test_hub_id_equals_folder(family, hub, client, tmp_path):
    """The example in every README.  The second time nothing is downloaded again."""
    hub.add("someone/tiny", good(family))
    found = loaded(client, tmp_path, "someone/tiny")
    assert torch.equal(found["logits"], logits_of(good(family))) and len(found["tokens"]) == 2
    assert hub.fetched().count("model.safetensors") == 1
    hub.requests.clear()
    assert torch.equal(loaded(client, tmp_path, "someone/tiny")["logits"], found["logits"])
    assert hub.fetched() == []
    assert {file for _, file, _ in hub.requests} == {"config.json"}, "the cache knows the rest"


def test_revision(hub, client, tmp_path):
    """Pythia's training steps are branches; main in their place is the wrong research result."""
    hub.add("someone/tiny", good("gpt_neox"))
    commit = hub.add("someone/tiny", good("gpt_neox", seed=8), revision="step3000")
    main, step = logits_of(good("gpt_neox")), logits_of(good("gpt_neox", seed=8))
    assert not torch.equal(main, step)
    for how, right in (({}, main), ({"revision": "step3000"}, step), ({"revision": commit}, step), ({}, main)):
        assert torch.equal(loaded(client, tmp_path, "someone/tiny", how)["logits"], right)


def test_a_new_commit_replaces_all_files(hub, client, tmp_path):
    """Old weights beside a new config would be a model that never existed."""
    hub.add("someone/tiny", good("gpt_neox"))
    loaded(client, tmp_path, "someone/tiny")
    newer = Path(shutil.copytree(good("gpt_neox", seed=8), tmp_path / "newer"))
    (newer / "generation_config.json").write_text('{"eos_token_id": 9}')
    hub.add("someone/tiny", newer)
    found = loaded(client, tmp_path, "someone/tiny")
    assert torch.equal(found["logits"], logits_of(newer)) and found["generation_config"] == {"eos_token_id": 9}


def test_only_one_kind_of_weights_is_fetched(hub, client, tmp_path):
    """gpt-neo-2.7B has safetensors and .bin: 10 GB each."""
    both = Path(shutil.copytree(good("gpt_neo"), tmp_path / "both"))
    (both / "pytorch_model.bin").write_bytes(b"not wanted")
    (both / "flax_model.msgpack").write_bytes(b"not wanted")
    (both / "model.safetensors.index.json").write_text("{}")
    hub.add("someone/tiny", both)
    loaded(client, tmp_path, "someone/tiny")
    assert sorted(hub.fetched()) == ["config.json", "generation_config.json", "merges.txt",
                                     "model.safetensors", "vocab.json"]


def bin_only(tmp_path):
    """As TinyStories lies on the hub: no safetensors, no generation_config.json."""
    from safetensors.torch import load_file
    folder = Path(shutil.copytree(good("gpt_neo"), tmp_path / "bin"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink()
    return folder


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["server down", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_without_a_network_the_cache_is_enough(kind, offline, hub, client, tmp_path):
    """On a train, on a cluster's nodes: what was loaded once loads again, files that never were included."""
    folder = good("gpt_neo") if kind == "safetensors" else bin_only(tmp_path)
    hub.add("someone/tiny", folder)
    found = loaded(client, tmp_path, "someone/tiny")
    hub.__exit__()
    again = loaded(client, tmp_path, "someone/tiny", **offline)
    assert torch.equal(again["logits"], found["logits"]) and again["generation_config"] == found["generation_config"]


def test_a_snapshot_that_was_fetched_whole(hub, client, tmp_path):
    """`hf download` notes no absent files; offline they are absent all the same."""
    folder = bin_only(tmp_path)
    hub.add("someone/tiny", folder)
    files = [path.name for path in folder.iterdir()]
    fetch = "import sys\nfrom huggingface_hub import hf_hub_download\nfor f in sys.argv[1:]: hf_hub_download('someone/tiny', f)"
    assert client(fetch, *files).returncode == 0
    found = loaded(client, tmp_path, "someone/tiny", HF_HUB_OFFLINE="1")
    assert torch.equal(found["logits"], logits_of(folder))


@pytest.mark.parametrize("offline", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["server down", "HF_HUB_OFFLINE"])
def test_without_a_network_and_a_cache(offline, hub, client):
    """What was looked for, that the network is the reason, and what to do: in one line."""
    hub.__exit__()
    run = client(GENERATE, "hi", "--model", "someone/tiny", **offline)
    line = last_line(run)
    assert run.returncode == 2 and run.stdout == ""
    assert line.startswith("error: no folder someone/tiny here, config.json is not in the hub's cache")
    assert "cannot be reached" in line


def test_a_cache_that_lacks_the_weights(hub, client, tmp_path):
    """The first download broke off after config.json, and now there is no network."""
    hub.add("someone/tiny", good("gpt_neo"))
    assert client("from load_weights import read_config; read_config('someone/tiny')").returncode == 0
    run = client(LOAD, "someone/tiny", "{}", tmp_path / "out.pt", HF_HUB_OFFLINE="1")
    assert run.returncode == 1 and "FileNotFoundError: no weights in someone/tiny" in last_line(run)
    assert "out of reach" in last_line(run)


@pytest.mark.parametrize("chunk, statuses", [(10 ** 7, [200, 200]), (1000, [200, 206])], ids=["small", "large"])
def test_a_connection_that_drops_once(chunk, statuses, hub, client, tmp_path):
    """The usual accident: what fits in one chunk is fetched anew, a large file from where it broke off."""
    hub.add("someone/tiny", good("gpt_neox"))
    hub.drop("model.safetensors", times=1)
    found = loaded(client, tmp_path, "someone/tiny",
                   first=f"from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = {chunk}\n")
    assert torch.equal(found["logits"], logits_of(good("gpt_neox")))
    assert [s for m, f, s in hub.requests if (m, f) == ("GET", "model.safetensors")] == statuses


def test_a_connection_that_keeps_dropping(hub, client, tmp_path):
    """Given up with one line, no half file is loaded, and the same command succeeds later."""
    hub.add("someone/tiny", good("gpt_neox"))
    hub.drop("model.safetensors", times=10 ** 6)
    run = client(LOAD, "someone/tiny", "{}", tmp_path / "out.pt")
    assert run.returncode == 1 and not (tmp_path / "out.pt").exists()
    assert last_line(run).startswith("ConnectionError: downloading model.safetensors of someone/tiny failed")
    assert "run the same command again" in last_line(run)
    hub.drop("model.safetensors", times=0)
    assert torch.equal(loaded(client, tmp_path, "someone/tiny")["logits"], logits_of(good("gpt_neox")))


@pytest.mark.parametrize("args, says", [
    (["--model", "someone/none"], "no folder someone/none here and no model someone/none on the hub"),
    (["--model", "none"], "no folder none, and no hub id"),
    (["--model", "some--one/no..ne"], "no model some--one/no..ne on the hub"),
    (["--model", "someone/tiny", "--revision", "step7"], "someone/tiny has no revision 'step7' on the hub"),
    (["--model", "someone/empty"], "no weights in someone/empty on the hub"),
    (["--model", "someone/data"], "someone/data has no config.json on the hub")], ids=lambda x: " ".join(x[1:]))
def test_what_is_not_there(args, says, hub, client, tmp_path):
    """One line with status 2, for each thing that can be misspelt."""
    hub.add("someone/tiny", good("gpt_neo"))
    empty = Path(shutil.copytree(good("gpt_neo"), tmp_path / "empty"))
    (empty / "model.safetensors").unlink()
    hub.add("someone/empty", empty)
    (empty / "config.json").unlink()
    hub.add("someone/data", empty)
    run = client(GENERATE, "hi", *args)
    assert run.returncode == 2 and run.stdout == "", run.stderr
    assert last_line(run).startswith("error: ") and says in last_line(run)
    assert run.stderr.count("\n") == 1, run.stderr
