"""Whether a folder holds what one save wrote into it, told before anything large is allocated."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from ..files import fingerprint, fingerprint_once, json_fingerprint, read_json, weight_files
from ..user_models.base import CONFIG_FILE, SAVE_ANEW, check_user_files, fingerprint_list, read_header
from ..user_profile import check_user_profile_template
from ..users import USERS_FILE


LM_FILES_ENTRY = "language_model_files"
BASE_FILES_ENTRY = "base_model_files"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LM_CONFIG = "config.json"
FREE_ENTRIES = {  # entries of a config that may change without the model becoming another: a base moves, a version rises
    ADAPTER_CONFIG: ("base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    LM_CONFIG: (
        *("_name_or_path", "transformers_version", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    ),
}
BASE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
FREE_ELEMENTS = 1 << 26  # of buffers, such as tables of positions, which are in no file
PARAMETERS_PER_BYTE = 2  # of a file of weights, where they are quantized to 4 bits


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what a library raises on a damaged file, which may be anything, into a `ValueError` that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(error, (ValueError, FileNotFoundError)) and str(path) in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} cannot be used ({type(error).__name__}: {reason}). The file is damaged, or of a newer version: put back "
            "the one that was saved."
        ) from error


def language_model_files(folder: Path) -> dict[str, str]:
    """Fingerprints of the files in `folder` that make the language model, or the adapter, what it is."""
    files = {name: fingerprint(folder / name) for name in sorted(weight_files(folder))}
    config = ADAPTER_CONFIG if ADAPTER_WEIGHTS in files else LM_CONFIG
    if files and (folder / config).is_file():
        files[config] = _config_fingerprint(folder / config)
    return files


def base_model_files(name: str, revision: str | None = None) -> dict[str, str]:
    """Fingerprints of the weights of an adapter's base model; empty if they are in no local folder and not in the cache."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            config = cached_file(name, LM_CONFIG, revision=revision, local_files_only=True)
        except OSError:  # not in the cache, or a folder that is gone
            return {}
        folder = Path(str(config)).parent
    paths = sorted(path for pattern in BASE_WEIGHTS for path in folder.glob(pattern) if path.is_file())
    return {path.name: fingerprint_once(path) for path in paths}


def check_user_model_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """
    Make sure that `users.json` is the one that was saved, and that the other entries of the config can be.

    Raises:
        `ValueError`: if not.
    """
    path = folder / CONFIG_FILE
    bos_token_id, template = config.get("bos_token_id"), config.get("user_profile_template")
    if bos_token_id is not None and (type(bos_token_id) is not int or bos_token_id < 0):
        raise ValueError(f"`bos_token_id` in {path} must be a token's id, or null, got {bos_token_id!r:.200}.")
    if template is not None:
        if not isinstance(template, str):
            raise ValueError(f"`user_profile_template` in {path} must be a text, or null, got {template!r:.200}.")
        with naming(path):
            check_user_profile_template(template)
    check_user_files(folder, config, (USERS_FILE,))


def check_fingerprints(folder: Path, config: Mapping[str, Any], needs_weights: bool = False) -> None:
    """
    Make sure that the language model in `folder` is the one that the user model was saved with.

    Args:
        folder (`Path`): The folder in which `user_model/` is.
        config (`Mapping`): The entries of the user model's config.
        needs_weights (`bool`, *optional*, defaults to `False`): Whether to refuse a folder without weights, in which a run
            with FSDP2 or DeepSpeed may keep shards of its own.

    Raises:
        `ValueError`: if a file is gone or another one, if there are weights that the list lacks, or if there is no list.
    """
    user_folder = folder / "user_model"
    listed = fingerprint_list(user_folder, config, LM_FILES_ENTRY)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    for name, expected in listed.items():
        path = folder / name
        if name in FREE_ENTRIES:
            differs = _config_fingerprint(path) != expected
        else:
            differs = not path.is_file() or fingerprint(path) != expected
        if differs:
            raise ValueError(
                f"{path} is not the file that the user model in {user_folder} was saved with: the folder holds "
                f"parts of two saves, as after a kill. Use an earlier checkpoint, or put the matching files back. {SAVE_ANEW}"
            )
    would_load = (
        {ADAPTER_WEIGHTS} if is_adapter else {name for name in weight_files(folder) if name != ADAPTER_WEIGHTS}
    )
    if needs_weights and not would_load:
        raise ValueError(
            f"{folder} holds no weights of a language model in safetensors, which are all that is loaded here. Save it with "
            "`model.save_pretrained(folder)`."
        )
    unlisted = sorted(would_load - listed.keys()) if needs_weights or weight_files(folder) else []
    if unlisted:
        raise ValueError(
            f"{folder / unlisted[0]} is not among the files that the user model in {user_folder} was saved with "
            f"({sorted(listed)}). Move it away, or use an earlier checkpoint. {SAVE_ANEW}"
        )


