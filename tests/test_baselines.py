"""What the prompts of the baselines look like."""

import pytest
from conftest import make_tokenizer
from datasets import Dataset

from trl_personal.evaluation.baselines import check_baselines, with_earlier_choices, with_user_id_text


TRAIN = Dataset.from_list(
    [
        {"prompt": "the story", "chosen": " yes", "rejected": " no", "user_id": "ann"},
        {"prompt": "i like", "chosen": " dogs", "rejected": " cats", "user_id": "ann"},
        {"prompt": "a story", "chosen": " no", "rejected": " yes", "user_id": "bo"},
    ]
)
TEST = Dataset.from_list(
    [
        {"prompt": "the end", "chosen": " yes", "rejected": " no", "user_id": "ann"},
        {"prompt": "i like", "chosen": " cats", "rejected": " dogs", "user_id": "ann"},
        {"prompt": "the end", "chosen": " yes", "rejected": " no", "user_id": "zoe"},
    ]
)


def test_earlier_choices_leave_out_the_same_prompt_and_unknown_users():
    rows = with_earlier_choices(TEST, TRAIN, "user_id", make_tokenizer(), max_length=100)
    assert rows["prompt"][:] == [
        "the story yes\n\ni like dogs\n\nthe end",
        "the story yes\n\ni like",
        "the end",
    ]


@pytest.mark.parametrize(("max_length", "num_shown"), [(100, 2), (13, 1), (8, 0)])
def test_the_oldest_choices_go_where_there_is_no_room(max_length, num_shown):
    row = with_earlier_choices(TEST.select([0]), TRAIN, "user_id", make_tokenizer(), max_length)[0]
    expected = ["the end", "i like dogs\n\nthe end", "the story yes\n\ni like dogs\n\nthe end"]
    assert row["prompt"] == expected[num_shown]


def test_messages_get_a_first_line_and_earlier_turns():
    def chat(row):
        messages = {"prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": row["prompt"]}]}
        return messages | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}

    train, test = (rows.to_list() for rows in (TRAIN, TEST))
    train, test = (Dataset.from_list([{**row, **chat(row)} for row in rows]) for rows in (train, test))
    named = with_user_id_text(test, "user_id")[0]["prompt"]
    assert [message["content"] for message in named] == ["be kind", "User ann\nthe end"]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    shown = with_earlier_choices(test, train, "user_id", tokenizer, 100, num_choices=1)[0]["prompt"]
    assert [message["content"] for message in shown] == ["be kind", "i like", " dogs", "be kind", "the end"]


def test_too_many_users_for_an_adapter_each():
    rows = Dataset.from_list([{**TRAIN[0], "user_id": str(i)} for i in range(21)])
    with pytest.raises(ValueError, match="one adapter for each of 21 users; it is for 20 or fewer"):
        check_baselines(["lora_per_user"], rows, "user_id")
    with pytest.raises(ValueError, match="need a `prompt` column"):
        check_baselines(["user_id_text"], rows.remove_columns("prompt"), "user_id")
    check_baselines(["vanilla"], rows.remove_columns("prompt"), "user_id")
