"""Which users a run has, and which user model it trains: from the model, the dataset and the arguments."""

import logging
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, TypeAlias

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models.attach import detach_user_model
from ..models.folder_checks import check_fingerprints
from ..models.loading import (
    HUB_PULL_ARGUMENTS,
    AutoPersonalizedModelForCausalLM,
    check_language_model_config,
    fetch_language_model,
    find_user_model,
    is_adapter,
    load_user_model,
)
from ..models.saving import embedding_size, get_base_model, is_personalized
from ..user_column import (
    AnyDataset,
    collect_users,
    iterate_user_ids,
    warn_of_missing_users,
    warn_of_variants,
    with_user_names,
)
from ..user_models import UserModel, get_user_model_class
from ..user_models.initialization import soft_prompt_drawer
from ..user_models.memory import warn_if_large
from ..users import GENERIC_USER_INDEX, UserVocab
from .config import PersonalizationConfig


logger = logging.getLogger(__name__)

EvalDatasets: TypeAlias = Dataset | IterableDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset]


def refuse_prompt_learning(model: str | nn.Module, peft_config: PeftConfig | None) -> None:
    """
    Make sure that no adapter puts virtual tokens in front of the text, as users do.

    Raises:
        `ValueError`: if `peft_config`, or an adapter of `model`, is prompt learning.
    """
    configs = [peft_config] if peft_config is not None else []
    if isinstance(model, PeftModel):
        configs.extend(model.peft_config.values())
    for config in configs:
        if config.is_prompt_learning:
            raise ValueError(
                f"{type(config).__name__} (prompt learning) cannot be combined with users: both put virtual tokens in front "
                "of the text. Use LoRA or another adapter, or no `peft_config`."
            )


def take_known_users(
    model: str | PreTrainedModel | PeftModel,
    args: PersonalizationConfig,
    quantization_config: BitsAndBytesConfig | None,
) -> tuple[Any, tuple[UserModel, UserVocab] | None, BitsAndBytesConfig | None]:
    """
    The model as TRL shall load it, the user model and vocabulary that it comes with (`None` if it has no users), and the
    quantization that is still to be done.

    A folder with a full model is left to TRL. An adapter is loaded here, since TRL loads no adapter by its name.
    """
    if not isinstance(model, str):
        return model, detach_user_model(model) if is_personalized(model) else None, quantization_config
    kwargs = {"dtype": torch.float32, **dict(args.model_init_kwargs or {})}  # type: ignore[attr-defined]
    hub_kwargs = {name: kwargs[name] for name in HUB_PULL_ARGUMENTS if name in kwargs}
    subfolder = kwargs.get("subfolder") or ""
    folder = find_user_model(model, subfolder, **hub_kwargs)
    if folder is None:
        return model, None, quantization_config
    if not is_adapter(model, subfolder=subfolder, **hub_kwargs):
        user_model, user_vocab, config = load_user_model(folder)
        fetch_language_model(model, subfolder, config, **hub_kwargs)
        check_fingerprints(folder.parent, config)
        check_language_model_config(folder.parent)
        return model, (user_model, user_vocab), quantization_config
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    loaded = AutoPersonalizedModelForCausalLM.from_pretrained(model, is_trainable=True, **kwargs)
    return loaded, detach_user_model(loaded), None


def check_settings(args: PersonalizationConfig, user_model: UserModel, source: str, strict: bool = True) -> None:
    """
    Make sure that the settings in `args` are those of a user model that exists.

    Raises:
        `ValueError`: if one of them differs; unless `strict`, a setting that was left at its default may differ.
    """
    defaults = {field.name: field.default for field in fields(args)}
    found = {"user_model_kind": user_model.kind, "num_virtual_tokens": user_model.config.num_virtual_tokens}
    for name, value in found.items():
        setting = getattr(args, name)
        if setting != value and (strict or setting != defaults[name]):
            raise ValueError(
                f"`{name}` is {setting!r} in the arguments, but {value!r} in {source}. Set `{name}={value!r}`, or start from "
                "another user model."
            )


def choose_users(
    args: PersonalizationConfig,
    train_dataset: AnyDataset | None,
    user_vocab: UserVocab | Iterable[str | int] | None,
    user_model: UserModel | None,
    known: tuple[UserModel, UserVocab] | None,
) -> tuple[UserModel | None, UserVocab]:
    """
    The user model to train (`None`: a new one has to be made) and its vocabulary.

    Args:
        args (`PersonalizationConfig`): The kind and length of soft prompts in it become those of a user model that there is.
        train_dataset (`Dataset` or `IterableDataset`, *optional*): Its users are the known ones, unless `user_vocab` is given.
        user_vocab (`UserVocab` or ids, *optional*): The known users. Those of the model that training starts from stay.
        user_model (`UserModel`, *optional*): The caller's own.
        known (`tuple`, *optional*): The user model and vocabulary of the model that training starts from.

    Raises:
        `ValueError`: if there are two user models, or one that does not fit the settings or the vocabulary.
    """
    if known is not None and user_model is not None:
        raise ValueError(
            "There are two user models: one in `model`, one in `user_model`. Leave `user_model` out to train on the one in "
            "`model`, or pass the plain language model."
        )
    if user_vocab is not None and not isinstance(user_vocab, UserVocab):
        user_vocab = UserVocab(user_vocab)
    vocab = _vocab_of(args, train_dataset, user_vocab)
    if user_vocab is None:
        warn_of_variants([*(known[1] if known is not None else ()), *vocab], "train")
    if known is not None:
        if user_vocab is not None and (left_out := sum(user_id not in user_vocab for user_id in known[1])):
            logger.warning(
                "`user_vocab` leaves out %d of the %d users that the model knows. They stay in the model, with the rows that "
                "they have; to drop them, use `user_model.keep_rows`.",
                left_out,
                len(known[1]),
            )
        vocab = known[1].extend(vocab)
        warn_if_large(type(known[0]), replace(known[0].config, num_users=len(vocab)), args.user_rank)
        user_model = known[0].resize(len(vocab))
    elif user_model is not None:
        check_settings(args, user_model, "`user_model`", strict=False)
        if user_model.config.num_users != len(vocab):
            raise ValueError(
                f"`user_model` has rows for {user_model.config.num_users} users, the vocabulary has {len(vocab)}. Pass the "
                "`user_vocab` it was made for, or a user model of that many users."
            )
    if user_model is not None:
        args.user_model_kind, args.num_virtual_tokens = user_model.kind, user_model.config.num_virtual_tokens
        if not any(parameter.requires_grad for parameter in user_model.parameters()):
            logger.warning(
                "All parameters of the user model are frozen, so users stay as they are and the language model alone is "
                "trained. (`get_peft_model` freezes the users of a model that has some: call "
                "`user_model.requires_grad_(True)` to train them.)"
            )
    return user_model, vocab


