"""What cannot work is refused before training starts, with what is wrong, what was found and what to do."""

import logging

import pandas as pd
import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_personal import IndividualUserModel, PersonalizedDPOTrainer, UserModelConfig


def with_users(preferences, user_ids):
    return Dataset.from_list([{**row, "user_id": u} for row, u in zip(preferences, user_ids, strict=False)])


def test_no_user_column(make_trainer, preferences):
    dataset = preferences.rename_column("user_id", "worker")
    with pytest.raises(
        ValueError,
        match=r"train dataset has no `user_id` column; found \['chosen', 'prompt', 'rejected', 'worker'\].*user_id_column=",
    ):
        make_trainer(trainer_kwargs={"train_dataset": dataset})
    trainer = make_trainer(user_id_column="worker", trainer_kwargs={"train_dataset": dataset})
    assert list(trainer.user_vocab) == ["ann", "bo"]
    with pytest.raises(ValueError, match="eval dataset has no `user_id` column"):
        make_trainer(trainer_kwargs={"eval_dataset": dataset})
    with pytest.raises(ValueError, match="held_out dataset has no `user_id` column"):
        make_trainer(trainer_kwargs={"eval_dataset": {"seen": preferences, "held_out": dataset}})
    with pytest.raises(ValueError, match="eval dataset has no `user_id` column"):
        make_trainer().evaluate(dataset)


@pytest.mark.parametrize(
    ("user_ids", "found"),
    [([[1], [2]] * 4, "List"), ([{"id": 1}] * 8, "dict"), ([True, False] * 4, "bool")],
)
def test_a_user_column_of_another_type(make_trainer, preferences, user_ids, found):
    with pytest.raises(
        TypeError, match=f"Column `user_id` of the train dataset must hold text or whole numbers.*found {found}"
    ):
        make_trainer(trainer_kwargs={"train_dataset": with_users(preferences, user_ids)})


def test_empty_ids_and_nobody_at_all(make_trainer, preferences):
    with pytest.raises(ValueError, match="Row 2 of the train dataset, column `user_id`: A user id is an empty text"):
        make_trainer(trainer_kwargs={"train_dataset": with_users(preferences, ["ann", "bo", "", "ann"])})
    with pytest.raises(ValueError, match="Row 1 of the eval dataset"):
        make_trainer(trainer_kwargs={"eval_dataset": with_users(preferences, ["ann", ""])})
    with pytest.raises(ValueError, match='`None` in every row.*user_model_kind="none"'):
        make_trainer(trainer_kwargs={"train_dataset": with_users(preferences, [None] * 8)})


def test_rows_without_a_user_are_the_generic_users(make_trainer, preferences):
    trainer = make_trainer(trainer_kwargs={"train_dataset": with_users(preferences, ["ann", None, "bo", None])})
    assert list(trainer.user_vocab) == ["ann", "bo"]


def test_class_labels_count_by_their_names(make_trainer, preferences):
    features = Features({**preferences.features, "user_id": ClassLabel(names=["x", "y"])})
    dataset = with_users(preferences, [0, 1] * 4).cast(features)
    assert list(make_trainer(trainer_kwargs={"train_dataset": dataset}).user_vocab) == ["x", "y"]


def test_an_empty_dataset(make_trainer, preferences):
    with pytest.raises(ValueError, match="train dataset has no rows"):
        make_trainer(trainer_kwargs={"train_dataset": preferences.select([])})
    with pytest.raises(
        ValueError, match=r"No row of the train dataset is left: each prompt alone fills `max_length` \(2\)"
    ):
        make_trainer(max_length=2)


def test_no_dataset_is_trls_error(make_trainer):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        make_trainer(trainer_kwargs={"train_dataset": None})
    with pytest.raises(TypeError, match="must be a `Dataset` or `IterableDataset`, got `list`"):
        make_trainer(trainer_kwargs={"train_dataset": [{"prompt": "a"}]})


