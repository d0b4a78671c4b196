"""What can go wrong with a hub, as sentences with a next step."""

import errno
from pathlib import Path
from urllib.parse import urlsplit

from toolkit.errors import CheckpointError

LOG_IN = "log in with: hf auth login"


def explain(error: Exception, reference: str, cache: Path) -> CheckpointError:
    """A CheckpointError for what huggingface_hub raised about owner/name@revision.

    In our own words: the hub's may repeat what was sent to it, such as a token.
    """
    from huggingface_hub import errors

    repository, _, revision = reference.partition("@")
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(
            f"{reference}: no such folder here, and no name that a hub can have",
            advice="give a folder, or a Hugging Face id such as owner/name@revision",
        )
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{repository}: this repository is gated: its owner asks for consent to terms",
            advice=f"accept them on the model's page at {host()}, then {LOG_IN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{repository}: no revision {revision!r}",
            advice="give a branch, a tag or a commit of 40 digits, or leave it out for main",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{repository}: no such folder here, and no such repository at {host()}",
            advice=f"check the name; if the repository is private, {LOG_IN}",
        )
    if is_unreachable(error):
        return CheckpointError(
            f"{reference}: no such folder here; {host()} cannot be reached "
            f"({_reason(error)}), and {cache} has no complete copy",
            advice="check the network and run the same command again; it goes on where it ended",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error.response.status_code, repository)
    if isinstance(error, OSError):
        return _explain_disk(error, cache)
    return CheckpointError(
        f"{host()}: the answer is not a hub's ({type(error).__name__})",
        advice="check HF_ENDPOINT, and whether a proxy or a log-in page answers instead",
    )


def _reason(error: Exception) -> str:
    """The shortest true reason: an HTTP status, or the kind of the error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"HTTP {status}" if status else type(error).__name__


def _explain_status(status: int, repository: str) -> CheckpointError:
    where = f"{host()}: {repository}"
    if status in (401, 403):
        return CheckpointError(f"{where}: access refused (HTTP {status})", advice=LOG_IN)
    advice = "wait a little and run the same command again" if status == 429 else ""
    return CheckpointError(f"{where}: answered with HTTP {status}", advice=advice)


def _explain_disk(error: OSError, cache: Path) -> CheckpointError:
    reason = error.strerror or type(error).__name__
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1), errno.EFBIG):
        return CheckpointError(
            f"{cache}: the disk is full ({reason})",
            advice="free space, or let HF_HOME name a folder on a larger disk; "
            "the same command goes on where it ended",
        )
    return CheckpointError(f"{error.filename or cache}: cannot be written or read: {reason}")


def is_unreachable(error: Exception) -> bool:
    """True when the hub gave no answer, or none that is about the question."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code >= 500
    offline = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    return isinstance(error, offline) or is_network_error(error)


def is_network_error(error: BaseException) -> bool:
    """True when no answer came: no route, no name, refused, cut, timed out."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    return isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)


def host() -> str:
    """The hub's name; never the user or password that HF_ENDPOINT may carry."""
    from huggingface_hub.constants import ENDPOINT

    return urlsplit(ENDPOINT).netloc.rpartition("@")[2]
