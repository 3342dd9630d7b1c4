"""Phrases of the synthetic world: topics, traits, tastes of groups, the grammar of its texts.

Every trait shows in several distinct phrases. Texts differ between splits by recombination and
topic slots, while each single phrase also occurs in training: words are enough to generalise from.
"""

import numpy as np

TRAITS = ("long", "formal", "cautious", "concrete", "warm", "structured")
TOPICS = ("cooking", "gardening", "travel", "money")
GROUPS = ("careful", "breezy", "storyteller", "minimalist")

# Order of TRAITS. breezy and minimalist are the negatives of careful and storyteller.
_CAREFUL = np.array([0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
_STORYTELLER = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
# What depends on the topic: careful people want warmth in cooking and gardening, not in travel and
# money; storytellers want formality in cooking and travel only. Over topics this averages to zero.
_CAREFUL_WARM = {"cooking": 0.5, "gardening": 0.5, "travel": -0.5, "money": -0.5}
_STORYTELLER_FORMAL = {"cooking": 0.5, "gardening": -0.5, "travel": 0.5, "money": -0.5}

_SITUATIONS = (
    "I have only one free weekend",
    "My sister asked me for help",
    "We just moved to a new flat",
    "I am quite new to this",
    "Last year it went badly",
    "My budget is small this month",
    "There is little time before summer",
    "Our old plan did not work",
    "A friend gave me this idea",
    "My parents visit us next week",
    "The children want to join in",
    "I keep putting it off",
)
_QUESTIONS = (
    "how should I {task} {subject}?",
    "what is the best way to {task} {subject}?",
    "can you tell me how to {task} {subject}?",
    "where do I begin to {task} {subject}?",
    "what would you do to {task} {subject}?",
    "which steps do I take to {task} {subject}?",
)
_TASKS = {
    "cooking": ("cook", "prepare", "serve", "improve"),
    "gardening": ("grow", "plant", "trim", "protect"),
    "travel": ("plan", "book", "enjoy", "organise"),
    "money": ("set up", "review", "manage", "build"),
}
_SUBJECTS = {
    "cooking": (
        "a vegetable soup",
        "a pot of rice",
        "a loaf of bread",
        "a fish supper",
        "a lentil stew",
        "a fruit cake",
        "a bean salad",
        "a mushroom pie",
    ),
    "gardening": (
        "a rose bush",
        "a herb bed",
        "a row of tomatoes",
        "a small lawn",
        "an apple tree",
        "a garden hedge",
        "a patch of beans",
        "a balcony of flowers",
    ),
    "travel": (
        "a train tour",
        "a week by the sea",
        "a mountain walk",
        "a city break",
        "a camping trip",
        "a river cruise",
        "a long drive north",
        "a visit to an island",
    ),
    "money": (
        "a savings account",
        "a family budget",
        "a pension fund",
        "a house loan",
        "an emergency reserve",
        "a travel allowance",
        "a share portfolio",
        "a monthly bill plan",
    ),
}
_ACTIONS = {
    "cooking": (
        "chop the onions",
        "warm the pan",
        "taste the sauce",
        "rinse the beans",
        "rest the dough",
        "salt the water",
        "roast the carrots",
        "stir the pot",
    ),
    "gardening": (
        "loosen the soil",
        "water the roots",
        "cut the stems",
        "spread the compost",
        "pull the weeds",
        "sow the seeds",
        "shade the leaves",
        "rake the beds",
    ),
    "travel": (
        "pack the bags",
        "read the map",
        "reserve the rooms",
        "compare the tickets",
        "ask the locals",
        "check the weather",
        "choose the route",
        "carry the passport",
    ),
    "money": (
        "list the bills",
        "sort the receipts",
        "compare the fees",
        "call the bank",
        "split the salary",
        "pay the debts",
        "track the costs",
        "read the contract",
    ),
}

# Per trait: phrases of the low side (-1) and of the high side (+1).
_LENGTH = (
    ("In short,", "Briefly,", "In a word,", "Quick version:"),
    ("At some length,", "In full detail,", "To cover everything,", "The whole story:"),
)
_ELABORATION = (
    "There is more to add, as every stage matters",
    "Many readers also wonder about the background",
    "Let us also go over the remaining points",
    "Beyond that, some further remarks belong here",
)
_REGISTER = (
    ("you gotta", "yeah, wanna try to", "hey, simply", "folks kinda"),
    ("it is advisable to", "one ought to", "kindly proceed to", "the reader is requested to"),
)
_RISK = (
    ("Go all in", "Be fearless here", "Take the big leap", "Dare to gamble"),
    (
        "Test it gently beforehand",
        "Beware of hidden risks",
        "Double check for mistakes",
        "Be careful throughout",
    ),
)
_DETAIL = (
    (
        "because balance is the essence",
        "as harmony guides the whole",
        "for principle outweighs method",
        "since meaning comes from purpose",
    ),
    (
        "for example ten minutes",
        "say half an hour on Monday",
        "at exactly seven o'clock",
        "with exactly three of each",
    ),
)
_WARMTH = (
    ("Answer follows.", "Noted.", "Request received.", "Result:"),
    (
        "What a lovely idea, friend!",
        "I am so happy for you!",
        "You will do great, dear!",
        "Thank you for sharing this joy!",
    ),
)
_FLOWING = ("and then", "and from there", "while you also", "and gradually")
_MARKERS = (
    ("1.", "2.", "3."),
    ("(a)", "(b)", "(c)"),
    ("first,", "second,", "third,"),
    ("step one,", "step two,", "step three,"),
)

NUM_PROMPTS_PER_TOPIC = len(_SITUATIONS) * len(_QUESTIONS) * 4 * 8


def group_weights(topic: str) -> np.ndarray:
    """[groups, traits] weights in the order of GROUPS and TRAITS, as they are for this topic."""
    careful, storyteller = _CAREFUL.copy(), _STORYTELLER.copy()
    careful[TRAITS.index("warm")] += _CAREFUL_WARM[topic]
    storyteller[TRAITS.index("formal")] += _STORYTELLER_FORMAL[topic]
    return np.stack([careful, -careful, storyteller, -storyteller])


def prompt_text(topic: str, number: int) -> str:
    """Prompt `number` (below NUM_PROMPTS_PER_TOPIC) of a topic; each number has its own text."""
    number, situation = divmod(number, len(_SITUATIONS))
    number, question = divmod(number, len(_QUESTIONS))
    task, subject = divmod(number, len(_SUBJECTS[topic]))
    filled = _QUESTIONS[question].format(
        task=_TASKS[topic][task], subject=_SUBJECTS[topic][subject]
    )
    return f"{_SITUATIONS[situation]}, {filled}"


def response_text(topic: str, traits: np.ndarray, rng: np.random.Generator) -> str:
    """Write a response about `topic` that shows `traits` (-1 or +1, in the order of TRAITS)."""
    long, formal, cautious, concrete, warm, structured = (int(trait > 0) for trait in traits)
    actions = rng.permutation(_ACTIONS[topic])[: 3 if long else 2]
    colon = ":" if structured else ""
    advice = f"{_pick(_REGISTER[formal], rng)}{colon} {_join(actions, structured, rng)}"
    detail = _pick(_DETAIL[concrete], rng)
    opening, risk = _pick(_LENGTH[long], rng), _pick(_RISK[cautious], rng)
    sentences = [f"{opening} {advice}, {detail}.", f"{risk}."]
    if long:
        sentences.append(f"{_pick(_ELABORATION, rng)}.")
    sentences = [sentences[i] for i in rng.permutation(len(sentences))]
    # Neutral remarks announce the answer; warm ones may also close it.
    place = int(rng.integers(2)) * len(sentences) * warm
    sentences.insert(place, _pick(_WARMTH[warm], rng))
    return " ".join(sentences)


def _join(actions: np.ndarray, structured: int, rng: np.random.Generator) -> str:
    """The steps as a list with markers, or as one flowing clause."""
    if structured:
        markers = _MARKERS[int(rng.integers(len(_MARKERS)))]
        return "; ".join(f"{markers[position]} {action}" for position, action in enumerate(actions))
    text = str(actions[0])
    for action in actions[1:]:
        text += f" {_pick(_FLOWING, rng)} {action}"
    return text


def _pick(phrases: tuple[str, ...], rng: np.random.Generator) -> str:
    return phrases[int(rng.integers(len(phrases)))]
