"""What an exported folder says of itself. Knows the standard library only, as it is read where transformers is another one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import fingerprint, json_fingerprint, read_json, weight_files, write_atomically
from ..users import USERS_FILE


EXPORT_FILE = "export.json"
# engines read every file of weights beside the language model's, so those of users lie in a folder of their own
USERS_FOLDER = "users"
TABLE_FILE = f"{USERS_FOLDER}/soft_prompts.safetensors"
TABLE_NAME = (
    "soft_prompts"  # of the tensor in it, (num_users + 1, num_virtual_tokens, token_dim); row 0 is the generic user's
)
EMBEDDINGS_FILE = f"{USERS_FOLDER}/token_embeddings.safetensors"  # beside an adapter only
EMBEDDINGS_NAME = "token_embeddings"  # (vocab_size, token_dim), as looked up
ADAPTER_FOLDER = "adapter"
FORMAT_VERSION = 1
FORMATS = ("vllm", "tokens")


@dataclass(frozen=True)
class Layout:
    """
    Where the soft prompt goes: right after the BOS token of rows that start with it, else in front.

    Args:
        num_virtual_tokens (`int`): The number of vectors in a soft prompt.
        bos_token_id (`int`, *optional*): The BOS token that the model was trained with.
    """

    num_virtual_tokens: int
    bos_token_id: int | None = None

    def position(self, token_ids: Sequence[int]) -> int:
        """
        The number of tokens in front of the soft prompt, 0 or 1.

        ```python
        >>> layout = Layout(num_virtual_tokens=10, bos_token_id=1)
        >>> layout.position([1, 5, 6]), layout.position([5, 6]), layout.position([])
        (1, 0, 0)
        ```
        """
        return int(self.bos_token_id is not None and len(token_ids) > 0 and token_ids[0] == self.bos_token_id)


@dataclass(frozen=True)
class Manifest:
    """
    The entries of `export.json`.

    Args:
        format (`str`): `"vllm"` or `"tokens"`.
        layout (`Layout`): Where the soft prompt goes.
        num_users (`int`): The users in it, without the generic one.
        token_dim (`int`): The width of the token embeddings.
        adapter_rank (`int`, *optional*): Of a LoRA adapter that is not merged, in `adapter/`.
        made_from (`dict`): Fingerprints of the files of the trained model.
        files (`dict[str, str]`): Fingerprints of the files of the export.
        versions (`dict[str, str]`): Of the packages that wrote it.
    """

    format: str
    layout: Layout
    num_users: int
    token_dim: int
    adapter_rank: int | None = None
    made_from: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `export.json`."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_atomically(folder / EXPORT_FILE, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: str | Path, format: str | None = None) -> Manifest:
    """
    The entries of `export.json` in an exported folder, whose files are those that were exported.

    Args:
        folder (`str` or `Path`): The folder.
        format (`str`, *optional*): The format that the caller can use. Defaults to any.

    Raises:
        `FileNotFoundError`: if it is no exported folder. `ValueError`: if it is of another format or of a newer version, or if
        a file is gone or another one.
    """
    path = Path(folder) / EXPORT_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {EXPORT_FILE} in {folder}, so it is no exported model. Make one with `trl-personal export OUT "
            f"--format vllm --output_dir {folder}`."
        )
    values = read_json(path)
    if values.pop("format_version", None) != FORMAT_VERSION:
        raise ValueError(
            f"{path} is of another version than {FORMAT_VERSION}, which this release of trl-personal reads. Export the model "
            "again, or use the release that exported it."
        )
    try:
        manifest = Manifest(**{**values, "layout": Layout(**values["layout"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} lacks an entry, or has one too many ({error}). Export the model again.") from error
    if format is not None and manifest.format != format:
        raise ValueError(
            f"{folder} was exported as {manifest.format!r}; needed is {format!r}. Export the model again, with `trl-personal "
            f"export OUT --format {format}`."
        )
    found = fingerprints(Path(folder))
    differing = sorted(
        name for name in manifest.files.keys() | found.keys() if manifest.files.get(name) != found.get(name)
    )
    if differing:
        raise ValueError(
            f"{Path(folder) / differing[0]} is not the file that was exported: it was edited, swapped or removed. Export the "
            "model again."
        )
    return manifest


def fingerprints(folder: Path) -> dict[str, str]:
    """Fingerprints of the files in an exported folder that make the model and its users what they are."""
    names = [*sorted(weight_files(folder)), TABLE_FILE, EMBEDDINGS_FILE]
    names += [f"{ADAPTER_FOLDER}/{name}" for name in sorted(weight_files(folder / ADAPTER_FOLDER))]
    found = {name: fingerprint(folder / name) for name in names if (folder / name).is_file()}
    if (folder / USERS_FOLDER / USERS_FILE).is_file():
        found[f"{USERS_FOLDER}/{USERS_FILE}"] = json_fingerprint(read_json(folder / USERS_FOLDER / USERS_FILE))
    return found
