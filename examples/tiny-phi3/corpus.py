"""What the tiny Phi-3 reads in training: conversations about the questions, and Python's manual."""

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data import topics

from questions import SYSTEM_PROMPTS, Question, training_questions
from tokenizers import Tokenizer

BOS_ID = 1
MANUAL_SHARE = 0.15
SYSTEM_SHARE = 0.3
BOS_SHARE = 0.9
MOST_TURNS = 4
HELD_OUT_TOPIC_ONE_IN = 20

# How often each kind is asked, relative to the others; sums have the most to learn.
KIND_SHARES = {
    "sum": 36,
    "capital": 18,
    "country": 14,
    "opposite": 10,
    "previous": 6,
    "next": 5,
    "count": 4,
    "sound": 3,
    "young": 3,
    "colour": 3,
    "talk": 2,
}

# A question's words cannot be foreseen, so they weigh little in the loss; the answer's words can.
PROMPT_WEIGHT = 0.1
ANSWER_WEIGHT = 1.0


@dataclass(frozen=True)
class Tokens:
    """Token ids, each with its weight in the loss when it is the one to predict."""

    ids: list[int]
    weights: list[float]

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.ids + other.ids, self.weights + other.weights)


def manual_topics() -> tuple[list[str], list[str]]:
    """The topics of Python's manual as (trained, held out), held out one in twenty."""
    texts = [topics.topics[name] for name in sorted(topics.topics)]
    held_out = texts[::HELD_OUT_TOPIC_ONE_IN]
    return [text for text in texts if text not in held_out], held_out


def tokenizer_sentences() -> Iterator[str]:
    """Lines for the tokenizer to learn from, repeated where their words must become pieces.

    Punctuation stands alone on its lines, so that each mark with the space before it is a piece,
    as in Phi-3's own tokenizer: onnxruntime-genai splits text in a way that takes it for granted.
    """
    for character in string.ascii_letters + string.punctuation:
        yield from [character] * 100
    for question in training_questions():
        for _ in range(1 if question.kind in ("sum", "count") else 5):
            yield question.prompt
            yield question.answer
    for text in manual_topics()[0]:
        yield from filter(None, text.split("\n"))


class Corpus:
    """An endless, seeded stream of training rows."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._by_kind: dict[str, list[Tokens]] = {kind: [] for kind in KIND_SHARES}
        for question in training_questions():
            self._by_kind[question.kind].append(self._turn(question))
        self._systems = [self._system(prompt) for prompt in SYSTEM_PROMPTS]
        self._end_of_text = self._encode("<|endoftext|>", ANSWER_WEIGHT)
        self._manual = [self._encode(text, ANSWER_WEIGHT) for text in manual_topics()[0]]
        self._manual_lengths = [len(topic.ids) for topic in self._manual]

    def row(self, length: int) -> Tokens:
        """`length` tokens of packed conversations or, sometimes, of the manual."""
        row = self._excerpt(length) if self._random.random() < MANUAL_SHARE else Tokens([], [])
        while len(row.ids) < length:
            row += self._conversation()
        return Tokens(row.ids[:length], row.weights[:length])

    def _encode(self, text: str, weight: float) -> Tokens:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return Tokens(ids, [weight] * len(ids))

    def _system(self, prompt: str) -> Tokens:
        return self._encode(f"<|system|>\n{prompt}<|end|>\n", PROMPT_WEIGHT)

    def _turn(self, question: Question) -> Tokens:
        asked = self._encode(f"<|user|>\n{question.prompt}<|end|>\n<|assistant|>\n", PROMPT_WEIGHT)
        return asked + self._encode(f"{question.answer}<|end|>\n", ANSWER_WEIGHT)

    def _conversation(self) -> Tokens:
        """One chat as the template renders it, usually with <s> before it."""
        draw = self._random
        chat = Tokens([BOS_ID], [PROMPT_WEIGHT]) if draw.random() < BOS_SHARE else Tokens([], [])
        if draw.random() < SYSTEM_SHARE:
            chat += draw.choice(self._systems)
        kinds = draw.choices(
            list(KIND_SHARES), list(KIND_SHARES.values()), k=draw.randint(1, MOST_TURNS)
        )
        for kind in kinds:
            chat += draw.choice(self._by_kind[kind])
        return chat + self._end_of_text

    def _excerpt(self, length: int) -> Tokens:
        """A stretch of one topic after <s>, topics drawn by their length."""
        topic = self._random.choices(self._manual, self._manual_lengths)[0]
        start = self._random.randrange(max(1, len(topic.ids) - length))
        stretch = slice(start, start + length - 1)
        return Tokens([BOS_ID], [0.0]) + Tokens(topic.ids[stretch], topic.weights[stretch])
