"""What personalized DPO is compared with, trained for as many steps: vanilla DPO, and other ways to personalize."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from rich.progress import track
from transformers import AutoProcessor, PrinterCallback

from ..arrays import FloatArray
from ..models.loading import is_adapter
from ..training.dpo import PersonalizedDPOTrainer
from ..training.settings import SCORING, TRAINING
from ..user_column import iterate_user_ids
from .scoring import ScoredPairs, score_pairs
from .trained_model import machine_settings, temporary_arguments


BASELINES = ("vanilla", "user_id_text", "in_context", "lora_per_user")
MAX_LORA_USERS = 20  # an adapter for each of more users would take long to train
NUM_CHOICES = 3  # how many of a user's earlier choices are shown in the prompt
Row = dict[str, Any]


def check_baselines(names: Sequence[str], train: Dataset | None, user_id_column: str) -> None:
    """
    Refuse what cannot be trained, before anything is loaded.

    Raises:
        `ValueError`: for a name that is none of `BASELINES`, without training pairs or a `prompt` column, or for a LoRA per
        user with more than `MAX_LORA_USERS`.
    """
    if unknown := [name for name in names if name not in BASELINES]:
        raise ValueError(f"There is no baseline {unknown[0]!r}. Choose from {', '.join(BASELINES)}.")
    if not names:
        return
    if train is None:
        raise ValueError("Baselines are trained, so they need the training pairs: give them with `--train_dataset`.")
    if names != ["vanilla"] and "prompt" not in train.column_names:
        raise ValueError(
            f"Baselines with users in the prompt need a `prompt` column; found {sorted(train.column_names)}."
        )
    num_users = len(set(iterate_user_ids(train, user_id_column, "train")) - {None})
    if "lora_per_user" in names and num_users > MAX_LORA_USERS:
        raise ValueError(
            f"`lora_per_user` trains one adapter for each of {num_users} users; it is for {MAX_LORA_USERS} or fewer. Leave it "
            "out, or evaluate fewer users."
        )


def train_without_users(
    base_model: str,
    train: Dataset,
    settings: Mapping[str, Any],
    peft_config: PeftConfig | None,
    *,
    processor: str | None = None,
    max_steps: int | None = None,
    batch_size: int = 8,
    disable_tqdm: bool = False,
    **model_kwargs: Any,
) -> PersonalizedDPOTrainer:
    """
    Train vanilla DPO on `train`.

    Args:
        base_model (`str`): The model that the training starts from; it is the reference too.
        train (`Dataset`): The pairs to train on, whoever they belong to.
        settings (`Mapping`): Settings as from [`~training.settings.read_training_settings`].
        peft_config (`PeftConfig`, *optional*): The adapter to train; `None` trains all weights.
        processor (`str`, *optional*): Where the tokenizer is. By default it is with the base model.
        max_steps (`int`, *optional*): The number of steps, in place of the one in `settings`.
        batch_size (`int`, *optional*, defaults to `8`): The number of pairs that are scored at once.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to show no progress bars.
        **model_kwargs: Keywords of `from_pretrained`, such as `dtype`.
    """
    kept = {name: value for name, value in settings.items() if name in (*SCORING, *TRAINING)}
    args = temporary_arguments(
        **kept | ({} if max_steps is None else {"max_steps": max_steps}) | machine_settings(settings),
        user_model_kind="none",
        per_device_eval_batch_size=batch_size,
        model_init_kwargs={"dtype": "float32", **model_kwargs},
        save_strategy="no",
        report_to="none",
        disable_tqdm=disable_tqdm,
        logging_strategy="no",
    )
    trainer = PersonalizedDPOTrainer(
        model=base_model,
        args=args,
        train_dataset=train,
        processing_class=AutoProcessor.from_pretrained(processor or base_model),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def adapter_config(name: str) -> PeftConfig | None:
    """The PEFT config to train another adapter like that in a folder; `None` if the folder has none."""
    if not is_adapter(name):
        return None
    config = PeftConfig.from_pretrained(name)
    config.inference_mode = False
    return config


def with_user_id_text(dataset: Dataset, user_id_column: str) -> Dataset:
    """
    Each prompt with the id of its user in front: a first line, or for messages the first line of the first one by the user.

    ```python
    >>> rows = Dataset.from_list([{"prompt": "Why?", "chosen": "a", "rejected": "b", "user_id": "ann"}])
    >>> with_user_id_text(rows, "user_id")["prompt"][0]
    'User ann\\nWhy?'
    ```
    """
    return dataset.map(lambda row: {"prompt": _with_first_line(row["prompt"], f"User {row[user_id_column]}")})


def _with_first_line(prompt: Any, line: str) -> Any:
    if isinstance(prompt, str):
        return f"{line}\n{prompt}"
    first = next((i for i, message in enumerate(prompt) if message["role"] == "user"), 0)
    return [
        {**message, "content": f"{line}\n{message['content']}"} if i == first else message
        for i, message in enumerate(prompt)
    ]


def with_earlier_choices(
    dataset: Dataset,
    train: Dataset,
    user_id_column: str,
    processor: Any,
    max_length: int,
    num_choices: int = NUM_CHOICES,
) -> Dataset:
    """
    Each prompt with the user's last training choices in front, prompt and chosen answer, as text or as earlier turns.

    Choices about the same prompt are passed over, and the oldest are left out where a row would be longer than `max_length`
    tokens. A user without training pairs has the prompt alone.
    """
    choices: dict[str | None, list[Row]] = {}
    for user, row in zip(iterate_user_ids(train, user_id_column, "train"), train, strict=True):
        choices.setdefault(user, []).append(row)

    def extend(row: Row, index: int) -> Row:
        room = (
            max_length - 1 - max(_num_tokens(processor, row["prompt"], row[name]) for name in ("chosen", "rejected"))
        )
        shown: list[Row] = []
        for choice in reversed([c for c in choices.get(users[index], []) if c["prompt"] != row["prompt"]]):
            room -= _num_tokens(processor, choice["prompt"], choice["chosen"]) + 2
            if room < 0 or len(shown) == num_choices:
                break
            shown.insert(0, choice)
        return {"prompt": _join([(c["prompt"], c["chosen"]) for c in shown], row["prompt"])}

    users = list(iterate_user_ids(dataset, user_id_column, "evaluation"))
    return dataset.map(extend, with_indices=True)


def _join(choices: Sequence[tuple[Any, Any]], prompt: Any) -> Any:
    if isinstance(prompt, str):
        return "".join(f"{earlier}{chosen}\n\n" for earlier, chosen in choices) + prompt
    return [message for earlier, chosen in choices for message in [*earlier, *chosen]] + prompt


def _num_tokens(processor: Any, prompt: Any, answer: Any) -> int:
    if isinstance(prompt, str):
        return len(processor(text=prompt + answer)["input_ids"])
    return len(processor.apply_chat_template([*prompt, *answer], tokenize=True, return_dict=True)["input_ids"])


def score_in_context(
    vanilla: PersonalizedDPOTrainer,
    dataset: Dataset,
    train: Dataset,
    user_id_column: str,
    num_choices: int = NUM_CHOICES,
) -> ScoredPairs:
    """Score with vanilla DPO the prompts that [`with_earlier_choices`] makes; rows may be `num_choices` times longer."""
    positions = getattr(vanilla.model.config.get_text_config(), "max_position_embeddings", None)
    max_length = (vanilla.args.max_length or 10**6) * (1 + num_choices)
    max_length = min(max_length, positions or max_length)
    rows = with_earlier_choices(dataset, train, user_id_column, vanilla.processing_class, max_length, num_choices)
    with _longer_rows(vanilla, max_length):
        return score_pairs(vanilla, rows)


@contextmanager
def _longer_rows(trainer: PersonalizedDPOTrainer, max_length: int) -> Iterator[None]:
    collator: Any = trainer.data_collator
    previous = trainer.args.max_length, collator.max_length
    trainer.args.max_length = collator.max_length = max_length
    try:
        yield
    finally:
        trainer.args.max_length, collator.max_length = previous


def score_lora_per_user(
    base_model: str,
    dataset: Dataset,
    train: Dataset,
    settings: Mapping[str, Any],
    peft_config: PeftConfig | None,
    of_unknown: FloatArray,
    *,
    max_steps: int | None = None,
    disable_tqdm: bool = False,
    **train_kwargs: Any,
) -> FloatArray:
    """
    Margins `(len(dataset),)` of one adapter for each user, trained on that user's pairs by vanilla DPO.

    All users together take as many steps as the other baselines: each a part of `max_steps`, or the same number of epochs over
    fewer pairs.

    Args:
        base_model (`str`): The model that each training starts from; it is the reference too.
        dataset (`Dataset`): The pairs to score.
        train (`Dataset`): The pairs to train on.
        settings (`Mapping`): Settings as from [`~training.settings.read_training_settings`].
        peft_config (`PeftConfig`, *optional*): The adapter of each user. By default LoRA on all linear layers.
        of_unknown (`NDArray`): The margins `(len(dataset),)` that users without training pairs get, such as those of vanilla
            DPO. Rows that a trainer leaves out have NaN.
        max_steps (`int`, *optional*): The number of steps of all users together, in place of the one in `settings`.
        disable_tqdm (`bool`, *optional*, defaults to `False`): Whether to show no progress bars.
        **train_kwargs: More keywords of [`train_without_users`].
    """
    column = settings.get("user_id_column", "user_id")
    steps = settings.get("max_steps", -1) if max_steps is None else max_steps
    train_users = np.array(list(iterate_user_ids(train, column, "train")), dtype=object)
    users = np.array(list(iterate_user_ids(dataset, column, "evaluation")), dtype=object)
    margins = of_unknown.copy()
    known = [user for user in dict.fromkeys(users) if user is not None and user in set(train_users)]
    for user in track(known, "A LoRA for each user", disable=disable_tqdm, transient=True):
        own = np.flatnonzero(train_users == user)
        trainer = train_without_users(
            base_model,
            train.select(own),
            settings,
            peft_config or LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
            disable_tqdm=True,
            max_steps=max(1, round(steps * len(own) / len(train))) if steps > 0 else None,
            **train_kwargs,
        )
        rows = np.flatnonzero(users == user)
        margins[rows] = score_pairs(trainer, dataset.select(rows)).by_row("own", len(rows))
    return margins