def test_images_for_a_model_without_eyes_are_trls_error(make_trainer, preferences):
    dataset = preferences.add_column("images", [[1]] * 8)
    with pytest.raises(ValueError, match="does not seem to be a vision-language model"):
        make_trainer(trainer_kwargs={"train_dataset": dataset})


def test_soft_prompt_beyond_the_models_positions(make_trainer):
    with pytest.raises(
        ValueError, match="model has 64 positions.*62 for text and 3 for the soft prompt.*`max_length` to 61"
    ):
        make_trainer(max_length=62)
    make_trainer(max_length=61)


def test_a_default_max_length_beyond_the_positions_is_fine_if_the_rows_are_short(make_trainer, preferences):
    make_trainer(max_length=1024)
    long = with_users(preferences, ["ann"]).map(lambda row: {"prompt": "yes " * 70})
    with pytest.raises(ValueError, match="model has 64 positions"):
        make_trainer(max_length=1024, trainer_kwargs={"train_dataset": long})


def test_a_user_model_that_does_not_fit(make_trainer):
    narrow = IndividualUserModel(UserModelConfig(num_users=2, num_virtual_tokens=3, token_dim=16))
    with pytest.raises(ValueError, match="soft prompts of width 16.*width 32"):
        make_trainer(trainer_kwargs={"user_model": narrow})
    crowded = IndividualUserModel(UserModelConfig(num_users=9, num_virtual_tokens=3, token_dim=32))
    with pytest.raises(ValueError, match="rows for 9 users, the vocabulary has 2"):
        make_trainer(trainer_kwargs={"user_model": crowded})


def test_two_different_settings(make_trainer):
    user_model = IndividualUserModel(UserModelConfig(num_users=2, num_virtual_tokens=5, token_dim=32))
    with pytest.raises(ValueError, match="`num_virtual_tokens` is 3 in the arguments, but 5 in `user_model`"):
        make_trainer(trainer_kwargs={"user_model": user_model})
    with pytest.raises(ValueError, match='need a `user_model_kind` other than "none"'):
        make_trainer(user_model_kind="none", trainer_kwargs={"user_vocab": ["ann"]})


