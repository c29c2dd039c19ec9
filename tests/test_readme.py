"""The README is read first, so what it says is checked: sizes, outputs, tables, commands."""

import ast
import itertools
import json
import os
import re
import runpy
import struct
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
import transformers

import benchmark
import compare
import convert
import generate
import look
import sampling
import train
from benchmarks.shapes import SHAPES, model_class
from conftest import ROOT
from load_weights import AutoModelForCausalLM, AutoTokenizer
from training.model import new_model

SVG = "{http://www.w3.org/2000/svg}"
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in (
    "README.md", "training/README.md", "checkpoints/README.md", "benchmarks/README.md", "notebooks/README.md",
    "fast/README.md", "originals/README.md", "docs/checking-a-port.md")}
README, TRAINING, CHECKPOINTS, BENCHMARKS, *_ = PAGES.values()


def rows(header, document=README):
    """Cells of each row of the table whose header line starts so."""
    lines = document[document.index(header):].splitlines()[2:]
    table = lines[:next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]


def test_every_module_is_listed():
    assert {name for name, _ in rows("| file |")} == {path.name for path in ROOT.glob("*.py")}


def test_the_first_command_is_near_the_top_and_its_output_is_true(capsys):
    """The block under `make demo` is how the output of the Makefile's line begins, to the letter."""
    assert README[:README.index("```bash")].count("\n") < 25
    shown = re.search(r"```text\n(.*?)```", README, re.S)[1]
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "generate.py" in line)
    import shlex
    assert generate.main(shlex.split(line.split("generate.py", 1)[1])) == 0
    assert len(shown.splitlines()) > 5 and capsys.readouterr().out.startswith(shown)


