"""Serving a model: here, or on a device with a tunnel to it; as a service when asked for."""

import base64
import json
import mimetypes
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from toolkit.console import Console, format_bytes
from toolkit.device import Device
from toolkit.endpoint import Endpoint, chat, stream_chat
from toolkit.errors import RunnerError, SettingsError, UnreachableError
from toolkit.place import LocalPlace, RemotePlace, build_command, explain_failure, open_place
from toolkit.remote import Service, read_service
from toolkit.runner.chatting import Message, TakeText, clean, converse
from toolkit.runner.failure import Failure
from toolkit.runner.images import (
    MOST_PICTURES,
    import_pillow,
    place_pictures,
    read_bytes,
    read_image,
)
from toolkit.runner.manifest import Vision
from toolkit.runner.serving.options import is_loopback
from toolkit.runner.serving.pictures import BODY_BYTES
from toolkit.ssh.embedded import running
from toolkit.ssh.session import Session, open_session
from toolkit.ssh.tunnel import LOOPBACK, tunneling

PORT = 8080
WATCH_S = 2.0
ANSWER_TIMEOUT_S = 3600
FIELDS_BYTES = 1024  # of a request, beside its messages


def run_here(text: str, arguments: Sequence[str]) -> NoReturn:
    """Become this machine's runner, on this terminal, so that Ctrl-C is for it alone."""
    place = LocalPlace(Path(text))
    os.execv(sys.executable, build_command(place.artifact, arguments))


def chat_with(
    text: str, *, system: str, max_tokens: int | None, temperature: float, seed: int | None,
    settings: Sequence[str], devices_file: Path | None,
) -> int:  # fmt: skip
    """Converse with the release in use on a device, whose server lasts as long."""
    with open_place(text, devices_file) as place, place.serving(settings) as endpoint:

        def ask(messages: list[Message], take_text: TakeText) -> None:
            asked = [{"role": role, "content": content} for role, content in messages]
            with explain_to_runner():
                stream_chat(
                    endpoint, asked, max_tokens=max_tokens, temperature=temperature, seed=seed,
                    timeout_s=ANSWER_TIMEOUT_S, take_text=take_text,
                )  # fmt: skip

        return converse(ask, f"{place.manifest.name} on {place.name}", system)


def answer_once(
    text: str, prompt: str, options: Sequence[str], console: Console, devices_file: Path | None
) -> None:
    """Ask an artifact or a device one question, and print the answer."""
    with open_place(text, devices_file) as place:
        answer = place.run(["generate", "--json", *options], prompt)
    console.event("answer", **answer)
    console.result(clean(answer["text"]))
    console.note(
        f"{answer['new_tokens']} tokens, {answer['tokens_per_second']:.1f} tokens/s, "
        f"loaded in {answer['load_seconds']:.1f} s, "
        f"peak memory {format_bytes(answer['peak_memory_bytes'])}, "
        f"{answer['engine']} on {answer['provider']}"
    )


def ask_about(
    text: str, prompt: str, images: Sequence[Path], console: Console, *, system: str,
    max_tokens: int | None, temperature: float, seed: int | None, settings: Sequence[str],
    devices_file: Path | None,
) -> None:  # fmt: skip
    """Ask the release in use on a device about pictures, through its server; print the answer.

    Raises RunnerError for a picture that the server would refuse, before anything is sent.
    """
    messages, sizes = _make_messages(text, prompt, images, system)
    with open_place(text, devices_file) as place:
        manifest = place.manifest
        if manifest.vision is None:
            raise RunnerError(
                f"{place.name}: the release in use there, {manifest.name}, reads no pictures",
                advice="deploy an artifact of a model that does",
            )
        with explain_failure(place.name):
            vision = Vision(**msgspec.structs.asdict(manifest.vision))
            list(place_pictures(sizes, vision, manifest.valid_context[1]))
        with ExitStack() as opened:
            with console.waiting(f"starting {manifest.name} on {place.name}"):
                endpoint = opened.enter_context(place.serving(settings))
            reply = chat(
                endpoint, messages, max_tokens=max_tokens, temperature=temperature, seed=seed,
                timeout_s=ANSWER_TIMEOUT_S,
            )  # fmt: skip
    console.event(
        "answer", text=reply.text, prompt_tokens=reply.prompt_tokens,
        new_tokens=reply.completion_tokens, stop_reason=reply.finish_reason, seconds=reply.seconds,
    )  # fmt: skip
    console.result(clean(reply.text))
    console.note(f"{reply.completion_tokens} tokens in {reply.seconds:.1f} s")


def _make_messages(
    name: str, prompt: str, images: Sequence[Path], system: str
) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """A question about pictures, no longer than a server takes, and their widths and heights."""
    parts, sizes = _read_pictures(name, images)
    content = [*parts, {"type": "text", "text": prompt}]
    before = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, Any]] = [*before, {"role": "user", "content": content}]
    if len(json.dumps(messages)) + FIELDS_BYTES > BODY_BYTES:
        raise RunnerError(
            f"{name}: pictures and prompt take more than the {BODY_BYTES:,} bytes that a request "
            "may have, where a picture takes four bytes for three of its file",
            advice="give fewer pictures, or smaller files",
        )
    return messages, sizes


