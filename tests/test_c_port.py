"""The port in C gives the right answers; with one line of it broken, the mistake is named."""

import re
import runpy
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

import compare
import diagnose
import vectors as V
from conftest import ROOT

COMPILER = shutil.which("gcc") or shutil.which("cc")
SOURCE = (ROOT / "examples" / "port.c").read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build it with")


def answered(source, vectors, tmp_path):
    """The folder of answers of a port with this source; no warning is let pass."""
    (tmp_path / "port.c").write_text(source, encoding="utf-8")
    subprocess.run([COMPILER, "-std=c11", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-o",
                    tmp_path / "port", tmp_path / "port.c", "-lm"], check=True)
    subprocess.run([tmp_path / "port", vectors, tmp_path / "answers"], check=True, timeout=60)
    return tmp_path / "answers"


def judged(vectors, answers, tmp_path, capsys):
    """(exit status, the table, {case: the ids of mistakes in its failures of the JUnit file})."""
    report = tmp_path / "report.xml"
    status = compare.main(["--check-vectors", str(vectors), str(answers), "--junit", str(report)])
    named = {}
    for case in ElementTree.parse(report).getroot():
        for failure in case.findall("failure"):
            found = re.findall(r"mistake: ([a-z0-9-]+)", failure.attrib["message"])
            named.setdefault(case.attrib["classname"], set()).update(found)
    return status, capsys.readouterr().out, named


def test_the_port_is_right(vectors_folder, tmp_path, capsys):
    answers = answered(SOURCE, vectors_folder, tmp_path)
    status, table, named = judged(vectors_folder, answers, tmp_path, capsys)
    assert status == 0 and named == {} and "WRONG" not in table
    assert f"{len(V.CASES) * 8} passed, 0 failed" in table   # logits twice, 4 hidden, greedy twice


