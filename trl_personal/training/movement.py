"""Says after training whether users have soft prompts of their own."""

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..user_models import UserModel
from ..user_models.movement import measure_movement


logger = logging.getLogger(__name__)


class MovementCallback(TrainerCallback):
    """
    Warns at the end of training if users' soft prompts hardly moved or hardly differ, and says at INFO level how far they are.

    Args:
        user_model ([`UserModel`]): The user model that is trained.
        embedding_std (`float`): The standard deviation of the language model's token embeddings.
    """

    def __init__(self, user_model: UserModel, embedding_std: float) -> None:
        self.user_model, self.embedding_std = user_model, embedding_std

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log one line, in the first process, unless users are frozen."""
        is_trained = any(parameter.requires_grad for parameter in self.user_model.parameters())
        movement = measure_movement(self.user_model, self.embedding_std) if is_trained else None
        if movement is None or not state.is_world_process_zero:
            return
        warning = movement.warning()
        if warning is not None:
            logger.warning(warning)
        else:
            logger.info(movement.describe())
