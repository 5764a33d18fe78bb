"""A named progress bar for a training, as scripts show it that train more than one model."""

import logging
import warnings
from typing import Any, TypeVar

from datasets import disable_progress_bars
from huggingface_hub.utils import enable_progress_bars as enable_hub_bars
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging as transformers_logging


TrainerT = TypeVar("TrainerT", bound=Trainer)


class NamedProgressCallback(ProgressCallback):
    """
    The progress bar of [`~transformers.trainer_callback.ProgressCallback`] with a name in front and the last loss behind, in
    place of a line for each log.

    Args:
        name (`str`): What is trained, in a few words.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description(f"{self.name}: scoring pairs", refresh=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


def with_progress(trainer: TrainerT, name: str) -> TrainerT:
    """
    Give a trainer a named progress bar in place of its own; nothing with `disable_tqdm`.

    Args:
        trainer ([`~transformers.Trainer`]): A trainer of any kind.
        name (`str`): What is trained, in a few words.

    Returns:
        The trainer.

    ```python
    with_progress(trainer, "P-DPO").train()
    ```
    """
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(NamedProgressCallback(name))
    return trainer


def quiet_libraries() -> None:
    """
    Leave out what libraries say on every run and who runs a script cannot change: names that will change, pinned memory, and
    the bars of short work on datasets and weights. Downloads keep their bars.
    """
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    enable_hub_bars()
    for category, module in (
        (FutureWarning, "transformers"),
        (UserWarning, "torch.utils.data"),
        (UserWarning, "peft"),
    ):
        warnings.filterwarnings("ignore", category=category, module=module)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
