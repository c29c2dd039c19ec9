"""compare.py: what is equal passes, what is not fails, and the report says where it begins."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import attention
import base
import compare
import neo
import neox
import pictures
import vectors
from helpers import REFERENCE, widen

W = 8
COMMON = dict(vocab_size=97, hidden_size=32, intermediate_size=96, max_position_embeddings=64,
              bos_token_id=0, eos_token_id=0)
SETTINGS = {"gpt_neo": dict(COMMON, num_layers=4, num_heads=2, window_size=W,
                            attention_types=[[["global", "local"], 2]]),
            "gpt_neox": dict(COMMON, num_hidden_layers=3, num_attention_heads=2, rotary_pct=0.25)}
NAMES = {"gpt_neo": ["embeddings", "block 0 (global)", "block 1 (local, window 8)", "block 2 (global)",
                     "block 3 (local, window 8)", "final norm", "logits"],
         "gpt_neox": ["embeddings", "block 0", "block 1", "block 2", "final norm", "logits"]}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A wide random checkpoint of each family, written by transformers."""
    found = {}
    for family, (config_class, model_class) in REFERENCE.items():
        found[family] = str(tmp_path_factory.mktemp(family))
        widen(model_class(config_class(**SETTINGS[family])), seed=1).save_pretrained(found[family])
    return found


@pytest.fixture(scope="module")
def port(folders):
    """{family: tensors of a port's file}, where the port is transformers and T is above 2 windows."""
    found = {}
    for family, (_, model_class) in REFERENCE.items():
        model = model_class.from_pretrained(folders[family], attn_implementation="eager").eval()
        ids = compare.make_ids(3, 1, 2 * W + 5, COMMON["vocab_size"])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        hidden = {f"hidden_states.{i}": x.contiguous() for i, x in enumerate(out.hidden_states)}
        found[family] = {"input_ids": ids.contiguous(), "logits": out.logits, **hidden}
    return found


@pytest.fixture
def report(tmp_path):
    """Run the command in this process -> (exit status, the JSON report)."""
    def run(*argv):
        path = tmp_path / "report.json"
        path.unlink(missing_ok=True)
        status = compare.main([*map(str, argv), "--json", str(path)])
        return status, json.loads(path.read_text()) if path.exists() else None
    return run


def line_of_error(capsys, *argv):
    """The one line that bad input gets."""
    try:
        status = compare.main([*map(str, argv)])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert "error: " in err and err.count("\n") == 1 and len(err) <= 300
    return err.strip()


