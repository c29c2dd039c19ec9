"""The command lines: wrong use is status 2 and one short line, found before the work, and nothing is lost."""

import errno
import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmark
import commands
import compare
import convert
import generate
import look
import mistakes
import pictures
import train
from conftest import ROOT
from helpers import good

COMMANDS = dict(benchmark=benchmark, compare=compare, convert=convert, generate=generate, look=look, mistakes=mistakes,
                train=train)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with checkpoints, files and links in it."""
    monkeypatch.chdir(tmp_path)
    for family in ("gpt_neo", "gpt_neox"):
        shutil.copytree(good(family), family)
    for name in ("folder", "empty"):
        Path(name).mkdir()
    for name in ("folder/x", "file"):
        Path(name).write_text("mine")
    Path("text.txt").write_text("to be or not to be, that is the question. " * 20)
    for link, target in (("loop", "loop"), ("lost", "nowhere/x"), ("to-file", "file")):
        Path(link).symlink_to(target)
    return tmp_path


def contents(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(capsys, command, *argv):
    """The one line that wrong use gets, after which every file is as before."""
    before = contents(Path.cwd())
    try:
        status = COMMANDS[command].main(list(argv))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and "error: " in err and len(err) <= 300, err
    assert err.strip().isprintable() and contents(Path.cwd()) == before
    return err


def no_work(monkeypatch):
    """From here on no model may be loaded and no table computed."""
    for module, names in ((compare, ("load_ours", "config_of")), (look, ("look",)), (generate, ("load",)),
                          (convert, ("Source",)), (train, ("start",))):
        for name in names:
            monkeypatch.setattr(module, name, lambda *args, **how: pytest.fail("this is found too late"))


# ------------------------------------------------------------------------------------------------
# Names
# ------------------------------------------------------------------------------------------------

TRAIN = ["--text", "text.txt", "--out", "out"]
NAMED = [("compare", "model", []), ("compare", "--json", ["gpt_neo"]), ("compare", "--plot", ["gpt_neo"]),
         ("compare", "--save-ours", ["gpt_neo"]), ("compare", "--theirs", ["gpt_neo"]), ("compare", "--revision", ["gpt_neo"]),
         ("compare", "--dtype", ["gpt_neo"]), ("compare", "--backend", ["gpt_neo"]), ("compare", "--vectors", []),
         ("compare", "--junit", ["--check-vectors", "a", "b"]), ("compare", "--check-vectors", ["a"]),
         ("convert", "IN", ["out"]), ("convert", "OUT", ["gpt_neo"]), ("convert", "--revision", ["gpt_neo", "out"]),
         ("generate", "--model", ["hi"]), ("generate", "--tokenizer", ["hi"]), ("generate", "--revision", ["hi"]),
         ("generate", "--device", ["hi"]), ("generate", "--dtype", ["hi"]), ("generate", "--backend", ["hi"]),
         ("generate", "--score", []), ("look", "--model", ["hi", "--out", "p"]), ("look", "--other", ["hi", "--out", "p"]),
         ("look", "--mistake", ["hi", "--out", "p"]), ("look", "--out", ["hi"]), ("train", "--text", TRAIN),
         ("train", "--valid", TRAIN), ("train", "--out", TRAIN), ("train", "--init", TRAIN), ("train", "--device", TRAIN),
         ("train", "--train", ["--task", "classify", "--out", "out"])]


@pytest.mark.parametrize("command, option, others", NAMED, ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_be_a_name(command, option, others, here, capsys, monkeypatch):
    """Empty, with a zero byte, or longer than any file's name: of files, folders, models, devices."""
    no_work(monkeypatch)
    for value, says in (("", "it is empty"), ("a\0b", "zero byte"), ("x" * 5000, "it is too long"),
                        ("d/" + "x" * 300, "it is too long")):
        argv = {"--check-vectors": ["--check-vectors", "a", value], "IN": [value, *others], "OUT": [*others, value],
                "model": [value]}.get(option, [*others, option, value])
        error = refused(capsys, command, *argv)
        assert f"argument {option}: " in error and says in error, error


@pytest.mark.parametrize("word", ["x" * 5000, "/".join(["folder", *["y" * 200] * 4]), "9" * 400])
def test_long_words_do_not_flood_a_line(word):
    """The end, which says what to do, is still there."""
    error = ValueError(f"{word} and {word} are not {word}: take another")
    text = commands.what_failed(error)
    assert len(text) < 280 and text.startswith(word[:60]) and text.endswith(": take another") and "…" in text
    assert commands.what_failed(OSError(errno.ENOENT, "No such file", "a\nb")) == "a\\nb: No such file"


