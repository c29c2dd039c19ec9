"""What all commands share: their options, outputs that are checked first, errors in one line.

    as_command      a command's main: its errors in one line, its output written whole
    Parser, a_name  its options, and the type of those that name something
    check_text      refuses a text whose bytes were not UTF-8
    given, spelled  the names of the options that were given, and as they are typed
    check_outputs   refuses files that could not be written when the work is done
    check_folder    the same for a folder
"""

import argparse
import codecs
import contextlib
import errno
import functools
import os
import re
import sys
import tempfile
from pathlib import Path

from files import error_line, one_line, plain, shown, temporary

# Names of the files of a checkpoint and of test vectors, which no output may replace.
READ = re.compile(
    r"(generation_|tokenizer_)?config\.json|config\.yml|merges\.txt|.*\.(npy|pt|index)"
    r"|(vocab|tokenizer|added_tokens|special_tokens_map|vectors|cases|greedy|ids)\.json"
    r"|(model|pytorch_model|flax_model|answers)\b.*\.(safetensors|bin|json|msgpack)")


class Parser(argparse.ArgumentParser):
    """argparse.ArgumentParser, with errors of one line of at most 300 characters."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {plain(message, 270)}\n")


def a_name(text):
    """The type, for argparse, of an option that names a file, a folder, a model or a device."""
    if os.name == "nt":
        longest = max(map(len, re.split(r"[/\\]", text)))
    else:
        longest = max(map(len, os.fsencode(text).split(b"/")))
    problem = ("it is empty" if not text else "no name has a zero byte" if "\0" in text else
               "it is too long" if longest > 255 or len(text) > 4000 else None)
    if problem:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a name: {problem}")
    return text


def check_text(text, what):
    """Raise ValueError for text from bytes that are not UTF-8; Python keeps them as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not UTF-8 at character {error.start + 1}") from None


def given(args, parser):
    """The names of the options that have another value than their default."""
    return [name for name, value in vars(args).items() if value != parser.get_default(name)]


def spelled(names):
    """Names of options as they are typed: ["save_ours", "ids"] -> "--save-ours, --ids"."""
    return ", ".join("--" + name.replace("_", "-") for name in names)


def check_outputs(outputs, read=()):
    """Raise ValueError, before any work is done, if a file cannot be written in the end.

    outputs: {option: path, or None}; read: names of files and folders that the command reads.
    """
    taken = {}
    for option, path in outputs.items():
        if path is None:
            continue
        if problem := unwritable(path):
            raise ValueError(f"{option}: {problem}")
        if (other := taken.setdefault(os.path.realpath(path), option)) != option:
            raise ValueError(f"{other} and {option} name the same file: name two files")
        if any(replaces(path, source) for source in read if source):
            raise ValueError(f"{option}: {plain(path)} is a file that is read: name another one")


def unwritable(path):
    """Why no file can be written at this path, in words, or None."""
    place, shown_path = Path(os.path.realpath(path)), plain(path)
    if path == "-":
        return "this cannot be written to standard output: name a file"
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        allowed = os.access(path, os.W_OK)                 # a pipe or a device is not replaced
        return None if allowed else f"{shown_path}: no permission to write there"
    if place.is_dir() or path.endswith(os.sep):
        return f"{shown_path} is a folder: name a file to write"
    if not place.parent.is_dir():
        folder = os.path.dirname(path) or place.parent
        return f"no folder {plain(folder)} to write {plain(place.name)} into"
    try:
        if os.path.lexists(place):
            there = place.stat()
            if not os.access(place, os.W_OK):
                return f"{shown_path}: no permission to write there"
            if any(os.path.samestat(there, other) for other in standard_files()):
                return f"{shown_path} is where messages are printed to: name another file"
        temporary(place.parent, place.name, "part").unlink()
    except OSError as error:
        return f"{shown_path}: {error.strerror}"


def standard_files():
    """The status of the files that standard output and standard error are, where they are some."""
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            yield os.fstat(output.fileno())


