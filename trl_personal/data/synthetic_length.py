"""Made-up posts with a shorter and a longer summary, judged by users who conflict on length. Nothing to download."""

import itertools
import random
from collections.abc import Iterator

from datasets import Dataset, DatasetDict


# What posts are about: the forum, and things that somebody there may own.
TOPICS = {
    "baking": ("mixer", "whisk", "cookbook", "toaster", "teapot"),
    "camping": ("tent", "lantern", "canoe", "stove", "hammock"),
    "cycling": ("bike", "helmet", "tandem", "pump", "saddle"),
    "gardening": ("rose", "wheelbarrow", "greenhouse", "hose", "shovel"),
    "music": ("guitar", "piano", "drum", "violin", "trumpet"),
    "pets": ("fishbowl", "birdcage", "kennel", "leash", "doghouse"),
    "reading": ("bookshelf", "novel", "dictionary", "magazine", "diary"),
    "winter": ("sled", "coat", "scarf", "snowboard", "parka"),
}
PEOPLE = (
    *("roommate", "neighbor", "sister", "brother", "cousin", "coworker"),
    *("uncle", "aunt", "landlord", "friend", "teacher", "grandmother"),
)
# What somebody did with a thing: as a clause, and as a noun.
EVENTS = (
    ("broke my {thing}", "a broken {thing}"),
    ("lost my {thing}", "a lost {thing}"),
    ("sold my {thing}", "a sold {thing}"),
    ("painted my {thing} green", "a green {thing}"),
    ("borrowed my {thing} and kept it", "a borrowed {thing}"),
    ("gave my {thing} to a stranger", "a vanished {thing}"),
    ("hid my {thing} as a joke", "a hidden {thing}"),
    ("dropped my {thing} in the mud", "a muddy {thing}"),
)
TIMES = (
    *("last Monday", "two weeks ago", "yesterday evening", "during the storm"),
    *("before a long trip", "after dinner", "over the holidays", "in June"),
)
PLACES = (
    *("inside the garage", "behind the shed", "at the club", "under the stairs"),
    *("near the station", "beside the lake", "above the kitchen", "outside my door"),
)
ORIGINS = (
    *("saved a year for it", "built it myself", "won it in a contest"),
    *("found it at a market", "inherited it", "use it every day"),
)
ATTEMPTS = (
    *("asked for an apology", "wrote a long letter", "offered to repair it", "called twice"),
    *("sent the bill", "waited for a week", "talked to their mother", "cooked dinner for them"),
)
REACTIONS = (
    *("laughed about it", "blamed the dog", "changed the subject", "promised nothing"),
    *("stopped talking to me", "cried for an hour", "shrugged and left", "denied everything"),
)
FEELINGS = ("angry", "sad", "confused", "tired", "betrayed", "guilty")
ACTIONS = (
    *("forgive them", "ask again", "buy a new one", "demand money"),
    *("tell the family", "lock my things away", "get even", "move out"),
)

POST_TITLES = ("{Noun} and my {person}", "What to do about {noun}?", "My {person} is not sorry")
POST_OPENINGS = (
    "I am {age} and my {person} {event} {time}.",
    "So {time} my {person} {event}.",
    "My {person} of {years} years {event} {time}, and I am still thinking about it.",
)
POST_DETAILS = (
    (
        "It was {place} and I {origin}.",
        "I {origin} and kept it {place}.",
        "You should know that I {origin}. It was {place}.",
    ),
    (
        "I {attempt}, but they {reaction}.",
        "When I {attempt}, they only {reaction}.",
        "They {reaction} after I {attempt}.",
    ),
    ("I feel {feeling}.", "Honestly I am {feeling}.", "By now I am just {feeling}."),
)
POST_ENDINGS = (
    "Should I {action} or {other_action}?",
    "Would you {action}, or would you rather {other_action}?",
    "My friends say I should {action}. I would rather {other_action}. What do you think?",
)

SHORTER_SUMMARIES = (
    "My {person} {event}.",
    "My {person} {event}. Should I {action}?",
    "Should I {action} because of {noun}?",
    "I am {feeling} about {noun}.",
    "Trouble with my {person} over {noun}.",
    "{Noun}, and my {person} {reaction}.",
    "I {attempt}. My {person} {reaction}.",
)
# A longer summary tells one piece of each kind, in one of these orders.
LONGER_PIECES = {
    "event": (
        "My {person} {event} {time}.",
        "{Time} my {person}, whom I used to trust, {event}.",
        "I have to deal with {noun} thanks to my {person} ({time}).",
    ),
    "value": (
        "I {origin} and kept it {place}.",
        "It matters to me because I {origin}.",
        "It was {place} and I {origin}.",
    ),
    "dispute": (
        "I {attempt}, to which my {person} {reaction}.",
        "My {person} {reaction} even though I {attempt}.",
        "My {person} {reaction} once I {attempt}, so nothing is settled.",
    ),
    "feeling": (
        "I am {feeling} and do not sleep well.",
        "This leaves me {feeling}.",
        "I feel {feeling} when I see them.",
    ),
    "question": (
        "Should I {action} or {other_action}?",
        "I can {action} or {other_action} and would like advice.",
        "Is it better to {action}, or do I {other_action}?",
    ),
}
LONGER_ORDERS = (
    ("event", "dispute", "question"),
    ("event", "value", "question"),
    ("feeling", "event", "dispute"),
    ("question", "event", "value"),
    ("value", "event", "dispute"),
    ("dispute", "event", "feeling", "question"),
)


