"""Write any checkpoint that can be loaded here in the official format, or in GPT-NeoX's own.

    python convert.py IN OUT              config.json and model.safetensors, as on the hub
    python convert.py IN OUT --parts 2    layer_LL-model_RR-model_states.pt, to train on in GPT-NeoX

IN is a folder or a hub id, in the hub's formats or in an original one (originals/).  Weights keep
their dtype and every bit.  OUT gets all of its files or none.
"""

import functools
import json
import math
import os
import sys
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

import neo
import neox
from commands import Parser, a_name, as_command, check_folder
from files import fetch, plain, write_files
from load_weights import (
    NAMES,
    WEIGHT_FILES,
    NoInit,
    misfit,
    missing_tensors,
    official_names,
    our_name,
    problem_text,
    read_config,
    read_tensors,
    tie,
    weight_files,
)
from originals.neox import LAYER_FILE, RANK_FILE, neox_yml, split_neox

# Files of the tokenizer and of generation settings, which are copied -> their names on the hub.
COPIED = {"generation_config.json": "generation_config.json",
          "20B_tokenizer.json": "tokenizer.json",
          **{name: name
             for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                          "added_tokens.json", "vocab.json", "merges.txt")}}
SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
               torch.float64: "F64"}


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------

class Source:
    """A checkpoint, whose tensors can be read one at a time and more than once."""

    def __init__(self, name_or_folder, revision=None):
        raw = read_config(name_or_folder, revision)
        self.cls = {"gpt_neo": neo.GPTNeoForCausalLM,
                    "gpt_neox": neox.GPTNeoXForCausalLM}[raw["model_type"]]
        self.config = self.cls.config_class.from_dict(raw)
        self.table, self.name = NAMES[raw["model_type"]], name_or_folder
        self.paths = weight_files(name_or_folder, revision)
        self.folder = name_or_folder if not Path(name_or_folder).is_dir() else self.paths[0].parent
        with torch.device("meta"), NoInit():
            model = self.cls(self.config)
        self.wanted = model.state_dict()
        if self.config.tie_word_embeddings:
            del self.wanted["lm_head.weight"]
        self.sizes = self.checked()

    def tensors(self):
        """Yield (our name, the file's name, tensor) of all but what is known and ignored."""
        for path in self.paths:
            for theirs, tensor in read_tensors(path):
                try:
                    ours = our_name(theirs, self.table)
                except KeyError:
                    ours = theirs                          # misfit reports it as unexpected
                if ours is not None:
                    yield ours, theirs, tensor

    def checked(self):
        """{our name: (dtype, shape)}; ValueError as in loading, where they are not the model's."""
        sizes, problems, tied = {}, [], {}
        for ours, theirs, tensor in self.tensors():
            if self.config.tie_word_embeddings and ours in ("transformer.embed.weight",
                                                            "lm_head.weight"):
                tied[ours] = tensor
            if ours == "lm_head.weight" and ours not in self.wanted:
                continue                                   # the embedding once more
            if problem := misfit(theirs, tensor, ours, self.wanted, sizes):
                problems.append(problem)
            sizes[ours] = (tensor.dtype, tuple(tensor.shape))
        problems += tie(tied)
        problems += missing_tensors(self.wanted, sizes, self.table, "")
        if problems:
            raise ValueError(f"the weights in {self.name} do not fit its config.json: "
                             f"{problem_text(problems, self.table)}")
        return sizes

    def official(self):
        """Yield (the hub's name, tensor), with a progress bar."""
        for ours, _, tensor in tqdm(self.tensors(), total=len(self.sizes), unit=" tensors",
                                    disable=None):
            if ours in self.wanted:
                yield next(iter(official_names({ours: None}, self.table))), tensor


def tokenizer_and_settings(name_or_folder, revision):
    """{file name: contents} of the tokenizer and the generation settings that are there."""
    files = {}
    for name, new in COPIED.items():
        if path := fetch(name_or_folder, name, revision, required=False):
            files[new] = path.read_bytes()
    return files


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------

def write_safetensors(path, source):
    """One file, written tensor by tensor, so that it takes the memory of one."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for ours, (dtype, shape) in source.sizes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        name = next(iter(official_names({ours: None}, source.table)))
        header[name] = {"dtype": SAFETENSORS[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in source.official():                # in the same order as the sizes
            file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


def official_files(source):
    """The files of the hub's format for write_files."""
    return {"model.safetensors": lambda path: write_safetensors(path, source),
            "config.json": config_bytes(source, source.config.vocab_size)}


