"""transformers' other arguments of from_pretrained and save_pretrained.

They are accepted at the values that change nothing here, so that code written for transformers
runs, and refused by name at any other value.  Settings for generate may come as transformers'
GenerationConfig.
"""

import torch

from files import error_line, shown

HUB = ("cache_dir", "local_files_only", "token")         # for huggingface_hub; nothing for a folder
# transformers' other arguments, with the values at which they change nothing here.
LOADING = {
    "low_cpu_mem_usage": (None, True, False), "trust_remote_code": (None, False),
    "subfolder": (None, ""), "force_download": (None, False), "proxies": (None, {}),
    "resume_download": (None, True, False), "use_auth_token": (None,), "max_memory": (None,),
    "offload_folder": (None,), "offload_state_dict": (None, False),
    "offload_buffers": (None, False), "quantization_config": (None,),
    "load_in_8bit": (None, False), "load_in_4bit": (None, False),
    "ignore_mismatched_sizes": (None, False),
    "output_loading_info": (None, False), "from_tf": (None, False), "from_flax": (None, False),
    "variant": (None,), "state_dict": (None,), "config": (None,), "adapter_kwargs": (None, {}),
    "tp_size": (None,), "device_mesh": (None,), "use_kernels": (None, False),
    "weights_only": (None, True), "key_mapping": (None, {}), "mirror": (None,),
    "use_cache": (None, True, False), "return_dict": (None, True),
    "output_hidden_states": (None, False), "output_attentions": (None, False),
    "code_revision": (None, "main"), "gguf_file": (None,), "use_flash_attention_2": (None, False),
    "from_pt": (None, True, False), "_do_init": (None, True),       # of the Flax classes
    "disable_mmap": (None, False), "fusion_config": (None, {}), "kernel_config": (None,),
    "_fast_init": (None, True, False), "generation_config": (None,),
}
SAVING = {                                                 # the same for save_pretrained
    "safe_serialization": (None, True), "is_main_process": (None, True), "state_dict": (None,),
    "push_to_hub": (None, False), "max_shard_size": (None, "50GB"), "variant": (None,),
    "token": (None,),
    "save_peft_format": (None, True, False), "save_original_format": (None, True, False),
}
REASONS = {"trust_remote_code": "code of a checkpoint is never run here",
           "load_in_8bit": "weights='int8' quantizes", "load_in_4bit": "weights='int4' quantizes",
           "quantization_config": "weights='int8' or 'int4' quantizes",
           "subfolder": "give the folder itself",
           "max_shard_size": "all weights are written into one model.safetensors, which "
                             "transformers reads",
           "safe_serialization": "weights are written as safetensors",
           "output_hidden_states": "ask for them in the call",
           "output_attentions": "ask for them in the call",
           "use_flash_attention_2": "attn_implementation='flash' asks for it"}


def loading_options(changes, device):
    """Take transformers' arguments out of `changes` -> (the hub's, use_safetensors, device).

    Raises ValueError, with the name, for one that asks for something that is not done here.
    """
    hub = {name: changes.pop(name) for name in HUB if name in changes}
    use_safetensors = changes.pop("use_safetensors", None)
    if use_safetensors not in (None, True, False):
        raise ValueError("use_safetensors must be True, False or None, got "
                         f"{shown(use_safetensors)}")
    check_usual("from_pretrained",
                {name: changes.pop(name) for name in LOADING if name in changes}, LOADING)
    mapped = device_of_map(changes.pop("device_map", None))
    if None not in (mapped, device) and torch.device(mapped) != torch.device(device):
        raise ValueError(f"device_map={mapped} and device={device} contradict each other: give one")
    device = mapped if device is None else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {shown(str(device))} cannot be used here: "
                         f"{error_line(error)}") from None
    return hub, use_safetensors, device


def check_usual(function, given, table):
    """Raise ValueError, with the name, for an argument that is not at one of its usual values."""
    for name, value in given.items():
        usual = table.get(name, ())
        if not any(value is one or (value == one and type(value) is type(one)) for one in usual):
            reason = REASONS.get(name, "only its usual values are accepted")
            raise ValueError(f"{function}({name}={shown(value)}) is not supported: {reason}")


def device_of_map(device_map):
    """The device that a device_map names, or None; one that splits the model is a ValueError."""
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if device_map == "auto":
        if torch.cuda.device_count() > 1:
            raise ValueError("device_map='auto' would split the model over several GPUs, which is "
                             "not supported: give device='cuda:0'")
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device_map is None or isinstance(device_map, torch.device):
        return device_map
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(f"device_map={shown(device_map)} is not supported: give one device, or "
                         "'auto' where there is only one") from None


def settings_dict(config):
    """A dict of settings from None, a dict, or an object like transformers' GenerationConfig."""
    if config is None or isinstance(config, dict):
        return config or {}
    for method in ("to_diff_dict", "to_dict"):
        if hasattr(config, method):
            return getattr(config, method)()
    raise ValueError("generation_config must be a dict or have a method to_dict, got "
                     f"{type(config).__name__}")
