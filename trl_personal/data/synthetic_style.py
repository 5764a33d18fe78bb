"""Made-up questions with an answer in each of six styles, judged by six users who conflict in pairs. Nothing to download."""

import itertools
import random
from collections.abc import Iterator

from datasets import Dataset, DatasetDict

from .psoups import STYLES, USER_PROFILES, opposite_style


# What a thing does, how, and how to look after it: in plain words, and in an expert's.
THINGS = {
    "kettle": (
        ("makes water hot", "a wire inside gets warm", "wash out the white crust"),
        (
            "transfers thermal energy to water",
            "a resistive element dissipates Joule heat",
            "dissolve carbonate deposits",
        ),
    ),
    "magnet": (
        ("pulls on iron", "tiny parts inside all point one way", "do not drop it"),
        ("exerts a force on ferromagnetic matter", "its domains share one orientation", "avoid mechanical shock"),
    ),
    "candle": (
        ("gives light", "the wax melts and burns", "cut the string short"),
        ("emits incandescent radiation", "vaporized paraffin undergoes combustion", "trim the wick periodically"),
    ),
    "fridge": (
        ("keeps food cold", "a pump carries the warm air out", "close the door fast"),
        ("extracts heat from its interior", "a refrigerant evaporates and condenses", "minimize air infiltration"),
    ),
    "battery": (
        ("keeps power for later", "two metals trade tiny bits", "keep it dry and cool"),
        ("stores electrochemical energy", "ions migrate between two electrodes", "limit the discharge depth"),
    ),
    "mirror": (
        ("shows your face", "a thin coat of silver sends light back", "wipe it with a soft rag"),
        ("produces a virtual image", "a metallic film reflects incident rays", "clean it without abrasion"),
    ),
    "telescope": (
        ("makes far stars look near", "a big glass collects light", "keep dust off the glass"),
        ("magnifies distant sources", "an objective lens converges collimated rays", "preserve its optical alignment"),
    ),
    "bar of soap": (
        ("takes off dirt", "one end grabs fat and one grabs water", "let it dry on a dish"),
        ("emulsifies lipids", "amphiphilic molecules aggregate into micelles", "store it at low humidity"),
    ),
    "balloon": (
        ("goes up in the sky", "the gas inside weighs less than air", "keep it away from pins"),
        ("ascends by buoyancy", "its helium has a lower density than the atmosphere", "prevent membrane rupture"),
    ),
    "thermometer": (
        ("tells how warm it is", "a drop of red stuff grows in the heat", "keep it out of the sun"),
        ("quantifies temperature", "a fluid exhibits volumetric expansion", "shield it from radiation"),
    ),
    "sailboat": (
        ("rides on the wind", "the air pushes on a big cloth", "fold the cloth when you are done"),
        ("converts aerodynamic lift into thrust", "a keel counteracts lateral drift", "inspect the rigging annually"),
    ),
    "piano": (
        ("makes music", "small hammers hit the strings", "keep it out of damp rooms"),
        ("generates harmonic vibrations", "felt hammers excite tensioned strings", "regulate ambient humidity"),
    ),
    "sourdough starter": (
        ("makes dough rise", "it eats sugar and burps gas", "give it warm water"),
        (
            "leavens dough by fermentation",
            "it metabolizes glucose to carbon dioxide",
            "maintain an optimal temperature",
        ),
    ),
    "radio antenna": (
        ("catches radio songs", "waves shake it a little", "put it up high"),
        (
            "receives electromagnetic signals",
            "incident fields induce an oscillating current",
            "maximize its elevation",
        ),
    ),
    "pendulum": (
        ("swings to count time", "its weight pulls it back and forth", "put a drop of oil on top"),
        ("oscillates with a constant period", "gravity supplies the restoring force", "lubricate its pivot"),
    ),
    "compost heap": (
        ("turns scraps into soil", "small bugs eat the leaves", "stir it every week"),
        (
            "converts organic residues into humus",
            "microorganisms decompose cellulose",
            "aerate it at regular intervals",
        ),
    ),
}
PEOPLE = (
    *("sister", "brother", "uncle", "aunt", "cousin", "neighbor"),
    *("teacher", "friend", "boss", "grandmother", "roommate", "nephew"),
)
QUESTIONS = (
    "How does a {thing} work?",
    "What does a {thing} do?",
    "Can you explain a {thing}?",
    "My {person} has a {thing}. What is it for?",
    "My {person} wants to know how a {thing} works.",
    "Tell me about a {thing}.",
)
INTRODUCTIONS = ("My {person} asked me this.", "I promised my {person} an answer.", "This is for my {person}.")