def check_base_model(folder: Path, config: Mapping[str, Any], name: str, revision: str | None = None) -> None:
    """
    Make sure that the adapter in `folder` is put on the base model that it was saved with, as far as it can be told: of
    files of the same name, the weights must be the same.

    Raises:
        `ValueError`: if the weights are others.
    """
    if BASE_FILES_ENTRY not in config:
        return
    expected = fingerprint_list(folder / "user_model", config, BASE_FILES_ENTRY)
    found = base_model_files(name, revision)
    for file in expected.keys() & found.keys():
        if found[file] != expected[file]:
            raise ValueError(
                f"{file} of the base model {name} is not the file that the adapter in {folder} was trained on: the base was "
                f"trained on or swapped since. Put the base model back, or name it in {folder / ADAPTER_CONFIG}. {SAVE_ANEW}"
            )


def check_bos_token_id(folder: Path, config: Mapping[str, Any], num_tokens: int, own: int | None) -> None:
    """
    Make sure that the language model has the token after which the soft prompt goes. In a folder of format 1 that is all
    that can be told; since then the config holds a fingerprint of itself.

    Raises:
        `ValueError`: if it has not.
    """
    bos_token_id = config.get("bos_token_id")
    if config["format_version"] == 1 and bos_token_id not in (None, own) and bos_token_id >= num_tokens:
        raise ValueError(
            f"`bos_token_id` in {folder / 'user_model' / CONFIG_FILE} is {bos_token_id}, the language model has {num_tokens} "
            "tokens. Put back the config that was saved."
        )


def check_sizes(folder: Path, architecture: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """
    Compare the sizes in `config.json` with the headers of the weights beside it, on a model without memory.

    Raises:
        `ValueError`: if a weight has another shape in the file, or if the file is too small for such a model.
    """
    path = folder / LM_CONFIG
    files = [folder / name for name in sorted(weight_files(folder)) if name.endswith(".safetensors")]
    headers = [read_header(file) for file in files]
    shapes = {name: shape for header in headers for name, (shape, _) in header.items()}
    num_bytes = sum(file.stat().st_size for file in files)
    with naming(path):
        num_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if num_layers > len(shapes):
            raise ValueError(f"{path} says {num_layers} layers, but the weights beside it are {len(shapes)} tensors.")
        with torch.device("meta"):
            model = architecture(copy.deepcopy(config))
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        num_elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
        if num_elements > PARAMETERS_PER_BYTE * num_bytes + FREE_ELEMENTS:
            raise ValueError(
                f"{path} describes a model of {num_elements:,} numbers, but the weights beside it are {num_bytes:,} bytes."
            )
    if getattr(config, "quantization_config", None) is not None:  # packed: other shapes
        return
    for name, shape in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{path} describes another model than the weights beside it: `{name}` would have shape "
                f"{tuple(tensors[name].shape)}, but has {shape} in the file. Put back the config that was saved."
            )


def check_loaded(folder: Path, info: Mapping[str, Any], is_quantized: bool) -> None:
    """
    Make sure that `from_pretrained` found a place for each weight in the files and a weight for each place.

    Raises:
        `ValueError`: if the config beside the weights describes another model.
    """
    names = (
        ("missing_keys", "mismatched_keys") if is_quantized else ("missing_keys", "mismatched_keys", "unexpected_keys")
    )
    wrong = {name: sorted(map(str, info[name])) for name in names if info.get(name)}
    if wrong:
        first = "; ".join(f"{len(keys)} {name.replace('_', ' ')}, such as {keys[0]}" for name, keys in wrong.items())
        raise ValueError(
            f"{folder / LM_CONFIG} describes another model than the weights beside it ({first}). Put back the config that "
            "was saved."
        )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """
    The entries of `adapter_config.json`.

    Raises:
        `FileNotFoundError`: if it is missing. `ValueError`: if it is damaged, of another task, or names no base model.
    """
    path = folder / ADAPTER_CONFIG
    values = read_json(path)
    base, revision, task = (values.get(name) for name in ("base_model_name_or_path", "revision", "task_type"))
    if not isinstance(base, str) or not base:
        raise ValueError(f"`base_model_name_or_path` in {path} must name the adapter's base model, got {base!r:.200}.")
    if revision is not None and not isinstance(revision, str):
        raise ValueError(f"`revision` in {path} must be a text or null, got {revision!r:.200}.")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"`task_type` in {path} must be 'CAUSAL_LM', got {task!r:.200}: it is no adapter of a language model."
        )
    return values


def _config_fingerprint(path: Path) -> str:
    free = FREE_ENTRIES[path.name]
    return json_fingerprint({name: value for name, value in read_json(path).items() if name not in free})
