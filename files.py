"""Files of a checkpoint: where they are, what is in them, and how to write them whole.

    fetch        the path of one file, in a folder or from the Hugging Face hub
    read_json    the object in a JSON file
"""

import json
import re
from pathlib import Path


def fetch(name_or_folder, filename, revision=None, required=True):
    """Path of one file of a checkpoint: in a folder of that name, else from the hub (and its cache).

    Returns None where the file is not there and not required.  Raises FileNotFoundError or
    ConnectionError with one line that says what was looked for, where, and what to do.
    """
    folder, name = Path(name_or_folder), str(name_or_folder)
    if folder.is_dir():
        if revision not in (None, "main"):
            raise ValueError(f"revision {revision!r} means something on the hub, but {folder} is a "
                             "folder here: leave one of them out")
        if (folder / filename).is_file():
            return folder / filename
        if required:
            raise FileNotFoundError(f"no {filename} in {folder}: is it the folder of a checkpoint?")
        return None
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file: give the folder of a checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"no folder {name}, and no hub id, which looks like "
                                "EleutherAI/pythia-70m")
    return fetch_from_hub(name, filename, revision, required)


def fetch_from_hub(repo, filename, revision, required):
    """The same for a hub id; downloads show their progress and are kept in the hub's own cache.

    config.json is read before the others, and asking for it notes which commit a branch is at now.
    What the cache knows of that commit (this file, or that there is none) is not asked again: one
    model comes from one commit, and without a network nothing waits for an answer twice.
    """
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache    # slow to import
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()                          # it retries by itself; we say how it ended

    where = f"{repo} (revision {revision})" if revision else repo
    try:
        known = filename != "config.json" and try_to_load_from_cache(repo, filename, revision=revision)
        if isinstance(known, str):
            return Path(known)
        if known and not required:                         # the cache's mark for "not in this commit"
            return None
        return Path(hf_hub_download(repo, filename, revision=revision))
    except errors.GatedRepoError:
        problem = f"{where} is gated on the hub: accept its terms there, then set HF_TOKEN"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        problem = f"no folder {repo} here and no model {repo} on the hub: check the spelling"
    except errors.RevisionNotFoundError:
        problem = f"{repo} has no revision {revision!r} on the hub (Pythia's are step0 ... step143000)"
    except errors.LocalEntryNotFoundError as error:        # before EntryNotFoundError, its parent
        if not required:
            return None
        raise ConnectionError(f"no folder {repo} here, {filename} is not in the hub's cache, and the "
                              f"hub cannot be reached: give a local folder, or try again with a "
                              f"network ({type(error.__cause__ or error).__name__})") from None
    except errors.EntryNotFoundError:
        if not required:
            return None
        problem = f"{where} has no {filename} on the hub: it is not a checkpoint of this kind"
    except Exception as error:                             # each HTTP library has its own
        raise ConnectionError(f"downloading {filename} of {where} failed ({type(error).__name__}: "
                              f"{error_line(error)}); run the same command again, files that are whole "
                              "are kept") from None
    raise FileNotFoundError(problem)


def error_line(error):
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_json(path):
    """The object in a JSON file; ValueError that names the file where there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content
