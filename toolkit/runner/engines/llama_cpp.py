"""GGUF artifacts through llama.cpp: the wheel `xllamacpp`, or else a `llama-server` on the device.

The wheel's Python interface offers a server only. It runs inside this process; the program runs as
a child. Both listen on a loopback port with a key made for this run, so that no other user of the
device can speak to them.

Which samplers take part is said with each request (`samplers` in the server's README), so that
top_k 40, min_p 0.05 and the penalties, which are llama.cpp's defaults, do not.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import os
import secrets
import urllib.parse
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..failure import Failure
from ..settings import GREEDY, Sampling, Settings, check_offered
from . import _llama_server
from ._llama_server import ChildServer, Program, find_program
from ._sampling import choose_seed

PACKAGE = "xllamacpp"
MODULE = "xllamacpp"
# What the name of a ggml device starts with when the provider is there; a CPU always is.
PROVIDERS = {"cpu": "CPU", "cuda": "CUDA", "metal": "Metal", "vulkan": "Vulkan"}
CACHE_TYPES = {8: "q8_0", 16: "f16"}
OFFERED: dict[str, tuple[int, ...]] = {
    "threads": (),
    "kv_bits": tuple(CACHE_TYPES),
    "batch_tokens": (),
}
LOWEST_BATCH_TOKENS = 2  # with one, llama.cpp's server aborts the process at the first prompt
ALL_LAYERS = 9999
HTTP_THREADS = 2  # one answers; the next prompt is encoded beside it
# Its server tries out the template of the file, and ends on one that its own Jinja cannot read;
# chats are rendered here, so it is given one that it knows.
CHAT_TEMPLATE = "chatml"
REQUEST_TIMEOUT_S = 1800


class Server(Protocol):
    """A server of llama.cpp's that is up."""

    version: str
    host: str
    port: int
    key: str

    def explain(self) -> str:
        """Return why it does not answer any more, if known."""

    def close(self) -> None:
        """Stop it and free its memory."""