# -- the same ------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", REFERENCE)
def test_naive_is_bit_identical(family, dtype, folders, report):
    status, found = report(folders[family], "--dtype", dtype, "--batch", 2)
    assert status == 0 and found["same"] and found["tolerance"] is None and found["dtype"] == dtype
    assert [row["row"] for row in found["rows"]] == NAMES[family]
    assert all(r["bit_equal"] and r["max_abs"] == r["relative"] == 0
               for row in found["rows"] for r in row["results"])
    assert found["next_token_agreement"] == [1.0] * len(found["lengths"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", REFERENCE)
def test_sdpa_is_within_tolerance_and_not_bit_identical(family, dtype, folders, report):
    status, found = report(folders[family], "--dtype", dtype, "--backend", "sdpa")
    last = found["rows"][-1]["results"][-1]
    assert status == 0 and not last["bit_equal"] and 0 < last["relative"] <= found["tolerance"]
    assert found["tolerance"] == {"float32": 1e-5, "bfloat16": 2**-4, "float16": 2**-7}[dtype]


@pytest.mark.parametrize("family", REFERENCE)
def test_gradients_are_equal(family, folders, report):
    status, found = report(folders[family], "--gradients")
    grads = found["gradients"]
    on_disk = set(load_file(Path(folders[family], "model.safetensors")))
    assert status == 0 and grads["same"] and grads["tolerance"] == 1e-6 and grads["total"] <= 1e-6
    assert {row["row"] for row in grads["rows"]} == on_disk | {"loss"}
    assert all(row["relative"] <= 1e-6 for row in grads["rows"])


def test_default_lengths_stand_on_both_sides_of_the_window():
    config = neo.GPTNeoConfig.from_dict
    layers = {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    assert compare.default_lengths(config(layers)) == [1, 5, 256, 257, 520]
    for window in range(2, 300):
        assert compare.default_lengths(config(layers | {"window_size": window}))[-1] % window
    assert compare.default_lengths(config(layers | {"max_position_embeddings": 260}))[-1] == 260
    assert compare.default_lengths(neox.GPTNeoXConfig()) == [1, 5, 64, 300]


def test_ids_are_the_documented_recipe_and_begin_alike(folders, capsys):
    x, expected = 7, []
    for _ in range(6):
        x = (1664525 * x + 1013904223) % 2**32
        expected.append(int(x / 2**32 * 97))
    assert compare.make_ids(7, 1, 6, 97).tolist() == [expected]
    assert torch.equal(compare.make_ids(7, 3, 40, 97)[:, :9], compare.make_ids(7, 3, 9, 97))
    assert compare.main([folders["gpt_neo"], "--ids", "--seed", "7", "--lengths", "6,2"]) == 0
    assert json.loads(capsys.readouterr().out) == [expected]


# -- not the same: every mistake of the field, where it shows and what the report says ------------

VISIBLE, ATTENTION, WINDOWS = attention.visible, attention.attention, neo.GPTNeoConfig.windows.fget


def window_plus(n):
    return lambda patch: patch.setattr(attention, "visible", lambda T, S, window=None, device=None: VISIBLE(
        T, S, window and window + n, device))


def all_global(patch):
    patch.setattr(attention, "visible", lambda T, S, window=None, device=None: VISIBLE(T, S, None, device))


def scaled(patch):
    patch.setattr(neo, "attention", lambda q, k, v, *, scale, **how: ATTENTION(
        q, k, v, scale=q.size(-1) ** -0.5, **how))


def gelu(name, wrong):
    return lambda patch: patch.setitem(base.ACTIVATIONS, name, wrong)


def rotary_everywhere(patch):
    patch.setattr(neox.GPTNeoXConfig, "rotary_ndims", property(lambda config: config.head_dim))


def coarse_angles(patch):
    def tables(position_ids, R, base, dtype):
        inv_freq = (1 / base ** (torch.arange(0, R, 2) / R)).bfloat16()
        angles = (position_ids[..., None] * inv_freq).float()[:, None]
        return angles.cos(), angles.sin()
    patch.setattr(neox, "rotary_tables", tables)


def sequential(patch):
    def forward(self, x, **how):
        a, weights = self.attn(self.ln_1(x), **how)
        return self.mlp(self.ln_2(a + x)) + a + x, weights
    patch.setattr(neox.Block, "forward", forward)


def spoiled(name, factor):
    """One tensor of ours is wrong."""
    load = compare.load_ours

    def wrong(*args):
        model = load(*args)
        with torch.no_grad():
            model.get_parameter(name).mul_(factor)
        return model
    return lambda patch: patch.setattr(compare, "load_ours", wrong)


@pytest.mark.parametrize("family, mistake, first, hint", [
    ("gpt_neo", window_plus(1), "block 1 (local, window 8)", "window"),
    ("gpt_neo", window_plus(-1), "block 1 (local, window 8)", "window"),
    ("gpt_neo", all_global, "block 1 (local, window 8)", "window"),
    ("gpt_neo", scaled, "block 0 (global)", "scores"),
    ("gpt_neo", gelu("gelu_new", torch.nn.functional.gelu), "block 0 (global)", "small"),
    ("gpt_neo", gelu("gelu_new", base.gelu_pytorch_tanh), "block 0 (global)", "rounding"),
    ("gpt_neo", spoiled("transformer.pos_embed.weight", 0), "embeddings", "embeddings"),
    ("gpt_neo", spoiled("transformer.blocks.3.mlp.up_proj.weight", 2), "block 3 (local, window 8)", "weights"),
    ("gpt_neo", spoiled("transformer.ln_f.bias", 0), "final norm", "final norm"),
    ("gpt_neo", spoiled("transformer.ln_f.bias", float("nan")), "final norm", "finite"),
    ("gpt_neox", gelu("gelu", base.gelu_new), "block 0", "small"),
    ("gpt_neox", rotary_everywhere, "block 0", "scores"),
    ("gpt_neox", coarse_angles, "block 0", "precision"),
    ("gpt_neox", sequential, "block 0", "block"),
    ("gpt_neox", spoiled("transformer.blocks.1.ln_2.weight", 2), "block 1", "weights"),
    ("gpt_neox", spoiled("lm_head.weight", 2), "logits", "logits")])
def test_a_mistake_is_found_and_placed(family, mistake, first, hint, folders, report, monkeypatch, capsys):
    mistake(monkeypatch)
    status, found = report(folders[family])
    assert status == 1 and not found["same"]
    assert found["first_difference"] == first
    assert found["hint"] == compare.HINTS[family].get(hint, compare.HINTS.get(hint))
    out = capsys.readouterr().out
    arrows = [line for line in out.splitlines() if "<-- look here first" in line]
    assert len(arrows) == 1 and arrows[0].startswith(first + " ")
    assert out.splitlines()[-1] == "hint: " + found["hint"]


def test_window_mistake_shows_only_above_the_window(folders, report, monkeypatch, capsys):
    window_plus(1)(monkeypatch)
    found = report(folders["gpt_neo"])[1]
    assert found["at_lengths"] == [9, 17] and found["first_position"] == 8
    capsys.readouterr()
    assert report(folders["gpt_neo"], "--lengths", "3,8")[0] == 0
    assert "no length is above the window of 8" in capsys.readouterr().out


def test_a_wrong_gradient_is_found(folders, report, monkeypatch):
    load = compare.load_ours

    def hooked(*args):
        model = load(*args)
        model.transformer.blocks[2].attn.out_proj.weight.register_hook(lambda grad: grad * (1 + 1e-4))
        return model
    monkeypatch.setattr(compare, "load_ours", hooked)
    status, found = report(folders["gpt_neox"], "--gradients")
    assert status == 1 and all(row["same"] for row in found["rows"])
    assert found["first_difference"] == "gradient of gpt_neox.layers.2.attention.dense.weight"
    assert found["gradients"]["rows"][0]["relative"] == pytest.approx(1e-4, rel=1e-2)


# -- files of other ports ------------------------------------------------------------------------

@pytest.mark.parametrize("form", ["names", "stack", "no batch", "logits only"])
@pytest.mark.parametrize("family", REFERENCE)
def test_theirs_passes(family, form, folders, port, report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)                 # must not be needed
    tensors = dict(port[family])
    hidden = [name for name in tensors if name.startswith("hidden")]
    if form == "no batch":
        tensors = {name: x[0] for name, x in tensors.items()}
    elif form == "stack":
        tensors["hidden_states"] = torch.stack([tensors.pop(name) for name in hidden])
    elif form == "logits only":
        tensors = {"logits": tensors["logits"]}
    save_file(tensors, tmp_path / "mine.safetensors")
    status, found = report(folders[family], "--theirs", tmp_path / "mine.safetensors", "--seed", 3)
    rows = NAMES[family][:-3] + NAMES[family][-2:]         # the last block is not in the tuple
    assert status == 0 and found["tolerance"] == 1e-5 and found["lengths"] == [2 * W + 5]
    assert [row["row"] for row in found["rows"]] == (rows if form != "logits only" else ["logits"])


def test_theirs_is_placed(folders, port, report, tmp_path):
    path = tmp_path / "mine.safetensors"

    def verdict(family, change):
        tensors = {name: x.clone() for name, x in port[family].items()}
        change(tensors)
        save_file(tensors, path)
        status, found = report(folders[family], "--theirs", path)
        assert status == 1
        return found["first_difference"], found["hint"]

    assert verdict("gpt_neo", lambda t: t["hidden_states.2"].mul_(1.01)) == (
        "block 1 (local, window 8)", compare.HINTS["weights"])
    assert verdict("gpt_neox", lambda t: t["hidden_states.2"].mul_(1.01)) == (
        "block 1", compare.HINTS["weights"])
    assert verdict("gpt_neo", lambda t: t["hidden_states.4"].mul_(1.01)) == (
        "final norm", compare.HINTS["last block"])
    assert verdict("gpt_neo", lambda t: t["logits"].mul_(1.00002)) == ("logits", compare.HINTS["logits"])


@pytest.mark.parametrize("windows, first, position, hint", [
    ([W, None, W, None], "block 0 (global)", W, "order"),
    ([None, W + 1, None, W + 1], "block 1 (local, window 8)", W, "window"),
    ([None, W - 1, None, W - 1], "block 1 (local, window 8)", W - 1, "window"),
    ([None, None, None, None], "block 1 (local, window 8)", W, "window"),
    ([None, W, None, None], "final norm", W, "last block")])
def test_a_port_with_wrong_windows_is_told_so(windows, first, position, hint, folders, report, tmp_path):
    """One file of one length is enough: its positions tell what lies inside the window."""
    model = neo.GPTNeoForCausalLM.from_pretrained(folders["gpt_neo"], attn_implementation="sdpa")
    for block, window in zip(model.transformer.blocks, windows):
        block.attn.window = window
    ids = compare.make_ids(5, 2, 2 * W + 5, COMMON["vocab_size"])
    compare.save_ours(tmp_path / "port.safetensors", ids, compare.trace(model, ids))
    status, found = report(folders["gpt_neo"], "--theirs", tmp_path / "port.safetensors")
    assert (status, found["first_difference"], found["first_position"]) == (1, first, position)
    assert found["hint"] == compare.HINTS[hint]


def test_saved_with_other_weights_names_the_block(folders, report, tmp_path):
    """One weight of block 1 is changed in a copy; the copy's own file is judged by the original."""
    model = neo.GPTNeoForCausalLM.from_pretrained(folders["gpt_neo"])
    with torch.no_grad():
        model.transformer.blocks[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "copy")
    path = tmp_path / "copy.safetensors"
    assert compare.main([str(tmp_path / "copy"), "--save-ours", str(path)]) == 0
    status, found = report(folders["gpt_neo"], "--theirs", path)
    assert status == 1 and found["first_difference"] == "block 1 (local, window 8)"
    assert report(tmp_path / "copy", "--theirs", path)[0] == 0


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("logits"), "lacks logits"),
    (lambda t: t.pop("hidden_states.1"), "lacks hidden_states.1"),
    (lambda t: t.update({"hidden_states.9": t["logits"] + 1}), "holds hidden_states.9; known are"),
    (lambda t: t.update(lm_head=t["logits"] + 1), "holds lm_head; known are"),
    (lambda t: t.update(logits=t["logits"][..., :96].clone()), "logits is torch.float32 of shape (1, 21, 96)"),
    (lambda t: t.update(logits=t["logits"][0, 0].clone()), "logits is torch.float32 of shape (1, 97)"),
    (lambda t: t.update({"hidden_states.1": t["hidden_states.1"][:, 1:].clone()}), "hidden_states.1 is"),
    (lambda t: t.update(hidden_states=t["hidden_states.0"][0].clone()), "hidden_states has shape (21, 32)"),
    (lambda t: t.update(input_ids=t["input_ids"][:, 1:].clone()), "input_ids is torch.int64 of shape (1, 20)"),
    (lambda t: t.update(input_ids=t["input_ids"].float()), "input_ids is torch.float32"),
    (lambda t: t.update(logits=t["logits"].long()), "logits is torch.int64"),
    (lambda t: t.update(logits=t["logits"].to(torch.float8_e4m3fn)), "logits is torch.float8_e4m3fn"),
    (lambda t: t.update(input_ids=t["input_ids"].bool()), "input_ids is torch.bool"),
    (lambda t: t.update(logits=t["logits"][:, :0].clone()), "logits has shape (1, 0, 97), without any token"),
    (lambda t: t.update(logits=t["logits"][0, 0, 0].clone()), "logits has shape (1,), without any token"),
    (lambda t: t.update(hidden_states=torch.ones(5, 1, 21, 32)), "holds hidden_states.0 beside hidden_states"),
    (lambda t: (t.clear(), t.update(logits=torch.ones(1, 65, 97))), "mine.safetensors: 65 tokens"),
    (lambda t: t.update({"x\x1b[31m\ny": t["logits"] + 1}), "holds x\\x1b[31m\\ny; known are"),
    (lambda t: t.update({"z" * 5000: t["logits"] + 1}), "zzz…; known are"),
    (lambda t: t["input_ids"].fill_(97), "vocabulary")])