def replaces(path, source):
    """Would a file at `path` replace something that is read: source itself, or a file in it?"""
    for where in (os.path.realpath, os.path.abspath):      # the hub's cache is full of links
        place, folder = where(path), where(source)
        inside = os.path.isdir(folder) and os.path.dirname(place) == folder
        if place == folder or inside and READ.fullmatch(os.path.basename(place)):
            return True
    return False


def check_folder(path):
    """Raise ValueError, before any work is done, where no folder can be made or files be added."""
    path = Path(os.path.realpath(path))
    parents = (parent for parent in (path, *path.parents) if os.path.lexists(parent))
    there = next(parents, path)                            # a drive of Windows may not be there
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)                                 # fails for a name that is too long
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        what = path if error.errno == errno.ENAMETOOLONG else there
        raise ValueError(f"{plain(what)}: {error.strerror}: name another folder") from None


def replace_closed_stderr():
    """Discard messages and progress bars if standard error is closed, as by 2>&-."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def replace_what_cannot_be_written(output):
    """Let `output` write ? for characters that its encoding lacks; returns a list of them.

    The list fills up while text is written.
    """
    replaced = []

    def replace(error):
        replaced.extend(error.object[error.start:error.end])
        return "?" * (error.end - error.start), error.end

    codecs.register_error("replace and note", replace)
    if hasattr(output, "reconfigure"):                     # a notebook's output takes everything
        output.reconfigure(errors="replace and note")
    return replaced


def say_what_was_replaced(replaced):
    """Say which characters `replace_what_cannot_be_written` has replaced, if any."""
    if replaced:
        print(f"standard output is in the encoding {sys.stdout.encoding}, which has no "
              f"{' '.join(sorted(set(replaced)))}: written as ?.  With PYTHONIOENCODING=utf-8 the "
              "whole text is written", file=sys.stderr)


def flush_output():
    """Write out what is printed; what cannot be written is discarded, and an OSError raised."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        raise
    except OSError as error:
        discard_output()
        raise OSError(error.errno, error.strerror, "standard output") from None


def discard_output():
    """Throw away what is still to be written to standard output."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def not_a_command(instead):
    """End with status 2: what a file that is only imported does when it is run."""
    print(f"error: this file is not a command: {instead}", file=sys.stderr)
    sys.exit(2)


def as_command(main):
    """Decorator of main(argv), which returns the exit status: what all commands do in the same way.

    An error that a user can cause becomes one line, and the status is 2; Ctrl-C makes it 130.
    All that is printed is written out before the command ends, and characters that the output's
    encoding lacks are replaced, with a message.  If the reader has gone, as with | head, there is
    no message, and the status is that of main, or 0 where it had not ended: a main whose work is
    more than what it prints catches BrokenPipeError itself.
    """
    @functools.wraps(main)
    def command(argv=None):
        replace_closed_stderr()
        replaced, status = replace_what_cannot_be_written(sys.stdout), 0
        try:
            status = main(argv)
            flush_output()
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):
                print(file=sys.stderr)
            status = 130
        except Exception as error:
            if isinstance(error, BrokenPipeError) and error.filename is None:
                discard_output()
            else:
                with contextlib.suppress(OSError):
                    flush_output()
                text, status = what_failed(error), 2
                with contextlib.suppress(OSError):         # a full disk: the status still says it
                    print(f"error: {text}", file=sys.stderr)
        finally:
            with contextlib.suppress(OSError):
                say_what_was_replaced(replaced)
        return status
    return command


def what_failed(error, smaller="take a smaller model, text or batch, or a larger machine"):
    """An exception in one line for people; raises an exception that no user's input causes.

    smaller: the advice for a user whose machine has too little memory.
    """
    no_room = re.search("out of memory|allocate memory", str(error))
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and no_room:
        return f"out of memory: {smaller}"
    if isinstance(error, OSError) and error.errno and error.filename is None:
        return f"{error.strerror} (standard output, or a file that was being written)"
    if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
        return error_line(error)                           # torch's messages have many lines
    if isinstance(error, ValueError) and "\n  " in str(error):
        return str(error)                                  # a list of tensors, one on each line
    if isinstance(error, (ValueError, OSError, ImportError)):
        return one_line(error)
    raise error
