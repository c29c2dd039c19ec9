"""Files of a checkpoint: where they are, what is in them, and how to write them whole.

    fetch          the path of one file, in a folder or from the Hugging Face hub
    read_json      the object in a JSON file
    read_text      a text file
    write_files    write several files that belong together: all of them, or none
    write_result   write one file that the user has named
    shown, plain   a value or a name from a file, made printable for an error message
    one_line       an exception, made one line for people
"""

import contextlib
import errno
import glob
import json
import os
import re
import sys
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:                                        # Windows has no such lock
    fcntl = None


# ------------------------------------------------------------------------------------------------
# Contents of files in error messages
# ------------------------------------------------------------------------------------------------

def plain(text, limit=80):
    """The text as one printable line of at most `limit` characters.

    A file from the network may contain line breaks, or escape sequences that move a terminal's
    cursor; they are shown as \\n or \\x1b.
    """
    text = str(text)
    if len(text) > limit:
        text = text[:limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode()
                   for c in text)


def shown(value, limit=80):
    """The repr of a value from a file, in one printable line of at most `limit` characters."""
    if isinstance(value, str):
        value = value[:limit]
    try:
        return plain(repr(value), limit)
    except (ValueError, RecursionError):                  # Python writes no integer of 5,000 digits
        return f"a {type(value).__name__} too long to show"


def error_line(error):
    """The first line of an exception's message, or its type where it has none."""
    return plain((str(error).strip().splitlines() or [type(error).__name__])[0], 160)


def one_line(error):
    """An exception as one printable line; of a file system's error, the file and what is wrong.

    The middle of a very long word is left out: it is a name or a number that a user has given.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{plain(error.filename, 1000)}: "
        text = where + error.strerror
    text = re.sub(r"(\S{100})\S{40,}(\S{20})", r"\1…\2", text)
    if len(text) > 280:
        text = re.sub(r"(\S{60})\S{20,}(\S{20})", r"\1…\2", text)
    return plain(text, 1000)


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------

LARGEST = 2**26                    # bytes; GPT-NeoX-20B's tokenizer.json is a thirtieth of this


def read_small(path):
    """The bytes of a file other than the weights.  Raises ValueError if there are too many."""
    if (size := os.path.getsize(path)) > LARGEST:
        raise ValueError(f"{plain(path, 1000)} is too large to be a file of a checkpoint: it "
                         f"has {size} bytes")
    return Path(path).read_bytes()


def read_text(name):
    """The text of a UTF-8 file, or of standard input for "-", without a byte-order mark.

    Raises ValueError, which names the file, if it cannot be read, is not UTF-8 or is empty.
    """
    if name == "-" and sys.stdin is None:
        raise ValueError("standard input is closed: there is no text to read")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        byte = f"{error.object[error.start]:#04x} (line {line})"
        raise ValueError(f"{name}: not UTF-8, the byte at offset {error.start} is {byte}: "
                         "save it as UTF-8") from None
    except (OSError, ValueError) as error:             # ValueError: a closed file
        raise ValueError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if not text:
        raise ValueError(f"{name}: there is no text in it")
    return text


def read_json(path, unique=False):
    """The object in a JSON file.  Raises ValueError, with the file's name, if there is none.

    unique: raise it also if an object has the same key twice; Python would take the last value.
    """
    data = read_small(path)
    try:
        content = json.loads(data.decode(),
                             object_pairs_hook=without_repeats if unique else None)
    except (ValueError, RecursionError) as error:       # UnicodeDecodeError and JSONDecodeError too
        raise ValueError(f"{plain(path, 1000)} is not valid JSON: {error_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{plain(path, 1000)} must hold a JSON object, not a "
                         f"{type(content).__name__}")
    return content


def without_repeats(pairs):
    """The dict of these (key, value) pairs.  Raises ValueError for a key that is there twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {shown(twice)} is there twice")
    return content