def neox_files(source, parts):
    """The files of GPT-NeoX's format for write_files; weights may be mapped from disk."""
    if source.cls is not neox.GPTNeoXForCausalLM:
        raise ValueError("--parts is for GPT-NeoX: GPT-Neo was trained by other code, "
                         "without such files")
    config = source.config
    files = {name: functools.partial(write_part, make)
             for name, make in split_neox(dict(source.official()), config, parts).items()}
    for rank in range(parts):
        # DeepSpeed looks for these too.  Where there are layer files they hold no weights.
        nothing = {"dp_world_size": 1, "mp_world_size": parts, "module": {}, "optimizer": {},
                   "global_steps": 1, "skipped_steps": 1, "iteration": 1}
        files[f"mp_rank_{rank:02d}_model_states.pt"] = functools.partial(write_part, nothing.copy)
    rows = -(-config.vocab_size // parts) * parts
    if rows != config.vocab_size:
        print(f"the vocabulary's {config.vocab_size} rows are filled up with zeros to {rows}",
              file=sys.stderr)
    files["config.yml"] = yaml.safe_dump(neox_yml(config, parts), sort_keys=False).encode()
    return files | {"config.json": config_bytes(source, rows)}


def write_part(make, path):
    torch.save(make(), path)


def config_bytes(source, vocab_size):
    """config.json as save_pretrained writes it; its torch_dtype is that of the first weight."""
    dtype = next(iter(source.sizes.values()))[0]
    config = {"architectures": [source.cls.__name__], **source.config.to_dict(),
              "vocab_size": vocab_size, "torch_dtype": str(dtype).removeprefix("torch.")}
    return (json.dumps(config, indent=2) + "\n").encode()


def check_mixture(out, files):
    """Raise ValueError where the folder would hold files of two checkpoints after the conversion.

    Files of an earlier conversion, all of which are replaced, may be there.
    """
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    weights = [name for name in there if name in WEIGHT_FILES
               or name.endswith((".safetensors", ".bin", ".msgpack", ".index"))
               or LAYER_FILE.fullmatch(name) or RANK_FILE.fullmatch(name)]
    settings = {*COPIED.values()} & {*there}
    for kind, names in (("weights", weights), ("files of a checkpoint", settings)):
        if other := sorted({*names} - files.keys()):
            raise ValueError(f"{plain(out)} holds other {kind} ({plain(other[0])}): give a new "
                             "folder")
    if "config.json" in there and not weights:
        raise ValueError(f"{plain(out)} holds a config.json without weights, which would be lost: "
                         "give a new folder")


def convert(name_or_folder, out, parts=None, revision=None):
    """Write a checkpoint in the hub's format, or in GPT-NeoX's in so many tensor-parallel parts.

    Raises OSError and ValueError as loading does, and ValueError where `out` is the folder that is
    read, cannot be written, or holds files of another checkpoint.
    """
    if os.path.isdir(name_or_folder) and os.path.realpath(name_or_folder) == os.path.realpath(out):
        raise ValueError(f"{plain(out)} is the folder that is read: give a new folder to write to")
    check_folder(out)
    source = Source(name_or_folder, revision)
    files = official_files(source) if parts is None else neox_files(source, parts)
    files = tokenizer_and_settings(source.folder, revision) | files
    check_mixture(Path(out), files)
    write_files(out, files)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(description="Write a checkpoint in the official format (config.json and "
                                     "model.safetensors), or in GPT-NeoX's own.")
    add = parser.add_argument
    add("checkpoint", type=a_name, metavar="IN",
        help="a folder or a hub id, in any format that is read here")
    add("out", type=a_name, metavar="OUT", help="the folder to write to")
    add("--parts", type=int, metavar="N",
        help="write GPT-NeoX's layer files in N tensor-parallel parts (only for a GPT-NeoX model)")
    add("--revision", type=a_name, help="branch, tag or commit on the hub")
    return parser.parse_args(argv)


@as_command
def main(argv=None):
    """Exit status: 0, 2 with one line on what is wrong, 130 when interrupted."""
    args = arguments(argv)
    convert(args.checkpoint, args.out, args.parts, args.revision)
    print(f"written to {plain(args.out)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
