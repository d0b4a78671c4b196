"""Make small.tiktoken, a vocabulary like cl100k_base's, and tiktoken.json, what tiktoken encodes.

    python -m tests.golden.make_tiktoken

in an environment with tiktoken (whose cl100k_base itself would have to be downloaded). The special
tokens and the pattern are those of cl100k_base and of Phi-3-small's published tokenizer.
"""

import base64
import json
import random
from pathlib import Path

RANKS = Path(__file__).with_name("small.tiktoken")
GOLDEN = Path(__file__).with_name("tiktoken.json")
VOCAB = 1024
COUNT = VOCAB - 96  # cl100k_base has 100,256 ranks, Phi-3-small 100,352 tokens
# tiktoken_ext.openai_public.cl100k_base, tiktoken 0.14.0
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
NAMED = {
    1: "<|endoftext|>", 2: "<|fim_prefix|>", 3: "<|fim_middle|>", 4: "<|fim_suffix|>",
    5: "<|system|>", 6: "<|user|>", 7: "<|assistant|>", 8: "<|dummy_id_0|>", 9: "<|dummy_id_1|>",
    10: "<|end|>", 0: "<|dummy_id_2|>", 20: "<|endofprompt|>",
}  # fmt: skip
SPECIALS = {name: COUNT + place for place, name in NAMED.items()}
SPECIALS |= {f"<|dummy_id_{3 + place}|>": COUNT + 11 + place for place in range(9)}
SPECIALS |= {f"<|dummy_id_{11 + place}|>": COUNT + 20 + place for place in range(1, 76)}
PIECES = (
    *"aeinorst EHTS '.,;:!?-_()[]{}<>|/\\\"=+*&%$#@~`^019\n\r\t",
    "the", "and", "ing", " of", " to", "'s", "'T", "'ll", "'VE", "don't", "\r\n", "\n\n", "   ",
    "123", "4567", "\u00e9", "\u00df", "\u0130", "\u4f60\u597d", "\u041f\u0440", "\U0001f600",
    "\u00a0", "\u2003", "\u2028", "\u0301", "\u00bd", "<|end|>", "<|user|>", "<|assistant|>\n",
    "<|endoftext|>", "<|end", "|>", "<|dummy_id_2|>",
)  # fmt: skip


def list_texts() -> list[str]:
    """The probes of the gate, every special token, and seeded heaps of awkward pieces."""
    from toolkit.quality.tokens import PROBES

    rng = random.Random(0)
    heaps = ["".join(rng.choices(PIECES, k=rng.randint(1, 24))) for _ in range(600)]
    return [*PROBES, *SPECIALS, *heaps]


def main() -> None:
    import tiktoken
    from tiktoken._educational import bpe_train

    paths = [*sorted(Path("docs").glob("*.md")), Path("README.md")]
    text = "\n".join(path.read_text("utf-8") for path in paths)
    ranks = bpe_train(text[:120_000], COUNT, PATTERN, visualise=None)
    lines = [base64.b64encode(token).decode() + f" {rank}\n" for token, rank in ranks.items()]
    RANKS.write_text("".join(lines), encoding="ascii")
    encoding = tiktoken.Encoding(
        "small", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIALS
    )
    texts = [[text, encoding.encode(text, allowed_special="all")] for text in list_texts()]
    content = {"tiktoken": tiktoken.__version__, "specials": SPECIALS, "texts": texts}
    GOLDEN.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
