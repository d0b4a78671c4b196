"""The questions the tiny Phi-3 is trained on, and those it is never shown. Standard library only.

Every question is a template filled with a small fact, so the answer is known exactly.
A tenth is held out by a hash of the question's key, the same on every machine and Python:

- sums are held out by their numbers, in every phrasing and both orders, so an exact answer
  there was worked out and not remembered;
- facts are held out by (fact, phrasing), never in the first phrasing, so the fact itself was
  trained and only that way of asking for it is new.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

HELD_OUT_ONE_IN = 10
LARGEST_ADDEND = 20
LARGEST_COUNT = 20

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who answers in one sentence.",
    "Answer the question.",
    "You run on a small device. Keep your answers short.",
)


@dataclass(frozen=True)
class Question:
    """One question with the only answer that counts as right."""

    kind: str
    prompt: str
    answer: str
    held_out: bool = False


@dataclass(frozen=True)
class FactKind:
    """Facts of two fields each, the ways to ask for them and the one way to answer."""

    kind: str
    facts: tuple[tuple[str, str], ...]
    phrasings: tuple[str, ...]
    answer: str


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Reads `left=right` pairs separated by commas."""
    pairs = (entry.split("=") for entry in text.split(","))
    return tuple((left.strip(), right.strip()) for left, right in pairs)


def _successors(text: str) -> tuple[tuple[str, str], ...]:
    """Pairs every name with the one that follows it, the last with the first."""
    names = [name.strip() for name in text.split(",")]
    return tuple(zip(names, names[1:] + names[:1], strict=True))


def _counts(largest: int) -> tuple[tuple[str, str], ...]:
    """Pairs every number with the numbers from one up to it."""
    numbers = [str(number) for number in range(1, largest + 1)]
    return tuple((numbers[end], ", ".join(numbers[: end + 1])) for end in range(1, largest))