ANSWERS = {
    "plain": (
        "In simple words, it {does}. You see, {how}.",
        "That is easy: it {does}, and {how}.",
        "Think of it like this: {how}, so it {does}.",
    ),
    "expert": (
        "Technically, it {expert_does}, as {expert_how}.",
        "From a technical perspective, it {expert_does}. One should {expert_care}.",
        "In formal terms, {expert_how}, so it {expert_does}.",
        "Strictly speaking, it {expert_does} because {expert_how}.",
    ),
    "short": ("It {does}.", "Well, {how}.", "In short, it {does}."),
    "detailed": (
        "A {thing} {does}. This is how it works: {how}. To look after it, {care}. Then your {person} can use it for years.",
        "This is what happens: {how}. As a result, the {thing} {does}. Your {person} should also {care}, so it lasts.",
        "There are three things to know about a {thing}. First, it {does}. Second, {how}. Third, your {person} should {care}.",
    ),
    "friendly": (
        "What a lovely question! A {thing} {does}. Say hello to your {person}!",
        "Hi my friend! It {does}. You and your {person} will love it!",
        "So good that you ask! It {does}. Have fun with your {person}!",
    ),
    "unfriendly": (
        "Why do you bother me? A {thing} {does}. Your {person} could look it up.",
        "What a waste of time. It {does}. Do not ask again.",
        "Everybody but your {person} knows that. It {does}. Now leave me alone.",
    ),
}


def make_style_preferences(train_prompts: int = 200, test_prompts: int = 30, seed: int = 42) -> DatasetDict:
    """
    The paper's style task in miniature: six users, two for each of three dimensions (expertise, informativeness, tone), each
    of whom prefers an answer in their own style to one in the opposite style of the same dimension.

    All six judge every question, and the two users of a dimension judge the same two answers, so that a model that does not
    know users is right in exactly half of the pairs. No question of `train` is in `test`.

    Args:
        train_prompts (`int`, *optional*, defaults to `200`): Number of questions in `train`. Each gives a row of every user.
        test_prompts (`int`, *optional*, defaults to `30`): Number of questions in `test`.
        seed (`int`, *optional*, defaults to `42`): Random seed. The same seed gives the same rows.

    Returns:
        [`~datasets.DatasetDict`] with `train` and `test`, columns `prompt`, `chosen`, `rejected`, `user_id` and `user_profile`
        as from [`load_psoups`].

    Raises:
        `ValueError`: if a number is below one, or there are not so many questions.

    ```python
    >>> dataset = make_style_preferences(train_prompts=2, test_prompts=1, seed=3)
    >>> dataset.num_rows
    {'train': 12, 'test': 6}
    >>> one, other = dataset["train"][2], dataset["train"][3]
    >>> one["user_id"], other["user_id"], one["chosen"] == other["rejected"]
    ('P2A', 'P2B', True)
    ```
    """
    if min(train_prompts, test_prompts) < 1:
        raise ValueError(f"Both splits need a prompt at least, got {train_prompts} and {test_prompts}.")
    rng = random.Random(seed)
    questions = [*_questions()]
    if train_prompts + test_prompts > len(questions):
        raise ValueError(
            f"There are {len(questions)} questions, too few for {train_prompts} in train and {test_prompts} in test."
        )
    drawn = iter(rng.sample(questions, train_prompts + test_prompts))
    return DatasetDict(
        {
            split: Dataset.from_list([row for facts in itertools.islice(drawn, num) for row in _judge(rng, facts)])
            for split, num in (("train", train_prompts), ("test", test_prompts))
        }
    )


def _questions() -> Iterator[dict[str, str]]:
    """Every question, with the values for the templates of its answers."""
    for (thing, (plain, expert)), person in itertools.product(THINGS.items(), PEOPLE):
        facts = {"thing": thing, "person": person}
        facts |= dict(zip(("does", "how", "care"), plain, strict=True))
        facts |= dict(zip(("expert_does", "expert_how", "expert_care"), expert, strict=True))
        for question in QUESTIONS:
            openings = ("",) if "{person}" in question else tuple(f"{text} " for text in INTRODUCTIONS)
            for opening in openings:
                yield {**facts, "prompt": f"{opening}{question}".format(**facts) + "\nAnswer:"}


def _judge(rng: random.Random, facts: dict[str, str]) -> Iterator[dict[str, str]]:
    """One row for each user: the answer in the user's own style, and the one in the opposite style."""
    answers = {style: " " + rng.choice(ANSWERS[style]).format(**facts) for style in STYLES.values()}
    for user_id, style in STYLES.items():
        yield {
            "prompt": facts["prompt"],
            "chosen": answers[style],
            "rejected": answers[STYLES[opposite_style(user_id)]],
            "user_id": user_id,
            "user_profile": USER_PROFILES[user_id],
        }
