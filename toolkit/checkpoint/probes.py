"""Texts on which tokenizers are compared; without special tokens, which differ by checkpoint."""

PLAIN_PROBES = (
    "Hello",
    " Hello",
    "Hello, world! It's 3 o'clock; don't be late.",
    "The quick brown fox jumps over the lazy dog.",
    "ALL CAPS, mixedCase, snake_case, kebab-case",
    "0 1 12 123 1234567890 3.14159 -2e-10 0xFF 1,000,000",
    "a+b=c; x != y && z <= 2 || !w ? p : q",
    "https://example.org/path?query=1&other=%20#part user@example.org",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]} # comment\n\n\nclass A:\n\tpass\n",
    '{"key": [1, 2.5, null, true], "text": "line\\nnext"}',
    "<p class='x'>5 &lt; 6</p> <|not a token|> <s <|end| <unknown>",
)
SPACE_PROBES = (
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "two  three   four    many                end",
    "\n",
    "\n\n",
    "a\nb\n\nc\n\n\nd\r\ne",
    "\t",
    "a\tb\t\tc\n\t\td",
    " \n \t ",
)
UNICODE_PROBES = (
    "Grüße aus Köln, naïve café, Ærøskøbing, İstanbul",
    "Привет, мир! Γειά σου Κόσμε",
    "你好,世界。こんにちは世界 안녕하세요 세계",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
    "e\u0301 vs \u00e9, \ufb01ligature, \uff21\uff22, \u00bd \u2460 \u2122",
    "no\u00a0break, em\u2003space, zero\u200bwidth, line\u2028end",
    "\u201cquotes\u201d \u2018single\u2019 \u2014 dash \u2026 \u20ac \u00a3 \u221e \u2211 \u2260",
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U00020000\U0001d54f rare \u0378 \ufffd",
)
PROBES = PLAIN_PROBES + SPACE_PROBES + UNICODE_PROBES
"""Where an engine differs on one of these, the source's own tokenizer answers."""

RARE_PROBES = (
    "\u00a0a no-break space in front",
    "a literal \u2581 and \u2581\u2581 more",
    "two spaces  \U0001f600  \u6f22\u5b57 before a character without a piece of its own",
)
"""Where onnxruntime-genai is known to differ (docs/quality.md): told, and nothing follows from it.

They would have every Phi-3 in ONNX answer by the source's tokenizer, for texts that hardly occur.
"""
