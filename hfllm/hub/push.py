"""Push a model's folder to the Hub in one commit, whole or not at all."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card import CARD_FILE, choose_card
from .contents import Files, check_for_tokens, check_model_folder, gather_files
from .errors import LOG_IN, PushError, explain, is_passing, status_of


logger = logging.getLogger(__name__)

ATTEMPTS = 4
FIRST_WAIT = 1.0  # seconds before the second attempt, twice as many before each further one
# Entries of a config that may change while the model stays the same.
VOLATILE = ("transformers_version", "auto_map", "dtype", "torch_dtype", "use_cache", "_name_or_path")
KEPT = (".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt")


def check_repo_id(repo_id: str) -> None:
    """Raise a PushError for an id that cannot exist, without asking the Hub."""
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

    The repository is created if it does not exist, private with `private`. `revision` is a branch, created if it does
    not exist. Files that the Hub has already are not sent again, and a push without changes makes no commit. Weights of
    an earlier form (other shards) are deleted in the same commit.

    Raises:
        PushError: nothing was pushed; says why, and what to do.
    """
    check_repo_id(repo_id)
    folder = Path(folder).expanduser()
    check_model_folder(folder)
    api = HfApi()
    files: Files | None = None
    for attempt in range(ATTEMPTS):
        try:
            full_id = _open(api, repo_id, private=private, revision=revision)
            head = api.model_info(full_id, revision=revision)
        except Exception as raised:
            _wait_or_give_up(raised, repo_id, attempt)
            continue
        if files is None:
            files = gather_files(folder, repo_id=full_id, base_model=base_model)
            made = bytes(files[CARD_FILE]).decode()  # type: ignore[arg-type]
            card = folder / CARD_FILE
            here = card.read_text(encoding="utf-8") if card.exists() else ""
        try:
            there = _read(api, full_id, CARD_FILE, head) or b""
            files[CARD_FILE] = choose_card(made, here=here, there=there.decode("utf-8", errors="replace")).encode()
            check_for_tokens(files)
            return _commit(api, full_id, files, head, revision=revision, overwrite=overwrite, message=commit_message)
        except Exception as raised:
            # Files that arrived stay there, and a commit whose answer was lost is found there.
            _wait_or_give_up(raised, repo_id, attempt)
    raise AssertionError("the last attempt returns or raises")


def open_repository(repo_id: str, *, private: bool) -> str:
    """Find or create the repository; returns its full id, `owner/name`.

    Raises:
        PushError: there is no token, it may not write there, or the Hub cannot be reached.
    """
    try:
        return _open(HfApi(), repo_id, private=private, revision=None)
    except PushError:
        raise
    except Exception as raised:
        raise explain(raised, repo_id) from raised


def _wait_or_give_up(raised: Exception, repo_id: str, attempt: int) -> None:
    """Wait and return if another attempt may help; otherwise raise the error."""
    if isinstance(raised, PushError):
        raise raised
    has_moved = status_of(raised) == 412
    if attempt + 1 == ATTEMPTS or not (has_moved or is_passing(raised)):
        raise explain(raised, repo_id) from raised
    logger.info("%s Trying again.", explain(raised, repo_id))
    if not has_moved:
        time.sleep(FIRST_WAIT * 2**attempt)


def _open(api: HfApi, repo_id: str, *, private: bool, revision: str | None) -> str:
    if get_token() is None:
        raise PushError(f"There is no token for the Hub on this machine. {LOG_IN}.")
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    api.auth_check(repo_id, write=True)  # create_repo does not check this for an existing repository
    if private and not api.model_info(repo_id).private:
        raise PushError(
            f"{repo_id} exists already, and is public: --private is for a new repository. Choose "
            "another name, or make it private in its settings first."
        )
    if revision not in (None, "main"):
        api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    return repo_id


def _commit(
    api: HfApi,
    repo_id: str,
    files: Files,
    head: ModelInfo,
    *,
    revision: str | None,
    overwrite: bool,
    message: str | None,
) -> str:
    """One attempt, on the repository's present head."""
    if not overwrite and (difference := _another_model(api, repo_id, head, files)):
        raise PushError(
            f"{repo_id} holds another model: {difference}. Choose another --repo_id, or replace it with --overwrite "
            "(its history stays)."
        )
    # With --overwrite all files of the other model are deleted; otherwise only those that would be read beside the new
    # weights.
    stale = {name for name in _names(head) - set(files) if name not in KEPT and (overwrite or _is_weights(name))}
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in files.items()]
    commit = api.create_commit(
        repo_id,
        operations=[*additions, *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale))],
        commit_message=message or "Push by hfllm",
        revision=revision,
        parent_commit=head.sha,
    )
    return commit.commit_url


def _names(head: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in head.siblings or []}


def _read(api: HfApi, repo_id: str, name: str, head: ModelInfo) -> bytes | None:
    """A file of the repository at its head; None if it has no such file."""
    if name not in _names(head):
        return None
    return Path(api.hf_hub_download(repo_id, name, revision=head.sha)).read_bytes()


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json"))


def _another_model(api: HfApi, repo_id: str, head: ModelInfo, files: Files) -> str:
    """How the model in the repository differs from ours; empty if it is the same, or there is none."""
    kinds = {"config.json": "a whole model", "adapter_config.json": "an adapter"}
    name = "adapter_config.json" if "adapter_config.json" in files else "config.json"
    there = _read(api, repo_id, name, head)
    if there is None:
        others = sorted(_names(head) & set(kinds))
        others += sorted(path for path in _names(head) if _is_weights(path) or path.endswith((".gguf", ".onnx")))
        return f"it has {others[0]}, and this is {kinds[name]}" if others else ""
    theirs, ours = json.loads(there), json.loads(_content(files[name]))
    names = ("base_model_name_or_path", "task_type", "r") if name == "adapter_config.json" else {*theirs, *ours}
    different = [key for key in sorted(names) if key not in VOLATILE and theirs.get(key) != ours.get(key)]
    if "model_type" in different:
        different = ["model_type"]
    if different:
        return "; ".join(f"{key} is {_short(theirs.get(key))}, here {_short(ours.get(key))}" for key in different[:3])
    if "tokenizer.json" in files:
        tokenizer = _read(api, repo_id, "tokenizer.json", head)
        if tokenizer is not None and tokenizer != _content(files["tokenizer.json"]):
            return "its tokenizer differs"
    return ""


def _content(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
