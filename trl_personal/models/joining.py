"""`model.add_users(...)` and `model.update_users(...)`: methods of a model with users that fit rows to new pairs."""

from importlib import import_module
from typing import Any


# Fitting needs the trainer, which knows models, and not the other way round: it is found by name when it is asked for.
FITTING = "..new_users.join"


class JoiningUsers:
    """Added in front of a model's class by [`attach_user_model`]: users join and are refined."""

    user_model_folder: str | None = None  # where the model was loaded from, with the settings of its training
    training_settings: dict[str, Any] | None = None  # of the trainer that the model is in

    def add_users(self, dataset: Any, tokenizer: Any, ref_model: Any = None, **kwargs: Any) -> Any:
        """See [`~new_users.join.add_users`]."""
        return import_module(FITTING, __package__).add_users(self, dataset, tokenizer, ref_model, **kwargs)

    def update_users(self, dataset: Any, tokenizer: Any, ref_model: Any = None, **kwargs: Any) -> Any:
        """See [`~new_users.join.update_users`]."""
        return import_module(FITTING, __package__).update_users(self, dataset, tokenizer, ref_model, **kwargs)
