import pytest
import torch
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_personal import DataCollatorForPersonalizedPreference, UserVocab


EXAMPLES = [
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "user_id": "bo"},
    {"prompt_ids": [6], "chosen_ids": [7, 8], "rejected_ids": [9], "user_id": None},
    {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [9], "user_id": "somebody else"},
    {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [9]},
    {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [9], "user_id": "ann"},
]


def test_adds_one_row_per_sequence_and_changes_nothing_else():
    inner = DataCollatorForPreference(pad_token_id=0)
    batch = DataCollatorForPersonalizedPreference(inner, UserVocab(["ann", "bo"]))(EXAMPLES)
    assert torch.equal(batch.pop("user_indices"), torch.tensor([2, 0, 0, 0, 1] * 2))
    expected = inner(EXAMPLES)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_column_may_have_another_name():
    collator = DataCollatorForPersonalizedPreference(DataCollatorForPreference(0), UserVocab([7]), "worker")
    examples = [{**example, "worker": 7} for example in EXAMPLES[:1]]
    assert collator(examples)["user_indices"].tolist() == [1, 1]


def test_a_callers_collator_is_wrapped(make_trainer):
    seen = []

    def mine(examples):
        seen.append(len(examples))
        return DataCollatorForPreference(pad_token_id=0)(examples)

    trainer = make_trainer(trainer_kwargs={"data_collator": mine})
    trainer.train()
    assert seen
    assert isinstance(trainer.data_collator, DataCollatorForPersonalizedPreference)
    assert trainer.data_collator.collator is mine


def test_a_personalized_collator_of_the_caller_is_kept(make_trainer):
    collator = DataCollatorForPersonalizedPreference(DataCollatorForPreference(0), UserVocab(["bo", "ann"]))
    trainer = make_trainer(trainer_kwargs={"data_collator": collator, "user_vocab": ["bo", "ann"]})
    trainer.train()
    assert trainer.data_collator is collator


def test_no_index_column_is_written(make_trainer):
    trainer = make_trainer()
    assert set(trainer.train_dataset.column_names) == {
        "prompt", "chosen", "rejected", "user_id", "prompt_ids", "chosen_ids", "rejected_ids",
    }  # fmt: skip


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_users_reach_the_batch_whatever_columns_are_kept(make_trainer, remove_unused_columns):
    trainer = make_trainer(remove_unused_columns=remove_unused_columns)
    users = torch.cat([batch["user_indices"].chunk(2)[0] for batch in trainer.get_train_dataloader()])
    assert sorted(users.tolist()) == [1] * 4 + [2] * 4


def test_integer_ids_train_as_their_text(make_trainer, preferences):
    rows = Dataset.from_list([{**row, "user_id": 10 + i % 2} for i, row in enumerate(preferences)])
    trainer = make_trainer(trainer_kwargs={"train_dataset": rows})
    assert list(trainer.user_vocab) == ["10", "11"]
    users = torch.cat([batch["user_indices"] for batch in trainer.get_train_dataloader()])
    assert set(users.tolist()) == {1, 2}