# ------------------------------------------------------------------------------------------------
# Options that do not go together
# ------------------------------------------------------------------------------------------------

VALUES = dict(model=["gpt_neo"], revision=["--revision", "main"], dtype=["--dtype", "bfloat16"], ids=["--ids"],
              backend=["--backend", "sdpa"], lengths=["--lengths", "3"], batch=["--batch", "2"], seed=["--seed", "3"],
              tolerance=["--tolerance", "1"], gradients=["--gradients"], theirs=["--theirs", "p.safetensors"],
              save_ours=["--save-ours", "o"], vectors=["--vectors", "v"], check_vectors=["--check-vectors", "v", "a"],
              junit=["--junit", "j"], json=["--json", "j"], plot=["--plot", "p.png"], markdown=["--markdown"])


def test_modes_of_compare_refuse_what_they_do_not_use(here, capsys, monkeypatch):
    """Every mode with every option: used, or refused by its name."""
    no_work(monkeypatch)
    assert {"--" + name.replace("_", "-") for name in VALUES} - {"--model"} == {
        option for argv in VALUES.values() for option in argv if option.startswith("--")}
    for mode, used in compare.MODES.items():
        start = [*(VALUES["model"] if "model" in used else []), *VALUES[mode]]
        for name, option in VALUES.items():
            if name not in (mode, "model"):
                if name in used or (mode, name) == ("ids", "save_ours"):             # both at once is allowed
                    assert getattr(compare.arguments([*start, *option]), name)
                else:
                    error = refused(capsys, "compare", *start, *option)
                    assert f"--{name.replace('_', '-')}" in error, error
                    assert "does not use" in error or "give a model, or" in error and name.endswith("vectors")
    assert "--junit belongs to --check-vectors" in refused(capsys, "compare", "gpt_neo", "--junit", "j")
    for argv in ([], ["gpt_neo", "--vectors", "v"], ["gpt_neo", "--check-vectors", "v", "a"], ["--ids"]):
        assert "give a model, or" in refused(capsys, "compare", *argv)


@pytest.mark.parametrize("option", [["--temperature", "1e-300"], ["--repetition-penalty", "1e300"]])
def test_numbers_that_float32_does_not_have(option, here, capsys, monkeypatch):
    no_work(monkeypatch)
    assert "must be in 1e-30" in refused(capsys, "generate", "hi", *option)


