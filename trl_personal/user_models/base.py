"""What every user model is: a module from user indices to soft prompts, with a config, a registry and its own files."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..files import fingerprint, json_fingerprint, read_json, replaced_file, write_atomically
from ..users import GENERIC_USER_INDEX, JOINED_FILE, USERS_FILE


CONFIG_FILE = "user_model_config.json"
WEIGHTS_FILE = "user_model.safetensors"
FORMAT_VERSION = 2  # of the two files above; 1 has no list of their fingerprints
FILES_ENTRY = "user_model_files"  # in the config: fingerprints of the files beside it, and of its other entries

SAVE_ANEW = (
    "(To combine a user model with a language model or a vocabulary on purpose, use `attach_user_model`; the model's "
    "`save_pretrained` then writes a folder that belongs together.)"
)

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
    """Returns the class registered as `kind`. Raises a `ValueError` that names the known kinds if there is none."""
    if not isinstance(kind, str) or kind not in USER_MODELS:
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
        num_users (`int`): The number of known users. The generic user is not counted; tables have `num_users + 1` rows.
        num_virtual_tokens (`int`): The number of vectors in a soft prompt.
        token_dim (`int`): The width of one token embedding of the language model.
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
    `GENERIC_USER_INDEX` (0) of every table is the generic user. Make tables an `nn.Embedding` with a row per user: then
    [`resize`], [`keep_rows`], [`get_rows`] and [`set_rows`] work as they are, and bitsandbytes optimizers keep 32-bit state
    for them. Weights are float32, also where the language model around them is cast (`model.half()`,
    `model.to(torch.bfloat16)`): small steps would be lost in fewer digits. The soft prompt is cast where it is used.
    """

    kind: ClassVar[str]
    keeps_float32 = True  # not under DeepSpeed, whose engine casts every module and keeps float32 weights itself
    config_class: ClassVar[type[UserModelConfig]] = UserModelConfig

    def __init__(self, config: UserModelConfig) -> None:
        super().__init__()
        self.config = config
        self._names_of_rows: frozenset[str] | None = None
        self._hub_mixin_config = None  # the config has a file of its own, so the mixin must not write `config.json`
        self.register_load_state_dict_post_hook(_keep_float32)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `half()`, `to(...)` and `cuda()` call for each tensor: moves are made, casts from float32 are not."""

        def moved(tensor: Tensor) -> Tensor:
            # what `fn` does is told by a tensor of nothing
            applied = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if applied.dtype in (tensor.dtype, torch.float32):
                return fn(tensor)
            return tensor.to(applied.device)

        return super()._apply(moved if self.keeps_float32 else fn, recurse)  # type: ignore[no-untyped-call]

    @abstractmethod
    def forward(self, user_indices: Tensor) -> Tensor:
        """LongTensor `(batch,)` of user indices to float32 soft prompts `(batch, num_virtual_tokens, token_dim)`."""

    @torch.no_grad()
    def initialize(self, draw: Callable[[int], Tensor]) -> None:  # noqa: B027 (a kind may keep its own initial values)
        """
        Start from prompts in the language model's embedding space. Called once, before training.

        `draw(n)` returns `n` initial prompts, `(n, num_virtual_tokens, token_dim)`, as `soft_prompt_init` says.
        """

    def units(self, embedding_std: float) -> dict[str, float]:
        """
        The size of a change that matters, for each parameter by name: the default learning rates are a share of it. A kind
        overrides it for parameters that are not on the scale of embeddings, such as weights of a mixture.

        Args:
            embedding_std (`float`): The standard deviation of the language model's token embeddings.

        ```python
        >>> from trl_personal import ClusterUserModel, ClusterUserModelConfig
        >>> ClusterUserModel(ClusterUserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=4)).units(0.1)
        {'cluster_prompts': 0.1, 'user_logits.weight': 1.0}
        ```
        """
        return dict.fromkeys((name for name, _ in self.named_parameters()), embedding_std)

    def row_tables(self) -> dict[str, nn.Embedding]:
        """
        The tables whose row `u` belongs to user `u`, by the names of the modules. Everything else is shared by all users.

        A table counts if it has one row more in a user model of one more user. (An `nn.Embedding` of something else may
        happen to have as many rows.)

        ```python
        >>> from trl_personal import IndividualUserModel
        >>> IndividualUserModel(UserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=4)).row_tables()
        {'user_offsets': Embedding(3, 12, padding_idx=0)}
        ```

        Raises:
            `ValueError`: if a parameter or buffer with a row per user is not the weight of an `nn.Embedding`.
        """
        tables = {}
        for name in sorted(self._names_with_rows()):
            module_name, _, attribute = name.rpartition(".")
            module = self.get_submodule(module_name)
            if not isinstance(module, nn.Embedding) or attribute != "weight":
                raise ValueError(
                    f"`{name}` of {type(self).__name__} has a row per user, but is not the weight of an `nn.Embedding`. Make "
                    "it one, or override `row_tables`, `get_rows` and `set_rows`."
                )
            tables[module_name] = module
        return tables

    @torch.no_grad()
    def get_rows(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """
        The rows of users, in the order of `indices`: for each of [`row_tables`] a float32 copy `(n, width)` on the CPU.

        Where FSDP2 has sharded the tables, every rank must call it.

        Raises:
            `ValueError`: if an index is not one of 0 (the generic user) to `num_users`.
        """
        rows = torch.tensor(self._checked_indices(indices, first=GENERIC_USER_INDEX), dtype=torch.long)
        whole = {name: _whole(table.weight) for name, table in self.row_tables().items()}
        return {name: weight[rows.to(weight.device)].float().cpu() for name, weight in whole.items()}

    @torch.no_grad()
    def set_rows(self, indices: Sequence[int] | Tensor, rows: Mapping[str, Tensor]) -> None:
        """
        Replace the rows of users by others, such as those that [`get_rows`] read from a model with the same shared
        parameters. All is checked before anything is written. Where FSDP2 has sharded the tables, every rank must call it.

        Args:
            indices (`list[int]` or `LongTensor` `(n,)`): The users, 1 to `num_users`. The generic user's row 0 is refused: it
                is every unknown user's, and in some kinds part of every user.
            rows (`dict[str, Tensor]`): New rows `(n, width)` by the names of [`row_tables`], all of them.

        Raises:
            `ValueError`: if an index is out of range or listed twice, or if names, shapes or numbers do not fit.
        """
        numbers = self._checked_indices(indices, distinct=True)
        tables = self.row_tables()
        if set(rows) != set(tables):
            raise ValueError(
                f"A user of {type(self).__name__} has rows in {sorted(tables)}, got rows of {sorted(rows)}. Read them with "
                "`get_rows` from a user model of the same kind."
            )
        for name, table in tables.items():
            shape = (len(numbers), *table.weight.shape[1:])
            if tuple(rows[name].shape) != shape:
                raise ValueError(f"Rows of `{name}` must have shape {shape}, got {tuple(rows[name].shape)}.")
            if not rows[name].isfinite().all():
                raise ValueError(f"Rows of `{name}` must be finite, but hold NaN or infinity.")
        for name, table in tables.items():
            weight = _whole(table.weight)
            weight[torch.tensor(numbers, dtype=torch.long, device=weight.device)] = rows[name].to(weight)
            if isinstance(table.weight, DTensor):
                table.weight.copy_(distribute_tensor(weight, table.weight.device_mesh, table.weight.placements))

    def keep_rows(self, indices: Sequence[int] | Tensor) -> Self:
        """
        A user model of these users only, who become 1 to n in the order given. The generic user stays row 0, and shared
        parameters, dtypes, device, training mode and `requires_grad` are the same.

        Raises:
            `ValueError`: if an index is not one of 1 to `num_users`, or is listed twice.
        """
        return self._with_rows([GENERIC_USER_INDEX, *self._checked_indices(indices, distinct=True)])

    def resize(self, num_users: int) -> Self:
        """
        A user model of `num_users` users: known users keep their rows, new ones start as in `__init__`. Shared parameters,
        dtypes, device, training mode and `requires_grad` are the same.

        Raises:
            `ValueError`: if there would be fewer users than now.
        """
        if num_users < self.config.num_users:
            raise ValueError(
                f"Cannot shrink a user model of {self.config.num_users} users to {num_users}. Name the users to keep, with "
                "`keep_rows`."
            )
        return self._with_rows(range(self.config.num_users + 1), num_users)

    @torch.no_grad()
    def _with_rows(self, rows: Sequence[int], num_users: int | None = None) -> Self:
        """A user model of `num_users` (default: of as many as there are rows) whose first rows are `rows` of this one."""
        num_users = len(rows) - 1 if num_users is None else num_users
        names, mine = self._names_with_rows(), _tensors(self)
        other = type(self)(replace(self.config, num_users=num_users)).to(next(iter(mine.values())).device)
        for name, tensor in _tensors(other).items():
            old = _whole(mine[name])
            tensor.data = tensor.data.to(old.dtype)
            if name in names:
                tensor[: len(rows)] = old[torch.tensor(rows, device=old.device)]
            else:
                tensor.copy_(old)
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(mine[name].requires_grad)
        for name, module in other.named_modules():
            module.training = self.get_submodule(name).training
        return other

    def _names_with_rows(self) -> frozenset[str]:
        """Parameters and buffers with a row per user: those with one row more where there is one user more."""
        if self._names_of_rows is None:
            with torch.device("meta"):
                now, more = (
                    _tensors(type(self)(replace(self.config, num_users=self.config.num_users + extra)))
                    for extra in (0, 1)
                )
            names = {name for name, tensor in now.items() if tensor.shape != more[name].shape}
            for name in names:
                if more[name].shape != (now[name].shape[0] + 1, *now[name].shape[1:]):
                    raise ValueError(
                        f"`{name}` of {type(self).__name__} grows with the number of users, but not by a row for each. "
                        "Override `resize`, `keep_rows`, `row_tables`, `get_rows` and `set_rows`."
                    )
            self._names_of_rows = frozenset(names)
        return self._names_of_rows

    def _checked_indices(
        self, indices: Sequence[int] | Tensor, first: int = GENERIC_USER_INDEX + 1, distinct: bool = False
    ) -> list[int]:
        numbers: list[Any] = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        last = self.config.num_users
        wrong = [
            n for n in numbers if not isinstance(n, Integral) or isinstance(n, bool) or not first <= int(n) <= last
        ]
        if wrong:
            raise ValueError(
                f"Users must be given by their rows, integers from {first} to {last}, got {wrong[:5]}. "
                "`UserVocab.encode` turns ids into rows."
            )
        twice = sorted(n for n, count in Counter(numbers).items() if count > 1) if distinct else []
        if twice:
            raise ValueError(f"Each user may be listed once, got {twice[:5]} more than once.")
        return [int(n) for n in numbers]

    def save_files(
        self, directory: str | Path, state_dict: Mapping[str, Tensor] | None = None, **extra: object
    ) -> None:
        """
        Write `user_model.safetensors`, then `user_model_config.json` with `extra` entries in it; each atomically.

        The config holds fingerprints of the weights, of a `users.json` and a `joined_users.json` that lie there, and of its
        own other entries. The generic user's row of a table that has none (`padding_idx`) is written as zeros.

        `state_dict` replaces the module's own, for weights gathered from other processes.
        """
        directory = Path(directory)
        state = self.state_dict() if state_dict is None else state_dict
        state = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
        for name in self._tables_without_generic_row() & state.keys():
            state[name] = state[name].clone()
            state[name][GENERIC_USER_INDEX] = 0
        with replaced_file(directory / WEIGHTS_FILE) as path:
            save_file(state, path)
        config: dict[str, Any] = {"format_version": FORMAT_VERSION, "kind": self.kind, **asdict(self.config), **extra}
        beside = [name for name in (WEIGHTS_FILE, USERS_FILE, JOINED_FILE) if (directory / name).is_file()]
        files = {name: fingerprint(directory / name) for name in beside}
        config[FILES_ENTRY] = files | {CONFIG_FILE: json_fingerprint(config)}
        write_atomically(directory / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

    def _tables_without_generic_row(self) -> set[str]:
        """Tables that say, by `padding_idx`, that the generic user has no row of its own: row 0 is zero and is not trained."""
        return {
            f"{name}.weight"
            for name, module in self.named_modules()
            if isinstance(module, nn.Embedding) and module.padding_idx == GENERIC_USER_INDEX
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save_files(save_directory)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, map_users: bool = False, **kwargs: Any
    ) -> "UserModel":
        """
        Load a user model of any registered kind, from a folder (or a repository) written by `save_pretrained`, or from one
        with a `user_model/` folder in it.

        With `map_users`, [`row_tables`] are mapped from the file: a row takes memory when it is used first. They are not
        searched for NaN then, which would read them, and changes of rows do not change the file.

        Raises:
            `FileNotFoundError`: if a file is missing. `ValueError`: if a file is cut off, foreign, of a newer format, of an
            unknown kind, or not the one that was saved; or if its weights do not have the shapes that the config says, are
            not finite, or give the generic user a row that the kind does not have.
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
        try:
            config = user_model_class.config_class(**{name: values[name] for name in names})
            with torch.device("meta"):
                user_model = user_model_class(
                    config
                )  # its shapes: nothing is allocated before the file is known to fit
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{directory / CONFIG_FILE} has sizes that cannot be. {error}") from error
        user_model._check_shapes(directory / WEIGHTS_FILE)
        check_user_files(directory, values, (WEIGHTS_FILE, CONFIG_FILE))
        if map_users:
            user_model.load_weights(directory, map_users=True)
            if not any(tensor.is_meta for tensor in _tensors(user_model).values()):  # but those that are not saved
                return user_model
        user_model = user_model_class(config)
        user_model.load_weights(directory)
        return user_model

    def load_weights(self, directory: str | Path, map_users: bool = False) -> None:
        """
        Read `user_model.safetensors` into this module. Shapes are compared with those in the file's header first. With
        `map_users`, the module takes the tensors of the file, which are mapped; else it copies them.

        Raises:
            `FileNotFoundError`: if it is missing. `ValueError`: if it is cut off or holds other names, shapes or dtypes, or
            numbers that are not finite, or a row of the generic user in a table without one.
        """
        path = Path(directory) / WEIGHTS_FILE
        self._check_shapes(path)
        saved = load_file(path)
        mapped = self._names_with_rows() if map_users else frozenset()
        spoiled = sorted(name for name, t in saved.items() if name not in mapped and not t.isfinite().all())
        if spoiled:
            raise ValueError(
                f"{path} holds NaN or infinity in {spoiled}, as after a training that diverged. Use an earlier checkpoint."
            )
        for name in sorted(self._tables_without_generic_row() & saved.keys()):
            if saved[name][GENERIC_USER_INDEX].any():
                raise ValueError(
                    f"Row {GENERIC_USER_INDEX} of `{name}` in {path} is not zero, but in a user model of kind {self.kind!r} "
                    "the generic user has no row. The file is damaged, or of another kind: put back the one that was saved."
                )
        self.load_state_dict(saved, assign=map_users)

    def _check_shapes(self, path: Path) -> None:
        """Compare names, shapes and dtypes with the header of a file, of which no more is read."""
        found = read_header(path)
        expected = {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in self.state_dict().items()}
        floats = {name: (shape, dtype.startswith(("F", "BF"))) for name, (shape, dtype) in found.items()}
        if floats != {name: (tuple(t.shape), t.is_floating_point()) for name, t in self.state_dict().items()}:
            raise ValueError(
                f"{path} does not fit a user model of kind {self.kind!r} with {self.config}: expected "
                f"{_describe(expected)}, found {_describe(found)}."
            )


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """
    Shapes and dtypes (`"F32"`, `"I64"`, ...) of the tensors in a safetensors file, by name, from its header alone.

    Raises:
        `FileNotFoundError`: if it is missing. `ValueError`: if it is cut off.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name} in {path.parent}.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}). The file is cut off, or is not safetensors.") from error


def check_user_files(directory: Path, config: Mapping[str, Any], names: Sequence[str]) -> None:
    """
    Make sure that the files `names` in `directory` are those that `config`, its `user_model_config.json`, was saved with.

    Folders of format 1 have no list of them.

    Raises:
        `ValueError`: if a file is another one or gone, or if the list is missing or lacks the file.
    """
    if FILES_ENTRY not in config and config["format_version"] == 1:
        return
    listed = fingerprint_list(directory, config, FILES_ENTRY)
    for name in names:
        path = directory / name
        if name not in listed:
            raise ValueError(f"`{FILES_ENTRY}` in {directory / CONFIG_FILE} lacks {name}. {SAVE_ANEW}")
        if name == CONFIG_FILE:
            found: str | None = json_fingerprint({key: value for key, value in config.items() if key != FILES_ENTRY})
        else:
            found = fingerprint(path) if path.is_file() else None
        if found != listed[name]:
            raise ValueError(
                f"{path} is not the file that was saved in {directory}: the folder holds parts of two saves, as after a kill, "
                f"or the file was edited or swapped. Use an earlier checkpoint, or put the file back. {SAVE_ANEW}"
            )


def fingerprint_list(directory: Path, config: Mapping[str, Any], entry: str) -> dict[str, str]:
    """
    The fingerprints in an entry of the config of a user model, by the names of files in one folder.

    Raises:
        `ValueError`: if there is no such entry, or if it is no list of files.
    """
    path, listed = directory / CONFIG_FILE, config.get(entry)
    if listed is None:
        raise ValueError(
            f"{path} has no `{entry}`, so nothing says which files it belongs to: the user model was saved alone, or the "
            f"entry is lost. {SAVE_ANEW}"
        )
    if not isinstance(listed, dict) or not all(
        isinstance(value, str) and Path(name).name == name for name, value in listed.items()
    ):
        raise ValueError(
            f"`{entry}` in {path} must map names of files in the folder to fingerprints, got {listed!r:.200}."
        )
    return listed


def read_user_model_config(directory: Path) -> dict[str, Any]:
    """The entries of `user_model_config.json`, checked to be one of ours and of a format this version reads."""
    path = directory / CONFIG_FILE
    values = read_json(path)
    version = values.get("format_version")
    if type(version) is not int or version < 1 or not isinstance(values.get("kind"), str):
        raise ValueError(f"{path} was not written by trl_personal: it has no `format_version` and `kind`.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {values['format_version']}, this version of trl_personal reads up to "
            f"{FORMAT_VERSION}. Upgrade with `pip install -U trl-personal`."
        )
    return values


def _tensors(user_model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are not saved."""
    return {**dict(user_model.named_parameters()), **dict(user_model.named_buffers())}


def _keep_float32(user_model: "UserModel", incompatible_keys: object) -> None:
    """After `load_state_dict(..., assign=True)`, which takes the dtypes of what is loaded."""
    if user_model.keeps_float32:
        user_model.float()


def _whole(tensor: Tensor) -> Tensor:
    """A tensor itself, or all of it if FSDP2 has sharded it: a copy, then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _describe(header: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
    return ", ".join(f"{name} {shape} {dtype}" for name, (shape, dtype) in sorted(header.items()))
