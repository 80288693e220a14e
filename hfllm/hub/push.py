"""A model's folder to the Hub, in one commit: whole there, or not at all."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card import CARD_FILE
from .contents import Files, check_model_folder, gather_files
from .errors import LOG_IN, PushError, explain, is_passing, status_of


logger = logging.getLogger(__name__)

ATTEMPTS = 4
FIRST_WAIT = 1.0  # seconds before the second attempt, twice as many before each further one
# Of a config, what may change while the model stays the same one.
VOLATILE = ("transformers_version", "auto_map", "dtype", "torch_dtype", "use_cache", "_name_or_path")
KEPT = (".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt")


def check_repo_id(repo_id: str) -> None:
    """Stop at an id that cannot be one; asks nobody."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(
            f"{repo_id!r} is not an id of the Hub: {error} Give owner/name, for example me/my-gpt."
        ) from error


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    base_model: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Push the model or adapter in a folder with its card and page; returns the commit's address.

    The repository is made if it is not there, `private` if so asked. `revision` is a branch, made if need be. Files
    that the Hub has already are not sent again, and a push of what is there makes no commit. Weights of an earlier
    form (other shards) are deleted in the same commit.

    Raises:
        PushError: nothing was pushed; says why, and what to do.
    """
    check_repo_id(repo_id)
    check_model_folder(Path(folder).expanduser())
    api = HfApi()
    repo_id = open_repository(api, repo_id, private=private, revision=revision)
    error: Exception | None = None
    for attempt in range(ATTEMPTS):
        try:
            return _commit(api, folder, repo_id, revision, overwrite, base_model, commit_message)
        except PushError:
            raise
        except Exception as raised:  # of httpx, of huggingface_hub, and what its threads wrap
            error = raised
            has_moved = status_of(raised) == 412
            if not (has_moved or is_passing(raised)):
                break
            # What arrived stays there, and a commit whose answer was lost is found to be there.
            logger.info("%s Trying again.", explain(raised, repo_id))
            if attempt + 1 < ATTEMPTS and not has_moved:
                time.sleep(FIRST_WAIT * 2**attempt)
    assert error is not None
    raise explain(error, repo_id) from error


def open_repository(api: HfApi, repo_id: str, *, private: bool, revision: str | None = None) -> str:
    """Find or make the repository and the branch; returns its full id, `owner/name`."""
    if get_token() is None:
        raise PushError(f"There is no token for the Hub on this machine. {LOG_IN}.")
    try:
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PushError(
                f"{repo_id} is there already, and public: --private is for a repository that is yet to be made. Choose "
                "another name, or make it private in its settings first."
            )
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    except PushError:
        raise
    except Exception as error:
        raise explain(error, repo_id) from error
    return repo_id


def _commit(
    api: HfApi,
    folder: str | Path,
    repo_id: str,
    revision: str | None,
    overwrite: bool,
    base_model: str | None,
    commit_message: str | None,
) -> str:
    """One attempt, upon the repository's head as it is now."""
    head = api.model_info(repo_id, revision=revision)
    there = {sibling.rfilename for sibling in head.siblings or []}
    old_card = ""
    if CARD_FILE in there:
        old_card = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=head.sha)).read_text(encoding="utf-8")
    files = gather_files(folder, repo_id=repo_id, base_model=base_model, old_card=old_card)
    if not overwrite and (difference := _another_model(api, repo_id, str(head.sha), there, files)):
        raise PushError(
            f"{repo_id} holds another model: {difference}. Choose another --repo_id, push to a branch with --revision, "
            "or replace it with --overwrite (its history stays)."
        )
    # With --overwrite what the other model brought goes; else what would be read beside the new weights.
    stale = {name for name in there - set(files) if name not in KEPT and (overwrite or _is_weights(name))}
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in files.items()]
    commit = api.create_commit(
        repo_id,
        operations=[*additions, *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale))],
        commit_message=commit_message or "Push by hfllm",
        revision=revision,
        parent_commit=head.sha,
    )
    return commit.commit_url


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json"))


def _another_model(api: HfApi, repo_id: str, sha: str, there: set[str], files: Files) -> str:
    """What makes the model in the repository another one than ours; empty if it is the same, or there is none."""
    name = "adapter_config.json" if "adapter_config.json" in files else "config.json"
    other_name = "config.json" if name == "adapter_config.json" else "adapter_config.json"
    if name not in there:
        if other_name in there:
            kinds = {"config.json": "a whole model", "adapter_config.json": "an adapter"}
            return f"what is there is {kinds[other_name]}, and this is {kinds[name]}"
        weights = sorted(path for path in there if _is_weights(path) or path.endswith((".gguf", ".onnx")))
        return f"{weights[0]} without a {name}" if weights else ""

    def both(name: str) -> tuple[bytes, bytes]:
        source = files[name]
        theirs = Path(api.hf_hub_download(repo_id, name, revision=sha)).read_bytes()
        return theirs, source if isinstance(source, bytes) else source.read_bytes()

    theirs, ours = map(json.loads, both(name))
    names = ("base_model_name_or_path", "task_type", "r") if name == "adapter_config.json" else {*theirs, *ours}
    different = [key for key in sorted(names) if key not in VOLATILE and theirs.get(key) != ours.get(key)]
    if different:
        return "; ".join(f"{key} is {_short(theirs.get(key))}, here {_short(ours.get(key))}" for key in different[:3])
    if "tokenizer.json" in there & set(files) and len(set(both("tokenizer.json"))) > 1:
        return "its tokenizer is another"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
