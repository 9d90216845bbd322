"""Secrets in URLs: refused, because addresses end up in plans, logs and error messages."""

from __future__ import annotations

import re

from logitstore.errors import ConfigError

# scheme, optional name, password: `abfs://container@account…` and `ssh://name@host` carry no secret, `name:pw@` does.
_PASSWORD = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<secret>[^/?#]*:[^/?#]*)@")
_WEB_USER = re.compile(r"(?P<scheme>https?://)(?P<secret>[^/?#]+)@", re.IGNORECASE)
_SIGNED = re.compile(
    r"[?&](?P<name>sig|key|apikey|api_key|awsaccesskeyid|[A-Za-z0-9._-]*(?:signature|credential|token|secret|password))=",
    re.IGNORECASE,
)


def check_url_has_no_secrets(url: str) -> None:
    """Refuse a URL with a password or a signature in it.

    Raises:
        ConfigError: says what was found without printing it.
    """
    if "://" not in url:
        return
    signed = _SIGNED.search(url)
    if _PASSWORD.search(url) or _WEB_USER.search(url):
        found = "a user name or password"
    elif signed:
        found = f"a query with {signed['name']!r}"
    else:
        return
    raise ConfigError(
        f"{hide_secrets(url)}: expected a URL without secrets, found {found} in it; URLs are stored and printed: give "
        "credentials in storage_options or in the environment"
    )


def hide_secrets(text: str) -> str:
    """A text with the passwords and signed queries of the URLs in it replaced by `***`."""
    text = _PASSWORD.sub(r"\g<scheme>***@", text)
    text = _WEB_USER.sub(r"\g<scheme>***@", text)
    signed = _SIGNED.search(text) if "://" in text else None
    if signed is None:
        return text
    return text[: text.find("?") + 1] + "***" if "?" in text else text[: signed.start()] + "***"