def test_bad_file_is_one_line(change, message, folders, port, tmp_path, capsys):
    tensors = {name: x.clone() for name, x in port["gpt_neo"].items()}
    change(tensors)
    save_file(tensors, tmp_path / "mine.safetensors")
    error = line_of_error(capsys, folders["gpt_neo"], "--theirs", tmp_path / "mine.safetensors")
    assert message in error and "mine.safetensors" in error and error.isprintable()


@pytest.mark.parametrize("content", [
    b"", b"abc", struct.pack("<Q", 1) + b"{", struct.pack("<Q", 10**15) + b"{}", struct.pack("<Q", 3) + b'"a"',
    struct.pack("<Q", 61) + b'{"logits":{"dtype":"F32","shape":[1,9,97],"data_offsets":[0,8]}}'])
def test_damaged_file_is_one_line(content, folders, tmp_path, capsys):
    (tmp_path / "mine.safetensors").write_bytes(content)
    error = line_of_error(capsys, folders["gpt_neo"], "--theirs", tmp_path / "mine.safetensors")
    assert "mine.safetensors is not a whole safetensors file" in error and len(error) < 300


# -- what is written -----------------------------------------------------------------------------

def test_json_is_complete_and_valid(folders, capsys, monkeypatch):
    spoiled("transformer.ln_f.bias", float("nan"))(monkeypatch)
    assert compare.main([folders["gpt_neo"], "--gradients", "--json", "-"]) == 1

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)     # and nothing else on stdout
    assert {"model", "revision", "dtype", "backend", "reference", "torch", "tolerance", "seed", "lengths",
            "input_ids", "rows", "next_token_agreement", "gradients", "same", "first_difference",
            "first_position", "at_lengths", "hint", "window", "layers", "rows_same"} <= found.keys()
    assert found["lengths"] == [len(ids[0]) for ids in found["input_ids"]] == [1, 5, 8, 9, 17]
    assert [len(row["results"]) for row in found["rows"]] == [5] * len(NAMES["gpt_neo"])
    assert found["rows"][-1]["results"][0] == {
        "length": 1, "max_abs": "NaN", "relative": "NaN", "bit_equal": False, "same": False,
        "first_position": 0}


