"""The files that the weights were first published in, and the reasons for their names and shapes.

    tensorflow.py    GPT-Neo, 2021: Mesh-TensorFlow on TPUs
    flax.py          GPT-Neo, 2021: transformers' Flax classes
    neox.py          GPT-NeoX, 2022, and Pythia, 2023: DeepSpeed on GPUs, in tensor-parallel parts

All tensors come out under the hub's names (load_weights.GPT_NEO, GPT_NEOX) and in torch's layout.
What a folder holds is seen from the names of its files:
"""

from pathlib import Path

from files import read_json
from originals.flax import read_flax
from originals.neox import (neox_config, neox_files, neox_folder, neox_settings, neox_shapes,
                            read_neox)
from originals.tensorflow import mesh_config, mesh_index, read_mesh


def config_json(folder):
    """The contents of folder/config.json; {} without one."""
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def original_config(name_or_folder, unpickle):
    """The hub's config.json for a folder: its own, or one made from an original format.

    None for what is no folder, and for a folder without either.
    unpickle(path, module): {name: tensor} of a file of torch.save, as by bin_files.read_bin.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        return None
    raw = config_json(folder)
    if "model_type" in raw:
        return raw
    if raw:
        return mesh_config(folder / "config.json") if mesh_index(folder) else None
    place = neox_folder(folder)
    return place and (config_json(place) or neox_config(place, unpickle))


def original_files(name_or_folder, unpickle):
    """The files of a folder for read_original, [] where there is none in an original format."""
    folder = Path(name_or_folder)
    if not folder.is_dir():
        return []
    if index := mesh_index(folder):
        return [index]
    if (place := neox_folder(folder)) is None:
        return []
    files = neox_files(place)
    neox_shapes(files, unpickle)
    return [paths[0] for paths in files.values()]


def read_original(path, unpickle):
    """Yield (the hub's name, tensor) of one file that original_files or the hub's folder names."""
    if path.suffix == ".msgpack":
        yield from read_flax(path)
    elif path.suffix == ".index":
        raw = config_json(path.parent)
        raw = raw if "model_type" in raw else mesh_config(path.parent / "config.json")
        yield from read_mesh(path, raw.get("vocab_size"))
    else:
        raw = config_json(path.parent) or config_json(path.parent.parent)
        if "model_type" in raw:
            parallel = raw.get("use_parallel_residual", True)      # GPTNeoXConfig's default
        else:
            parallel = neox_settings(path.parent)[0].get("gpt_j_residual", False)    # GPT-NeoX's
        yield from read_neox(path, unpickle, parallel)
