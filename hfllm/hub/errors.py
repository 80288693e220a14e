"""What went wrong between here and the Hub, with the next step."""

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
    """A push that did not happen. The Hub holds what it held before; the same push can be run again."""

    def __init__(self, message: str, *, is_refusal: bool = True):
        """`is_refusal`: to try again changes nothing; else the network or the Hub had a bad moment."""
        super().__init__(message)
        self.is_refusal = is_refusal


LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write"
AGAIN = "Nothing is lost: run the same push again."


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it: huggingface_hub wraps what an upload's thread raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with, if that is what went wrong."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return cause.response.status_code
    return None


def is_passing(error: BaseException) -> bool:
    """Whether trying again may help: the connection broke, or the Hub had a bad moment."""
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return any(isinstance(cause, httpx2.TransportError) for cause in causes(error))


def explain(error: BaseException, repo_id: str) -> PushError:
    """The error of a push as a message that says what to do."""
    status, said = status_of(error), _said(error)  # an upload that is refused by itself has no status of its own
    for cause in causes(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return PushError("HF_HUB_OFFLINE=1 keeps everything here off the network. Unset it to push.")
        if isinstance(cause, LocalTokenNotFoundError):
            return PushError(f"There is no token for the Hub on this machine. {LOG_IN}.")
    if status == 401 and "credentials" in said.lower():
        return PushError(f"The Hub does not know this token: it is mistyped, expired or revoked. {LOG_IN}.")
    if isinstance(error, RevisionNotFoundError):
        return PushError(
            f"{repo_id} has no such revision. Leave --revision out, or give a branch. The Hub said: {said}"
        )
    if status in (401, 404) or isinstance(error, RepositoryNotFoundError):
        return PushError(
            f"The Hub shows no repository {repo_id} to this token: it is not there, or it is private and another's. "
            f"Check the name. {LOG_IN} there."
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
        return PushError(
            f"Others commit to {repo_id} all the time, and each push came too late. {AGAIN}", is_refusal=False
        )
    if status is not None and is_passing(error):
        return PushError(f"The Hub answered {status} ({said or 'without a word'}). {AGAIN}", is_refusal=False)
    if is_passing(error):
        kind = next(type(cause).__name__ for cause in causes(error) if isinstance(cause, httpx2.TransportError))
        return PushError(f"The connection to the Hub broke off ({kind}). {AGAIN}", is_refusal=False)
    return PushError(f"The Hub refused the push to {repo_id}: {said or type(error).__name__}.")


def _said(error: BaseException) -> str:
    """The server's own words on one line; none of the request, which has the token in its headers."""
    for cause in causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            words = cause.server_message or cause.response.headers.get("X-Error-Message") or ""
            return " ".join(words.split())[:300].rstrip(".")
    return " ".join(str(error).split())[:300].rstrip(".")