NEO = {"neo-global-first", "neo-local-first"}
NEOX = V.CASES.keys() - NEO
BROKEN = {
    "scaled-scores": ("m->neox ? 1 / sqrtf(D) : 1;", "1 / sqrtf(D);", NEO),
    "window-plus-one": ("self - layer->window + 1", "self - layer->window", NEO),
    "positions-from-one": ("m->pos_embed[(past + t) * C", "m->pos_embed[(past + t + 1) * C", NEO),
    "qkv-thirds": ("h * 3 * D + part * D", "part * C + h * D", NEOX),
    "gelu-tanh": (
        '!strcmp(act, "gelu")', '!strcmp(act, "none")', {"neox-parallel", "neox-sequential"}),
    "rotary-opposite-sign": ("float angle = ", "float angle = -", NEOX),
    "norm-eps": ("sqrtf(variance + m->eps)", "sqrtf(variance + 1e-6f)", NEO | NEOX),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_line_is_named(mistake, vectors_folder, tmp_path, capsys):
    """In the table and in the XML; in the cases that it concerns, and in no other."""
    right, wrong, cases = BROKEN[mistake]
    assert SOURCE.count(right) == 1
    answers = answered(SOURCE.replace(right, wrong), vectors_folder, tmp_path)
    status, table, named = judged(vectors_folder, answers, tmp_path, capsys)
    assert status == 1 and named == {case: {mistake} for case in cases}
    assert set(re.findall(r"mistake: ([a-z0-9-]+): ", table)) == {mistake}
    assert table.count("instead: ") == len(cases)


def test_a_mistake_of_the_cache_alone_fails_the_cached_answers_alone(
        vectors_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diagnose, "SECONDS", 0)                # it is in no table: no pairs
    right, wrong = "m->pos_embed[(past + t) * C", "m->pos_embed[t * C"
    answers = answered(SOURCE.replace(right, wrong), vectors_folder, tmp_path)
    status, table, named = judged(vectors_folder, answers, tmp_path, capsys)
    failed = re.findall(r"^  (\S.*?) +WRONG", table, re.M)
    assert status == 1 and set(failed) == {"cached_logits", "cached greedy"}
    assert named == {case: set() for case in NEO}


# ------------------------------------------------------------------------------------------------
# What README.md and docs/checking-a-port.md show
# ------------------------------------------------------------------------------------------------

README, PAGE = ((ROOT / name).read_text(encoding="utf-8")
                for name in ("README.md", "docs/checking-a-port.md"))
SHOWN = re.findall(r"```text\n(.*?)```", PAGE, re.S)


def rounded(text):
    """Rounding errors differ from machine to machine; everything else must be as it is shown."""
    return re.sub(r"\d\.\de-0[67]", "rounding", text)


def test_the_green_table_is_shown_as_it_is(vectors_folder, tmp_path, capsys):
    _, table, _ = judged(vectors_folder, answered(SOURCE, vectors_folder, tmp_path), tmp_path, capsys)
    assert len(SHOWN[0]) > 300 and rounded(table).endswith(rounded(SHOWN[0]))


def test_the_broken_port_is_shown_as_it_is(vectors_folder, tmp_path, capsys):
    """The page's sed command, the logits alone, and the table; README.md shows how it begins."""
    right, wrong = re.search(r"^sed 's\|(.*?)\|(.*?)\|' examples/port.c", PAGE, re.M).groups()
    assert SOURCE.count(right) == 1
    answers = answered(SOURCE.replace(right, wrong), vectors_folder, tmp_path)
    for path in [*answers.rglob("hidden*"), *answers.rglob("cached*"), *answers.rglob("greedy*")]:
        path.unlink()
    _, table, _ = judged(vectors_folder, answers, tmp_path, capsys)
    assert len(SHOWN[1]) > 300 and rounded(table) == rounded(SHOWN[1])
    section = README[README.index("## Check your own port"):]
    begin = re.search(r"```text\n(.*?)```", section, re.S)[1]
    assert begin.count("\n") > 3 and table.startswith(begin)


def test_a_mistake_without_a_name_is_shown(vectors_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diagnose, "SECONDS", 0)                # no pairs, which take minutes
    right = "x[i] += a[i];"
    assert SOURCE.count(right) == 2 and f"`{right[:-1]}` in `block`" in PAGE
    answers = answered(SOURCE.replace(right, "x[i] += a[i] / 2;", 1), vectors_folder, tmp_path)
    for case in NEOX:                                          # one family is enough
        shutil.rmtree(answers / case)
    _, table, _ = judged(vectors_folder, answers, tmp_path, capsys)
    assert SHOWN[2].count("\n") == 3 and SHOWN[2] in table
    assert table.count("none of the known mistakes gives these numbers") == len(NEO)


def test_the_picture_is_the_script_s():
    """To a third of an exponent's height: rounding differs from machine to machine."""
    def parted(svg):
        points = [float(y) for path in re.findall(r'points="(.*?)"', svg)
                  for y in re.findall(r",(\S+)", path)]
        fixed = re.sub(r'points=".*?"|cy=".*?"|y="[^"]*" (?=font-size="13" fill="#[^"]*" '
                       r'text-anchor="start")', "", svg)
        return points, fixed
    drawn = runpy.run_path(str(ROOT / "docs" / "porting_picture.py"))["picture"]()
    saved = (ROOT / "docs" / "porting_picture.svg").read_text(encoding="utf-8")
    (points, fixed), (old_points, old_fixed) = parted(drawn), parted(saved)
    assert fixed == old_fixed and "(porting_picture.svg)" in PAGE
    assert len(points) == 28 and points == pytest.approx(old_points, abs=13)


def test_the_page_s_links_and_commands_are_true():
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    for line in re.findall(r"python compare\.py (.*?)(?: > .*)?$", PAGE, re.M):
        compare.arguments(line.replace("`", "").split())


# ------------------------------------------------------------------------------------------------
# Damaged files
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, said", [
    ("config.json", b"{", "is missing"), ("config.json", b"", "is not valid JSON"),
    ("config.json", b'{"model_type": "gpt_neo"}', '"activation_function" is missing'),
    ("model.safetensors", b"\0" * 4, "is not a .safetensors file"),
    ("model.safetensors", b"\2" + b"\0" * 7 + b"{}", "has no transformer.wte.weight"),
    ("npy/input_ids.npy", b"12 13 14", "is not a .npy file of int64")])
def test_damaged_vectors_are_one_line(name, content, said, port, vectors_folder, tmp_path):
    vectors = shutil.copytree(vectors_folder, tmp_path / "vectors")
    (vectors / "neo-global-first" / name).write_bytes(content)
    run = subprocess.run([port, vectors, tmp_path / "answers"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and said in run.stderr


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    path = tmp_path_factory.mktemp("port") / "port"
    subprocess.run([COMPILER, "-g", "-fsanitize=undefined", "-fno-sanitize-recover", "-o", path,
                    ROOT / "examples" / "port.c", "-lm"], check=True)
    return path
