"""What an evaluation found, as files, pictures and tables, and how it was made."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .._version import __version__
from ..files import write_atomically
from ..terminal import printable
from ..user_models import UserModel
from ..user_models.movement import Movement
from ..users import UserId, UserVocab
from .answers import GENERIC_USER
from .answers_report import AnswersReport
from .answers_verdict import overall_verdict
from .judged import JudgeReport
from .plots import plot_length_by_user, plot_report, plot_training_curves, plot_user_map
from .probes import ProbesReport
from .report import PersonalizationReport, scorers_of


OF_ANSWERS = (
    *("mean_generated_length", "length_drift", "distinct_1", "distinct_2", "empty_share", "generated_lengths"),
)
MOST_ROWS = 20  # users in a table that is printed
OF_ALL_PAIRS = {"accuracy of vanilla DPO": "vanilla_accuracy", "majority share": "majority_share"}
LENGTH_PREFERENCES = ("longer", "shorter")


@dataclass(frozen=True)
class ModelEvaluation:
    """
    What [`evaluate_model`] and [`evaluate_trainer`] find.

    Args:
        report ([`PersonalizationReport`]): Accuracies, gain and verdict.
        pairs (`Dataset`): A row for each pair: its `row` in the dataset, its `user_id`, and its margin for each scorer.
        num_dropped (`int`): The number of rows that were left out, as their prompt alone is too long.
        metrics (`dict[str, float]`): The metrics of `trainer.evaluate`.
        chosen_lengths (`Mapping`): For each user the mean length of the chosen answers, in words; empty if it is not known.
        preferences (`Mapping`): For each user what the user prefers, if `preference_column` names a column that says so.
        preference_column (`str`): The name of that column, or empty.
        majority_share (`float`, *optional*): The share of pairs that follow the more frequent preference: what a model without
            users can reach.
        answers (`list[dict]`): For each user the row of [`~evaluation.answers.summarize_answers`], the generic user being
            `None`. Empty if nothing was generated.
        samples (`list[dict]`): For each prompt the answers of all users and, if there is one, of the reference.
        user_model, user_vocab: The user model that was evaluated, and its users.
        movement ([`Movement`], *optional*): How far users' soft prompts are from the generic one and from each other.
        answers_report ([`AnswersReport`], *optional*): The answers' half of the verdict.
        judge_report ([`JudgeReport`], *optional*): What a judge says of the answers.
        probes_report ([`ProbesReport`], *optional*): What personalization costs.
        log_history (`list[dict]`): The log of its training.
        run (`dict`): The command, versions, hardware and settings of the evaluation.
    """

    report: PersonalizationReport
    pairs: Dataset
    num_dropped: int
    metrics: dict[str, float]
    chosen_lengths: Mapping[UserId, float]
    preferences: Mapping[str, Any]
    preference_column: str
    majority_share: float | None
    answers: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    user_model: UserModel
    user_vocab: UserVocab
    log_history: list[dict[str, Any]]
    run: dict[str, Any]
    movement: Movement | None = None
    answers_report: AnswersReport | None = None
    judge_report: JudgeReport | None = None
    probes_report: ProbesReport | None = None

    @property
    def overall_verdict(self) -> str:
        """Pairs and answers in one sentence, without ids; that of pairs alone if there are no answers."""
        if self.answers_report is None:
            return self.report.verdict
        return overall_verdict(self.report.has_gain, self.answers_report)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pairs, for JSON. The ids of users are in `users` and `samples`."""
        found = self.report.to_dict()
        generic = [row for row in self.answers if row["user_id"] is None]
        has_vanilla = "vanilla" in self.pairs.column_names
        return {
            **{name: found[name] for name in ("verdict", "has_gain", "gain", "advantages", "groups")},
            **{name: found[name] for name in ("worst_user", "worst_decile", "calibration")},
            "overall_verdict": self.overall_verdict,
            "answers": self.answers_report.to_dict() if self.answers_report else None,
            "judge": self.judge_report.to_dict() if self.judge_report else None,
            "probes": self.probes_report.to_dict() if self.probes_report else None,
            "users": self.user_rows(),
            "generic": {**generic[0], "user_id": GENERIC_USER, "preference": None} if generic else None,
            "means": self.means(),
            "length_by_preference": self._length_by_preference(),
            "vanilla_accuracy": float((np.array(self.pairs["vanilla"]) > 0).mean()) if has_vanilla else None,
            "majority_share": self.majority_share,
            "num_dropped": self.num_dropped,
            "soft_prompts": self.movement.to_dict() if self.movement else None,
            "metrics": self.metrics,
            "samples": self.samples,
            "run": self.run,
        }

    def user_rows(self) -> list[dict[str, Any]]:
        """A flat row for each user: accuracy, its interval and mean margin for each scorer, and what the answers are like."""
        answers = {row["user_id"]: {name: row[name] for name in OF_ANSWERS} for row in self.answers}
        rows = []
        for user in self.report.users:
            row: dict[str, Any] = {
                **{"user_id": user.user_id, "known": user.known, "minority": user.minority},
                **{"num_pairs": user.num_pairs, "num_prompts": user.num_prompts, "gain": user.gain},
                "preference": self.preferences.get(user.user_id or ""),
            }
            for scorer, accuracy in user.accuracy.items():
                row |= {
                    f"accuracy_{scorer}": accuracy.value,
                    f"accuracy_{scorer}_low": accuracy.low,
                    f"accuracy_{scorer}_high": accuracy.high,
                    f"margin_{scorer}": user.mean_margin[scorer],
                }
            row["mean_chosen_length"] = self.chosen_lengths.get(user.user_id)
            if self.answers:
                row |= answers.get(user.user_id, dict.fromkeys(OF_ANSWERS))
            rows.append(row | self._more_of_user(user.user_id))
        return rows

    def means(self) -> dict[str, float]:
        """Accuracies, lengths in words, and the share of empty answers: means over the known users who have each."""
        rows = self.user_rows()
        rows = [row for row in rows if row["known"]] or rows
        names = [f"accuracy_{scorer}" for scorer in scorers_of(self.report)]
        names += ["mean_generated_length", "mean_chosen_length", "empty_share"]
        values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
        return {name: mean(found) for name, found in values.items() if found}

    def length_rows(self) -> list[dict[str, Any]]:
        """The rows of [`~evaluation.plots.plot_length_by_user`]: each user with answers, and the generic user."""
        return [
            {
                "user_id": GENERIC_USER if row["user_id"] is None else row["user_id"],
                "preference": preference if preference in LENGTH_PREFERENCES else None,
                "generated_lengths": row["generated_lengths"],
                "mean_chosen_length": None if row["user_id"] is None else self.chosen_lengths.get(row["user_id"]),
            }
            for row in self.answers
            for preference in [self.preferences.get(row["user_id"] or "")]
        ]

    def users_table(self) -> Table:
        """The accuracy of each user with each prompt and the lengths of answers, to print; with ids, of 20 users at most."""
        scorers = [scorer for scorer in scorers_of(self.report) if scorer != "vanilla"]
        title = "Pair accuracy by soft prompt, and length of answers in words"
        table = Table("user", "prefers", title=title, box=SIMPLE_HEAD, collapse_padding=True)
        for heading in ("pairs", *(scorer.replace("_", " ") for scorer in scorers), "generated", "chosen"):
            table.add_column(heading, justify="right")
        rows, found = self.user_rows(), self.to_dict()
        for row in [*rows[:MOST_ROWS], {"user_id": "mean", **found["means"]}, *filter(None, [found["generic"]])]:
            cells = [_cell(row.get(f"accuracy_{scorer}"), 2) for scorer in scorers]
            lengths = [_cell(row.get(f"mean_{kind}_length"), 1) for kind in ("generated", "chosen")]
            names = (row["user_id"] or GENERIC_USER, str(row.get("preference") or ""), str(row.get("num_pairs", "")))
            table.add_row(*(Text(printable(name)) for name in names), *cells, *lengths)
        caption = [f"{name} {_cell(found[key], 2)}" for name, key in OF_ALL_PAIRS.items() if found[key] is not None]
        if len(rows) > MOST_ROWS:
            caption.append(f"{len(rows) - MOST_ROWS} more users are in the file")
        table.caption = ", ".join(caption)
        return table

    def answers_table(self, prompt_index: int, user_ids: Sequence[UserId]) -> Table:
        """What some users (`None`: the generic one) are answered to one prompt, side by side."""
        sample = self.samples[prompt_index]
        names = [str(user_id or GENERIC_USER) for user_id in user_ids]
        wants = [f"prefers {self.preferences[name]}" if name in self.preferences else "" for name in names]
        title = Text(printable(sample["prompt"], keep="\n\t"))
        table = Table(title=title, title_justify="left", title_style="dim")
        for name, want in zip(names, wants, strict=True):
            table.add_column(Text(f"{printable(name)}\n{printable(want)}"))
        table.add_row(*(Text(printable(sample["answers"][name].strip(), keep="\n\t")) for name in names))
        return table

    def save(self, folder: str | Path) -> list[str]:
        """
        Write `evaluation.json`, the table of users as `users.parquet` and `users.json`, `pairs.parquet`, and the pictures
        `accuracy_by_user.png`, `user_map.png`, `training_curves.png` and `length_by_user.png`, as far as there is something to
        draw. Returns the names of the files.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.user_rows()
        for name, content in (("evaluation.json", self.to_dict()), ("users.json", rows)):
            write_atomically(
                folder / name, json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False).encode()
            )
        Dataset.from_list(rows).to_parquet(folder / "users.parquet")
        self.pairs.to_parquet(folder / "pairs.parquet")
        plot_report(folder / "accuracy_by_user.png", self.report)
        files = ["evaluation.json", "users.json", "users.parquet", "pairs.parquet", "accuracy_by_user.png"]
        if len(self.user_vocab) > 1:
            gains = {user.user_id: round(user.gain, 2) for user in self.report.users if user.user_id and user.known}
            values, name = (self.preferences, self.preference_column) if self.preferences else (gains, "gain")
            plot_user_map(folder / "user_map.png", self.user_model, self.user_vocab, values, name)
            files.append("user_map.png")
        if any("loss" in entry for entry in self.log_history):
            plot_training_curves(folder / "training_curves.png", self.log_history)
            files.append("training_curves.png")
        if self.answers:
            plot_length_by_user(folder / "length_by_user.png", self.length_rows())
            files.append("length_by_user.png")
        return files

    def _more_of_user(self, user_id: str | None) -> dict[str, float | None]:
        """Flat numbers from the reports on answers, of a judge and of probes, where there are such reports."""
        row: dict[str, float | None] = {}
        if self.answers_report is not None:
            users = {user.user_id: user.means for user in self.answers_report.users}
            for name in ("repetition", "nats_per_token"):
                found = users.get(user_id, {}).get(name)
                row[name] = None if found is None else found.value
        if self.judge_report is not None:
            rate = self.judge_report.users.get(user_id or "")
            row["win_rate"] = None if rate is None else rate.rate.value
            controlled = self.judge_report.length_controlled.get(user_id or "")
            row["win_rate_length_controlled"] = None if controlled is None else controlled.value
        if self.probes_report is not None:
            probed = self.probes_report.users.get(user_id or "")
            row["gives_in"] = None if probed is None else probed.gives_in.value
            row["kl"] = None if probed is None or probed.kl is None else probed.kl.value
        return row

    def _length_by_preference(self) -> dict[str, float]:
        """Mean length of generated answers, in words, over the users of each preference."""
        lengths: dict[str, list[float]] = {}
        for row in self.answers:
            if row["user_id"] in self.preferences:
                lengths.setdefault(str(self.preferences[row["user_id"]]), []).append(row["mean_generated_length"])
        return {preference: mean(lengths[preference]) for preference in sorted(lengths)}


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def describe_run() -> dict[str, Any]:
    """What a table of results has to name: `command`, `versions` of the packages that matter, and `hardware`."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "versions": {
            "trl_personal": __version__,
            **{name: version(name) for name in ("trl", "transformers", "peft", "torch")},
        },
        "hardware": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {accelerator}, {platform.platform()}",
    }
