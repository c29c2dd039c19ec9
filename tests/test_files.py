"""Files that belong together are written all or not at all; what a file contains is printed safely."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors import SafetensorError

import files
from conftest import ROOT

OLD = {"model.safetensors": b"old weights", "config.json": b'{"old": 1}'}
NEW = {"model.safetensors": b"new weights", "config.json": b'{"new": 1}'}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(folder, at):
    """write_files in a process of its own that ends without a word at the n-th rename."""
    subprocess.run([sys.executable, "-c", f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import files
count, replace = 0, os.replace
def dies(source, target):
    global count
    count += 1
    if count == {at}:
        os._exit(9)
    replace(source, target)
os.replace = dies
files.write_files({str(folder)!r}, {NEW!r})
"""], check=False)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_kill_leaves_the_old_set_or_the_new_one_or_is_noticed(at, tmp_path):
    """There are four renames: two take the old files away, two put the new ones in their place."""
    files.write_files(tmp_path, OLD)
    killed(tmp_path, at)
    left = {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")}
    if "config.json" in left:
        assert left == (OLD if at == 1 else NEW)
    else:
        with pytest.raises(FileNotFoundError, match="stopped half-way"):
            files.fetch(tmp_path, "config.json")
    assert (at < 5) == any(name.startswith(".") for name in contents(tmp_path))
    files.write_files(tmp_path, NEW)                       # the next save clears up
    assert contents(tmp_path) == NEW


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_an_error_puts_everything_back(at, error, tmp_path, monkeypatch):
    files.write_files(tmp_path, OLD)
    count, replace = 0, os.replace

    def fails(source, target):
        nonlocal count
        count += 1
        if count == at:
            raise error
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(type(error)):
            files.write_files(tmp_path, NEW)
    assert contents(tmp_path) == OLD


def disk_is_full(path):
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def safetensors_says_full(path):
    raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")


def torch_says_full(path):
    torch.save(torch.zeros(9), "/dev/full")


@pytest.mark.parametrize("writer", [disk_is_full, safetensors_says_full, torch_says_full])
def test_a_full_disk_is_an_error_that_names_the_file(writer, tmp_path):
    """The libraries' own errors name no file, and some are RuntimeErrors of several lines."""
    files.write_files(tmp_path, OLD)
    with pytest.raises(OSError) as caught:
        files.write_files(tmp_path, {"model.safetensors": writer, "config.json": b"new"})
    assert caught.value.filename == str(tmp_path / "model.safetensors") and "\n" not in str(caught.value)
    assert contents(tmp_path) == OLD


def test_something_else_in_the_place_of_the_folder_or_of_a_file(tmp_path):
    """Refused in words, before anything is written; an empty name is not the current folder."""
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    for folder, kind, says in [("file", FileExistsError, "is not a folder"), ("link", FileExistsError, "is not a folder"),
                               ("folder", IsADirectoryError, "config.json is a folder")]:
        with pytest.raises(kind, match=says):
            files.write_files(tmp_path / folder, {"model.safetensors": pytest.fail, "config.json": b"new"})
    with pytest.raises(ValueError, match="empty name"):
        files.write_files("", {"config.json": pytest.fail})
    assert not [*(tmp_path / "folder" / "config.json").iterdir()]


def test_older_files_go_with_the_change_or_stay(tmp_path, monkeypatch):
    files.write_files(tmp_path, OLD | {"model.safetensors.index.json": b"old"})
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            files.write_files(tmp_path, NEW, obsolete=["model.safetensors.index.json"])
    assert contents(tmp_path) == before
    files.write_files(tmp_path, NEW, obsolete=["model.safetensors.index.json", "not there"])
    assert contents(tmp_path) == NEW


def test_a_result_is_whole_or_not_there_and_a_pipe_is_not_replaced(tmp_path):
    with pytest.raises(OSError):
        files.write_result(tmp_path / "result", disk_is_full)
    assert not [*tmp_path.iterdir()]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_result(pipe, b"text")
    assert os.read(reader, 9) == b"text" and pipe.is_fifo()

    def replaces(path):                                    # as safetensors' save_file does
        (tmp_path / "new").write_bytes(b"more")
        os.replace(tmp_path / "new", path)

    files.write_result(pipe, replaces)
    assert os.read(reader, 9) == b"more" and pipe.is_fifo()
    os.close(reader)
    with pytest.raises(OSError, match="/dev/full"):
        files.write_result("/dev/full", b"text")


def test_two_saves_at_once_wait_for_each_other(tmp_path):
    """Whatever their order, the folder holds one set."""
    def slow(data):
        def write(path):
            time.sleep(0.01)
            path.write_bytes(data)
        return write

    sets = [{"model.safetensors": slow(b"%d" % i), "config.json": b"%d" % i} for i in range(6)]
    threads = [threading.Thread(target=files.write_files, args=(tmp_path, one)) for one in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(contents(tmp_path).values())) == 1 and len(contents(tmp_path)) == 2


def test_links_are_replaced_and_never_followed(tmp_path):
    """Neither at the final name, as in the hub's cache, nor at any name that a save uses on its way."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", f"config.json.{os.getpid()}.part", ".config.json.abcdefgh.part"):
        (folder / name).symlink_to(outside)
    files.write_files(folder, NEW)
    assert contents(folder) == NEW and outside.read_bytes() == b"mine"
    assert not (folder / "config.json").is_symlink()


def test_a_link_that_is_named_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("there", "new"):
        link = tmp_path / name
        link.symlink_to(f"folder/{name}.json")
        if name == "there":
            link.write_text("old")
        files.write_result(link, b"text")
        assert link.is_symlink() and (tmp_path / "folder" / f"{name}.json").read_bytes() == b"text"


@pytest.mark.parametrize("value, expected", [
    ("a\nb\x1b[31m", "'a\\nb\\x1b[31m'"), ("\udcff", "'\\udcff'"), (10**5000, "a int too long to show"),
    ([["x"] * 1000], None), ("é", "'é'"), (float("nan"), "nan")], ids=["escapes", "surrogate", "huge", "long", "é", "nan"])
def test_values_are_shown_in_one_harmless_line(value, expected):
    text = files.shown(value)
    assert text.isprintable() and len(text) <= 82 and text.encode()
    assert expected is None or text == expected


@pytest.mark.parametrize("content", ["[" * 10**5, "9" * 5000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}", "", "[1]"],
                         ids=["deep", "number", "huge number", "mark", "empty", "list"])
def test_json_that_is_none(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written():
    """"Run the same command again" would not help there."""
    error = PermissionError(13, "Permission denied", "/cache")
    text = files.download_problem("some/model", "config.json", error)
    assert "HF_HOME" in text and "same command" not in text
    assert "same command" in files.download_problem("some/model", "config.json", TimeoutError("timed out"))
    assert json.dumps(text)