def test_markdown_row(folders, capsys):
    assert compare.main([folders["gpt_neox"], "--markdown", "--lengths", "5,20"]) == 0
    name = Path(folders["gpt_neox"]).name
    assert capsys.readouterr().out == f"| {name} | float32 | 5, 20 | 6 of 6 | 0 | 0 |\n"


@pytest.mark.parametrize("extra", [[], ["--backend", "sdpa"]])
def test_plot_has_content(extra, folders, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread
    path = tmp_path / "layers.png"
    assert compare.main([folders["gpt_neo"], *extra, "--plot", str(path)]) == 0
    image = imread(path)[..., :3]
    assert image.shape[0] > 400 and image.shape[1] > 600
    for colour in [(0, 0x72, 0xB2), (0xCC, 0x79, 0xA7)]:                   # the first line and the last
        assert (abs(image * 255 - colour).max(-1) < 2).sum() > 100


# -- bad input -----------------------------------------------------------------------------------

def test_bad_arguments_are_one_line(folders, capsys, tmp_path):
    folder = folders["gpt_neo"]
    assert "no folder" in line_of_error(capsys, tmp_path / "nothing")
    assert "config.json" in line_of_error(capsys, tmp_path)
    assert "dtype" in line_of_error(capsys, folder, "--dtype", "int8")
    assert "backend" in line_of_error(capsys, folder, "--backend", "magic")
    assert "64 positions" in line_of_error(capsys, folder, "--lengths", "65")
    assert "lengths" in line_of_error(capsys, folder, "--lengths", "5,0")
    assert "at least 2" in line_of_error(capsys, folder, "--lengths", "1", "--gradients")
    assert "lengths" in line_of_error(capsys, folder, "--lengths", str(10**23))
    assert "--batch must be" in line_of_error(capsys, folder, "--batch", str(10**23))
    assert "--tolerance must be" in line_of_error(capsys, folder, "--tolerance", "nan")
    assert "no folder" in line_of_error(capsys, folder, "--plot", tmp_path / "nothing" / "x.png")
    assert "is a folder" in line_of_error(capsys, folder, "--json", tmp_path)
    assert "is a folder" in line_of_error(capsys, folder, "--save-ours", tmp_path)
    assert "mine.safetensors is not one" in line_of_error(capsys, folder, "--theirs", tmp_path / "mine.safetensors")
    assert "does not use --lengths" in line_of_error(capsys, folder, "--theirs", "x.safetensors", "--lengths", "5")
    Path(tmp_path, "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "cut.safetensors" in line_of_error(capsys, folder, "--theirs", tmp_path / "cut.safetensors")


def test_an_optional_package_is_missed_before_any_work(folders, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    assert "pip install matplotlib" in line_of_error(capsys, folders["gpt_neo"], "--plot", "x.png")


def test_what_transformers_refuses_is_one_line(folders, capsys, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("this model\nis odd")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
    assert "transformers cannot load" in line_of_error(capsys, folders["gpt_neo"], "--lengths", "2")


def test_without_transformers_it_says_what_to_do(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in line_of_error(capsys, folders["gpt_neo"])


def test_exit_status_of_the_command(folders, port, tmp_path):
    """As a command, from another folder: a difference is no error, so standard error stays empty."""
    save_file(dict(port["gpt_neo"], logits=port["gpt_neo"]["logits"] * 1.1), tmp_path / "wrong.safetensors")
    done = subprocess.run([sys.executable, compare.__file__, folders["gpt_neo"], "--theirs", "wrong.safetensors"],
                          cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (1, "")


def test_a_full_disk_leaves_no_half_report(tmp_path, monkeypatch):
    """The report, the plot and the JUnit file are whole or not there, and the error names them."""
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (_ for _ in ()).throw(OSError(28, "full")))
    monkeypatch.setattr(compare, "print_table", lambda *_: None)
    with pytest.raises(OSError, match="report.json"):
        compare.write_report({}, tmp_path / "report.json")
    with pytest.raises(OSError, match="verdicts.xml"):
        vectors.write_junit([], {}, tmp_path / "verdicts.xml")
    assert not [*tmp_path.iterdir()]
