"""A checkpoint by reference: a local folder, or owner/name[@revision] of a Hugging Face hub.

Downloads go to huggingface_hub's own cache, in its layout, so that a model which is there already
is not fetched twice. HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and the token of `hf auth login` count.
"""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.checkpoint import CONFIG_FILES, MORE_TEMPLATES, TOKENIZER_FILES, Checkpoint
from toolkit.checkpoint.config import Config, read_config
from toolkit.checkpoint.download import RemoteFile, fetch
from toolkit.checkpoint.hub_errors import explain, host, is_unreachable
from toolkit.checkpoint.quantized import check_quantization
from toolkit.checkpoint.safetensors import INDEX, SINGLE, read_weight_map
from toolkit.console import Console, format_bytes
from toolkit.errors import CheckpointError, PhishipError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

SMALL_FILES = (*CONFIG_FILES, *TOKENIZER_FILES, INDEX)
MORE = re.compile(rf"{MORE_TEMPLATES}/[^/]+\.jinja")
REFERENCE = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>(?!.*\.\.)[\w][\w./-]*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ANSWER_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Reference:
    """A repository of the hub and the revision asked for: a branch, a tag or a commit."""

    repository: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Read owner/name[@revision]; CheckpointError for anything else."""
        found = REFERENCE.fullmatch(text)
        if not found:
            raise CheckpointError(
                f"{text}: no such folder, and not owner/name[@revision] either",
                advice="give a folder, or a Hugging Face id such as owner/name@revision",
            )
        return cls(found["repository"], found["revision"] or "main")

    @property
    def is_pinned(self) -> bool:
        """True when the revision is a commit, which never changes."""
        return bool(COMMIT.fullmatch(self.revision))


def resolve(
    reference: str,
    console: Console,
    *,
    cache: Path | None = None,
    accept: Callable[[Config], object] | None = None,
) -> Checkpoint:
    """Open a local folder, or download what is missing of owner/name[@revision] and open that.

    What exists, or starts like a path, is a folder. `cache` is huggingface_hub's by default.
    `accept` sees the config before any weight is fetched; what it raises ends the download.
    Interrupted, the next call goes on where this one ended. CheckpointError says what is wrong.
    """
    if is_local(reference):
        checkpoint = Checkpoint.open(Path(reference).expanduser())
        if accept:
            accept(checkpoint.config)
        return checkpoint
    wanted = Reference.parse(reference)
    if cache is None:
        from huggingface_hub.constants import HF_HUB_CACHE

        cache = Path(HF_HUB_CACHE)
    try:
        return _Download(wanted, cache, console).open(accept)
    except PhishipError:
        raise
    except Exception as error:
        raise explain(error, f"{wanted.repository}@{wanted.revision}", cache) from error


def is_local(reference: str) -> bool:
    """True for what exists, or starts with ./ ../ / or ~."""
    path = Path(reference)
    looks_local = reference.startswith((".", "~")) or path.is_absolute()
    return looks_local or (bool(reference) and path.exists())


@dataclass(frozen=True)
class _Download:
    """One reference on its way to a folder of the cache."""

    wanted: Reference
    cache: Path
    console: Console

    def open(self, accept: Callable[[Config], object] | None) -> Checkpoint:
        """Resolve, download, open; from the cache alone when the hub cannot be reached."""
        from huggingface_hub import HfApi

        repository, revision = self.wanted.repository, self.wanted.revision
        try:
            info = HfApi().model_info(
                repository, revision=revision, files_metadata=True, timeout=ANSWER_TIMEOUT_S
            )
        except Exception as error:
            if not is_unreachable(error):
                raise
            return self._open_cached(error, accept)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        commit = str(info.sha)
        if not COMMIT.fullmatch(commit):
            raise ValueError("no commit")
        self._tell(commit)
        _require_checkpoint(repository, siblings)
        small = [name for name in siblings if name in SMALL_FILES or MORE.fullmatch(name)]
        folder = self._fetch_small(commit, small)
        config = read_config(folder / "config.json")
        check_quantization(config)
        if accept:
            accept(config)
        weights = _weight_files(repository, folder, siblings)
        self._fetch_weights(commit, [siblings[name] for name in weights])
        self._fetch_small(commit, [*small, *weights])
        self._remember(commit)
        return Checkpoint.open(folder, commit)

    def _tell(self, commit: str) -> None:
        self.console.event("resolved", repository=self.wanted.repository, revision=commit)
        if not self.wanted.is_pinned:
            pinned = f"{self.wanted.repository}@{commit}"
            self.console.note(f"{self.wanted.revision} is {commit} now; to pin it: {pinned}")

    def _open_cached(
        self, error: Exception, accept: Callable[[Config], object] | None
    ) -> Checkpoint:
        """Open what the cache has; `error` again when that is not all of it."""
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    self.wanted.repository,
                    revision=self.wanted.revision,
                    cache_dir=self.cache,
                    local_files_only=True,
                    allow_patterns=[*SMALL_FILES, f"{MORE_TEMPLATES}/*.jinja", SINGLE],
                )
            )
            checkpoint = Checkpoint.open(folder, folder.name)
        except (OSError, CheckpointError):
            raise error from None
        self.console.note(f"{host()} cannot be reached; going on with what was downloaded before")
        self._tell(folder.name)
        if accept:
            accept(checkpoint.config)
        return checkpoint

    def _fetch_small(self, commit: str, names: Sequence[str]) -> Path:
        """Let huggingface_hub fetch files whole; those whose blob is there it only links."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()  # Ours shows the weights, which take all the time.
        return Path(
            snapshot_download(
                self.wanted.repository,
                revision=commit,
                cache_dir=self.cache,
                allow_patterns=list(names),
            )
        )

    def _fetch_weights(self, commit: str, weights: Sequence["RepoSibling"]) -> None:
        """Fetch the blobs of the weights, with progress, after a look at the disk."""
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        files = [self._remote_file(commit, sibling) for sibling in weights if sibling.lfs]
        missing_bytes = sum(file.missing_bytes for file in files)
        present_bytes = sum(file.present_bytes for file in files)
        if not missing_bytes and all(file.path.exists() for file in files):
            return
        free_bytes = shutil.disk_usage(self.cache).free
        if free_bytes < missing_bytes:
            raise CheckpointError(
                f"{self.cache}: {format_bytes(free_bytes)} free; {self.wanted.repository} takes "
                f"{format_bytes(missing_bytes)} more",
                advice="free space, or let HF_HOME name a folder on a larger disk",
            )
        if present_bytes:
            self.console.note(f"{format_bytes(present_bytes)} were downloaded before; going on")
        label = f"download {self.wanted.repository}"
        with self.console.progress(label, missing_bytes) as advance:
            fetch(files, build_hf_headers(), advance)

    def _remote_file(self, commit: str, sibling: "RepoSibling") -> RemoteFile:
        from huggingface_hub import hf_hub_url

        assert sibling.lfs
        sha256 = sibling.lfs.sha256
        if not SHA256.fullmatch(sha256):
            raise ValueError("no sha256")
        return RemoteFile(
            url=hf_hub_url(self.wanted.repository, sibling.rfilename, revision=commit),
            size_bytes=sibling.lfs.size,
            sha256=sha256,
            path=self._storage / "blobs" / sha256,
            lock=self.cache / ".locks" / self._storage.name / f"{sha256}.lock",
        )

    @property
    def _storage(self) -> Path:
        return self.cache / f"models--{self.wanted.repository.replace('/', '--')}"

    def _remember(self, commit: str) -> None:
        """Note which commit the revision was, where huggingface_hub looks when it is offline."""
        if self.wanted.is_pinned:
            return
        path = self._storage / "refs" / self.wanted.revision
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(commit)
        temporary.replace(path)


def _require_checkpoint(repository: str, siblings: Mapping[str, object]) -> None:
    """Refuse a repository that cannot be a checkpoint before anything is fetched."""
    if "config.json" in siblings and (SINGLE in siblings or INDEX in siblings):
        return
    wanted = "config.json" if "config.json" not in siblings else f"{SINGLE} or {INDEX}"
    kinds = sorted({Path(name).suffix for name in siblings} & {".bin", ".gguf", ".onnx", ".pt"})
    raise CheckpointError(
        f"{repository}: has no {wanted}" + (f"; found only {', '.join(kinds)}" if kinds else ""),
        advice="phiship reads safetensors only; look for the original model's repository",
    )


def _weight_files(repository: str, folder: Path, siblings: Mapping[str, object]) -> list[str]:
    """Names of the safetensors to read, as `read_index` will choose them."""
    if SINGLE in siblings:
        return [SINGLE]
    names = sorted(set(read_weight_map(folder / INDEX).values()))
    if absent := [name for name in names if name not in siblings]:
        raise CheckpointError(
            f"{repository}: {INDEX} names {absent[0]}, which the repository does not have"
        )
    return names
