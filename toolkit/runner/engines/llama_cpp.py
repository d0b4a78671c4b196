"""GGUF artifacts through llama.cpp, in the wheel `xllamacpp`.

The wheel's Python interface offers a server only. It runs inside this process on a loopback port,
with a key made for this run, so that no other user of the device can speak to it.
"""

from __future__ import annotations

import http.client
import json
import secrets
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..failure import Failure
from ..settings import GREEDY, Sampling, Settings

PACKAGE = "xllamacpp"
MODULE = "xllamacpp"
# What the name of a ggml device starts with when the provider is there; a CPU always is.
PROVIDERS = {"cpu": "CPU", "cuda": "CUDA", "metal": "Metal", "vulkan": "Vulkan"}
OFFERED: dict[str, tuple[int, ...]] = {}
ALL_LAYERS = 9999
REQUEST_TIMEOUT_S = 1800


class Model:
    """A GGUF file behind a server in this process."""

    def __init__(self, llama: Any, params: Any, provider: str) -> None:
        self.version = str(llama.__version__)
        self.provider = provider
        self._key = secrets.token_hex(16)
        self._has_begun = False
        params.api_keys = [self._key]
        try:
            self._server = llama.Server(params)
        except RuntimeError as error:
            raise Failure(
                "model", f"llama.cpp could not load {params.model.path}: {error}"
            ) from None
        address = urllib.parse.urlparse(self._server.listening_address)
        self._host, self._port = str(address.hostname), address.port

    def encode(self, text: str) -> list[int]:
        """Return token ids; the tokenizer parses special tokens and adds none."""
        request = {"content": text, "add_special": False, "parse_special": True}
        with self._post("/tokenize", request) as response:
            return [int(token) for token in json.load(response)["tokens"]]

    def generate(
        self, prompt_ids: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[tuple[int, str]]:
        """Yield up to `new_tokens` (token id, text) pairs, greedily."""
        request = {
            "prompt": list(prompt_ids),
            "n_predict": new_tokens,
            "temperature": 0,
            "samplers": ["temperature"],  # nothing but the argmax
            "cache_prompt": False,
            "return_tokens": True,
            "stream": True,
        }
        with self._post("/completion", request) as response:
            self._has_begun = True
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                chunk = json.loads(line[len(b"data: ") :])
                if chunk["stop"]:
                    return
                # A piece of a character has a token but no text yet.
                tokens = chunk["tokens"]
                for position, token in enumerate(tokens):
                    yield int(token), chunk["content"] if position == len(tokens) - 1 else ""

    def close(self) -> None:
        """Stop the server and free its memory.

        Closing one whose loop has not begun can hang for ever, so a token is made first.
        """
        if not self._has_begun:
            list(self.generate([0], 1))
        del self._server

    def _post(self, path: str, request: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=REQUEST_TIMEOUT_S)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        connection.request("POST", path, json.dumps(request).encode(), headers)
        response = connection.getresponse()
        if response.status != 200:
            body = response.read(2000).decode("utf-8", "replace")
            raise Failure("engine", f"llama.cpp refused {path}: HTTP {response.status}: {body}")
        return response


def load(folder: Path, main_file: str, provider: str, settings: Settings) -> Model:
    """Load a GGUF file for `context_tokens`; Failure when the provider is not active."""
    import xllamacpp as llama  # type: ignore[import-not-found,unused-ignore]

    _check_provider([device["name"] for device in llama.get_device_info()], provider)
    params = llama.CommonParams()
    params.model.path = str(folder / main_file)
    params.n_ctx = settings.context_tokens
    params.n_parallel = 1
    params.n_gpu_layers = 0 if provider == "cpu" else ALL_LAYERS
    params.fit_params = False  # would shrink the context or the offload silently
    params.cache_ram_mib = 0  # a cache of earlier prompts is memory for nothing here
    params.warmup = False
    params.n_threads_http = 1
    params.endpoint_slots = False
    params.ui = False
    params.verbosity = -1
    return Model(llama, params, provider)


def _check_provider(devices: list[str], asked: str) -> None:
    if asked not in PROVIDERS:
        raise Failure("provider", f"provider {asked!r} is unknown; allowed: {', '.join(PROVIDERS)}")
    if not any(device.startswith(PROVIDERS[asked]) for device in devices):
        raise Failure(
            "provider",
            f"the artifact asks for provider {asked}; llama.cpp has only {', '.join(devices)} here",
            "install the xllamacpp build that brings this provider",
        )