def fetch(name_or_folder, filename, revision=None, required=True, *, cache_dir=None,
          local_files_only=False, token=None):
    """Path of one file of a checkpoint: in a folder of that name, otherwise from the hub.

    cache_dir, local_files_only and token are passed to huggingface_hub; a folder ignores them.
    Returns None where the file is not there and not required.  Raises FileNotFoundError,
    NotADirectoryError or ConnectionError, with one line that says what was looked for, where, and
    what to do, and ValueError for a revision of a folder.
    """
    folder, name = Path(name_or_folder), str(name_or_folder)
    if folder.is_dir():
        if revision not in (None, "main"):
            raise ValueError(f"revision {revision!r} means something on the hub, but {folder} is a "
                             "folder here: leave one of them out")
        if (folder / filename).is_file():
            return folder / filename
        if any(folder.glob(f".{glob.escape(filename)}.*.old")):
            raise FileNotFoundError(f"no {filename} in {folder}: a save into it was stopped "
                                    "half-way; save again, or rename the files .NAME.*.old there "
                                    "back to NAME")
        if required:
            raise FileNotFoundError(f"no {plain(filename)} in {folder}: is it the folder "
                                    "of a checkpoint?")
        return None
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file: give the folder of a checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"no folder {plain(name, 200)}, and no hub id, which looks like "
                                "EleutherAI/pythia-70m")
    return fetch_from_hub(name, filename, revision, required,
                          dict(cache_dir=cache_dir, local_files_only=local_files_only, token=token))


def fetch_from_hub(repo, filename, revision, required, how):
    """`fetch` for a hub id: downloads into the hub's own cache, with a progress bar.

    config.json is always asked for first, and the answer tells the cache which commit the branch is
    at now.  For the other files the cache is looked up first: it may have the file of that commit,
    or the note that there is none.  So all files of a model are from one commit, and without a
    network only the first request has to wait.
    """
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache  # slow to import
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()                          # no warnings about its retries

    where = f"{repo} (revision {revision})" if revision else repo
    try:
        known = filename != "config.json" and try_to_load_from_cache(
            repo, filename, cache_dir=how["cache_dir"], revision=revision)
        if isinstance(known, str):
            return Path(known)
        if known and not required:                 # the cache knows: this commit has no such file
            return None
        return Path(hf_hub_download(repo, filename, revision=revision, **how))
    except errors.GatedRepoError:
        problem = f"{where} is gated on the hub: accept its terms there, then set HF_TOKEN"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        problem = f"no folder {repo} here and no model {repo} on the hub: check the spelling"
    except errors.RevisionNotFoundError:
        problem = (f"{repo} has no revision {revision!r} on the hub "
                   "(Pythia's are step0 ... step143000)")
    except errors.LocalEntryNotFoundError as error:        # before EntryNotFoundError, its parent
        if not required:
            return None
        raise ConnectionError(offline_problem(repo, filename, how, error)) from None
    except errors.EntryNotFoundError:
        if not required:
            return None
        problem = f"{where} has no {filename} on the hub: it is not a checkpoint of this kind"
    except Exception as error:                             # each HTTP library has its own
        raise ConnectionError(download_problem(where, filename, error)) from None
    raise FileNotFoundError(problem)


def offline_problem(repo, filename, how, error):
    """The message for a file that is not in the cache when the hub cannot be asked."""
    why = ("local_files_only forbids asking the hub" if how["local_files_only"]
           else "the hub cannot be reached")
    return (f"no folder {repo} here, {filename} is not in the hub's cache, and {why}: give a local "
            f"folder, or try again with a network ({type(error.__cause__ or error).__name__})")


def download_problem(where, filename, error):
    """The message for a download that failed: what failed, and what to do about it."""
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS,
                                                      errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR,
                                                      errno.EEXIST):
        return (f"{filename} of {where} cannot be stored in the hub's cache ({error_line(error)}): "
                "free some space or mend its permissions, or set HF_HOME (or cache_dir) to a "
                "folder that can be written")
    return (f"downloading {filename} of {where} failed ({type(error).__name__}: "
            f"{error_line(error)}); run the same command again, files that are whole are kept")


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------

