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


# --- Collators of the caller's own ------------------------------------------------------------------------------------

INNER = DataCollatorForPreference(pad_token_id=0, max_length=4)
VOCAB = UserVocab(["ann", "bo"])
ROWS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6, 7], "user_id": "ann"},
    {"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [6], "user_id": "bo"},
    {
        "prompt_ids": [1, 2],
        "chosen_ids": [3],
        "rejected_ids": [4, 5, 6, 8],
        "user_id": "bo",
    },  # cut, it equals the first
    {"prompt_ids": [7, 7, 7], "chosen_ids": [8], "rejected_ids": [9], "user_id": None},
]
OWNERS = {(1, 2, 3): [1, 2], (1, 5): [2], (7, 7, 7, 8): [0], (1, 2, 4, 5): [1, 2], (1, 6): [2], (7, 7, 7, 9): [0]}


class Sorted(DataCollatorForPreference):
    """A subclass of TRL's, of which nothing is known either."""

    def torch_call(self, examples):
        return super().torch_call(sorted(examples, key=lambda example: len(example["prompt_ids"])))


@pytest.mark.parametrize(
    ("collator", "left_out"),
    [
        (lambda examples: INNER(examples[::-1]), []),
        (Sorted(pad_token_id=0, max_length=4), []),
        (
            lambda examples: INNER([row for row in examples if len(row["prompt_ids"]) > 1] or examples),
            [(1, 5), (1, 6)],
        ),
    ],
    ids=["reversed", "sorted", "one left out"],
)
def test_users_follow_the_rows_of_a_collator_of_ones_own(collator, left_out):
    """Two equal rows of two users are one another's: which of them comes first is the same to the loss."""
    batch = DataCollatorForPersonalizedPreference(collator, VOCAB)(ROWS)
    found = {}
    for ids, user in zip(batch["input_ids"].tolist(), batch["user_indices"].tolist(), strict=True):
        found.setdefault(tuple(i for i in ids if i), []).append(user)
    expected = {tokens: users for tokens, users in OWNERS.items() if tokens not in left_out}
    assert {tokens: sorted(users) for tokens, users in found.items()} == expected
    chosen, rejected = batch["user_indices"].chunk(2)
    assert torch.equal(chosen, rejected)


def test_profiles_follow_the_rows_too():
    rows = [{**row, "user_prompt_ids": [10 + place, *row["prompt_ids"]]} for place, row in enumerate(ROWS)]
    batch = DataCollatorForPersonalizedPreference(lambda examples: INNER(examples[::-1]), VOCAB, row_collator=INNER)(
        rows
    )
    for ids, profiled in zip(batch["input_ids"].tolist(), batch["user_input_ids"].tolist(), strict=True):
        assert profiled[1 : 1 + min(3, len(ids) - 1)][:1] == ids[:1]
    assert batch["user_input_ids"][:, 0].tolist() == [13, 10, 11, 12] * 2  # the first and the third are equal rows


def test_a_row_twice_is_nobodys():
    twice = DataCollatorForPersonalizedPreference(lambda examples: INNER(examples[:1] + examples), VOCAB)
    with pytest.raises(ValueError, match="cannot be told which users the rows of the collator .*lambda.* belong to"):
        twice(ROWS)


def test_one_of_two_equal_rows_left_out_is_refused_where_it_matters():
    pair = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    first = DataCollatorForPersonalizedPreference(lambda examples: INNER(examples[:1]), UserVocab(["ann", "bo"]))
    assert first([{**pair, "user_id": "bo"}, {**pair, "user_id": "bo"}])["user_indices"].tolist() == [2, 2]
    with pytest.raises(ValueError, match="cannot be told which users"):
        first([{**pair, "user_id": "ann"}, {**pair, "user_id": "bo"}])


@pytest.mark.parametrize("change", ["mask", "shift"])
def test_rows_with_other_tokens_are_refused(change):
    def collator(examples):
        batch = INNER(examples)
        if len(examples) > 1:  # such as words left out at random
            batch["input_ids"] = batch["input_ids"] + 1 if change == "shift" else batch["input_ids"].clone()
            batch["attention_mask"][:, 0] = 0 if change == "mask" else 1
        return batch

    with pytest.raises(ValueError, match="collator .*collator.* belong to.*`user_indices`"):
        DataCollatorForPersonalizedPreference(collator, UserVocab(["ann", "bo"]))(ROWS)


def test_a_collator_may_say_whose_its_rows_are():
    def collator(examples):
        return INNER(examples) | {"user_indices": torch.tensor([2, 1, 0, 2] * 2)}

    personalized = DataCollatorForPersonalizedPreference(collator, VOCAB)
    assert personalized(ROWS)["user_indices"].tolist() == [2, 1, 0, 2] * 2
    short = DataCollatorForPersonalizedPreference(
        lambda examples: INNER(examples) | {"user_indices": torch.tensor([1])}, VOCAB
    )
    with pytest.raises(ValueError, match=r"`user_indices` of shape \(1,\) for 8 rows"):
        short(ROWS)