def _vocab_of(
    args: PersonalizationConfig, train_dataset: AnyDataset | None, user_vocab: UserVocab | None
) -> UserVocab:
    if not isinstance(train_dataset, (Dataset, IterableDataset)):
        return user_vocab or UserVocab()  # TRL says what is wrong
    if user_vocab is None:
        return collect_users(train_dataset, args.user_id_column)
    if isinstance(train_dataset, Dataset):
        user_ids = list(iterate_user_ids(train_dataset, args.user_id_column, "train"))
        warn_of_missing_users(user_ids, "train")
        warn_of_variants([*user_vocab, *filter(None, user_ids)], "train")
        unknown = sum(user_id is not None and user_id not in user_vocab for user_id in user_ids)
        if unknown:
            logger.warning(
                "%d of %d rows of the train dataset have a user who is not in `user_vocab`; they train the generic user.",
                unknown,
                len(train_dataset),
            )
    return user_vocab


def make_user_model(
    args: PersonalizationConfig, num_users: int, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int
) -> UserModel:
    """
    A new user model as `args` say, its soft prompts drawn from the token embeddings of `model`.

    The global random generator stays where it was, so that the order of the data is the same as without users.
    """
    embedding = get_base_model(model).get_input_embeddings()
    user_model_class = get_user_model_class(args.user_model_kind)
    num_tokens, token_dim = embedding_size(embedding)
    sizes: dict[str, Any] = {"num_users": num_users, "token_dim": token_dim}
    for option in {field.name for field in fields(user_model_class.config_class)} - sizes.keys():
        if hasattr(args, option):
            sizes[option] = getattr(args, option)
    text = args.soft_prompt_init_text
    draw = soft_prompt_drawer(
        embedding,
        min(num_tokens, len(tokenizer)),
        args.num_virtual_tokens,
        args.soft_prompt_init,
        seed,
        None if text is None else tokenizer(text, add_special_tokens=False)["input_ids"],
    )
    config = user_model_class.config_class(**sizes)
    warn_if_large(user_model_class, config, args.user_rank)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        user_model = user_model_class(config)
    with gather_params_ctx(list(embedding.parameters()), modifier_rank=None):
        user_model.initialize(draw)
    return user_model


def say_what_moves(args: PersonalizationConfig, known: tuple[UserModel, UserVocab] | None) -> None:
    """
    Say so if a training goes on from a model with users, since it moves more than the users in its data.

    Raises:
        `ValueError`: for `freeze="shared"` without such a model.
    """
    if args.freeze == "shared" and known is None:
        raise ValueError(
            '`freeze="shared"` trains rows in a model that has been trained with users, and `model` has none. Name the folder '
            "of such a model, or leave `freeze` out."
        )
    if known is not None and args.freeze == "nothing":
        logger.info(
            "Training goes on from a model with %d users: it moves what they share, and so all of their soft prompts, also of "
            'those who are not in the data. `freeze="shared"` (`--freeze shared`) moves the rows of users alone; '
            "`model.add_users` fits rows without training.",
            len(known[1]),
        )


def freeze_shared(model: nn.Module, user_model: UserModel) -> None:
    """Let nothing but rows of known users be trained. The generic user's row of a table gets a gradient of zero."""
    model.requires_grad_(False)
    for table in user_model.row_tables().values():
        table.weight.requires_grad_(True)
        table.weight.register_hook(_without_generic_row)


def _without_generic_row(gradient: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(gradient[: GENERIC_USER_INDEX + 1]), gradient[GENERIC_USER_INDEX + 1 :]])


def with_names_of_users(datasets: Any, column: str) -> Any:
    """One dataset or several, with names where the user column holds the numbers of a `ClassLabel`."""
    if isinstance(datasets, dict):
        return type(datasets)({name: with_names_of_users(dataset, column) for name, dataset in datasets.items()})
    return with_user_names(datasets, column) if isinstance(datasets, (Dataset, IterableDataset)) else datasets


def check_ids_of_rows(args: PersonalizationConfig, dataset: object, name: str) -> None:
    """Read each user id of a dataset once, so that a bad one raises now; a stream is not read."""
    if isinstance(dataset, Dataset):
        for _ in iterate_user_ids(dataset, args.user_id_column, name):
            pass
