"""A tokenizer for a new model: byte-pair encoding learned from the texts that it is trained on.

Its files are the two families' official ones, field by field, with another vocabulary, so every
program that reads GPT-Neo's or GPT-NeoX's tokenizer reads them too.
"""

import json
import re
import tempfile
import unicodedata
from pathlib import Path

from tokenizer import GPT2Tokenizer, GPTNeoXTokenizerFast

END, PADDING = "<|endoftext|>", "<|padding|>"
CLASSES = {"neo": GPT2Tokenizer, "neox": GPTNeoXTokenizerFast}


def new_tokenizer(texts, family, vocab_size, context):
    """The family's tokenizer with a vocabulary of vocab_size tokens learned from the texts.

    Raises ValueError where the texts are too short for so many.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, content in train_tokenizer(texts, family, vocab_size, context).items():
            Path(folder, name).write_text(content, encoding="utf-8", newline="\n")
        return CLASSES[family].from_pretrained(folder)


def learn_merges(texts, alphabet, count):
    """Byte-pair encoding's training: `count` times, join the pair of neighbours seen most often."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if count < 1:
        raise ValueError(f"--vocab-size is {1 - count} too small for the bytes and one merge")
    if count > sum(len(text.encode()) for text in texts):  # the library makes room for all of them
        raise ValueError(f"--vocab-size needs {count} merges, which are more than the text has "
                         "bytes: choose another size, or more text")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=len(alphabet) + count, min_frequency=2, initial_alphabet=alphabet,
        show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # The official files have one merge for each token.  If a token could be made in two ways, the
    # order of the merges would not be the order of the ids.  And a short text has too few pairs
    # that occur twice.
    if not len(merges) == len({left + right for left, right in merges}) == count:
        raise ValueError(f"--vocab-size needs {count} merges and the text gives {len(merges)}: "
                         "choose another size, or more text")
    return merges


def train_tokenizer(texts, family, vocab_size, context):
    """A byte-level BPE of vocab_size ids in the family's official files: {name: content}.

    In both families the order of the ids is the order of the merges.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())                 # the 256 bytes as printable characters
    config = dict(bos_token=END, eos_token=END, unk_token=END, add_prefix_space=False,
                  model_max_length=context)
    if family == "neo":
        merges = learn_merges(texts, alphabet, vocab_size - len(alphabet) - 1)
        vocab = [*alphabet, *map("".join, merges), END]
        config["tokenizer_class"] = "GPT2Tokenizer"
        files = {"vocab.json": {token: i for i, token in enumerate(vocab)},
                 "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""])}
    else:
        # UTF-8 never has the bytes C0, C1 and F5 to FF, and the official file no tokens for them.
        alphabet = sorted(set(alphabet) - set(map(chr, [0xC0, 0xC1, *range(0xF5, 0x100)])))
        # encode cuts out runs of spaces before BPE sees the text, so no merge is spent on them.
        pieces = [piece for text in texts
                  for piece in re.split(" {2,24}", unicodedata.normalize("NFC", text))]
        runs = [" " * n for n in range(24, 1, -1)]
        merges = learn_merges(pieces, alphabet, vocab_size - 2 - len(alphabet) - len(runs))
        vocab = [END, PADDING, *alphabet, *map("".join, merges)]
        config |= dict(tokenizer_class="GPTNeoXTokenizerFast", pad_token=PADDING)
        files = {"tokenizer.json": neox_tokenizer_json(vocab, merges, runs)}
    files["tokenizer_config.json"] = config
    return {name: content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            for name, content in files.items()}


def neox_tokenizer_json(vocab, merges, runs):
    """GPT-NeoX-20B's tokenizer.json, field by field, around another vocabulary."""
    def added(id, content, special):
        return dict(id=id, special=special, content=content, single_word=False, lstrip=False,
                    rstrip=False, normalized=not special)

    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[added(0, END, True), added(1, PADDING, True),
                      *(added(len(vocab) + i, run, False) for i, run in enumerate(runs))],
        normalizer=dict(type="NFC"), pre_tokenizer=byte_level, post_processor=byte_level,
        decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False,
                   vocab={token: i for i, token in enumerate(vocab)},
                   merges=list(map(" ".join, merges))))
