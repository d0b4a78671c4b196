"""Chats over real HTTP connections, with everything a server may say instead of an answer."""

import datetime
import email.utils
import itertools
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest

from tests.measuring.chat_server import Said, reply, serving, stream
from toolkit import endpoint as endpoints
from toolkit.endpoint import Endpoint, chat, stream_chat
from toolkit.errors import PhishipError, RunnerError, SettingsError, UnreachableError
from toolkit.measuring.sides import add_key, parse_endpoint
from toolkit.place import LocalPlace

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
KEY = "sk-very-secret-0123456789"


def ask(endpoint: Endpoint, **options: float) -> endpoints.Reply:
    return chat(endpoint, MESSAGES, max_tokens=16, timeout_s=options.get("timeout_s", 20))


def test_chat_asks_as_openai_says_and_reads_the_answer() -> None:
    with serving(lambda _: reply("Paris.", usage=(11, 2))) as server:
        answer = chat(server.endpoint("phi-3", KEY), MESSAGES, max_tokens=16, seed=5, timeout_s=20)
    assert (answer.text, answer.finish_reason) == ("Paris.", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (11, 2)
    assert 0 < answer.seconds < 20
    asked = server.asked[0]
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["Authorization"] == f"Bearer {KEY}"
    assert asked.body == {
        "model": "phi-3", "messages": MESSAGES, "max_tokens": 16, "temperature": 0.0, "seed": 5,
    }  # fmt: skip


def test_without_a_key_none_is_sent() -> None:
    with serving(lambda _: reply("x")) as server:
        ask(server.endpoint())
    assert "Authorization" not in server.asked[0].headers


def test_missing_usage_is_none_not_zero() -> None:
    with serving(lambda _: reply("x", usage=None)) as server:
        answer = ask(server.endpoint())
    assert (answer.prompt_tokens, answer.completion_tokens) == (None, None)


@pytest.mark.parametrize("suffix", ["", "/", "/chat/completions", "?api-version=2024-05-01"])
def test_ways_to_write_a_base_url(suffix: str) -> None:
    with serving(lambda _: reply("x")) as server:
        ask(Endpoint(server.base_url + suffix, "m"))
    query = suffix if suffix.startswith("?") else ""
    assert server.asked[0].path == "/v1/chat/completions" + query


def test_a_stream_comes_in_pieces_with_usage_at_the_end() -> None:
    pieces = ["Pa", "ris", " – größer\u2028"]
    taken: list[str] = []
    with serving(lambda _: stream(pieces, hold_s=0.01)) as server:
        answer = stream_chat(
            server.endpoint(), MESSAGES, max_tokens=16, timeout_s=20, take_text=taken.append
        )
    assert taken == pieces
    assert answer.text == "".join(pieces)
    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("stop", 5, 3)
    assert answer.first_text_seconds is not None
    assert 0 < answer.first_text_seconds < answer.seconds
    assert server.asked[0].body["stream_options"] == {"include_usage": True}


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    with serving(lambda _: stream(["Pa"], done=False)) as server, pytest.raises(RunnerError) as e:
        stream_chat(server.endpoint(), MESSAGES, max_tokens=1, timeout_s=9, take_text=len)
    assert "broke off" in str(e.value)


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (Said.json({"error": {"message": "bad key"}}, 401), UnreachableError, "bad key"),
        (Said.json({"error": {"message": "no such model"}}, 404), RunnerError, "no such model"),
        (Said.json({"message": "context is 4096"}, 400), RunnerError, "context is 4096"),
        (Said.json({"detail": "Authorization failed"}, 403), UnreachableError, "failed"),
        (Said(500, b"<html>oops \x1b[31m</html>"), RunnerError, "HTTP 500"),
        (Said(302, b"", {"Location": "http://127.0.0.1:1/elsewhere"}), RunnerError, "HTTP 302"),
        (Said(200, b"<html>login page</html>"), RunnerError, "login page"),
        (Said(200, b"[1]"), RunnerError, "no answer"),
        (Said(200, b'{"choices": []}'), RunnerError, "no answer"),
        (Said(200, b'{"choices": [{"message": null}]}'), RunnerError, "no answer"),
        (Said(200, b""), RunnerError, "no answer"),
        (Said(200, b"{}", {"Content-Length": "99"}), RunnerError, "broke off"),
    ],
)
def test_what_is_no_answer_is_one_sentence(
    said: Said, kind: type[PhishipError], words: str
) -> None:
    with serving(lambda _: said) as server, pytest.raises(kind) as error:
        ask(server.endpoint(key=KEY))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)
    assert len(server.asked) == 1


def test_a_server_that_repeats_the_key_does_not_bring_it_into_the_error() -> None:
    said = Said.json({"error": {"message": f"the key {KEY} is wrong"}}, 401)
    with serving(lambda _: said) as server, pytest.raises(UnreachableError) as error:
        ask(server.endpoint(key=KEY))
    assert KEY not in f"{error.value} {error.value.advice} {server.endpoint(key=KEY)}"
    assert "***" in str(error.value)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_after_the_time_it_names(status: int) -> None:
    times: list[float] = []

    def answer(_: object) -> Said:
        times.append(time.monotonic())
        return reply("Paris.") if len(times) == 3 else Said(status, b"", {"Retry-After": "0.2"})

    with serving(answer) as server:
        assert ask(server.endpoint()).text == "Paris."
    # 0.2 s is what the server asked for; a sleep never ends early.
    assert all(later - sooner >= 0.2 for sooner, later in itertools.pairwise(times))