@pytest.mark.parametrize("config_class", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused_by_name(make_trainer, config_class):
    config = config_class(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(
        ValueError, match=rf"{config_class.__name__} \(prompt learning\) cannot be combined with users"
    ):
        make_trainer(trainer_kwargs={"peft_config": config})
    if config_class is PromptTuningConfig:
        model = get_peft_model(make_model(), config)
        with pytest.raises(ValueError, match="PromptTuningConfig"):
            make_trainer(trainer_kwargs={"model": model, "processing_class": make_tokenizer()})


def test_a_missing_pad_token_is_handled_as_trl_does(make_trainer, tokenizer):
    tokenizer.pad_token = None
    trainer = make_trainer(trainer_kwargs={"processing_class": tokenizer})
    assert trainer.processing_class.pad_token == "<eos>"
    trainer.train()


def test_rows_of_users_outside_a_given_vocabulary_are_counted(make_trainer, caplog):
    with caplog.at_level(logging.WARNING, "trl_personal"):
        trainer = make_trainer(trainer_kwargs={"user_vocab": ["bo", "cy"]})
    assert list(trainer.user_vocab) == ["bo", "cy"]
    assert "4 of 8 rows of the train dataset have a user who is not in `user_vocab`" in caplog.text
    assert "ann" not in caplog.text


def test_no_user_id_in_a_log_line(make_trainer, preferences, caplog):
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(
            save_strategy="steps",
            save_steps=1,
            trainer_kwargs={"train_dataset": with_users(preferences, ["Person-A", "Person-B"] * 4)},
        )
        trainer.train()
        trainer.save_model()
    assert "P-DPO with 2 known users" in caplog.text
    assert "Person" not in caplog.text


def test_streams_are_read_once_for_their_users(make_trainer, preferences):
    stream = preferences.to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    trainer = make_trainer(trainer_kwargs={"train_dataset": stream})
    assert list(trainer.user_vocab) == ["ann", "bo"]
    trainer.train()


@pytest.mark.parametrize("bad", ["", 1.5], ids=repr)
@pytest.mark.parametrize("known", [False, True], ids=["collected", "given"])
def test_a_bad_id_in_a_stream_is_told(make_trainer, preferences, bad, known):
    """With the row's number where the stream is read for its users, and when its batch is made where they are given."""

    def rows():
        for number, row in enumerate(preferences):
            yield {**row, "user_id": bad} if number == 5 else row

    stream = IterableDataset.from_generator(rows)
    if known:
        trainer = make_trainer(trainer_kwargs={"train_dataset": stream, "user_vocab": ["ann", "bo"]}, max_steps=4)
        with pytest.raises((TypeError, ValueError), match="user"):
            trainer.train()
        assert trainer.state.global_step < 2
    else:
        with pytest.raises((TypeError, ValueError), match="Row 5 of the train dataset, column `user_id`"):
            make_trainer(trainer_kwargs={"train_dataset": stream})


def test_a_stream_trains_rows_without_a_user_and_unknown_users_as_the_generic_user(make_trainer, preferences):
    """A dataset counts them beforehand; a stream is not read twice for that. What is trained is the same."""
    rows = with_users(preferences, ["ann", None, "bo", "new", "ann", "nobody", "bo", None])
    weights = []
    for data in (rows, rows.to_iterable_dataset()):
        settings = {"trainer_kwargs": {"train_dataset": data, "user_vocab": ["ann", "bo", "cy"]}}
        trainer = make_trainer(per_device_train_batch_size=8, optim="sgd", max_steps=1, **settings)
        trainer.train()
        weights.append(trainer.user_model.user_offsets.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-4)  # the rows are in another order
    assert weights[1].ne(0).any(dim=1).tolist() == [False, True, True, False]


def test_the_rows_of_a_stream_are_followed_through_a_collator(make_trainer, preferences):
    data = preferences.to_iterable_dataset()
    collator = DataCollatorForPreference(pad_token_id=0, max_length=32)
    found = []
    for own in (collator, lambda examples: collator(examples[::-1])):
        trainer = make_trainer(trainer_kwargs={"train_dataset": data, "data_collator": own}, optim="sgd")
        trainer.train()
        found.append(trainer.user_model.user_offsets.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)
    assert found[0].any()

    def changed(examples):
        batch = collator(examples)
        return batch if len(examples) == 1 else batch | {"input_ids": batch["input_ids"] + 1}

    trainer = make_trainer(trainer_kwargs={"train_dataset": data, "data_collator": changed})
    with pytest.raises(ValueError, match="cannot be told which users the rows of the collator"):
        trainer.train()


def test_a_stream_that_diverges_stops_and_one_that_is_resumed_goes_on(make_trainer, preferences, tmp_path, caplog):
    stream = {"trainer_kwargs": {"train_dataset": preferences.to_iterable_dataset()}}
    with pytest.raises(FloatingPointError, match="The training has diverged"):
        make_trainer(learning_rate=1e30, max_steps=20, **stream).train()
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **stream}
    straight = make_trainer(**settings)
    straight.train()
    (tmp_path / "out/checkpoint-3/trainer_state.json").unlink()
    resumed = make_trainer(**settings)
    resumed.train(resume_from_checkpoint=True)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    for path in (tmp_path / "out").glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    make_trainer(**settings).train(resume_from_checkpoint=True)
    assert "training starts afresh" in caplog.text


def test_a_plain_config_trains_with_the_default_settings(make_trainer, make_args):
    trainer = make_trainer(args=make_args(DPOConfig))
    assert isinstance(trainer, PersonalizedDPOTrainer)
    assert trainer.user_model.config.num_virtual_tokens == 10
    trainer.train()


def test_no_config_at_all_names_the_folder_as_trl_does(model_dirs, preferences, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="bf16"):  # TRL's default precision needs another machine than this one
        PersonalizedDPOTrainer(model=model_dirs["gptj"], train_dataset=preferences)


def test_an_optimizer_of_the_caller_gets_the_user_model(make_trainer, model_dirs):
    model = make_model()
    model.config.name_or_path = model_dirs["gptj"]
    kwargs = {"model": model, "processing_class": make_tokenizer()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(trainer_kwargs={**kwargs, "optimizers": (optimizer, None)})
    before = trainer.user_model.generic_prompt.clone()
    trainer.train()
    assert not torch.equal(trainer.user_model.generic_prompt, before)
    model = make_model()
    model.config.name_or_path = model_dirs["gptj"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="does not hold the user model's parameters"):
        make_trainer(trainer_kwargs={**kwargs, "model": model, "optimizers": (optimizer, scheduler)})


def test_value_types_of_text_are_all_accepted(make_trainer, preferences):
    for dtype in ("large_string", "int32", "uint8"):
        ids = [0, 1] * 4 if "int" in dtype else ["a", "b"] * 4
        dataset = with_users(preferences, ids)
        dataset = dataset.cast(Features({**dataset.features, "user_id": Value(dtype)}))
        assert len(make_trainer(trainer_kwargs={"train_dataset": dataset}).user_vocab) == 2


# --- Columns of users -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True], ids=["dataset", "stream"])
def test_users_of_a_class_label_have_their_names(make_trainer, preferences, streams):
    named = preferences.cast_column("user_id", ClassLabel(names=["bo", "ann"]))
    assert named["user_id"][:2] == [1, 0]
    data = named.to_iterable_dataset() if streams else named
    trainer = make_trainer(trainer_kwargs={"train_dataset": data, "eval_dataset": {"one": named}})
    assert list(trainer.user_vocab) == ["ann", "bo"]
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch["user_indices"].tolist()) == {1, 2}
    expected = make_trainer(trainer_kwargs={"eval_dataset": {"one": preferences}})
    for dataset in ("one", named):
        texts = dataset if dataset == "one" else preferences
        found, wanted = trainer.evaluate(dataset), expected.evaluate(texts)
        assert found["eval_users/accuracy_mean"] == wanted["eval_users/accuracy_mean"]


def test_rows_without_a_user_are_counted_and_told(make_trainer, preferences, caplog):
    """A missing value of pandas is `None` in a dataset, and as text it is a user like any other."""
    frame = preferences.to_pandas()
    frame.loc[[0, 3], "user_id"] = pd.NA
    make_trainer(trainer_kwargs={"train_dataset": Dataset.from_pandas(frame)})
    assert "2 of 8 rows of the train dataset have no user" in caplog.text
    caplog.clear()
    frame["user_id"] = frame["user_id"].astype("string").fillna("nan")
    trainer = make_trainer(trainer_kwargs={"train_dataset": Dataset.from_pandas(frame)})
    assert "2 of 8 rows of the train dataset have a user id such as 'nan'" in caplog.text
    assert len(trainer.user_vocab) == 3


def test_known_users_who_are_left_out_of_the_vocabulary_are_told(make_trainer, preferences, tmp_path, caplog):
    make_trainer().save_model(str(tmp_path / "saved"))
    rows = preferences.filter(lambda row: row["user_id"] == "bo")
    trainer = make_trainer(
        trainer_kwargs={"model": str(tmp_path / "saved"), "train_dataset": rows, "user_vocab": ["bo", "cy"]}
    )
    assert "leaves out 1 of the 2 users that the model knows" in caplog.text
    assert list(trainer.user_vocab) == ["ann", "bo", "cy"]
    assert "ann" not in caplog.text


def test_a_vocabulary_that_is_one_text_is_refused(make_trainer):
    with pytest.raises(TypeError, match="must be a list of user ids, found str"):
        make_trainer(trainer_kwargs={"user_vocab": "alice"})


# --- Rows that cannot teach, and ids that look alike --------------------------------------------------------------------


SAME = {"prompt": "yes", "chosen": " no", "rejected": " no", "user_id": "ann"}
BLANK_PROMPT = {"prompt": " ", "chosen": " yes", "rejected": " no", "user_id": "ann"}
BLANK_ANSWER = {"prompt": "yes", "chosen": "", "rejected": " no", "user_id": "only-here"}
WHY = "1 x `chosen` is blank, 1 x `prompt` is blank, 1 x both responses are the same"


@pytest.mark.parametrize("streams", [False, True], ids=["dataset", "stream"])
def test_rows_that_cannot_teach_are_counted_told_and_left_out(make_trainer, preferences, streams, caplog):
    dataset = Dataset.from_list([SAME, *preferences, BLANK_PROMPT, BLANK_ANSWER])
    data = dataset.to_iterable_dataset() if streams else dataset
    trainer = make_trainer(trainer_kwargs={"train_dataset": data})
    assert f"3 of 11 rows of the train dataset cannot teach and are left out: {WHY}." in caplog.text
    assert list(trainer.user_vocab) == ["ann", "bo"]
    expected = make_trainer().train_dataset["chosen_ids"][:]
    assert [row["chosen_ids"] for row in trainer.train_dataset] == expected


def test_rows_that_cannot_teach_are_left_out_of_an_evaluation(make_trainer, preferences, caplog):
    expected = make_trainer().evaluate(preferences)
    caplog.clear()
    trainer = make_trainer(trainer_kwargs={"eval_dataset": {"held_out": Dataset.from_list([SAME, *preferences])}})
    assert "1 of 9 rows of the held_out dataset cannot teach" in caplog.text
    assert trainer.evaluate()["eval_held_out_loss"] == expected["eval_loss"]
    assert trainer.evaluate(Dataset.from_list([SAME, *preferences]))["eval_loss"] == expected["eval_loss"]


@pytest.mark.parametrize("streams", [False, True], ids=["dataset", "stream"])
def test_a_dataset_that_cannot_teach_at_all_is_refused(make_trainer, streams):
    dataset = Dataset.from_list([SAME, BLANK_PROMPT])
    with pytest.raises(
        ValueError, match="train dataset (can teach: 1 x `prompt` is blank, 1 x both|has no row that can teach)"
    ):
        make_trainer(trainer_kwargs={"train_dataset": dataset.to_iterable_dataset() if streams else dataset})


def test_ids_that_look_alike_are_told_without_naming_them(make_trainer, preferences, caplog):
    trainer = make_trainer(trainer_kwargs={"train_dataset": with_users(preferences, ["Ann", "ann ", "bo", "cy"] * 2)})
    assert "2 user ids are 1 but for white space, letter case or the way they are written" in caplog.text
    assert len(trainer.user_vocab) == 4
    assert "ann" not in caplog.text.lower().replace("cannot", "")
    caplog.clear()
    make_trainer(trainer_kwargs={"user_vocab": ["ANN", "bo"]})  # the dataset has `ann`
    assert "2 user ids are 1 but for" in caplog.text


def test_integers_that_pandas_made_floats_are_the_same_users(make_trainer, preferences):
    frame = preferences.to_pandas()
    frame["user_id"] = [12, 7] * 4
    frame.loc[3, "user_id"] = float("nan")
    assert str(frame["user_id"].dtype) == "float64"
    trainer = make_trainer(trainer_kwargs={"train_dataset": Dataset.from_pandas(frame)})
    assert list(trainer.user_vocab) == ["12", "7"]
    with pytest.raises(TypeError, match="Row 0 of the train dataset, column `user_id`: .* whole number .* found 1.5"):
        make_trainer(trainer_kwargs={"train_dataset": with_users(preferences, [1.5, 2.5] * 4)})