def _read_pictures(
    name: str, paths: Sequence[Path]
) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """Parts of a message with files in data: URLs, and the pictures' widths and heights.

    RunnerError for what no server would take.
    """
    if len(paths) > MOST_PICTURES:
        raise RunnerError(f"{name}: {len(paths)} pictures; a question can have {MOST_PICTURES}")
    with explain_failure("this machine"):  # where it may be missing though the device has it
        import_pillow()
    parts, sizes = [], []
    for path in paths:
        with explain_failure(name):
            data = read_bytes(path, str(path))
            sizes.append(read_image(data, str(path)).size)
        kind = mimetypes.guess_type(path.name)[0] or ""
        kind = kind if kind.startswith("image/") else "image/unknown"  # a file's name is no proof
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts, sizes


def serve_device(device: Device, port: int, arguments: Sequence[str], console: Console) -> None:
    """Bring a device's server to a port of this machine, until interrupted or lost.

    Its service when that is active, else a server that ends with this command. Raises what
    `open_session` raises; RunnerError when nothing serves there; SettingsError for a taken port.
    """
    _check_port(port)
    with ExitStack() as opened:
        started = opened.enter_context(running(device))
        session = opened.enter_context(open_session(started))
        place, service = RemotePlace(session), read_service(session)
        if service.active and arguments:
            raise SettingsError(
                f"{device.name}: its service is active, and was installed with other settings",
                advice="leave them out here, or give them to: phiship serve DEVICE --install",
            )
        if service.active:
            tunnel = tunneling(started, service.port, port, service.address)
            local = opened.enter_context(tunnel)
            endpoint = Endpoint(f"http://{LOOPBACK}:{local}/v1", place.manifest.name)
        else:
            with console.waiting(f"starting {place.manifest.name} on {place.name}"):
                endpoint = opened.enter_context(place.serving(arguments, local_port=port))
        _tell(endpoint, service, console)
        with suppress(KeyboardInterrupt):
            while _is_there(session, service):
                time.sleep(WATCH_S)
            raise UnreachableError(
                f"{place.name}: its server has ended",
                advice=f"see why: phiship logs {place.name}",
            )


def _check_port(port: int) -> None:
    """Raise SettingsError for a port that is taken, before a device loads gigabytes for it."""
    try:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((LOOPBACK, port))
    except OSError as error:
        raise SettingsError(
            f"port {port} of this machine: {error.strerror}",
            advice="choose another with --port, or 0 for a free one",
        ) from None


def install_service(
    device: Device,
    port: int,
    host: str,
    token_variable: str | None,
    settings: Sequence[str],
    console: Console,
) -> None:
    """Have a device serve its release from now on, and after every boot.

    Raises SettingsError for a token that is not there, RunnerError without a release to serve.
    """
    token = _read_token(token_variable)
    if token is None and not is_loopback(host):
        raise SettingsError(
            f"host {host} can be reached by other machines, and there is no token",
            advice="put one into an environment variable and name it with --token-env",
        )
    with running(device) as started, open_session(started) as session:
        session.lock()
        place = RemotePlace(session)
        with console.waiting(f"starting {place.manifest.name} on {place.name}"):
            answer = session.call(
                "install_service", port=port, host=host, token=token, settings=list(settings)
            )
        service = msgspec.convert(answer, Service)
        linger = session.call("facts").get("linger")
    console.event("service", **msgspec.to_builtins(service))
    console.result(f"{place.name}: {service.name} answers on http://{service.host}:{service.port}")
    if linger is False:
        console.note(
            "it stops when its user logs out; to keep it, on the device: sudo loginctl "
            "enable-linger"
        )
    console.note(f"  from here: phiship serve {place.name}")


def remove_service(device: Device, console: Console) -> None:
    """Stop a device's service and remove it."""
    with running(device) as started, open_session(started) as session:
        session.lock()
        removed = session.call("remove_service")["removed"]
    console.event("service_removed", name=removed)
    console.result(f"{device.name}: {removed or 'no service'} is gone")


def _read_token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable)
    if not token:
        raise SettingsError(
            f"the environment variable {variable} holds no token",
            advice=f"put one there: export {variable}=...",
        )
    return token


def _is_there(session: Session, service: Service) -> bool:
    if service.active:
        return read_service(session).active
    return bool(session.call("serving")["running"])


def _tell(endpoint: Endpoint, service: Service, console: Console) -> None:
    console.event("serving", base_url=endpoint.base_url, model=endpoint.model)
    console.result(f"{endpoint.base_url}   model {endpoint.model}")
    if service.has_token:
        console.note("  it wants its token: Authorization: Bearer ...")
    console.note("  Ctrl-C ends")


@contextmanager
def explain_to_runner() -> Iterator[None]:
    """Turn our errors into the runner's, whose conversation goes on after them."""
    try:
        yield
    except RunnerError as error:
        raise Failure("request", str(error), error.advice) from error
