"""What storage clients raise, turned into errors that say where and what to do.

Few clients keep to OSError: below fsspec lie botocore, aiohttp, google-cloud and azure, each with classes of its own.
So everything counts as trouble outside of the program unless it is known to be something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from logitstore.errors import ConfigError, LogitStoreError, OutsideError
from logitstore.url_secrets import hide_secrets

# Raised by mistakes in a program, never by a storage that answers badly.
_PROGRAMMING_ERRORS = (TypeError, AttributeError, AssertionError, LookupError, NameError, MemoryError, RecursionError)
_DENIED_CLASS = re.compile("Credential|Forbidden|Unauthorized|AccessDenied|Authentication")
# What clients say of a profile, a region or an address that they were told to use and cannot.
_SETTINGS_CLASS = re.compile("ProfileNotFound|ConfigNotFound|ConfigParse|InvalidConfig|Region|ParamValidation")
# What S3 says of session tokens with status 400.
_DENIED_CODES = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_DENIED_MESSAGE = re.compile(r"\s*(Forbidden|Unauthorized|40[13]\b)")


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Translate what storage clients raise inside; FileNotFoundError and the project's own errors pass as they are.

    Raises:
        FileNotFoundError: the storage says that what was asked for is not there.
        ConfigError: access is denied, credentials are missing, the client cannot use its own settings, a folder is
            where a file should be or the other way round, or the storage cannot do what was asked at all.
        OutsideError: anything else that went wrong in the storage.
    """
    try:
        yield
    except (LogitStoreError, FileNotFoundError, *_PROGRAMMING_ERRORS):
        raise
    except (NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError(
            f"{where}: expected folders above and a file at the end, found {error}; check the address"
        ) from error
    except NotImplementedError as error:
        raise ConfigError(
            f"{where}: this kind of storage cannot do what was asked ({error!r}); use another kind"
        ) from error
    except Exception as error:
        if is_denied(error):
            raise ConfigError(
                f"{where}: access denied ({hide_secrets(str(error))}); check the credentials of this storage"
            ) from error
        if _SETTINGS_CLASS.search(type(error).__name__) or str(error).startswith("Invalid endpoint"):
            raise ConfigError(
                f"{where}: expected settings that the client of this storage can use, found {error}; correct the "
                "address, the environment, the profile or storage_options"
            ) from error
        if find_status(error) == 404:  # azure, of a container
            raise FileNotFoundError(f"{where}: {error}") from error
        raise OutsideError(
            f"{where}: storage failed with {hide_secrets(repr(error))}; run the command again"
        ) from error


def is_denied(error: Exception) -> bool:
    """Whether an error says that credentials are missing, wrong or not enough."""
    return (
        isinstance(error, PermissionError)
        or _DENIED_CLASS.search(type(error).__name__) is not None
        or _DENIED_MESSAGE.match(str(error)) is not None
        or find_status(error) in (401, 403)
        or find_code(error) in _DENIED_CODES
    )


def find_status(error: BaseException | None) -> int | None:
    """The HTTP status that an error or its cause carries, under the names that clients use for it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
        for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
            status = getattr(error, name, None)
            if isinstance(status, int):
                return status
        error = error.__cause__
    return None


def find_code(error: Exception) -> str | None:
    """The error code that an S3 server sent, which s3fs keeps in the cause of the OSError that it makes of it."""
    for known in (error, error.__cause__):
        response = getattr(known, "response", None)
        if isinstance(response, dict):
            code = response.get("Error", {}).get("Code")
            return str(code) if code else None
    return None