@pytest.mark.parametrize("options", [["--top-k", "5"], ["--temperature", "0.7"], ["--top-p", "0.5", "--min-p", "0.1"]])
def test_the_likeliest_token_is_the_same_whatever_else_is_asked(options, capsys):
    """What filters and temperature leave is always the likeliest token: nothing that is asked for is passed over."""
    texts = []
    for more in ([], options):
        assert generate.main(["HAMLET.", "--greedy", "--max-new-tokens", "6", *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    if "--temperature" not in options:
        assert generate.main(["HAMLET.", "--temperature", "0", "--max-new-tokens", "6", *options]) == 0
        assert capsys.readouterr().out == texts[0]


@pytest.mark.parametrize("argv, says", [
    (["--task", "classify", "--train", "a.csv", "--init", "gpt_neo", "--out", "o", "--prompt", "x"], "--prompt is for --task lm"),
    ([*TRAIN, "--train", "a.csv"], "--train is for --task classify"),
    ([*TRAIN, "--family", "neox", "--window", "3"], "--window is for --family neo")])
def test_options_of_another_training(argv, says, here, capsys, monkeypatch):
    no_work(monkeypatch)
    assert says in refused(capsys, "train", *argv)


def test_files_that_are_named_twice_are_all_read(here):
    args = train.parse(["--text", "a", "b", "--text", "c", "--valid", "d", "--valid", "e", "--out", "out"])
    assert args.text == ["a", "b", "c"] and args.valid == ["d", "e"] and train.parse(TRAIN).valid == []


# ------------------------------------------------------------------------------------------------
# Outputs
# ------------------------------------------------------------------------------------------------

OUTPUTS = [("compare", ["gpt_neo"], "--json"), ("compare", ["gpt_neo"], "--plot"), ("compare", ["gpt_neo"], "--save-ours"),
           ("compare", ["--check-vectors", "folder", "empty"], "--junit"), ("look", ["hi", "--model", "gpt_neo"], "--out")]


@pytest.mark.parametrize("command, others, option", OUTPUTS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("path, says", [
    ("folder", "is a folder"), ("new/", "is a folder"), (".", "is a folder"), ("nowhere/x.png", "no folder nowhere"),
    ("file/x.png", "no folder file"), ("loop", "symbolic links"), ("lost", "no folder"), ("/proc/x.png", "No such file"),
    ("-", "this cannot be written to standard output"), ("x" * 250 + ".png", "too long|File name too long")])
def test_a_file_that_cannot_be_written_is_found_first(command, others, option, path, says, here, capsys, monkeypatch):
    no_work(monkeypatch)
    monkeypatch.setattr(compare, "check_vectors", pytest.fail)
    if (option, path) != ("--json", "-"):
        error = refused(capsys, command, *others, option, path)
        assert option in error and any(word in error for word in says.split("|")), error


def test_a_file_without_permission_is_found_first(here, capsys, monkeypatch):
    """A read-only file, where its folder would allow to replace it; root is not asked for permission."""
    no_work(monkeypatch)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "file: no permission" in refused(capsys, "compare", "gpt_neo", "--json", "file")


@pytest.mark.parametrize("command, argv, says", [
    ("compare", ["gpt_neo", "--json", "a.png", "--plot", "./a.png"], "--json and --plot name the same file"),
    ("compare", ["gpt_neo", "--json", "file", "--plot", "to-file"], "--json and --plot name the same file"),
    ("compare", ["gpt_neo", "--theirs", "file", "--json", "to-file"], "to-file is a file that is read"),
    ("compare", ["gpt_neo", "--save-ours", "gpt_neo/model.safetensors"], "is a file that is read"),
    ("compare", ["gpt_neo", "--json", "gpt_neo/config.json"], "is a file that is read"),
    ("compare", ["--check-vectors", "folder", "empty", "--junit", "folder/vectors.json"], "is a file that is read"),
    ("compare", ["--check-vectors", "folder", "empty", "--junit", "empty/case/logits.npy"], "no folder empty/case"),
    ("look", ["hi", "--model", "gpt_neo", "--out", "gpt_neo/vocab.json"], "is a file that is read"),
    ("look", ["hi", "--other", "gpt_neox", "--out", "gpt_neox/tokenizer.json"], "is a file that is read"),
    ("convert", ["gpt_neo", "gpt_neo/"], "is the folder that is read"),
    ("compare", ["gpt_neo", "--plot", "x.xyz"], "pictures are written as png"),
    ("compare", ["gpt_neo", "--plot", "x.pgf"], "pictures are written as png")])
def test_outputs_that_would_replace_each_other_or_an_input(command, argv, says, here, capsys, monkeypatch):
    no_work(monkeypatch)
    monkeypatch.setattr(compare, "check_vectors", pytest.fail)
    assert says in refused(capsys, command, *argv)


def test_an_output_may_lie_beside_what_is_read_and_be_written_again(here):
    for _ in range(2):
        assert look.main(["hi", "--model", "gpt_neo", "--out", "gpt_neo/page.html"]) == 0
    assert compare.main(["gpt_neo", "--lengths", "2", "--save-ours", "gpt_neo/ours.safetensors"]) == 0
    assert look.main(["hi", "--model", "gpt_neo", "--out", "to-file"]) == 0
    assert Path("to-file").is_symlink() and Path("file").read_text().startswith("<!DOCTYPE html>")


def test_the_file_that_is_printed_to_is_not_replaced(here, monkeypatch):
    """As compare.py M --json x > x; and /dev/stdout, a link there, would be replaced by a file."""
    with open("printed", "w") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        for path in ("printed", f"/proc/self/fd/{output.fileno()}"):
            with pytest.raises(ValueError, match="printed to: name another"):
                commands.check_outputs({"--json": path})
    commands.check_outputs({"--json": "printed", "--plot": os.devnull})


@pytest.mark.parametrize("command, argv", [("convert", ["gpt_neo"]), ("compare", ["--vectors"]), ("train", ["--text", "text.txt", "--out"])])
def test_a_folder_that_cannot_be_made_is_found_first(command, argv, here, capsys, monkeypatch):
    no_work(monkeypatch)
    for out, says in (("file/x", "file: Not a directory"), ("loop/x", "symbolic links"), ("/proc/x", "/proc")):
        assert says in refused(capsys, command, *argv, out)


def test_a_conversion_mixes_no_two_checkpoints(here, capsys):
    """The old tokenizer's files would stay, or a config.json that belongs to something else would go."""
    assert "gpt_neo holds other files of a checkpoint (merges.txt)" in refused(capsys, "convert", "gpt_neox", "gpt_neo")
    Path("folder/config.json").write_text("{}")
    assert "config.json without weights" in refused(capsys, "convert", "gpt_neo", "folder")
    assert convert.main(["gpt_neo", "empty"]) == convert.main(["gpt_neo", "empty"]) == 0


def test_vectors_are_written_through_a_link(here, monkeypatch):
    for name in ("write_case", "write_tokenizer"):
        monkeypatch.setattr(f"vectors.{name}", lambda folder, *_: folder.mkdir())
    Path("link").symlink_to("empty")
    assert compare.main(["--vectors", "link"]) == 0
    assert Path("link").is_symlink() and Path("empty/vectors.json").exists()


def test_a_run_does_not_mix_with_other_files(here, capsys):
    Path("out.run").mkdir()
    Path("out.run/thesis.txt").write_text("mine")
    assert "out.run holds thesis.txt, which train.py has not written" in refused(capsys, "train", *TRAIN)


# ------------------------------------------------------------------------------------------------
# What ends badly while it runs
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", COMMANDS)
def test_all_commands_end_alike(module):
    assert COMMANDS[module].main.__wrapped__


@pytest.mark.parametrize("error, status, says", [
    (ValueError("two\nlines"), 2, "error: two lines\n"), (FileNotFoundError(2, "No such file", "x"), 2, "error: x: No such file\n"),
    (OSError(errno.ENOSPC, "No space left on device"), 2,
     "error: No space left on device (standard output, or a file that was being written)\n"),
    (ImportError("no package"), 2, "error: no package\n"), (MemoryError(), 2, "error: out of memory: take a smaller"),
    (RuntimeError("[enforce fail] can't allocate memory: 1"), 2, "error: out of memory: take a smaller"),
    (RuntimeError("deep\ninside"), 2, "error: deep\n"), (KeyboardInterrupt(), 130, "\n"), (BrokenPipeError(32, "x"), 0, ""),
    (BrokenPipeError(32, "Broken pipe", "fifo"), 2, "error: fifo: Broken pipe\n")], ids=repr)
def test_how_a_command_ends(error, status, says, capsys):
    def main(argv):
        raise error
    assert commands.as_command(main)() == status
    err = capsys.readouterr().err
    assert err.startswith(says) and err.count("\n") <= 1 and bool(err) == bool(says)


def test_an_error_that_cannot_be_written_still_has_its_status(monkeypatch, here):
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w", buffering=1))
    assert compare.main(["nowhere"]) == 2


def test_only_the_work_that_is_done_needs_memory(here, capsys):
    """To print ids takes no attention."""
    assert compare.main(["gpt_neox", "--ids", "--lengths", "200000"]) == 0
    assert capsys.readouterr().out.count(",") == 199_999


def test_a_mistake_in_the_code_is_shown_whole():
    with pytest.raises(TypeError):
        commands.as_command(lambda argv: 1 + "")()


@pytest.mark.parametrize("text", ["short", "long\n" * 9000])
def test_output_that_cannot_be_written_is_one_line(text, monkeypatch, capsys):
    """Without this the text is still waiting when Python ends, which then reports an ignored error."""
    full = "error: standard output: No space left on device\n" if text == "short" else \
        "error: No space left on device (standard output, or a file that was being written)\n"
    for path, status, says in [("/dev/full", 2, full), (None, 0, "")]:
        reader, pipe = os.pipe()
        os.close(reader)                                   # as | head does
        monkeypatch.setattr(sys, "stdout", open(path or pipe, "w"))
        assert commands.as_command(lambda argv: print(text) or 0)() == status
        assert capsys.readouterr().err == says
        sys.stdout.close()                                 # nothing is left to be written


def test_output_in_an_encoding_that_lacks_a_character(monkeypatch, capsys):
    """The reports of compare.py have a Δ, which cp1252 has not."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert commands.as_command(lambda argv: print("max Δ") or 1)() == 1
    assert sys.stdout.buffer.getvalue().strip() == b"max ?"
    assert "has no Δ: written as ?" in capsys.readouterr().err


@pytest.mark.parametrize("same", [True, False])
def test_a_reader_that_goes_early_still_gets_the_verdict(same, here, monkeypatch):
    """compare.py M | head: status 0 would mean that the models are the same."""
    def gone(*_):
        raise BrokenPipeError
    monkeypatch.setattr(compare, "make_report", lambda *args, **how: {"same": same})
    monkeypatch.setattr(compare, "print_table", gone)
    assert compare.main(["gpt_neo", "--json", "r.json"]) == (0 if same else 1)
    assert json.loads(Path("r.json").read_text()) == {"same": same}
    monkeypatch.setattr(compare, "check_vectors", lambda *_: ([SimpleNamespace(passed=same)], []))
    monkeypatch.setattr(compare, "table", gone)
    monkeypatch.setattr(compare, "write_junit", lambda verdicts, mistakes, path: Path(path).write_text("written"))
    assert compare.main(["--check-vectors", "gpt_neo", "gpt_neox", "--junit", "j.xml"]) == (0 if same else 1)
    assert Path("j.xml").read_text() == "written"
    monkeypatch.setattr(train, "run_or_resume", gone)
    assert train.main([]) == 2                             # 0 would mean that the training is finished


def test_a_pipe_is_written_to(here):
    """--json >(program), and --out /dev/stdout | program: a pipe that has no name in any folder."""
    reader, writer = os.pipe()
    for path in (f"/dev/fd/{writer}", "/dev/null"):
        assert commands.unwritable(path) is None
    os.close(reader), os.close(writer)


def test_names_on_windows(monkeypatch):
    """There a folder's name ends at a backslash too, and characters count, not bytes."""
    path = "C:\\Benutzer\\" + "ж" * 150 + "\\" + "ж" * 150
    monkeypatch.setattr(os, "name", "nt")
    assert commands.a_name(path) == path


def test_only_files_of_the_checkpoint_itself_are_kept(here):
    assert commands.replaces("gpt_neo/config.json", "gpt_neo") and not commands.replaces("gpt_neo/new/config.json", "gpt_neo")


@pytest.mark.parametrize("argv, says", [
    (["--batch", "1000000"], "need about"), (["--batch", "1048577"], "--batch must be in 1 … 1048576"),
    (["--lengths", "1000000"], "need about 1.49e+04 GiB"), (["--batch", "0"], "--batch must be"), (["--batch", "-1"], "--batch must be"),
    (["--ids", "--lengths", "1000000", "--batch", "1000000"], "--batch must be in 1 … 1, not"),
    (["--lengths", "0"], "a length must be in 1")])
def test_more_than_any_memory_holds_is_refused_first(argv, says, here, capsys, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 2**34 // 4096 if name == "SC_PHYS_PAGES" else 4096)
    monkeypatch.setattr(compare, "make_ids", pytest.fail)
    assert says in refused(capsys, "compare", "gpt_neox", *argv)


@pytest.mark.parametrize("name", ["meta", "a\nb", "hpu", "privateuseone", "cpu:x"])
def test_devices_that_cannot_be_used(name, here, capsys):
    assert "--device" in refused(capsys, "generate", "hi", "--device", name)
    assert "--device" in refused(capsys, "train", *TRAIN, "--device", name)


def test_more_likeliest_tokens_than_there_are(here, capsys):
    outs = []
    for number in ("257", "9" * 23):
        assert generate.main(["hi", "--top", number, "--model", "gpt_neo"]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] and outs[0].count("\n") == 257


def test_a_mistake_that_does_not_exist(here, capsys, monkeypatch):
    no_work(monkeypatch)
    for name, near in (("scaled-score", "scaled-scores"), ("zzz", "python mistakes.py prints all")):
        error = refused(capsys, "look", "hi", "--out", "p.html", "--mistake", name)
        assert near in error
    monkeypatch.setattr(mistakes, "measured", pytest.fail)
    assert "unrecognized arguments: all" in refused(capsys, "mistakes", "all")
    with pytest.raises(SystemExit) as stop:
        mistakes.main(["--help"])
    assert stop.value.code == 0


@pytest.mark.parametrize("file", ["score", "diagnose", "vectors"])
def test_a_file_that_is_no_command_says_so(file, capsys):
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{file}.py"), run_name="__main__")
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: this file is not a command: python ")


def test_names_in_pictures():
    """matplotlib takes $…$ for a formula, and fails on one that is none and on half a surrogate pair."""
    figure = pictures.pyplot().figure()
    figure.suptitle(pictures.plain_label(r"a $\nonsense{$ b" + "\udcff"))
    figure.canvas.draw()
    pictures.pyplot().close(figure)
    assert pictures.picture_format("a/b.PNG") == pictures.picture_format("x") == "png"


def test_float64_is_judged_by_a_tolerance(here, capsys):
    """The reference of GPT-Neo casts scores to float32, ours stays in float64."""
    assert compare.main(["gpt_neo", "--dtype", "float64"]) == 0
    assert "within 1.0e-05" in capsys.readouterr().out