def test_the_picture_is_the_script_s():
    drawn = runpy.run_path(str(ROOT / "docs" / "architecture.py"))["picture"]()
    assert (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8") == drawn
    assert "(docs/architecture.svg)" in README and "(docs/architecture.png)" in README
    png = (ROOT / "docs" / "architecture.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == (1920, 1080)


def test_the_picture_s_texts_have_room():
    """Each text lies inside the picture and inside each box that its middle is in; no two overlap."""
    fonts = pytest.importorskip("matplotlib.font_manager")
    from PIL import ImageFont  # comes with matplotlib
    tree = ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot()
    number = lambda node, *names: [float(node.get(name)) for name in names]     # noqa: E731
    rects = [number(node, "x", "y", "width", "height") for node in tree.iter(f"{SVG}rect")
             if node.get("x")]
    font = ImageFont.truetype(fonts.findfont("DejaVu Sans"), 100)               # wider than Arial
    areas = []
    for node in tree.iter(f"{SVG}text"):
        x, y, size = number(node, "x", "y", "font-size")
        width = font.getlength(node.text) * size / 100
        x -= {"middle": width / 2, "end": width, "start": 0}[node.get("text-anchor")]
        areas.append((node.text, x, y - 0.8 * size, x + width, y + 0.2 * size))
    for words, left, top, right, bottom in areas:
        assert 0 < left and right < 1280 and 0 < top and bottom < 720, words
        for x, y, width, height in rects:
            if x < (left + right) / 2 < x + width and y < (top + bottom) / 2 < y + height:
                assert x < left and right < x + width and y < top and bottom < y + height, words
    for one, two in itertools.combinations(areas, 2):
        assert (one[3] <= two[1] or two[3] <= one[1] or one[4] <= two[2] or two[4] <= one[2]), (
            one[0], two[0])


@pytest.mark.parametrize("family, left", [("neo", True), ("neox", False)])
def test_the_picture_s_shapes_are_the_model_s(family, left):
    """Every parameter of a model stands in the family's half with its shape in letters."""
    letters = {16: "C", 64: "4C", 48: "3C", 50: "V", 20: "P"}
    model = new_model(family, vocab_size=50, context=20, hidden_size=16, layers=2, heads=2, window=4,
                      dropout=0.0)
    texts = [node.text for node in ElementTree.parse(ROOT / "docs" / "architecture.svg").iter(f"{SVG}text")
             if (float(node.get("x")) < 640) == left]
    for name, p in [*model.named_parameters(), ("lm_head.weight", model.lm_head.weight)]:
        module, kind = name.split(".")[-2:]
        shape = f"({', '.join(letters[n] for n in p.shape)})"
        wanted = rf"\b{module} \([^)]*\), bias {re.escape(shape)}" if kind == "bias" and p.shape and (
            not module.startswith("ln")) else rf"\b{module} {re.escape(shape)}"
        assert any(re.search(wanted, words) for words in texts), (name, shape)


def test_make_commands_are_targets():
    """Each is in the Makefile, and .PHONY, since folders have such names too."""
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    commands = set(re.findall(r"\bmake ([a-z][a-z-]+)(?=`|\n| +#)", "\n".join(PAGES.values())))
    assert {"demo", "test", "test-all", "test-cpus", "notebooks", "finetune", "lab", "port"} <= commands <= set(phony)
    assert all(re.search(rf"^{name}:", makefile, re.M) for name in commands)


def test_links_lead_to_files():
    """Relative links and pictures of every page."""
    for page, document in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", document):
            if not "".join(link).startswith("http"):
                assert (ROOT / page).parent.joinpath("".join(link)).exists(), (page, link)


def test_what_generate_refuses_is_refused():
    """Each setting that the README calls refused, by its name; with num_beams=1 accepted."""
    paragraph = README[README.index("**What generate refuses"):].split("\n\n")[0]
    names = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b(?!=)", paragraph))
    assert len(names) > 9 and names <= sampling.REFUSED.keys()
    model = AutoModelForCausalLM.from_pretrained(ROOT / "checkpoints" / "demo-neo")
    ids = torch.tensor([[5, 6]])
    for name in sorted(names):
        with pytest.raises(ValueError, match=name):
            model.generate(ids, max_new_tokens=1, do_sample=True, **{name: 0.5})
    assert model.generate(ids, max_new_tokens=1, num_beams=1).shape == (1, 3)


def test_benchmark_commands_parse():
    """The commands of benchmarks/README.md: blocks, and the last column of its tables."""
    import shlex
    lines = [*re.findall(r"benchmark\.py ([a-z].*)$", "\n".join(re.findall(r"```bash\n(.*?)```", BENCHMARKS + README, re.S)), re.M),
             *(row[-1] for header in ("| gpt-neo-125m shape |", "| pythia-160m shape |")
               for row in rows(header, BENCHMARKS) if row[-1] != "the same run")]
    assert len(lines) > 12
    for line in lines:
        benchmark.arguments(shlex.split(line))


def test_scores_are_printed_so(capsys, monkeypatch):
    """The commands under "How likely is a text?" print what stands below them."""
    import shlex
    section = README[README.index("## How likely is a text?"):]
    commands, shown = re.search(r"```bash\n(.*?)```\n\n```text\n(.*?)```", section, re.S).groups()
    monkeypatch.chdir(ROOT)
    for line in commands.splitlines():
        assert generate.main(shlex.split(line.split("generate.py", 1)[1])) == 0
    assert capsys.readouterr().out == shown


def test_equality_table(capsys, monkeypatch):
    """Each row is what `compare.py checkpoints/NAME --dtype DTYPE --markdown` prints today."""
    table = rows("| checkpoint | dtype |")
    assert {(row[0], row[1]) for row in table} == {(n, d) for n in ("demo-neo", "demo-neox")
                                                 for d in ("float32", "bfloat16", "float16")}
    for name, dtype, *_ in table:
        config = compare.config_of(ROOT / "checkpoints" / name)
        assert config.position_limit is None or config.position_limit >= 2 * config.window_size
    monkeypatch.chdir(ROOT)
    assert compare.main(["checkpoints/demo-neo", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert [cell.strip() for cell in printed.strip().strip("|").split("|")] == table[0]


@pytest.mark.slow
def test_equality_table_whole(capsys):
    for row in rows("| checkpoint | dtype |"):
        assert compare.main([str(ROOT / "checkpoints" / row[0]), "--dtype", row[1], "--markdown"]) == 0
        assert [cell.strip() for cell in capsys.readouterr().out.strip().strip("|").split("|")] == row


def test_sizes():
    """Weights and gigabytes of each official checkpoint, from models built without memory."""
    table = {name: (count, single, half) for name, count, single, half in rows("| checkpoint | weights |")}
    assert table.keys() == SHAPES.keys()
    for name, config in SHAPES.items():
        with torch.device("meta"):
            count = model_class(config)(config).num_parameters()
        assert table[name] == (f"{count:,}", f"{4 * count / 1e9:.2f} GB", f"{2 * count / 1e9:.2f} GB")


def test_training_s_files_are_listed():
    assert ({name for name, _ in rows("| file |", TRAINING)}
            == {path.name for path in (ROOT / "training").glob("[a-z]*.py")})


def test_demo_checkpoints():
    """Held-out bits per byte as training.json has them; small, and with windows that the context leaves behind."""
    for name, *cells in rows("| demo checkpoint |", CHECKPOINTS):
        folder = ROOT / "checkpoints" / name
        record, config = (json.loads((folder / file).read_text()) for file in ("training.json", "config.json"))
        assert cells[-1] == f"{record['valid_bits_per_byte']:.3f}" and record["valid_bits_per_byte"] <= 2.3
        assert cells[0] == f"{record['parameters']:,}"
        assert sum(f.stat().st_size for f in folder.iterdir()) <= 8e6
        if "window_size" in config:
            assert 4 * config["window_size"] <= config["max_position_embeddings"]


@pytest.mark.parametrize("name", ["demo-neo", "demo-neox", "demo-induction"])
def test_demo_tokenizers_are_official_files(name):
    """transformers reads them unchanged and gives the same ids, and the text comes back."""
    folder = ROOT / "checkpoints" / name
    theirs, mine = transformers.AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "HAMLET.\n    To be, or not to be:  that is the question;\n<|endoftext|>café 生活 \t x   y"
    assert mine.encode(text) == theirs.encode(text) and len(mine) == len(theirs)
    assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text)) == text


def test_python_example_runs(capsys, monkeypatch):
    """The blocks of Python, one after the other; the other hub names stand for the same code with a network."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    monkeypatch.chdir(ROOT)
    with pytest.warns(UserWarning, match="score.weight: not in checkpoints/demo-neox"):
        exec(compile(ast.parse(code), "README.md", "exec"), {})
    assert "HAMLET." in capsys.readouterr().out


def test_command_lines_parse():
    """Every file in the commands of all pages exists, and every option."""
    import shlex
    parsers = {"generate.py": generate.arguments, "compare.py": compare.arguments, "train.py": train.parse,
               "look.py": look.arguments, "convert.py": convert.arguments, "benchmark.py": benchmark.arguments}
    seen = set()
    text = re.sub(r"\\\n\s*", "", "\n".join(PAGES.values()))
    text = text.replace("$DEMO", re.search('DEMO="(.*)"', text)[1])
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
    for line in re.findall(r"(?:^|/|python |torchrun .*?)\b([\w/]+\.py .*)$", blocks, re.M):
        command, *arguments = shlex.split(re.split(" [#>]| {3,}", line)[0])
        assert (ROOT / command).is_file(), command
        if command in parsers:
            parsers[command](arguments)
            seen.add(command)
    assert seen == parsers.keys()


def test_core_imports_stay_light():
    """The models need torch and small things: no transformers, no hub, no plots until they are asked for, and no
    triton where its kernels could not run."""
    code = ("import sys; import neo, neox, attention, load_weights, generate, tokenizer; "
            "print([m for m in ('transformers', 'huggingface_hub', 'matplotlib', 'triton', 'flash_attn', "
            "'tokenizers', 'pandas') if m in sys.modules])")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]" or torch.cuda.is_available()
