"""A GGUF artifact in LlamaEdge: pushed like any other, started by its own script, asked by HTTP."""

from dataclasses import replace
from pathlib import Path

from toolkit.artifact import Manifest, Smoke, read_manifest
from toolkit.console import Console
from toolkit.deploy import Push, deploy
from toolkit.device import Device
from toolkit.endpoint import Endpoint, chat
from toolkit.errors import ArtifactError, RunnerError, SmokeError, UnreachableError
from toolkit.formats.gguf.llamaedge import SCRIPT, choose_template
from toolkit.remote import read_remote_manifest
from toolkit.report import Report
from toolkit.smoke import ANSWER_TIMEOUT_S, Answer, quote
from toolkit.ssh.session import Session
from toolkit.ssh.tunnel import LOOPBACK, tunneling

ADDRESS_VARIABLE = "LLAMAEDGE_ADDRESS"
SERVER_VARIABLE = "LLAMAEDGE_SERVER"


def deploy_to_llamaedge(
    artifact: Path, device: Device, console: Console, push: Push, report: Report
) -> None:
    """As `deploy`, for a device that has wasmedge and LlamaEdge's server: that one is asked.

    Raises what `deploy` raises; ArtifactError for an artifact without a start script.
    """
    check_start(artifact, read_manifest(artifact))
    deploy(artifact, device, console, replace(push, has_engine=True, ask=ask_there), report=report)


def check_start(artifact: Path, manifest: Manifest) -> None:
    """Raise ArtifactError unless the artifact has LlamaEdge's start script, for its own chat."""
    if not any(file.path == SCRIPT for file in manifest.files):
        raise ArtifactError(
            f"{manifest.name}: no {SCRIPT} in it; LlamaEdge runs GGUF artifacts of phiship's own",
            advice="build one with a recipe of the format gguf: phiship list",
        )
    template = choose_template(manifest.chat)
    if f"--prompt-template {template} " not in (artifact / SCRIPT).read_text(encoding="utf-8"):
        raise ArtifactError(
            f"{manifest.name}: its {SCRIPT} names another chat template than {template}, which is "
            "the nearest to the model's",
            advice="build the artifact again, or use --runtime ollama, or phiship's own",
        )


def ask_there(session: Session, release: str, smoke: Smoke) -> Answer:
    """Start a release's script on the device and ask what it serves; it ends with the session."""
    manifest, device = read_remote_manifest(session, release), session.device
    told = session.call(
        "start_script", release=release, script=SCRIPT, address_variable=ADDRESS_VARIABLE,
        ready_path="/v1/models", environment={SERVER_VARIABLE: device.llamaedge_server},
    )  # fmt: skip
    try:
        with tunneling(device, told["port"]) as port:
            return ask_server(f"http://{LOOPBACK}:{port}/v1", device.name, manifest, smoke)
    except UnreachableError as error:
        session.call("serving")  # raises when not LlamaEdge but the device is lost
        raise RunnerError(
            f"{device.name}: LlamaEdge ended while it was asked: {error}",
            advice=f"see why: phiship logs {device.name}",
        ) from error


def ask_server(base_url: str, device: str, manifest: Manifest, smoke: Smoke) -> Answer:
    """Ask a running LlamaEdge at `base_url` (ends in /v1) a question.

    UnreachableError or RunnerError when it does not answer, SmokeError when the answer does not
    stop. LlamaEdge puts a system prompt of its own in front.
    """
    answer = _ask(Endpoint(base_url, manifest.name), smoke)
    if leaked := [text for text in manifest.chat.stop_texts if text in answer.text]:
        raise SmokeError(
            f"{device}: LlamaEdge did not stop at {leaked[0]}: it answered {quote(answer.text)}",
            advice=f"start it with {SCRIPT} of the artifact",
        )
    return answer


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
        provider="cpu",
        engine="LlamaEdge",
        stop_reason=reply.finish_reason,
        token_ids=(),
    )
