"""What a carried chat template costs: python -m bench.chat_template TEMPLATE.jinja"""

import sys
import time
from pathlib import Path

from toolkit.runner.template import Renderer

CHATS = 300


def main(path: Path) -> None:
    """Print the times of the child's start and of rendering 21 messages, and its memory."""
    text = path.read_text(encoding="utf-8")
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": "x" * 400} for i in range(21)]
    variables = {
        "messages": messages, "tools": None, "add_generation_prompt": True,
        "bos_token": "<s>", "eos_token": "</s>",
    }  # fmt: skip
    renderer = Renderer()
    start_s = time.monotonic()
    renderer.start()
    started_s = time.monotonic()
    renderer.check()
    ready_s = time.monotonic()
    renderer.render(text, variables)
    first_s = time.monotonic()
    for _ in range(CHATS):
        renderer.render(text, variables)
    each_s = (time.monotonic() - first_s) / CHATS
    assert renderer._process
    status = Path(f"/proc/{renderer._process.pid}/status").read_text(encoding="ascii")
    memory = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(
        f"start() {1e3 * (started_s - start_s):.0f} ms, ready {1e3 * (ready_s - start_s):.0f} ms, "
        f"first chat {1e3 * (first_s - ready_s):.0f} ms, next ones {1e3 * each_s:.2f} ms, {memory}"
    )
    renderer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
