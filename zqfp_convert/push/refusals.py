"""What can go wrong between a checkpoint and the Hub, told with what is safe and what goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from zqfp_convert.errors import OutputError, Stopped, ZqfpError

LOGIN = "Run 'hf auth login' with a token that may write, or set HF_TOKEN"


@contextmanager
def told(repository: str, safe: str) -> Iterator[None]:
    """Turns what the Hub's client raises into errors of a user.

    Args:
        repository: that was spoken to.
        safe: a sentence on what is safe, and the command that goes on.

    Raises:
        OutputError: with what stands in the way. No token is in it, nor in what it was raised from.
        Stopped: (a KeyboardInterrupt) by Ctrl-C.
    """
    try:
        yield
    except (ZqfpError, Stopped):
        raise
    except KeyboardInterrupt:
        raise Stopped(f"Stopped. {safe}") from None
    except Exception as error:  # of the client and of its transport, of many unrelated kinds
        refusal = _refusal(repository, error, safe)
        raise refusal from (None if _tells_token(error) else error)


def _refusal(repository: str, error: Exception, safe: str) -> OutputError:
    links = list(_chain(error))
    if any(isinstance(link, OfflineModeIsEnabled) for link in links):
        return OutputError(
            repository,
            "the Hub may not be reached (HF_HUB_OFFLINE is set)",
            needed="a connection to the Hub",
            do=f"Unset HF_HUB_OFFLINE. {safe}",
        )
    answered = next((link for link in links if isinstance(link, HfHubHTTPError)), None)
    status = getattr(getattr(answered, "response", None), "status_code", None)
    if answered is None or status is None:
        lost = any(isinstance(link, OSError) or _of_transport(link) for link in links)
        what = "the Hub cannot be reached" if lost else "the upload has failed"
        return OutputError(
            repository,
            f"{what} ({_words(links[-1])})",
            needed="a connection to the Hub until all is uploaded",
            do=f"Check the network and try again. {safe}",
        )
    said = _without_token(answered.server_message or "").strip()
    found = f"the Hub answers {status}" + (f": {said}" if said else "")
    if status == 401:
        needed, do = "a token that the Hub knows", f"{LOGIN}. {safe}"
    elif status in (403, 404):
        needed = "the right to write there"
        do = f"Check the name and your rights there. {LOGIN}. {safe}"
    else:
        needed, do = "an upload that the Hub accepts", f"Try again later. {safe}"
    return OutputError(repository, found, needed=needed, do=do)


def _of_transport(error: BaseException) -> bool:
    """Whether an error is of the library that the Hub's client sends with, whichever that is."""
    return type(error).__module__.startswith(("httpx", "httpcore", "h11", "requests", "urllib3"))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _words(error: BaseException) -> str:
    lines = _without_token(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _without_token(text: str) -> str:
    token = get_token()
    return text.replace(token, "***") if token else text


def _tells_token(error: BaseException) -> bool:
    token = get_token()
    return bool(token) and any(token in str(link) for link in _chain(error))
