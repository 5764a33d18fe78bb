"""What every user model is: a module from user indices to soft prompts, with a config, a registry and its own files."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import read_json, replaced_file, write_atomically


CONFIG_FILE = "user_model_config.json"
WEIGHTS_FILE = "user_model.safetensors"
FORMAT_VERSION = 1  # of the two files above

USER_MODELS: dict[str, type["UserModel"]] = {}

UserModelClass = TypeVar("UserModelClass", bound="type[UserModel]")


def register_user_model(kind: str) -> Callable[[UserModelClass], UserModelClass]:
    """
    Class decorator that gives a [`UserModel`] its `kind`: the name in `user_model_kind` and in saved folders.

    Raises:
        `ValueError`: if another class has the name. (Running a notebook cell again replaces the class.)
    """

    def decorator(cls: UserModelClass) -> UserModelClass:
        known = USER_MODELS.get(kind)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"A user model of kind {kind!r} is already registered: {known.__name__}.")
        cls.kind = kind
        USER_MODELS[kind] = cls
        return cls

    return decorator


def get_user_model_class(kind: str) -> type["UserModel"]:
    """The class registered as `kind`; a `ValueError` that names the known kinds otherwise."""
    if kind not in USER_MODELS:
        raise ValueError(
            f"There is no user model of kind {kind!r}. Known kinds: {sorted(USER_MODELS)}. If the kind is your own, "
            "import the module that registers it first."
        )
    return USER_MODELS[kind]


@dataclass
class UserModelConfig:
    """
    Sizes of a user model. A kind with options of its own declares a subclass and names it in `config_class`.

    Args:
        num_users (`int`): Known users. The generic user is not counted; tables have `num_users + 1` rows.
        num_virtual_tokens (`int`): Vectors in a soft prompt.
        token_dim (`int`): Width of one token embedding of the language model.
    """

    num_users: int
    num_virtual_tokens: int
    token_dim: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "num_users" else 1
            if field.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"`{field.name}` must be an integer of at least {least}, got {value!r}.")


class UserModel(nn.Module, ModelHubMixin, ABC, library_name="trl-personal", tags=["trl-personal", "p-dpo"]):
    """
    Maps user indices to soft prompts (the implicit user model f of arXiv 2402.05133).

    A subclass needs `__init__(config)` and `forward(user_indices)`, and a name through [`register_user_model`]. Row
    `GENERIC_USER_INDEX` (0) of every table is the generic user. Tables are best an `nn.Embedding`: bitsandbytes
    optimizers keep 32-bit state for those only. Weights are float32; the soft prompt is cast where it is used.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type[UserModelConfig]] = UserModelConfig

    def __init__(self, config: UserModelConfig) -> None:
        super().__init__()
        self.config = config
        self._hub_mixin_config = None  # the config has a file of its own, so the mixin shall not write `config.json`

    @abstractmethod
    def forward(self, user_indices: Tensor) -> Tensor:
        """LongTensor `(batch,)` of user indices to float32 soft prompts `(batch, num_virtual_tokens, token_dim)`."""

    @torch.no_grad()
    def initialize(self, draw: Callable[[int], Tensor]) -> None:  # noqa: B027 (a kind may keep its own initial values)
        """
        Start from prompts in the language model's embedding space. Called once, before training.

        `draw(n)` returns `n` initial prompts, `(n, num_virtual_tokens, token_dim)`, as `soft_prompt_init` says.
        """

    @torch.no_grad()
    def resize(self, num_users: int) -> Self:
        """
        A user model for `num_users` users: the rows of known users are copied, new ones start as in `__init__`.

        Raises:
            `ValueError`: if there would be fewer users than now.
        """
        if num_users < self.config.num_users:
            raise ValueError(f"Cannot shrink a user model of {self.config.num_users} users to {num_users}.")
        resized = type(self)(replace(self.config, num_users=num_users))
        state = resized.state_dict()
        for name, old in self.state_dict().items():
            new = state[name]
            if new.shape == old.shape:
                new.copy_(old)
            elif new.ndim == old.ndim and new.shape[1:] == old.shape[1:]:
                new[: old.shape[0]] = old.to(new.device)
            else:
                raise ValueError(f"{name} of {type(self).__name__} has no row per user; override `resize`.")
        return resized.to(next(self.parameters()).device)

    def save_files(
        self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None, **extra: object
    ) -> None:
        """
        Write `user_model.safetensors`, then `user_model_config.json` with `extra` entries in it; each atomically.

        `state_dict` replaces the module's own, for weights gathered from other processes.
        """
        state = self.state_dict() if state_dict is None else state_dict
        with replaced_file(Path(directory) / WEIGHTS_FILE) as path:
            save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, path)
        config = {"format_version": FORMAT_VERSION, "kind": self.kind, **asdict(self.config), **extra}
        write_atomically(Path(directory) / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save_files(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "UserModel":
        """
        Load a user model of any registered kind, from a folder (or a repository) written by `save_pretrained`, or from one
        with a `user_model/` folder in it.

        Raises:
            `FileNotFoundError`: if a file is missing. `ValueError`: if a file is cut off, foreign, of a newer format, of an
            unknown kind, or if its weights do not have the shapes that the config says.
        """
        directory = Path(pretrained_model_name_or_path)
        if not directory.is_dir():
            patterns = [CONFIG_FILE, WEIGHTS_FILE, f"user_model/{CONFIG_FILE}", f"user_model/{WEIGHTS_FILE}"]
            directory = Path(snapshot_download(str(directory), allow_patterns=patterns, **kwargs))
        if not (directory / CONFIG_FILE).is_file() and (directory / "user_model").is_dir():
            directory = directory / "user_model"
        values = read_user_model_config(directory)
        user_model_class = get_user_model_class(values["kind"])
        names = {field.name for field in fields(user_model_class.config_class)}
        missing = sorted(names - set(values))
        if missing:
            raise ValueError(f"{directory / CONFIG_FILE} lacks {missing}; it is not of kind {values['kind']!r}.")
        user_model = user_model_class(user_model_class.config_class(**{name: values[name] for name in names}))
        user_model.load_weights(directory)
        return user_model

    def load_weights(self, directory: str | Path) -> None:
        """
        Read `user_model.safetensors` into this module.

        Raises:
            `FileNotFoundError`: if it is missing. `ValueError`: if it is cut off or holds other names, shapes or dtypes.
        """
        path = Path(directory) / WEIGHTS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path.name} in {path.parent}.")
        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read ({error}). The file is cut off, or is not safetensors."
            ) from error
        expected = self.state_dict()
        found = {name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in saved.items()}
        wanted = {name: (tuple(tensor.shape), tensor.is_floating_point()) for name, tensor in expected.items()}
        if found != wanted:
            raise ValueError(
                f"{path} does not fit a user model of kind {self.kind!r} with {self.config}: expected "
                f"{_describe(expected)}, found {_describe(saved)}."
            )
        self.load_state_dict(saved)


def read_user_model_config(directory: Path) -> dict[str, Any]:
    """The entries of `user_model_config.json`, checked to be one of ours and of a format this version reads."""
    path = directory / CONFIG_FILE
    values = read_json(path)
    if not isinstance(values.get("format_version"), int) or "kind" not in values:
        raise ValueError(f"{path} was not written by trl_personal: it has no `format_version` and `kind`.")
    if values["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {values['format_version']}, this version of trl_personal reads up to "
            f"{FORMAT_VERSION}. Upgrade with `pip install -U trl-personal`."
        )
    return values


def _describe(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(state.items()))
