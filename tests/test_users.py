import json

import numpy as np
import pytest
import torch

from trl_personal import GENERIC_USER_INDEX, UserVocab
from trl_personal.users import find_variants


def test_rows_follow_the_given_order_after_the_generic_user():
    vocab = UserVocab(["bo", "ann"])
    assert vocab.encode(["bo", "ann"]) == [1, 2]
    assert list(vocab) == ["bo", "ann"]
    assert len(vocab) == 2


def test_unknown_and_missing_users_are_the_generic_user():
    assert UserVocab(["ann"]).encode(["nobody", None]) == [GENERIC_USER_INDEX] * 2


def test_integer_ids_are_kept_as_text():
    vocab = UserVocab([7, "8"])
    assert vocab.encode(["7", 7, 8]) == [1, 1, 2]
    assert 7 in vocab
    assert vocab.decode([1, 2, 0]) == ["7", "8", None]


def test_zero_is_a_user_and_not_the_generic_one():
    assert UserVocab([0]).encode([0]) == [1]


def test_extending_appends_new_users_and_moves_nobody():
    vocab = UserVocab(["ann", "bo"]).extend(["bo", "cy", "cy", "dee"])
    assert list(vocab) == ["ann", "bo", "cy", "dee"]


def test_save_and_load_keep_rows(tmp_path):
    vocab = UserVocab(["zoë", "1", "a b"])
    vocab.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "users.json").read_text()) == {"zoë": 1, "1": 2, "a b": 3}
    assert UserVocab.from_pretrained(tmp_path) == vocab


def test_vocabularies_are_equal_in_the_same_order_only():
    assert UserVocab(["ann", "bo"]) == UserVocab(["ann", "bo"])
    assert UserVocab(["ann", "bo"]) != UserVocab(["bo", "ann"])


def test_rows_of_a_saved_vocabulary_are_its_numbers_and_not_the_order_of_the_file(tmp_path):
    (tmp_path / "users.json").write_text('{"bo": 2, "cy": 3, "ann": 1}')
    vocab = UserVocab.from_pretrained(tmp_path)
    assert list(vocab) == ["ann", "bo", "cy"]
    assert vocab.encode(["bo", "cy", "ann"]) == [2, 3, 1]


def test_repr_names_nobody():
    assert repr(UserVocab(["ann"])) == "UserVocab(num_users=1)"


@pytest.mark.parametrize(
    ("user_ids", "error", "message"),
    [
        (["ann", "ann"], ValueError, "'ann' occurs twice"),
        ([7, "7"], ValueError, "'7' occurs twice"),
        ([""], ValueError, "empty text"),
        ([None], ValueError, "known users only"),
        ([1.5], TypeError, "text or a whole number .* found 1.5"),
        ([True], TypeError, "found bool"),
        ([["ann"]], TypeError, "found list"),
    ],
)
def test_bad_ids_are_refused(user_ids, error, message):
    with pytest.raises(error, match=message):
        UserVocab(user_ids)


def test_a_vocabulary_with_a_hole_is_refused(tmp_path):
    (tmp_path / "users.json").write_text('{"ann": 1, "bo": 3}')
    with pytest.raises(ValueError, match="rows must be 1 to 2"):
        UserVocab.from_pretrained(tmp_path)


# --- What is no list of users -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user_ids",
    ["alice", b"alice", {"alice": 1, "bob": 2}, {"alice", "bob"}, frozenset({1}), {"alice": 1}.keys(), 7, None],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_list_of_users_is_refused(user_ids):
    for call in (UserVocab, UserVocab(["a"]).encode, UserVocab(["a"]).extend):
        with pytest.raises(TypeError, match=f"must be a list of user ids, found {type(user_ids).__name__}"):
            call(user_ids)


@pytest.mark.parametrize("user_id", [7, "7", np.int64(7), np.uint8(7), torch.tensor(7), np.array(7)], ids=repr)
def test_integers_of_numpy_and_torch_are_users(user_id):
    vocab = UserVocab([user_id, "bob"])
    assert list(vocab) == ["7", "bob"]
    assert user_id in vocab
    assert vocab.encode([user_id, 7, "7", "bob"]) == [1, 1, 1, 2]


@pytest.mark.parametrize(
    "user_id", [7.5, True, np.bool_(True), torch.tensor(True), np.float32(7), float("inf"), b"7", (7,), torch.ones(2)]
)
def test_other_values_are_no_users(user_id):
    with pytest.raises(TypeError, match="A user id must be a text or (an integer|a whole number)"):
        UserVocab(["alice"]).encode([user_id])
    assert user_id not in UserVocab(["7", "True", "1", "7.0"])


def test_a_whole_float_is_the_integer_that_pandas_made_it_of():
    assert UserVocab(["7", "bo"]).encode([7.0, "7", 7, -7.0, float("nan")]) == [1, 1, 1, 0, 0]
    assert list(UserVocab([12.0, 2.0**53])) == ["12", str(2**53)]
    with pytest.raises(TypeError, match="the float 1e.17, which several integers are rounded to"):
        UserVocab([1e17])


def test_variants_of_one_id_are_found_and_kept_apart():
    ids = ["ann", "Ann", "ann ", "Zoe\u0308", "Zo\u00eb", "bo", "a\u200bnn", "7", "7.0", "007"]
    assert find_variants(ids) == [["ann", "Ann", "ann ", "a\u200bnn"], ["Zoe\u0308", "Zo\u00eb"], ["7", "7.0"]]
    assert len(UserVocab(ids)) == len(ids)


@pytest.mark.parametrize("row", [-1, 3, 100])
def test_a_row_that_there_is_not_is_nobody(row):
    with pytest.raises(IndexError, match=f"no row {row} in a vocabulary of 2 users"):
        UserVocab(["alice", "bob"]).decode([1, row])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "occur twice"),
        ('{"a": 1, "b": true}', "its rows must be 1 to 2"),
        ('{"a": 1.0, "b": 2}', "its rows must be 1 to 2"),
        ('{"a": 1, "b": 1}', "its rows must be 1 to 2"),
        ('{"a": 1, "b": "2"}', "its rows must be 1 to 2"),
        ('{"a": [1], "b": 2}', "its rows must be 1 to 2"),
        ('{"": 1}', "empty text"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, text, message):
    (tmp_path / "users.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        UserVocab.from_pretrained(tmp_path)
