"""openai/summarize_from_feedback (TL;DR): comparisons of two summaries of a post, each made by a known worker."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from datasets import DatasetDict, Features, Value

from .pairs import GROUP, SPLIT, OnReport, make_splits
from .rows import Row, SkippedRow, text_of, user_id_of
from .source import Source, check_columns, open_source, peek
from .splits import TEST, TRAIN, SourceSplits


logger = logging.getLogger(__name__)

PAPER_SEED = 3456
SHARE_SHORTER = 0.3  # of the workers, on average
PREFERENCES = ("longer", "shorter")  # 0 and 1 in the side file and in the draws
TOP_USERS_FILE, PREFERENCES_FILE = "sup_users_top10.txt", "sup_users_preferences.txt"
COLUMNS = {"info", "summaries", "choice", "worker", "split"}


class Comparison(NamedTuple):
    """One raw row, checked."""

    prompt: str
    texts: tuple[str, str]
    choice: int
    worker: str
    post_id: str
    split: str


@dataclass(frozen=True)
class Workers:
    """Who trains (`top`), who prefers what (empty for the annotators' own choice), and the posts of the training pairs."""

    top: frozenset[str]
    preferences: Mapping[str, str]
    train_posts: frozenset[str]


def load_tldr(
    name_or_path: str | Path = "openai/summarize_from_feedback",
    *,
    labels: Literal["length", "choice"] = "length",
    num_users: int | None = 10,
    seed: int = PAPER_SEED,
    max_length_chars: int | None = 4800,
    supervised_only: bool = True,
    config_name: str | None = "comparisons",
    revision: str | None = None,
    on_report: OnReport | None = None,
) -> DatasetDict:
    """
    TL;DR comparisons with their workers, as in the P-DPO paper (arXiv 2402.05133).

    The `num_users` workers with the most training rows are the users. Their pairs make `train`. `test` has the pairs of *all*
    workers: those outside the top keep their own ids, and are unknown users to a model trained on `train`. The rows' own
    `split` field decides (`train` against `valid1` and `valid2`); a pair whose post is also trained on leaves `test`.

    With `labels="length"` each worker is given a preference, longer with probability 0.7, else shorter, and the pair follows
    `len` of the raw summaries in characters, not the annotator's choice; of two of equal length the first is chosen. The
    preferences come from `sup_users_top10.txt` and `sup_users_preferences.txt` if both lie beside the file, otherwise from
    one draw per worker in the order of training rows (equal counts: first seen first; then the workers of `test` alone).
    With the default seed those are the draws of the paper. With `labels="choice"` it is the annotator's real choice.

    Args:
        name_or_path (`str` or `Path`): The set on the Hub, or a file (or folder) of JSON lines in its raw schema: `info`,
            `summaries`, `choice`, `worker`, `split`. OpenAI's own files, which leave out empty fields, are read too.
        labels (`str`): What decides which summary is chosen: `"length"`, the paper's simulated preference, or `"choice"`, the
            annotator's.
        num_users (`int`, *optional*, defaults to 10): Number of workers whose rows are trained on; `None` for all workers.
        seed (`int`): Random seed for drawing the workers' preferences. The two files need none.
        max_length_chars (`int`, *optional*, defaults to 4800): Characters that prompt and summary may have together in a
            training pair. Test pairs may be longer.
        supervised_only (`bool`): Whether to keep only pairs whose policies both have "sup" and neither "ppo" nor "cnn" in
            their name, as the paper does. `False` keeps all, CNN/DM articles included.
        config_name (`str`, *optional*, defaults to "comparisons"): Name of the configuration of the set on the Hub.
        revision (`str`, *optional*): Branch, tag or commit of the set on the Hub.
        on_report (`Callable`, *optional*): Function that is called with the [`LoadReport`].

    Returns:
        `DatasetDict` with `train` and `test`, columns `prompt`, `chosen`, `rejected`, `user_id` and
        `post_id` (all text), and `preference` ("longer" or "shorter") with `labels="length"`. Summaries start with a space,
        which the prompt's closing `TL;DR:` asks for.

    Raises:
        `FileNotFoundError`: if there is no such file. `ValueError`: for an option or a schema that is not known, or if no
        pair is left.
    """
    if labels not in ("length", "choice"):
        raise ValueError(f'`labels` must be "length" or "choice", found {labels!r}.')
    if num_users is not None and num_users < 1:
        raise ValueError(f"`num_users` must be at least 1, or `None` for all workers, found {num_users}.")
    sources = open_source(name_or_path, config_name=config_name, revision=revision)
    hint = "The raw schema of openai/summarize_from_feedback is needed; mirrors without `worker` are of no use here."
    check_columns(peek(next(iter(sources.values())), str(name_or_path)), COLUMNS, str(name_or_path), hint)
    workers = _choose_workers(sources, name_or_path, labels, num_users, seed, supervised_only)
    features = {name: Value("string") for name in ("prompt", "chosen", "rejected", "user_id", "post_id")}
    if labels == "length":
        features["preference"] = Value("string")
    return make_splits(
        sources,
        partial(_pairs, workers=workers, supervised_only=supervised_only, max_length_chars=max_length_chars),
        Features(features),
        SourceSplits((TRAIN, TEST)),  # every row names its split
        name=str(name_or_path),
        on_report=on_report,
    )


def draw_preferences(workers: list[str], seed: int = PAPER_SEED) -> dict[str, str]:
    """
    A simulated preference for each worker, "longer" with probability 0.7: one draw each, in the order given.

    ```python
    >>> list(draw_preferences([f"worker {number}" for number in range(1, 11)]).values()).index("shorter")
    3
    ```
    """
    draws = np.random.RandomState(seed).choice(2, size=len(workers), p=[1 - SHARE_SHORTER, SHARE_SHORTER])
    return {worker: PREFERENCES[draw] for worker, draw in zip(workers, draws, strict=True)}


def _choose_workers(
    sources: dict[str, Source],
    name_or_path: str | Path,
    labels: str,
    num_users: int | None,
    seed: int,
    supervised_only: bool,
) -> Workers:
    comparisons = [(row.worker, row.post_id, row.split) for row in _comparisons(sources, supervised_only)]
    train_rows = Counter(worker for worker, _, split in comparisons if split == TRAIN)
    ranking = [worker for worker, _ in train_rows.most_common()]
    preferences: dict[str, str] = {}
    if labels == "length":
        files = _read_side_files(Path(name_or_path))
        if files is not None:
            ranking, preferences = [*dict.fromkeys([*files[0], *ranking])], files[1]
        else:
            everyone = dict.fromkeys([*ranking, *(worker for worker, _, _ in comparisons)])
            preferences = draw_preferences(list(everyone), seed)
    top = frozenset(train_rows if num_users is None else ranking[:num_users])
    posts = frozenset(post_id for worker, post_id, split in comparisons if split == TRAIN and worker in top)
    return Workers(top, preferences, posts)


def _comparisons(sources: dict[str, Source], supervised_only: bool) -> Iterator[Comparison]:
    for source in sources.values():
        for _, row in source:
            try:
                if not isinstance(row, SkippedRow):
                    yield _read_comparison(row, supervised_only)
            except SkippedRow:
                continue  # counted when the pairs are made


def _read_side_files(path: Path) -> tuple[list[str], dict[str, str]] | None:
    """The ranking and the preferences that lie beside the data, or `None`."""
    folder = path if path.is_dir() else path.parent
    top, preferences = folder / TOP_USERS_FILE, folder / PREFERENCES_FILE
    if not path.exists() or not (top.is_file() and preferences.is_file()):
        return None
    drawn = {}
    for number, line in enumerate(preferences.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        worker, _, preference = line.strip().rpartition(" ")
        if preference not in ("0", "1") or not worker:
            raise ValueError(f"{preferences}, line {number}, must be a worker and 0 (longer) or 1 (shorter).")
        drawn[worker] = PREFERENCES[int(preference)]
    logger.info("Length preferences come from %s and %s in %s.", TOP_USERS_FILE, PREFERENCES_FILE, folder)
    return top.read_text(encoding="utf-8").split(), drawn


def _read_comparison(row: Row, supervised_only: bool) -> Comparison:
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    if not isinstance(info, dict):
        raise SkippedRow("`info` is not an object")
    if not (isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(s, dict) for s in summaries)):
        raise SkippedRow("`summaries` is not a list of two objects")
    policies = [text_of(summary, "policy") if supervised_only else "" for summary in summaries]
    if supervised_only and not all("sup" in p and "ppo" not in p and "cnn" not in p for p in policies):
        raise SkippedRow('a policy without "sup", or with "ppo" or "cnn"', broken=False)
    if choice not in (0, 1) or isinstance(choice, bool):
        raise SkippedRow("`choice` is neither 0 nor 1")
    split = text_of(row, "split")
    if split != TRAIN and not split.startswith("valid"):
        raise SkippedRow("`split` is neither train nor valid...")
    first, second = (text_of(summary, "text") for summary in summaries)
    return Comparison(
        prompt=_prompt(info),
        texts=(first, second),
        choice=choice,
        worker=user_id_of(row, "worker"),
        post_id=text_of(info, "id"),
        split=TRAIN if split == TRAIN else TEST,
    )


def _prompt(info: Row) -> str:
    post = text_of(info, "article" if info.get("article") and not info.get("post") else "post")
    subreddit, title = info.get("subreddit") or "", info.get("title") or ""
    return f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"


def _pairs(row: Row, workers: Workers, supervised_only: bool, max_length_chars: int | None) -> Iterator[Row]:
    comparison = _read_comparison(row, supervised_only)
    first, second = comparison.texts
    if first.strip() == second.strip():
        raise SkippedRow("both summaries are the same text", broken=False)
    if comparison.split == TRAIN and comparison.worker not in workers.top:
        raise SkippedRow("a training row of a worker outside the top", broken=False)
    if comparison.split == TEST and comparison.post_id in workers.train_posts:
        raise SkippedRow("a test row whose post is trained on", broken=False)
    length = len(comparison.prompt) + max(len(first), len(second))
    if comparison.split == TRAIN and max_length_chars is not None and length > max_length_chars:
        raise SkippedRow("a training row longer than `max_length_chars`", broken=False)
    pair = {"prompt": comparison.prompt, "user_id": comparison.worker, "post_id": comparison.post_id}
    best = comparison.choice
    if workers.preferences:
        preference = workers.preferences.get(comparison.worker)
        if preference is None:
            raise SkippedRow(f"a worker who is not in {PREFERENCES_FILE}")
        best = _best_by_length(first, second, preference)
        pair["preference"] = preference
    chosen, rejected = (first, second) if best == 0 else (second, first)
    yield {
        **pair,
        "chosen": _with_space(chosen),
        "rejected": _with_space(rejected),
        SPLIT: comparison.split,
        GROUP: comparison.post_id,
    }


def _best_by_length(first: str, second: str, preference: str) -> int:
    if len(first) == len(second):
        return 0
    return int((len(second) > len(first)) == (preference == "longer"))


def _with_space(summary: str) -> str:
    return summary if summary[0].isspace() else f" {summary}"
