"""Checkpoints of the Hugging Face hub: `org/name[@revision]` becomes a local snapshot directory."""

from __future__ import annotations

from pathlib import Path

from safepatch_core.errors import InputError, UsageError
from safepatch_core.files.filenames import COMPANIONS

# Nothing that could be executed or unpickled, no subdirectories, no second copy in Mistral's own layout.
_UNWANTED = ["*/*", "*.py", "*.bin", "*.pt", "*.pth", "consolidated*"]


def snapshot(repo: str, revision: str | None = None) -> tuple[Path, str]:
    """The local directory of `repo` at `revision` (default: main) and its commit hash, fetched where needed.

    Raises UsageError without huggingface_hub, InputError where the repository can't be had.
    """
    ref = repo if revision is None else f"{repo}@{revision}"
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise UsageError(
            f"{ref}: no such path, and a hub id needs huggingface_hub: pip install safepatch[hub]"
        ) from None
    try:
        wanted = ["*.safetensors", *COMPANIONS]
        directory = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except errors.GatedRepoError:
        reason = "the repository is gated: accept its terms and log in"
    except errors.RevisionNotFoundError:
        reason = "no such revision"
    except errors.RepositoryNotFoundError:
        reason = "no such repository, or it is private"
    except errors.LocalEntryNotFoundError:
        reason = "not in the local cache, and the hub can't be reached"
    except Exception as error:
        # The client passes on whatever its HTTP, TLS and file layers raise; the user gets one line of it.
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    else:
        return directory, directory.name
    raise InputError(f"{ref}: no such path, and can't be had from the hub: {reason}")
