"""Sending a finished checkpoint to the Hugging Face hub, with the token of ``hf auth login`` or ``HF_TOKEN``."""

from __future__ import annotations

import glob
import inspect
import re
import shlex
from pathlib import Path

from awq_jax.convert import card
from awq_jax.errors import CheckpointError, ConfigError, needed

REPO = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def check(repo: str) -> str:
    """See that a repository may be written to, before there is anything to send. Nothing is created.

    Args:
      repo: ``owner/name``, or a ``name`` of one's own.

    Returns:
      ``owner/name``.

    Raises:
      ConfigError: it is no name of a repository.
      CheckpointError: there is no valid login, its token only reads, or the repository is somebody else's.
    """
    if not REPO.fullmatch(repo):
        raise ConfigError(f"{repo!r} is not a repository of the hub: give owner/name")
    huggingface_hub = needed("huggingface_hub", "pushing to the hub")  # which takes a second, and only this needs
    from huggingface_hub.errors import RepositoryNotFoundError

    api = huggingface_hub.HfApi()
    try:
        user = api.whoami()
    except Exception as e:  # its errors share no base class with those of its HTTP library
        raise CheckpointError(
            f"nothing can be pushed to {repo}, as the hub does not know who you are: {_first_line(e)} Log in with "
            "`hf auth login`, or set HF_TOKEN to a token that may write"
        ) from e
    name = str(user["name"])
    repo = repo if "/" in repo else f"{name}/{repo}"
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise CheckpointError(f"the token of {name} may only read; pushing to {repo} needs one that may write")
    mine = {name, *(str(o.get("name")) for o in user.get("orgs") or ())}
    try:
        if "write" in inspect.signature(api.auth_check).parameters:
            api.auth_check(repo, write=True)
        else:  # of older versions
            api.auth_check(repo)
    except RepositoryNotFoundError:
        if repo.partition("/")[0] not in mine:
            raise CheckpointError(
                f"{name} cannot create {repo}: that is neither theirs nor of an organization of theirs"
            ) from None
    except Exception as e:
        raise CheckpointError(f"{name} may not write to {repo}: {_first_line(e)}") from e
    return repo


def upload(path: Path, repo: str, *, private: bool = False, branch: str | None = None) -> str:
    """Send a finished checkpoint: a directory, or a single file with the card beside it, as one commit.

    Args:
      path: of the checkpoint.
      repo: ``owner/name`` (see `check`); created if it is not there.
      private: if it is created, for nobody else to see.
      branch: to commit to, created if it is not there; None: the main one.

    Returns:
      The address of the repository.

    Raises:
      CheckpointError: it could not be sent; says that the local copy is whole, and what sends it again.
    """
    huggingface_hub = needed("huggingface_hub", "pushing to the hub")  # as in `check`

    api = huggingface_hub.HfApi()
    patterns, folder = None, path
    if path.is_file():
        patterns, folder = [glob.escape(path.name)], path.parent
        patterns += [card.README, card.KEPT] if card.is_of(folder / card.README, path.name) else []
    try:
        address = str(api.create_repo(repo, private=private or None, exist_ok=True))
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=patterns, revision=branch, commit_message="awq_jax"
        )
    except Exception as e:  # as in `check`
        command = ["hf", "upload", repo, str(path), *(["--private"] if private else [])]
        command += ["--revision", branch] if branch is not None else []
        raise CheckpointError(
            f"{path} is whole, but was not sent to {repo}: {_first_line(e)} To send it again: {shlex.join(command)}"
        ) from e
    return address


def _first_line(e: Exception) -> str:
    """What went wrong, and what that came from."""
    text = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
    told = f"{type(e).__name__}: {text[:300].rstrip('.')}."
    return f"{told} {_first_line(e.__cause__)}" if isinstance(e.__cause__, Exception) else told
