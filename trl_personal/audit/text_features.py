"""Simple numbers about a text: length, sentences, marks, vocabulary, and what it shares with the prompt."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..agreement import encode
from ..arrays import BoolArray, FloatArray


FEATURES = (
    *("words", "word_length", "sentences", "sentence_length", "reading_grade", "lines", "list_marks", "commas"),
    *("question_marks", "exclamation_marks", "brackets", "quotes", "markup", "emoji", "digits", "capitals"),
    *("type_token_ratio", "prompt_overlap", "second_person"),
)

LOGGED = frozenset(  # counts, as log(1 + n)
    {"words", "sentences", "sentence_length", "lines", "list_marks", "commas", "question_marks", "exclamation_marks"}
) | {"brackets", "quotes", "markup", "emoji"}

SECOND_PERSON = frozenset({b"you", b"your", b"yours", b"you're", b"you'll", b"you've", b"you'd", b"yourself"})
MAX_CHARACTERS = 20_000  # of a text; the rest does not count
BATCH_SIZE = 2_000  # texts that are counted at once, which bounds the memory

NEWLINE, BULLET, FIRST_BYTE_OF_EMOJI = ord("\n"), 0xE2, 0xF0  # in UTF-8; "•" is E2 80 A2
_PUNCTUATION = bytes(set(range(128)) - set(b"'") - {code for code in range(128) if chr(code).isalnum()})
LOWER_WORDS = bytes.maketrans(_PUNCTUATION, b" " * len(_PUNCTUATION))
LOWER_WORDS = bytes(LOWER_WORDS[code] for code in bytes(range(256)).lower())


def text_features(texts: Sequence[str], prompts: Sequence[str]) -> FloatArray:
    """
    The numbers `FEATURES` of each text.

    `words` and the counts of marks are on a log scale, `log(1 + n)`. `digits` and `capitals` are shares of the characters,
    `second_person` of the words, `prompt_overlap` of the distinct words. `word_length` is in characters, `sentence_length` in
    words on a log scale, and `reading_grade` the Flesch-Kincaid grade within 0 and 40, with a syllable for each run of vowels.

    Args:
        texts (`Sequence[str]`): The `n` texts. An empty one has no words.
        prompts (`Sequence[str]`): The prompt that each text answers.

    Returns:
        Float `(n, len(FEATURES))`.

    Raises:
        `ValueError`: if there are not as many prompts as texts.

    ```python
    >>> row = dict(zip(FEATURES, text_features(["Do you? Yes, I do!"], ["Do it"])[0].tolist()))
    >>> row["word_length"], row["prompt_overlap"], row["second_person"]
    (2.8, 0.25, 0.2)
    >>> round(row["words"], 3), round(row["sentences"], 3)  # log(1 + 5), log(1 + 2)
    (1.792, 1.099)
    ```
    """
    if len(texts) != len(prompts):
        raise ValueError(
            f"Each text needs the prompt it answers, found {len(texts)} texts and {len(prompts)} prompts."
        )
    places, distinct = encode(list(zip(texts, prompts, strict=True)))  # users judge the same texts
    features = np.zeros((len(distinct), len(FEATURES)))
    for start in range(0, len(distinct), BATCH_SIZE):
        batch = distinct[start : start + BATCH_SIZE]
        cut = [text[:MAX_CHARACTERS] for text, _ in batch]
        features[start : start + BATCH_SIZE] = _combine(_count_marks(cut), _count_words(cut, [p for _, p in batch]))
    return features[places]


def _combine(counts: dict[str, FloatArray], words: FloatArray) -> FloatArray:
    """Counts of a batch as the columns `FEATURES`; `words` is what [`_count_words`] returns, `(n, 3)`."""
    num_words = np.maximum(counts["words"], 1)
    num_characters = np.maximum(counts["characters"], 1)
    sentences = np.maximum(counts["sentences"], np.minimum(counts["words"], 1))
    word_length = counts["letters"] / num_words
    sentence_length = counts["words"] / np.maximum(sentences, 1)
    columns = counts | {
        "word_length": word_length,
        "sentences": sentences,
        "sentence_length": sentence_length,
        "reading_grade": np.clip(0.39 * sentence_length + 11.8 * counts["syllables"] / num_words - 15.59, 0, 40),
        "digits": counts["digits"] / num_characters,
        "capitals": counts["capitals"] / num_characters,
        "type_token_ratio": words[:, 0],
        "prompt_overlap": words[:, 1],
        "second_person": words[:, 2],
    }
    return np.stack([np.log1p(columns[name]) if name in LOGGED else columns[name] for name in FEATURES], axis=1)


def _count_marks(texts: Sequence[str]) -> dict[str, FloatArray]:
    """Counts of each text, found for all of them at once in one array of UTF-8 bytes."""
    encoded = [
        text.encode("utf-8", "replace") + b"\n" for text in texts
    ]  # the newline ends words, lines and sentences
    starts = np.cumsum([0, *map(len, encoded[:-1])])
    now = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    is_space, is_newline, is_digit = _is_any(now, b" \n\t\r"), now == NEWLINE, (now >= ord("0")) & (now <= ord("9"))
    is_vowel = _is_any(now | np.uint8(0x20), b"aeiouy")  # in lower case
    is_character = (now & 0xC0) != 0x80  # not the second or a later byte of one
    was_newline, will_be_space = _shift_right(is_newline), _shift_left(is_space)
    is_list_mark = (
        (_is_any(now, b"-*") & will_be_space) | (now == BULLET) | (is_digit & _shift_left(_is_any(now, b".)")))
    )
    found = {
        "characters": is_character,
        "letters": is_character & ~is_space,
        "words": ~is_space & _shift_right(is_space),
        "syllables": is_vowel & ~_shift_right(is_vowel),
        "sentences": _is_any(now, b".!?") & will_be_space,
        "lines": is_newline,
        "list_marks": was_newline & is_list_mark,
        "commas": _is_any(now, b",;:"),
        "question_marks": now == ord("?"),
        "exclamation_marks": now == ord("!"),
        "brackets": _is_any(now, b"(["),
        "quotes": now == ord('"'),
        "markup": _is_any(now, b"*#`_|"),
        "digits": is_digit,
        "capitals": (now >= ord("A")) & (now <= ord("Z")),
        "emoji": now >= FIRST_BYTE_OF_EMOJI,
    }
    return {
        name: np.add.reduceat(flags.view(np.uint8), starts, dtype=np.int32).astype(np.float64)
        for name, flags in found.items()
    }


def _is_any(values: NDArray[np.uint8], characters: bytes) -> BoolArray:
    found = values == characters[0]
    for character in characters[1:]:
        found |= values == character
    return found


def _shift_right(flags: BoolArray) -> BoolArray:
    """What `flags` is for the byte before; the first byte comes after a newline."""
    return np.concatenate([[True], flags[:-1]])


def _shift_left(flags: BoolArray) -> BoolArray:
    """What `flags` is for the byte after."""
    return np.concatenate([flags[1:], [False]])


def _count_words(texts: Sequence[str], prompts: Sequence[str]) -> FloatArray:
    """For each text the shares of distinct words, of those that the prompt has too, and of words such as "you", `(n, 3)`."""
    rows = np.zeros((len(texts), 3))
    known: dict[str, frozenset[bytes]] = {}
    for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        words = _words(text)
        if not words:
            continue
        if prompt not in known:
            known[prompt] = frozenset(_words(prompt))
        distinct = set(words)
        overlap = len(distinct & known[prompt]) / len(distinct)
        second_person = sum(map(words.count, SECOND_PERSON & distinct)) / len(words)
        rows[number] = len(distinct) / len(words), overlap, second_person
    return rows


def _words(text: str) -> list[bytes]:
    """Words in lower case without punctuation; those with letters beyond ASCII keep their case there."""
    return text.encode("utf-8", "replace").translate(LOWER_WORDS).split()