class Model:
    """A GGUF file behind a server."""

    def __init__(self, server: Server, provider: str) -> None:
        self._server = server
        self._has_begun = False
        self.version = server.version
        self.provider = provider
        self.reused_tokens = 0

    def encode(self, text: str) -> list[int]:
        """Return token ids; the tokenizer parses special tokens and adds none."""
        request = {"content": text, "add_special": False, "parse_special": True}
        with self._posting("/tokenize", request) as response:
            return [int(token) for token in json.load(response)["tokens"]]

    def generate(
        self, prompt_ids: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY
    ) -> Generator[tuple[int, str], None, None]:
        """Yield up to `new_tokens` (token id, text) pairs."""
        request = {
            "prompt": list(prompt_ids),
            "n_predict": new_tokens,
            "cache_prompt": True,
            "return_tokens": True,
            "stream": True,
            **_describe_sampling(sampling),
        }
        self.reused_tokens = 0  # it tells when the answer is whole
        with self._posting("/completion", request) as response:
            self._has_begun = True
            for chunk in _read_chunks(response):
                if chunk["stop"]:
                    self.reused_tokens = int(chunk.get("timings", {}).get("cache_n", 0))
                    return
                # A piece of a character has a token but no text yet.
                tokens = chunk["tokens"]
                for position, token in enumerate(tokens):
                    yield int(token), chunk["content"] if position == len(tokens) - 1 else ""
            raise ConnectionError("the answer has no end")

    def close(self) -> None:
        """Stop the server and free its memory.

        Closing one whose loop has not begun can hang for ever, so a token is made first.
        """
        if not self._has_begun and isinstance(self._server, _OwnServer):
            list(self.generate([0], 1))
        self._server.close()

    @contextlib.contextmanager
    def _posting(self, path: str, request: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """Post a request; leaving the block ends the connection, and what is done for it."""
        server = self._server
        connection = http.client.HTTPConnection(server.host, server.port, timeout=REQUEST_TIMEOUT_S)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
        try:
            connection.request("POST", path, json.dumps(request).encode(), headers)
            response = connection.getresponse()
            if response.status != 200:
                body = response.read(2000).decode("utf-8", "replace")
                raise Failure("engine", f"llama.cpp refused {path}: HTTP {response.status}: {body}")
            yield response
        except (OSError, http.client.HTTPException) as error:
            words = server.explain()
            raise Failure("engine", f"llama.cpp broke off {path}: {error!r} {words}") from None
        finally:
            connection.close()


class _OwnServer:
    """The wheel's server, inside this process."""

    def __init__(self, llama: Any, params: Any) -> None:
        self.version = str(llama.__version__)
        self.key = secrets.token_hex(16)
        params.api_keys = [self.key]
        try:
            self._server = llama.Server(params)
        except RuntimeError as error:
            path = params.model.path
            raise Failure("model", f"llama.cpp could not load {path}: {error}") from None
        address = urllib.parse.urlparse(self._server.listening_address)
        self.host, self.port = str(address.hostname), int(address.port or 0)

    def explain(self) -> str:
        return ""

    def close(self) -> None:
        del self._server


def import_runtime() -> None:
    """Import the wheel, or find a llama-server that fits; ImportError when there is neither."""
    _find_runtime()


def describe_program() -> str:
    """Return the name and build of the llama-server in place of the wheel; ImportError without."""
    return f"{_llama_server.PROGRAM} b{find_program().build}"


def load(
    folder: Path, main_file: str, provider: str, settings: Settings, has_tokenizer: bool = True
) -> Model:
    """Load a GGUF file for `context_tokens`; Failure when the provider is not active."""
    del has_tokenizer  # llama.cpp does not load a file without
    check_offered("llama.cpp", settings, OFFERED)
    if provider not in PROVIDERS:
        raise Failure(
            "provider", f"provider {provider!r} is unknown; allowed: {', '.join(PROVIDERS)}"
        )
    if settings.batch_tokens and settings.batch_tokens < LOWEST_BATCH_TOKENS:
        found = f"batch_tokens is {settings.batch_tokens}"
        raise Failure("settings", f"llama.cpp: {found}; the lowest is {LOWEST_BATCH_TOKENS}")
    runtime = _find_runtime()
    if isinstance(runtime, Program):
        _check_provider(["CPU", *runtime.devices], provider)
        options = choose_options(folder / main_file, provider, settings)
        return Model(ChildServer(runtime, options), provider)
    _check_provider([device["name"] for device in runtime.get_device_info()], provider)
    params = choose_params(runtime, folder / main_file, provider, settings)
    return Model(_OwnServer(runtime, params), provider)


def choose_params(llama: Any, path: Path, provider: str, settings: Settings) -> Any:
    """Return what the wheel's server is made with."""
    params = llama.CommonParams()
    params.model.path = str(path)
    params.n_ctx = settings.context_tokens
    params.n_parallel = 1
    params.n_gpu_layers = 0 if provider == "cpu" else ALL_LAYERS
    params.fit_params = False  # would shrink the context or the offload silently
    params.cache_ram_mib = 0  # a cache of earlier prompts is memory for nothing here
    params.n_ctx_checkpoints = 0  # copies of the cache, likewise
    params.warmup = False
    params.n_threads_http = HTTP_THREADS
    params.endpoint_slots = False
    params.ui = False
    params.verbosity = -1
    params.chat_template = CHAT_TEMPLATE
    if settings.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads
    if settings.batch_tokens:
        params.n_batch = params.n_ubatch = settings.batch_tokens
    if settings.kv_bits:
        name = f"GGML_TYPE_{CACHE_TYPES[settings.kv_bits].upper()}"
        params.cache_type_k = params.cache_type_v = getattr(llama.ggml_type, name)
    return params


def choose_options(path: Path, provider: str, settings: Settings) -> dict[str, object]:
    """Return the same for the program, by the names of its environment variables."""
    options: dict[str, object] = {
        "MODEL": path,
        "CTX_SIZE": settings.context_tokens,
        "N_PARALLEL": 1,
        "N_GPU_LAYERS": 0 if provider == "cpu" else ALL_LAYERS,
        "FIT": "off",
        "CACHE_RAM": 0,
        "CTX_CHECKPOINTS": 0,
        "THREADS_HTTP": HTTP_THREADS,
        "CHAT_TEMPLATE": CHAT_TEMPLATE,
        "ENDPOINT_SLOTS": 0,
        "UI": 0,
        "NO_WEBUI": 1,  # its name before
        "OFFLINE": 1,
    }
    if provider == "cpu":
        options["DEVICE"] = "none"
    if settings.threads:
        options["THREADS"] = settings.threads
    if settings.batch_tokens:
        options["BATCH"] = options["UBATCH"] = settings.batch_tokens
    if settings.kv_bits:
        options["CACHE_TYPE_K"] = options["CACHE_TYPE_V"] = CACHE_TYPES[settings.kv_bits]
    return options


def _find_runtime() -> Any:
    """Return the wheel's module or a Program; a program that is named goes first."""
    if os.environ.get(_llama_server.VARIABLE):
        return find_program()
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        missing = error
    try:
        return find_program()
    except ImportError as error:
        raise ImportError(f"{missing}; nor is there another llama.cpp: {error}") from None


def _describe_sampling(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature <= 0:
        return {"temperature": 0, "samplers": ["temperature"]}  # nothing but the argmax
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": choose_seed(sampling),
        "samplers": ["temperature", "top_p"],
    }


def _read_chunks(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the objects of a stream of events; Failure when one is an error."""
    for line in response:
        if not line.startswith((b"data: {", b"error: {")):
            continue
        chunk: dict[str, Any] = json.loads(line.partition(b": ")[2])
        if "stop" not in chunk:
            raise Failure("engine", f"llama.cpp failed: {chunk.get('error', chunk)}")
        yield chunk


def _check_provider(devices: list[str], asked: str) -> None:
    if not any(device.startswith(PROVIDERS[asked]) for device in devices):
        raise Failure(
            "provider",
            f"the artifact asks for provider {asked}; llama.cpp has only {', '.join(devices)} here",
            "install the xllamacpp build that brings this provider",
        )
