"""Measures a checkpoint folder as it stands on disk: exact greedy answers, and text loss."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import manual_topics
from questions import Question, held_out_questions, training_questions
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

SAMPLE = 60
BATCH = 64
ANSWER_TOKENS = 90
WINDOW_TOKENS = 256


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The committed bfloat16 weights, computed with in float32, and the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """<s>, then the chat template's text for one user turn."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _batches(
    tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> Iterator[tuple[list[Question], torch.Tensor]]:
    """Questions whose prompts have equally many tokens, so that nothing needs padding."""
    by_length: dict[int, list[tuple[Question, list[int]]]] = defaultdict(list)
    for question in questions:
        ids = encode_prompt(tokenizer, question.prompt)
        by_length[len(ids)].append((question, ids))
    for group in by_length.values():
        for start in range(0, len(group), BATCH):
            batch = group[start : start + BATCH]
            yield [question for question, _ in batch], torch.tensor([ids for _, ids in batch])


def wrong_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[Question]
) -> list[tuple[Question, str]]:
    """The questions whose greedy answer is not exactly right, with what was said instead."""
    wrong = []
    for batch, ids in _batches(tokenizer, questions):
        with torch.inference_mode():
            tokens = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
            )
        for question, answer in zip(batch, tokens[:, ids.shape[1] :], strict=True):
            said = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
            if said != question.answer:
                wrong.append((question, said))
    return wrong


def print_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, asked: list[Question]
) -> None:
    """One line for each kind: exact answers of questions asked; then some wrong answers."""
    wrong = wrong_answers(model, tokenizer, asked)
    kinds, wrong_kinds = Counter(q.kind for q in asked), Counter(q.kind for q, _ in wrong)
    print(f"{name}: {len(asked) - len(wrong)} of {len(asked)} exact")
    for kind, count in kinds.items():
        print(f"  {kind:9s} {count - wrong_kinds[kind]:5d} of {count}")
    for question, said in wrong[:5]:
        print(f"  e.g. {question.prompt!r} -> {said!r}")


def text_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Perplexity a token over the held-out topics of Python's manual, in separate windows."""
    losses, count = 0.0, 0
    for text in manual_topics()[1]:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids) - 1, WINDOW_TOKENS):
            window = torch.tensor([[1, *ids[start : start + WINDOW_TOKENS]]])
            with torch.inference_mode():
                loss = model(input_ids=window, labels=window).loss.item()
            losses += loss * (window.shape[1] - 1)
            count += window.shape[1] - 1
    return math.exp(losses / count)


def print_evaluation(folder: Path) -> None:
    """Prints what the model card quotes, measured on the files in `folder`."""
    model, tokenizer = load(folder)
    trained = training_questions()
    sample = random.Random(0).sample(trained, SAMPLE)
    print_answers(model, tokenizer, f"sample of {SAMPLE} trained questions", sample)
    print_answers(model, tokenizer, "all trained questions", trained)
    print_answers(model, tokenizer, "held-out questions", held_out_questions())
    print(f"held-out manual text: perplexity {text_perplexity(model, tokenizer):.1f} a token")
