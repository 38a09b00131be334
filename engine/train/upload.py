"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

from engine.errors import UserError, first_line

REFUSALS = {
    401: "the token is not valid; log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; take one with the right to write, or another OWNER",
    404: "there is no such owner, or the token may not write there; check OWNER/NAME",
}
"""What an HTTP status of the hub means, and the remedy."""


def require_token(repository: str) -> None:
    """Raises UserError where nobody is logged in to the hub."""
    if get_token() is None:
        raise UserError(f"push_to_hub={repository!r}: no token; log in with `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str) -> str:
    """Uploads a folder as one commit, into a repository that is made, private, where it is missing; returns its
    address. Raises UserError where the hub cannot be reached, or refuses."""
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of mapdistill")
    except (HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        reason = REFUSALS.get(status) if status is not None else None
        if reason is None:
            reason = f"{api.endpoint} cannot be used ({first_line(error)[:200]}); try again when it can be reached"
        raise UserError(f"push_to_hub={repository!r}: {reason}. The folder is complete: {folder}") from None
    return str(address)


def describe_upload(folder: Path, repository: str) -> str:
    """Returns what an upload would do: the repository, and each file with its size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"  {path.relative_to(folder)}  {path.stat().st_size:,} bytes" for path in files]
    return "\n".join([f"nothing is uploaded; to {repository}, private where it is new, would go {folder}:", *lines])
