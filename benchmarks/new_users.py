"""
New users who join a trained model: accuracy on pairs that played no part in it, against fixed recipes, and the time it takes.

    python examples/tulu_style.py --output_dir style && python examples/gptj_length.py --output_dir length
    python benchmarks/new_users.py composed --model style            # three tastes each, of a model that knows one a user
    python benchmarks/new_users.py length --model length             # twenty users, shorter or longer
    python benchmarks/new_users.py noisy --model length              # some answers flipped, or all by coin
    python benchmarks/new_users.py thousand --model style            # a thousand users in one call
    python benchmarks/new_users.py composed --model style --json benchmarks/results/new_users.json

Times are CPU seconds of the process, with one thread, tokenization and the set-up included.
"""

import argparse
import itertools
import json
import resource
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_personal import AutoPersonalizedModelForCausalLM
from trl_personal.data import make_length_preferences, make_style_preferences
from trl_personal.new_users.fit import Hypothesis, Pairs, fit
from trl_personal.new_users.join import settings_of
from trl_personal.new_users.margins import row_margins
from trl_personal.new_users.prior import row_prior


PLAIN_PRECISIONS = (0.1, 0.3, 1.0)  # of fits that are given one weight of the prior, and no doubts
NUM_TEST = 60


def composed_users(seed, num_pairs, draw_seed=0):
    """Eight users who each have one taste of each of three dimensions: rows to join with, and others to be tested on."""
    dataset, rng = make_style_preferences(seed=seed), np.random.default_rng(seed + draw_seed)
    pools = {split: defaultdict(list) for split in dataset}
    for split, rows in dataset.items():
        for row in rows:
            pools[split][row["user_id"]].append(row)

    def draw(tastes, split, number):
        rows = []
        for taste in tastes:
            pool = pools[split][taste]
            rows += [pool[i] for i in rng.permutation(len(pool))[: -(-number // 3)]]
        return [rows[i] for i in rng.permutation(len(rows))[:number]]

    support, test = [], []
    for tastes in itertools.product(("P1A", "P1B"), ("P2A", "P2B"), ("P3A", "P3B")):
        name = {"user_id": "+".join(tastes)}
        support += [row | name for row in draw(tastes, "train", num_pairs)]
        test += [row | name for row in draw(tastes, "test", NUM_TEST)]
    return support, test


def length_users(seed, num_pairs, num_users=20):
    """Users who like it shorter or longer, seven of ten the latter."""
    dataset = make_length_preferences(num_users, num_pairs, NUM_TEST, seed=seed)
    return [[row | {"user_id": f"new-{row['user_id']}"} for row in dataset[split]] for split in ("train", "test")]


def with_noise(rows, share, seed):
    """Rows in which a share of the answers is flipped; half of them are those of a coin."""
    rng = np.random.default_rng(seed)
    return [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} if rng.random() < share else row for row in rows
    ]


def as_majority(rows):
    """The same pairs, judged by somebody of the majority's taste."""
    return [
        row
        if row["preference"] == "longer"
        else row | {"chosen": row["rejected"], "rejected": row["chosen"], "preference": "longer"}
        for row in rows
    ]


def first(rows, number):
    """The first rows of each user."""
    seen = defaultdict(int)
    kept = []
    for row in rows:
        seen[row["user_id"]] += 1
        if seen[row["user_id"]] <= number:
            kept.append(row)
    return kept


class Bench:
    """A trained folder, to which users are added on a copy of its user model."""

    def __init__(self, folder, ref_model):
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.reference = AutoModelForCausalLM.from_pretrained(
            ref_model or Path(folder, "warmed_up"), dtype=torch.float32
        )

    def join(self, support, test, plain=False):
        """Accuracies of users and seconds, from joining with `support`; also those of fixed recipes."""
        model = AutoPersonalizedModelForCausalLM.from_pretrained(self.folder)
        users = list(dict.fromkeys(row["user_id"] for row in test))
        start = time.process_time()
        fits = model.add_users(Dataset.from_list(support), self.tokenizer, self.reference)
        seconds = time.process_time() - start
        dataset = Dataset.from_list(test)
        with row_margins(model, self.tokenizer, dataset, settings_of(model, None), self.reference) as margins:
            rows = margins.flat_rows([0, *model.user_vocab.encode(users)])
            owner = torch.tensor([users.index(test[number]["user_id"]) for number in margins.rows])
            scores = {
                "generic": margins.at(rows[:1].expand(len(users), -1), owner, gradients=False)[0],
                "own": margins.at(rows[1:], owner, gradients=False)[0],
            }
            for precision, own in zip(
                PLAIN_PRECISIONS, self.plain_rows(support, users) if plain else (), strict=False
            ):
                scores[f"plain {precision:g}"] = margins.at(own, owner, gradients=False)[0]
        found = {
            name: [float((values[owner == u] > 0).double().mean()) for u in range(len(users))]
            for name, values in scores.items()
        }
        results = {name: {"mean": float(np.mean(a)), "worst": min(a)} for name, a in found.items()}
        by_user = {user.user_id: user for user in fits.users}
        expected = [by_user[user].accuracy for user in users if user in by_user]
        inside = [e.low <= a <= e.high for e, a in zip(expected, found["own"], strict=False)]
        results |= {
            "expected": float(np.mean([e.value for e in expected])),
            "inside_interval": float(np.mean(inside)),
            "fitted": sum(user.status == "fitted" for user in fits.users),
            "num_users": len(users),
            "cpu_seconds_per_user": seconds / len(users),
            "cpu_seconds": seconds,
        }
        return results

    def plain_rows(self, support, users):
        """Rows of MAP estimates with each of `PLAIN_PRECISIONS`, on margins that are linear at the generic prompt."""
        model = AutoPersonalizedModelForCausalLM.from_pretrained(self.folder)
        settings, dataset = settings_of(model, None), Dataset.from_list(support)
        with row_margins(model, self.tokenizer, dataset, settings, self.reference) as margins:
            prior = row_prior(margins, len(model.user_vocab), 1.0)
            generic = margins.flat_rows([0])
            owner = torch.tensor([users.index(support[number]["user_id"]) for number in margins.rows])
            start, slopes = margins.at(generic.expand(len(users), -1), owner, prior.basis)
            beta, found = settings.get("beta", 0.1), []
            for precision in PLAIN_PRECISIONS:
                rows = []
                for user in range(len(users)):
                    own = owner == user
                    pairs = Pairs(start[own][None], start[own][None], slopes[own].double()[None], own[own][None])
                    rows.append(fit(pairs, Hypothesis(precision, 0.0), beta).codes[0])
                found.append(generic + torch.stack(rows).float() @ prior.basis)
            return found


def show(label, found):
    """One line a measurement."""
    parts = [
        f"{name} {value['mean']:.3f} (worst {value['worst']:.2f})"
        if isinstance(value, dict)
        else f"{name} {value:.3f}"
        for name, value in found.items()
    ]
    print(f"{label}: " + ", ".join(parts), flush=True)


def main(arguments):
    """Measure one task and print it, line by line."""
    torch.set_num_threads(1)
    disable_progress_bars()
    bench, results = Bench(arguments.model, arguments.ref_model), {}
    seeds, numbers = (list(map(int, text.split(","))) for text in (arguments.seeds, arguments.pairs))

    def measure(label, support, test, plain=False):
        results[label] = bench.join(support, test, plain)
        show(label, results[label])

    if arguments.task == "composed":
        for seed in seeds:
            support, test = composed_users(seed, max(numbers), arguments.draw_seed)
            for number in numbers:
                measure(f"seed {seed}, {number} pairs", first(support, number), test, plain=True)
    elif arguments.task == "length":
        for seed in seeds:
            support, test = length_users(seed, max(numbers))
            for number in numbers:
                measure(f"seed {seed}, {number} pairs", first(support, number), test)
    elif arguments.task == "noisy":
        for seed in seeds:
            support, test = length_users(seed, max(numbers))
            for number in numbers:
                few = first(support, number)
                measure(f"seed {seed}, {number} pairs, 20% flipped", with_noise(few, 0.2, seed), test)
                measure(f"seed {seed}, {number} pairs, by coin", with_noise(few, 0.5, seed), as_majority(test))
    else:
        rows = make_style_preferences(1000, 30, seed=seeds[0])["train"]
        support = [
            rows[i] | {"user_id": f"new-{i % 1000}"} for i in np.random.default_rng(0).integers(len(rows), size=10_000)
        ]
        few = [row for row in support if int(row["user_id"][4:]) < 100]
        for label, part in (("a hundred users", few), ("a thousand users", support)):
            model = AutoPersonalizedModelForCausalLM.from_pretrained(arguments.model)
            dataset, start = Dataset.from_list(part), time.process_time()
            model.add_users(dataset, bench.tokenizer, bench.reference)
            results[label] = {
                "cpu_seconds": time.process_time() - start,
                "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
            show(label, results[label])
    if arguments.json:
        path = Path(arguments.json)
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | {arguments.task: results}, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("composed", "length", "noisy", "thousand"))
    parser.add_argument("--model", required=True, help="folder of the example that trained it")
    parser.add_argument("--ref_model", help="the model that training started from; default: warmed_up in the folder")
    parser.add_argument("--seeds", default="2007,2008,2009")
    parser.add_argument("--pairs", default="3,6,15,30")
    parser.add_argument("--draw_seed", type=int, default=0, help="of the draw of pairs, added to the seed of the data")
    parser.add_argument("--json", help="file to add the results to")
    main(parser.parse_args())
