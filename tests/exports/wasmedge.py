"""Stands in for wasmedge with llama-api-server.wasm: the same command line, the same API, strictly.

Options are those of llama-api-server/src/main.rs of LlamaEdge, chats are rendered as Phi3ChatPrompt
of its chat-prompts does, with its system prompt; answers come from the weights in llama.cpp.
"""

import argparse
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from toolkit.runner.engines import llama_cpp
from toolkit.runner.settings import Settings

SYSTEM = "<|system|>\nYou are a friendly chatbot.<|end|>"
FIELDS = {
    "model", "messages", "temperature", "top_p", "n", "stream", "stream_options", "stop",
    "max_completion_tokens", "presence_penalty", "frequency_penalty", "logit_bias", "user",
    "response_format", "tools", "tool_choice",
}  # fmt: skip
# Known to clients, not to LlamaEdge, which passes over what it does not know.
PASSED_OVER = {"max_tokens", "seed"}
LONGEST_ANSWER = 400


def read_arguments() -> argparse.Namespace:
    """The command line of both programs; an unknown option ends it."""
    outer = argparse.ArgumentParser(allow_abbrev=False)
    outer.add_argument("--dir", required=True)
    outer.add_argument("--nn-preload", required=True)
    outer.add_argument("wasm", type=Path)
    outer.add_argument("rest", nargs=argparse.REMAINDER)
    given = outer.parse_args()
    inner = argparse.ArgumentParser(allow_abbrev=False)
    inner.add_argument("--prompt-template", choices=["phi-3-chat"], required=True)
    inner.add_argument("--ctx-size", type=int, required=True)
    inner.add_argument("--model-name", required=True)
    inner.add_argument("--repeat-penalty", type=float, default=1.1)
    inner.add_argument("--threads", type=int, default=2)
    inner.add_argument("--socket-addr", required=True)
    return inner.parse_args(given.rest, given)


def render(messages: list[dict[str, str]]) -> str:
    """Phi3ChatPrompt::build."""
    first, text = messages[0], ""
    system = f"<|system|>\n{first['content']}<|end|>" if first["role"] == "system" else SYSTEM
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role == "user":
            text = f"{text.strip() or system}\n<|user|>\n{content}<|end|>"
        elif role == "assistant":
            text = f"{text.strip()}\n<|assistant|>\n{content}<|end|>"
    return f"{text}\n<|assistant|>"


class Handler(BaseHTTPRequestHandler):
    """POST /v1/chat/completions, GET /v1/models."""

    arguments: argparse.Namespace
    model: Any

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        model = {"id": self.arguments.model_name, "object": "model", "created": 0, "owned_by": "-"}
        self._answer(200 if self.path == "/v1/models" else 404, {"data": [model]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        unknown = set(request) - FIELDS - PASSED_OVER
        if self.path != "/v1/chat/completions" or unknown or request["messages"] == []:
            return self._answer(400, {"error": f"not in the contract: {self.path} {request}"})
        if request["model"] != self.arguments.model_name:
            return self._answer(500, {"error": "There is no model available in the chat graphs."})
        ids = self.model.encode(render(request["messages"]))
        count = request.get("max_completion_tokens", LONGEST_ANSWER)
        texts = [text for _, text in self.model.generate(ids, count)]
        message = {"role": "assistant", "content": "".join(texts).strip().removesuffix("<|end|>")}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(texts)}
        usage["total_tokens"] = sum(usage.values())
        return self._answer(
            200,
            {
                "id": "chatcmpl-1", "object": "chat.completion", "created": 0,
                "model": request["model"], "choices": [choice], "usage": usage,
            },
        )  # fmt: skip

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until killed; the first line of output is the port."""
    arguments = read_arguments()
    name, encoding, target, weights = arguments.nn_preload.split(":")
    if (name, encoding, target) != ("default", "GGML", "AUTO") or not arguments.wasm.is_file():
        sys.exit(f"not in the contract: {sys.argv}")
    host, port = arguments.socket_addr.rsplit(":", 1)
    settings = Settings(context_tokens=arguments.ctx_size)
    Handler.arguments = arguments
    Handler.model = llama_cpp.load(Path.cwd(), weights, "cpu", settings)
    server = HTTPServer((host, int(port)), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
