"""The source's own tokenizer, for artifacts whose engine has another: ids of texts, texts of ids.

Its package is imported only where a manifest asks for it, and reads tokenizer.json alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from .failure import Failure

PACKAGE = "tokenizers"
FILE = "tokenizer.json"
INCOMPLETE = "\ufffd"  # how a piece of a character is decoded
MOST_HELD = 3  # tokens in a row whose last character is open: it has four bytes at most
BEFORE = 8  # tokens of the prompt that say how an answer begins: with a space or without


class SourceTokenizer:
    """tokenizer.json as the source reads it."""

    def __init__(self, folder: Path) -> None:
        """Failure when the package or the file is missing, or the file is damaged."""
        path = folder / FILE
        try:
            from tokenizers import Tokenizer, __version__

            self.version = str(__version__)
            self._tokenizer = Tokenizer.from_file(str(path))
        except ImportError as error:
            raise Failure(
                "runtime",
                f"the artifact is tokenized by {PACKAGE}, which cannot be imported: {error}",
                f"install it: python -m pip install {PACKAGE}",
            ) from None
        except Exception as error:  # the package raises nothing narrower
            raise Failure("artifact", f"{path}: cannot be read: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Return token ids; special tokens are parsed, none are added."""
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False).ids]

    def spell(self, prompt_ids: Iterable[int], tokens: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Pair each token with the text it adds; a character comes with its last token.

        Special tokens add none. What comes before says whether the first word has its space.
        """
        seen = [token for token in prompt_ids if token >= 0][-BEFORE:]
        # The text of seen[done:] is what was shown of it, and what the newest token adds.
        done, shown, held = 0, len(seen), 0
        for token in tokens:
            seen.append(token)
            before, after = self._decode(seen[done:shown]), self._decode(seen[done:])
            is_open = after.endswith(INCOMPLETE) and held < MOST_HELD
            held = held + 1 if is_open else 0
            piece = "" if is_open else after[len(before) :]
            if piece:
                done, shown = shown, len(seen)
            yield token, piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class Retokenized:
    """An engine's model whose ids and texts are the source tokenizer's."""

    def __init__(self, model: Any, tokenizer: SourceTokenizer) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.version = model.version
        self.provider = model.provider

    @property
    def reused_tokens(self) -> int | None:
        """Of the last prompt, how many tokens the engine still had."""
        found: int | None = self._model.reused_tokens
        return found

    def encode(self, text: str) -> list[int]:
        """Return token ids; special tokens are parsed, none are added."""
        return self._tokenizer.encode(text)

    def generate(
        self, prompt_ids: Sequence[int], new_tokens: int, *rest: Any, **more: Any
    ) -> Generator[tuple[int, str], None, None]:
        """Yield up to `new_tokens` (token id, text) pairs; the rest is for the engine."""
        with closing(self._model.generate(prompt_ids, new_tokens, *rest, **more)) as pairs:
            tokens = (token for token, _ in pairs)
            yield from self._tokenizer.spell(prompt_ids, tokens)

    def close(self) -> None:
        """Let the runtime free its memory."""
        self._model.close()
