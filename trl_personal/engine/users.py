"""Users who join, are updated and leave while others are answered."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models.folder_users import write_known_users
from ..models.known_users import KnownUsers, known_users
from ..models.loading import load_user_model
from ..models.saving import USER_MODEL_FOLDER, get_base_model
from ..serving.interface import RequestError
from ..user_models.base import FILES_ENTRY, read_user_model_config
from .transformers import TransformersEngine


class ModelUsers:
    """
    A [`~serving.interface.UserAdmin`] for the model of an engine. A change is made on a second model with the same weights, is
    written to the folder, and only then do the users of the first become those of the second, between two tokens.

    Args:
        engine ([`TransformersEngine`]): Has the model.
        tokenizer: The model's tokenizer.
        folder (`Path`, *optional*): The folder of the model. Without one, as for a model of the hub, changes end with the
            server.
        ref_model (`str`, *optional*): The model that training started from; an adapter does not need it.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path | None = None,
        ref_model: str | None = None,
    ) -> None:
        self._engine, self._tokenizer, self._folder, self._ref_model = engine, tokenizer, folder, ref_model
        self._files = None if folder is None else _fingerprints(folder)

    def add_users(self, pairs: Sequence[Mapping[str, Any]], user_ids: Sequence[str]) -> Mapping[str, Any]:
        """See [`~serving.interface.UserAdmin.add_users`]."""
        rows = Dataset.from_list([dict(pair) for pair in pairs]) if pairs else None
        return self._change(
            lambda model: model.add_users(rows, self._tokenizer, self._ref_model, user_ids=list(user_ids)).to_dict()
        )

    def update_users(self, pairs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """See [`~serving.interface.UserAdmin.update_users`]."""
        rows = Dataset.from_list([dict(pair) for pair in pairs])

        def update(model: Any) -> Mapping[str, Any]:
            causal_lm = get_base_model(model)
            # rows are set in place: not in the table that answers are read from
            causal_lm.user_model = causal_lm.user_model.resize(causal_lm.user_model.config.num_users)
            return model.update_users(rows, self._tokenizer, self._ref_model).to_dict()

        return self._change(update)

    def remove_users(self, user_ids: Sequence[str]) -> Mapping[str, Any]:
        """See [`~serving.interface.UserAdmin.remove_users`]."""

        def remove(model: Any) -> Mapping[str, Any]:
            get_base_model(model).remove_users(list(user_ids))
            return {"num_removed": len(user_ids)}

        return self._change(remove)

    def export_users(self, user_ids: Sequence[str]) -> bytes:
        """See [`~serving.interface.UserAdmin.export_users`]."""
        with tempfile.TemporaryDirectory() as folder, as_request_errors():
            path = Path(folder, "users.safetensors")
            get_base_model(self._engine.model).export_users(list(user_ids), path)
            return path.read_bytes()

    def _change(self, change: Callable[[Any], Mapping[str, Any]]) -> Mapping[str, Any]:
        with as_request_errors():
            model = with_same_weights(self._engine.model)
            told = change(model)
        users = known_users(model)
        if self._folder is not None:
            users = self._write(self._folder, users)
        self._engine.set_users(users)
        return {**told, "num_users": len(users.user_vocab), "is_saved": self._folder is not None}

    def _write(self, folder: Path, users: KnownUsers) -> KnownUsers:
        """
        Write users to the folder; returns them with their tables mapped from there.

        Raises:
            [`RequestError`]: if the folder's users are no longer those that the server read or wrote last: they would be lost.
        """
        user_folder = folder / USER_MODEL_FOLDER
        if _fingerprints(folder) != self._files:
            raise RequestError(
                "The users in the model's folder were changed by somebody else since the server read them, so nothing was "
                "changed now. Start the server again."
            )
        write_known_users(folder, users, read_user_model_config(user_folder))
        self._files = _fingerprints(folder)
        return replace(users, user_model=load_user_model(user_folder, map_users=True)[0])


def _fingerprints(folder: Path) -> Any:
    return read_user_model_config(folder / USER_MODEL_FOLDER).get(FILES_ENTRY)


@contextmanager
def as_request_errors() -> Iterator[None]:
    """Let errors that say what is wrong with pairs or ids reach the client."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise RequestError(" ".join(str(error).split())) from error


def with_same_weights(model: Any) -> Any:
    """
    A second model with the weights of `model`, which both read: what is done to its modules, hooks, adapters and users does
    not show in the first, which may be at work meanwhile. It takes no memory but for its structure.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        is_plain = type(parameter) is nn.Parameter  # those that bitsandbytes has quantized have a state of their own
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False) if is_plain else parameter
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)
