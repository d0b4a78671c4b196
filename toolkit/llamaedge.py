"""A GGUF artifact in LlamaEdge: its start script is in the artifact, its API is tested here."""

from pathlib import Path

from toolkit.artifact import Manifest, Smoke, read_manifest
from toolkit.device import Device
from toolkit.endpoint import Endpoint, chat
from toolkit.errors import ArtifactError, SmokeError
from toolkit.formats.gguf.llamaedge import SCRIPT
from toolkit.report import Report
from toolkit.smoke import ANSWER_TIMEOUT_S, Answer, check_answer, quote
from toolkit.ssh.embedded import running
from toolkit.ssh.tunnel import LOOPBACK, tunneling

PORT = 8080


def check_start(manifest: Manifest) -> str:
    """The start script's path in the artifact; ArtifactError when it has none."""
    if any(file.path == SCRIPT for file in manifest.files):
        return SCRIPT
    raise ArtifactError(
        f"{manifest.name}: no {SCRIPT} in it; LlamaEdge runs GGUF artifacts of phiship's own",
        advice="build one with a recipe of the format gguf: phiship list",
    )


def check_server(
    base_url: str, device: str, manifest: Manifest, report: Report, *, smoke: Smoke | None = None
) -> Answer:
    """Ask a running LlamaEdge at `base_url` (ends in /v1) the artifact's question.

    UnreachableError or RunnerError when it does not answer, SmokeError when the answer is wrong or
    does not stop. LlamaEdge puts a system prompt of its own in front.
    """
    question = smoke or manifest.smoke
    if question is None:
        raise ArtifactError(
            f"{manifest.name}: its manifest has no smoke test",
            advice="give a question and a part of its answer: --prompt TEXT --expect TEXT",
        )
    with report.step("smoke test", limit=f"contains {quote(question.expect)}") as step:
        answer = _ask(Endpoint(base_url, manifest.name), question)
        step.measured = f"{quote(question.prompt)}: {quote(answer.text)}"
        check_answer(device, answer, question)
        if leaked := [text for text in manifest.chat.stop_texts if text in answer.text]:
            raise SmokeError(
                f"{device}: LlamaEdge did not stop at {leaked[0]}: it answered "
                f"{quote(answer.text)}",
                advice=f"start it with {SCRIPT} of the artifact",
            )
    return answer


def check_on_device(
    artifact: Path, device: Device, report: Report, *, smoke: Smoke | None = None, port: int = PORT
) -> Answer:
    """As `check_server`, for the LlamaEdge at a port of the device's loopback, through SSH."""
    manifest = read_manifest(artifact)
    check_start(manifest)
    with running(device) as started, tunneling(started, port) as local_port:
        base_url = f"http://{LOOPBACK}:{local_port}/v1"
        return check_server(base_url, started.name, manifest, report, smoke=smoke)


def _ask(endpoint: Endpoint, smoke: Smoke) -> Answer:
    messages = [{"role": "user", "content": smoke.prompt}]
    reply = chat(endpoint, messages, max_tokens=smoke.max_tokens, timeout_s=ANSWER_TIMEOUT_S)
    new_tokens = reply.completion_tokens or 0
    return Answer(
        text=reply.text,
        prompt_tokens=reply.prompt_tokens or 0,
        new_tokens=new_tokens,
        tokens_per_second=new_tokens / reply.seconds if reply.seconds else 0.0,
        first_token_seconds=reply.first_text_seconds or 0.0,
        load_seconds=0.0,
        peak_memory_bytes=0,
        provider="",
        engine="LlamaEdge",
        stop_reason=reply.finish_reason,
        token_ids=(),
    )