def make_length_preferences(
    num_users: int = 10,
    train_pairs_per_user: int = 200,
    test_pairs_per_user: int = 30,
    shorter_share: float = 0.3,
    seed: int = 42,
) -> DatasetDict:
    """
    The paper's length task in miniature: each user always prefers the longer, or always the shorter, of two summaries.

    The two summaries of a post differ in length, and also in wording, in the facts they tell and in their order. Users draw
    from the same posts, two users to a post on average, and often disagree about one. No post of `train` is in `test`.

    Args:
        num_users (`int`, *optional*, defaults to `10`): Number of users, who are named `user_01`, `user_02`, ...
        train_pairs_per_user (`int`, *optional*, defaults to `200`): Number of pairs of each user in `train`, each about
            another post.
        test_pairs_per_user (`int`, *optional*, defaults to `30`): Number of pairs of each user in `test`, each about another
            post that is not in `train`.
        shorter_share (`float`, *optional*, defaults to `0.3`): Share of users who prefer shorter summaries, rounded to
            whole users.
        seed (`int`, *optional*, defaults to `42`): Random seed. The same seed gives the same rows.

    Returns:
        [`~datasets.DatasetDict`] with `train` and `test`, columns `prompt`, `chosen`, `rejected`, `user_id` and
        `preference` (`"longer"` or `"shorter"`).

    Raises:
        `ValueError`: if a number is below one, or the share not in [0, 1].

    ```python
    >>> dataset = make_length_preferences(train_pairs_per_user=4, test_pairs_per_user=1, seed=0)
    >>> dataset.num_rows
    {'train': 40, 'test': 10}
    >>> row = dataset["test"][0]
    >>> row["user_id"], row["preference"], len(row["chosen"]) > len(row["rejected"])
    ('user_01', 'shorter', False)
    ```
    """
    if min(num_users, train_pairs_per_user, test_pairs_per_user) < 1:
        raise ValueError(
            f"Users and pairs must be at least one, got {num_users} users with {train_pairs_per_user} train pairs and "
            f"{test_pairs_per_user} test pairs each."
        )
    if not 0.0 <= shorter_share <= 1.0:
        raise ValueError(f"`shorter_share` must lie in [0, 1], got {shorter_share}.")
    rng = random.Random(seed)
    width = max(2, len(str(num_users)))
    user_ids = [f"user_{number:0{width}d}" for number in range(1, num_users + 1)]
    shorter = set(rng.sample(user_ids, round(shorter_share * num_users)))
    preferences = {user_id: "shorter" if user_id in shorter else "longer" for user_id in user_ids}
    posts = _distinct_posts(rng)
    return DatasetDict(
        {
            split: Dataset.from_list(_judge(rng, posts, preferences, pairs_per_user))
            for split, pairs_per_user in (("train", train_pairs_per_user), ("test", test_pairs_per_user))
        }
    )


def _judge(
    rng: random.Random, posts: Iterator[dict[str, str]], preferences: dict[str, str], pairs_per_user: int
) -> list[dict[str, str]]:
    """Rows of one split: users draw from new posts, so few that most are judged by two users or more."""
    num_posts = max(pairs_per_user, len(preferences) * pairs_per_user // 2)
    pool = list(itertools.islice(posts, num_posts))
    rows = []
    for user_id, preference in preferences.items():
        rejected = "shorter" if preference == "longer" else "longer"
        for post in rng.sample(pool, pairs_per_user):
            rows.append(
                {
                    "prompt": post["prompt"],
                    "chosen": post[preference],
                    "rejected": post[rejected],
                    "user_id": user_id,
                    "preference": preference,
                }
            )
    return rows


def _distinct_posts(rng: random.Random) -> Iterator[dict[str, str]]:
    """Endless posts, each with a `prompt`, a `shorter` and a `longer` summary; no prompt comes twice."""
    seen = set()
    while True:
        post = _write_post(rng)
        if post["prompt"] not in seen:
            seen.add(post["prompt"])
            yield post


def _write_post(rng: random.Random) -> dict[str, str]:
    topic = rng.choice(list(TOPICS))
    facts = _draw_facts(rng, topic)
    details = [rng.choice(wordings) for wordings in POST_DETAILS]
    rng.shuffle(details)
    post = [rng.choice(POST_OPENINGS), *details, rng.choice(POST_ENDINGS)]
    title = rng.choice(POST_TITLES).format(**facts)
    longer = [rng.choice(LONGER_PIECES[piece]) for piece in rng.choice(LONGER_ORDERS)]
    return {
        "prompt": f"SUBREDDIT: r/{topic}\nTITLE: {title}\nPOST: {' '.join(post).format(**facts)}\nTL;DR:",
        "shorter": " " + rng.choice(SHORTER_SUMMARIES).format(**facts),
        "longer": " " + " ".join(longer).format(**facts),
    }


def _draw_facts(rng: random.Random, topic: str) -> dict[str, str]:
    """What happened, as values for the templates; capitalised names hold the capitalised text."""
    thing = rng.choice(TOPICS[topic])
    event, noun = (text.format(thing=thing) for text in rng.choice(EVENTS))
    action, other_action = rng.sample(ACTIONS, 2)
    time = rng.choice(TIMES)
    return {
        "age": str(rng.randint(18, 60)),
        "years": str(rng.randint(2, 20)),
        "person": rng.choice(PEOPLE),
        "event": event,
        "noun": noun,
        "Noun": noun[0].upper() + noun[1:],
        "time": time,
        "Time": time[0].upper() + time[1:],
        "place": rng.choice(PLACES),
        "origin": rng.choice(ORIGINS),
        "attempt": rng.choice(ATTEMPTS),
        "reaction": rng.choice(REACTIONS),
        "feeling": rng.choice(FEELINGS),
        "action": action,
        "other_action": other_action,
    }
