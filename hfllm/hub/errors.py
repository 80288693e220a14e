"""Errors of a push, as messages with the next step."""

from collections.abc import Iterator

import httpx2
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


class PushError(RuntimeError):
    """A push that failed. The Hub is unchanged; the same push can be run again."""

    def __init__(self, message: str, *, is_refusal: bool = True):
        """`is_refusal`: trying again will not help; otherwise the failure may be temporary."""
        super().__init__(message)
        self.is_refusal = is_refusal


LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write"
AGAIN = "Nothing is lost: run the same push again."


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes: huggingface_hub wraps the errors of an upload's thread."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the Hub's answer, or None if there was none."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return cause.response.status_code
    return None


def is_passing(error: BaseException) -> bool:
    """Whether trying again may help: the connection broke, or the Hub failed temporarily."""
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return any(isinstance(cause, httpx2.TransportError) for cause in causes(error))


def explain(error: BaseException, repo_id: str) -> PushError:
    """The error of a push as a message that says what to do."""
    status, said = status_of(error), _said(error)  # a refused upload may have no status of its own
    for cause in causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return PushError("HF_HUB_OFFLINE=1 keeps everything here off the network. Unset it to push.")
        if isinstance(cause, LocalTokenNotFoundError):
            return PushError(f"There is no token for the Hub on this machine. {LOG_IN}.")
    if status == 401 and "credentials" in said.lower():
        return PushError(f"The Hub does not know this token: it may be mistyped, expired or revoked. {LOG_IN}.")
    if isinstance(error, RevisionNotFoundError):
        return PushError(
            f"{repo_id} has no such revision. Leave --revision out, or give a branch. The Hub said: {said}"
        )
    if status in (401, 404) or isinstance(error, RepositoryNotFoundError):
        return PushError(
            f"The Hub shows no repository {repo_id} to this token: it does not exist, or it is private and "
            f"belongs to someone else. Check the name. {LOG_IN} there."
        )
    if status in (None, 402, 403, 413, 507) and any(
        word in said.lower() for word in ("storage", "quota", "limit", "upgrade")
    ):
        return PushError(f"The Hub has no room left for {repo_id}: {said}. Delete something there, then push again.")
    if status == 403:
        return PushError(
            f"This token may not write to {repo_id}: {said}. Give a --repo_id of your own user or organization, or a "
            "token with write access."
        )
    if status == 412:
        return PushError(f"Others committed to {repo_id} during each attempt of this push. {AGAIN}", is_refusal=False)
    if status is not None and is_passing(error):
        return PushError(f"The Hub answered {status} ({said or 'no message'}). {AGAIN}", is_refusal=False)
    if is_passing(error):
        kind = next(type(cause).__name__ for cause in causes(error) if isinstance(cause, httpx2.TransportError))
        return PushError(f"The connection to the Hub broke off ({kind}). {AGAIN}", is_refusal=False)
    return PushError(f"The Hub refused the push to {repo_id}: {said or type(error).__name__}.")


def _said(error: BaseException) -> str:
    """The server's message on one line, without the request, whose headers hold the token."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            words = cause.server_message or cause.response.headers.get("X-Error-Message") or ""
            return " ".join(words.split())[:300].rstrip(".")
    return " ".join(str(error).split())[:300].rstrip(".")