def test_a_busy_server_may_name_a_date_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "WAIT_S", 0.01)
    past = email.utils.format_datetime(datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc))
    said = [Said(429, b"", {"Retry-After": past}), Said(429, b""), reply("Paris.")]
    with serving(lambda _: said.pop(0)) as server:
        assert ask(server.endpoint()).text == "Paris."


def test_a_limit_of_hours_is_not_waited_for() -> None:
    said = Said.json({"error": {"message": "daily limit"}}, 429, Retry_After="40000")
    with serving(lambda _: said) as server, pytest.raises(UnreachableError) as error:
        ask(server.endpoint())
    assert len(server.asked) == 1
    assert "40000" in error.value.advice


def test_tries_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "WAIT_S", 0.01)
    with serving(lambda _: Said(429, b"busy")) as server, pytest.raises(UnreachableError):
        ask(server.endpoint())
    assert len(server.asked) == endpoints.TRIES


def test_a_server_that_drips_is_left_when_the_time_is_over() -> None:
    said = stream(["x"] * 1000, hold_s=0.05)
    with serving(lambda _: said) as server, pytest.raises(UnreachableError) as error:
        stream_chat(server.endpoint(), MESSAGES, max_tokens=9, timeout_s=0.5, take_text=len)
    assert "0.5 s" in str(error.value)


def test_a_server_that_says_nothing_is_left_when_the_time_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        silent = Endpoint(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", "m")
        with pytest.raises(UnreachableError, match="within"):
            ask(silent, timeout_s=0.3)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(UnreachableError, match="refused"):
        ask(Endpoint(f"http://127.0.0.1:{port}/v1", "m"))


def test_a_huge_body_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "BODY_BYTES", 1 << 20)
    said = Said(200, [b"x" * (1 << 18)] * 64)
    with serving(lambda _: said) as server, pytest.raises(RunnerError, match="more than"):
        ask(server.endpoint())


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(write_certificate(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def accept() -> None:
            try:
                with plain.accept()[0] as one, context.wrap_socket(one, server_side=True):
                    pass
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        with pytest.raises(UnreachableError, match=r"(?i)certificate"):
            ask(Endpoint(f"https://127.0.0.1:{plain.getsockname()[1]}/v1", "m", KEY))


def write_certificate(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name)
        .public_key(key.public_key()).serial_number(1).not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    )  # fmt: skip
    path = folder / "certificate.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + certificate.public_bytes(pem))
    return path


def test_endpoints_are_written_as_url_and_model() -> None:
    found = parse_endpoint("https://models.github.ai/inference#microsoft/phi-4")
    assert (found.base_url, found.model) == (
        "https://models.github.ai/inference",
        "microsoft/phi-4",
    )
    for text in ("https://host/v1", "ftp://host/v1#m", "host#m", "https://#m", ""):
        with pytest.raises(SettingsError, match="no endpoint"):
            parse_endpoint(text)
    with pytest.raises(SettingsError) as error:
        parse_endpoint("https://me:password@host/v1#m")
    assert "password@" not in str(error.value)


def test_a_key_comes_from_the_environment_and_goes_nowhere_unprotected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    assert add_key(Endpoint("https://host/v1", "m"), "SOME_KEY").key == KEY
    assert add_key(Endpoint("http://127.0.0.1:8080/v1", "m"), "SOME_KEY").key == KEY
    with pytest.raises(SettingsError, match="plain text"):
        add_key(Endpoint("http://host/v1", "m"), "SOME_KEY")
    with pytest.raises(SettingsError, match="OTHER_KEY"):
        add_key(Endpoint("https://host/v1", "m"), "OTHER_KEY")


@pytest.mark.parametrize(
    ("address", "key", "header"),
    [
        ("https://models.github.ai/inference", KEY, "Authorization"),
        ("https://integrate.api.nvidia.com/v1", KEY, "Authorization"),
        (
            "https://mine.services.ai.azure.com/models?api-version=2024-05-01-preview",
            KEY,
            "Api-key",
        ),
        ("https://mine.openai.azure.com/openai/v1", KEY, "Api-key"),
        ("https://mine.openai.azure.com/openai/v1", "eyJhbGciOi.x.y", "Authorization"),
        ("https://phi.eastus2.models.ai.azure.com/v1", KEY, "Authorization"),
    ],
)
def test_each_provider_gets_the_key_as_it_wants_it(address: str, key: str, header: str) -> None:
    request = endpoints._make_request(Endpoint(address, "m", key), {})
    assert key in request.headers[header]
    assert sum(key in value for value in request.headers.values()) == 1
    assert "/chat/completions" in request.full_url


def test_our_own_server_answers_whole_and_in_pieces(artifacts: dict[str, Path]) -> None:
    pieces: list[str] = []
    with LocalPlace(artifacts["onnx"]).serving() as endpoint:
        whole = ask(endpoint)
        streamed = stream_chat(
            endpoint, MESSAGES, max_tokens=16, timeout_s=60, take_text=pieces.append
        )
        with pytest.raises(RunnerError, match="HTTP 400"):
            chat(endpoint, MESSAGES, max_tokens=100_000, timeout_s=60)
    assert "Paris" in whole.text
    assert streamed.text == "".join(pieces) == whole.text
    assert (streamed.prompt_tokens, streamed.completion_tokens, streamed.finish_reason) == (
        whole.prompt_tokens, whole.completion_tokens, "stop",
    )  # fmt: skip
    assert len(pieces) > 1
    assert streamed.first_text_seconds is not None
    assert streamed.first_text_seconds < streamed.seconds