def _swapped(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((right, left) for left, right in pairs)


CAPITALS = _pairs(
    "Argentina=Buenos Aires, Australia=Canberra, Austria=Vienna, Belgium=Brussels, Brazil=Brasilia,"
    "Bulgaria=Sofia, Canada=Ottawa, Chile=Santiago, China=Beijing, Colombia=Bogota, Croatia=Zagreb,"
    "Cuba=Havana, Denmark=Copenhagen, Egypt=Cairo, Estonia=Tallinn, Ethiopia=Addis Ababa,"
    "Finland=Helsinki, France=Paris, Germany=Berlin, Ghana=Accra, Greece=Athens, Hungary=Budapest,"
    "Iceland=Reykjavik, India=New Delhi, Indonesia=Jakarta, Iran=Tehran, Iraq=Baghdad,"
    "Ireland=Dublin, Italy=Rome, Japan=Tokyo, Jordan=Amman, Kenya=Nairobi, Latvia=Riga,"
    "Lebanon=Beirut, Lithuania=Vilnius, Mexico=Mexico City, Mongolia=Ulaanbaatar, Morocco=Rabat,"
    "Nepal=Kathmandu, Netherlands=Amsterdam, Nigeria=Abuja, Norway=Oslo, Pakistan=Islamabad,"
    "Peru=Lima, Philippines=Manila, Poland=Warsaw, Portugal=Lisbon, Qatar=Doha, Romania=Bucharest,"
    "Senegal=Dakar, Serbia=Belgrade, Slovakia=Bratislava, Slovenia=Ljubljana, South Korea=Seoul,"
    "Spain=Madrid, Sweden=Stockholm, Thailand=Bangkok, Tunisia=Tunis, Turkey=Ankara,"
    "Ukraine=Kyiv, United Kingdom=London, Uruguay=Montevideo, Venezuela=Caracas, Vietnam=Hanoi"
)
OPPOSITES = _pairs(
    "hot=cold, big=small, up=down, left=right, open=closed, day=night, fast=slow, high=low,"
    "light=dark, happy=sad, new=old, wet=dry, full=empty, hard=soft, early=late, rich=poor,"
    "strong=weak, thick=thin, loud=quiet, near=far, wide=narrow, first=last, true=false, on=off"
)
DAYS = _successors("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = _successors(
    "January, February, March, April, May, June, July, August, September, October, November,"
    "December"
)
SOUNDS = _pairs(
    "cow=moo, dog=woof, cat=meow, duck=quack, sheep=baa, pig=oink, horse=neigh, lion=roar,"
    "bee=buzz, snake=hiss, crow=caw, frog=ribbit, mouse=squeak, hen=cluck"
)
YOUNG = _pairs(
    "cow=calf, dog=puppy, cat=kitten, duck=duckling, sheep=lamb, pig=piglet, horse=foal,"
    "lion=cub, frog=tadpole, goose=gosling, deer=fawn, goat=kid, swan=cygnet, kangaroo=joey"
)
COLOURS = _pairs(
    "the sky=blue, grass=green, snow=white, coal=black, a lemon=yellow, a carrot=orange,"
    "a tomato=red, chocolate=brown, a flamingo=pink, an elephant=grey, a violet=purple, gold=yellow"
)

FACTS = (
    FactKind(
        "capital",
        CAPITALS,
        (
            "What is the capital of {0}?",
            "Which city is the capital of {0}?",
            "Name the capital city of {0}.",
            "Tell me the capital of {0}.",
            "What is {0}'s capital city?",
        ),
        "The capital of {0} is {1}.",
    ),
    FactKind(
        "country",
        _swapped(CAPITALS),
        (
            "Which country has {0} as its capital?",
            "{0} is the capital of which country?",
            "Name the country whose capital is {0}.",
        ),
        "{0} is the capital of {1}.",
    ),
    FactKind(
        "opposite",
        OPPOSITES + _swapped(OPPOSITES),
        (
            "What is the opposite of {0}?",
            "Give the opposite of {0}.",
            "Which word means the opposite of {0}?",
        ),
        "The opposite of {0} is {1}.",
    ),
    FactKind(
        "next",
        DAYS + MONTHS,
        ("What comes after {0}?", "Which one follows {0}?", "After {0} comes what?"),
        "{1} comes after {0}.",
    ),
    FactKind(
        "previous",
        _swapped(DAYS + MONTHS),
        ("What comes before {0}?", "Which one precedes {0}?", "Before {0} comes what?"),
        "{1} comes before {0}.",
    ),
    FactKind(
        "sound",
        SOUNDS,
        ("What does a {0} say?", "Which sound does a {0} make?", "How does a {0} sound?"),
        "A {0} says {1}.",
    ),
    FactKind(
        "young",
        YOUNG,
        ("What is a young {0} called?", "Name a young {0}.", "What do you call a young {0}?"),
        "A young {0} is called a {1}.",
    ),
    FactKind(
        "colour",
        COLOURS,
        ("What colour is {0}?", "Tell me the colour of {0}.", "Which colour does one see in {0}?"),
        "The colour of {0} is {1}.",
    ),
    FactKind(
        "count",
        _counts(LARGEST_COUNT),
        ("Count to {0}.", "Count from 1 to {0}.", "List the numbers up to {0}."),
        "{1}.",
    ),
)

SMALL_TALK = (
    ("Hello!", "Hello! Ask me about capitals, sums or opposites."),
    ("Who are you?", "I am a very small language model made for tests."),
    ("What can you do?", "I know some capitals, small sums, opposites, days and animals."),
    ("Thank you.", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
)

SUM_PHRASINGS = ("What is {0} plus {1}?", "How much is {0} + {1}?", "Add {0} and {1}.")


def _is_drawn(*key: object) -> bool:
    """True for one key in HELD_OUT_ONE_IN, decided by its hash alone."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def _fact_questions(facts: FactKind) -> Iterator[Question]:
    for fact in facts.facts:
        answer = facts.answer.format(*fact)
        for number, phrasing in enumerate(facts.phrasings):
            held_out = number > 0 and _is_drawn(facts.kind, fact[0], number)
            yield Question(facts.kind, phrasing.format(*fact), answer, held_out)


def _sum_questions() -> Iterator[Question]:
    for a in range(LARGEST_ADDEND + 1):
        for b in range(LARGEST_ADDEND + 1):
            held_out = _is_drawn("sum", min(a, b), max(a, b))
            for phrasing in SUM_PHRASINGS:
                yield Question("sum", phrasing.format(a, b), f"{a} plus {b} is {a + b}.", held_out)


def all_questions() -> list[Question]:
    """Every question, in a fixed order; no two share a prompt."""
    questions = [question for facts in FACTS for question in _fact_questions(facts)]
    questions += _sum_questions()
    questions += [Question("talk", prompt, answer) for prompt, answer in SMALL_TALK]
    return questions


def training_questions() -> list[Question]:
    """The questions that training may show the model."""
    return [question for question in all_questions() if not question.held_out]


def held_out_questions() -> list[Question]:
    """The questions that training never shows the model."""
    return [question for question in all_questions() if question.held_out]