def write_files(folder, files, obsolete=()):
    """Write files that belong together into a folder: afterwards all are new, or all are as before.

    files: {name: bytes, or a function that writes the file at the path it is given}.  The last one
    must be a file without which no program reads the folder, such as config.json.
    obsolete: names of older files that the new ones replace; they are removed.

    Each file is first written in the folder under a temporary name, and renamed when all of them
    are complete; so the folder may be the one that the weights are mapped from.  Temporary files
    that killed processes have left are removed.  A second save into the same folder waits for the
    first.  Raises ValueError for an empty folder name, and OSError, which names the file, where it
    cannot be written.
    """
    if not os.fspath(folder):
        raise ValueError("the folder to save into has an empty name: name a folder")
    folder = Path(folder)
    check_places(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        remove_leftovers(folder, [*files, *obsolete])
        parts = {}
        try:
            for name, content in files.items():
                parts[name] = temporary(folder, name, "part")
                write_part(parts[name], content, folder / name)
                parts[name].chmod(0o666 & ~current_umask())    # mkstemp lets only the owner read
            put_in_place(folder, parts, obsolete)
        finally:
            for path in parts.values():
                path.unlink(missing_ok=True)


def write_result(path, content):
    """Write one file that the user has named; content is as in write_files.

    Something that is not a file, such as /dev/stdout, is written to and not replaced.  save_file
    would replace it, so then the content goes into a temporary file first.
    """
    path = Path(path)
    if not path.exists() or path.is_file() or path.is_dir():
        path = Path(os.path.realpath(path))                # a link stays, its file is replaced
        write_files(path.parent, {path.name: content})
        return
    if not isinstance(content, bytes):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder, "part")
            write_part(part, content, path)
            content = part.read_bytes()
    write_part(path, content, path)


def check_places(folder, names):
    """Raise OSError where the folder, or the place of one of its files, is something else."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder: name another one to save into")
    for name in names:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise IsADirectoryError(f"{folder / name} is a folder, but a file of that name must be "
                                    "written: remove it, or save into another folder")


def write_part(path, content, place):
    """Write one file; an OSError names `place`, the path that the file gets in the end."""
    try:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)
    except Exception as error:
        number = getattr(error, "errno", None)
        why = os.strerror(number) if number else "it cannot be written; is the disk full?"
        if said := re.search(r"\(os error (\d+)\)", str(error)):          # safetensors' own error
            number, why = int(said[1]), os.strerror(int(said[1]))
        if number is None and re.search("iostream|inline_container", str(error)):
            number = errno.EIO                             # torch.save does not name the cause
        if number is None:
            raise
        raise OSError(number, why, str(place)) from None


def put_in_place(folder, parts, obsolete=()):
    """Rename complete files, {name: temporary path}, to their names: all of them, or none.

    The old file of the last name is moved away first, and the new one put in its place last: if the
    process is killed in between, the folder lacks this file and is refused, and nobody reads a
    mixture of old and new files.
    """
    *others, last = parts
    if not others and not obsolete:                        # one file: one rename, which is atomic
        os.replace(parts[last], folder / last)
        return
    undo = []                                              # (where the old file is now, its place)
    try:
        for name in [last, *others, *obsolete]:
            if os.path.lexists(folder / name):
                aside = temporary(folder, name, "old")
                undo.append((aside, folder / name))
                os.replace(folder / name, aside)
        for name in [*others, last]:
            undo.append((None, folder / name))
            os.replace(parts[name], folder / name)
    except BaseException:
        for aside, place in reversed(undo):
            if aside is None:
                place.unlink(missing_ok=True)
            elif not os.path.lexists(place):
                os.replace(aside, place)
        raise
    finally:
        for aside, _ in undo:
            if aside:
                aside.unlink(missing_ok=True)


def temporary(folder, name, kind):
    """The path of a new empty file .NAME.random.KIND in the folder."""
    handle, path = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=f".{kind}")
    os.close(handle)
    return Path(path)


def remove_leftovers(folder, names):
    """Remove the temporary files of saves that were killed.  Call it while holding the lock."""
    for name in names:
        ours = re.compile(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}\.(part|old)"
                          rf"|{re.escape(name)}\.\d+\.part")
        for path in folder.iterdir():
            if ours.fullmatch(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)


def current_umask():
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def locked(folder):
    """Hold the folder's lock: wait until no other process saves into this folder."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)                                   # this releases the lock
