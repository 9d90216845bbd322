"""What Ray would record of a job: secrets are named in it, and never carried by it.

Ray keeps a job's entrypoint, metadata and runtime environment as they are: in the head's tables (and their Redis), in
`/api/jobs/` for every client, in the nodes' logs and in the table of actors. The files of a job lie in the head's
memory, and unpacked on every node. A secret in any of these stays there. So a job carries the *names* of environment
variables, whose values the machines have by other means, and whatever looks like a value is refused before it is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from logitstore.errors import ConfigError
from logitstore.url_secrets import hide_secrets

_SECRET_WORDS = frozenset(
    {"secret", "secrets", "token", "password", "passwd", "passphrase", "credential", "credentials", "key", "apikey"}
    | {"accesskey", "secretkey", "sas", "pat", "authorization", "bearer", "cookie"}
)
_WORD_BREAK = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")
# Of a name's last word: it is about a secret, and not the secret itself.
_NOT_THE_SECRET = frozenset({"file", "path", "dir", "folder", "variable", "uri", "url"})
_REFERENCE = re.compile(r"\$\{\w+\}")
# Of gcsfs, which takes the way to log in where others take the token.
_WAYS_TO_LOG_IN = frozenset({"anon", "cloud", "google_default", "browser", "cache"})
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Sections whose keys tell what is secret; elsewhere a key such as `top_k` or `batch_tokens` says nothing.
_SECTIONS = frozenset({"storage_options", "env_vars", "extra_body"})


def is_secret_name(name: str) -> bool:
    """Whether a variable or an option of this name holds a secret: AWS_SECRET_ACCESS_KEY does, AWS_REGION does not."""
    words = [word.lower() for word in _WORD_BREAK.split(name) if word]
    if not words or words[-1] in _NOT_THE_SECRET:
        return False
    return bool(_SECRET_WORDS.intersection(words)) or "connection_string" in name.lower()


def find_secrets(values: object, place: str = "", *, by_name: bool = False) -> Iterator[str]:
    """Dotted names of what a job must not carry, in settings or in plain values.

    Args:
        values: settings, or plain values in mappings and lists.
        place: where they stand, the beginning of the names.
        by_name: values of keys that sound like secrets are secrets, not only URLs that have one in them.
    """
    if isinstance(values, BaseModel | Mapping):
        items = values.items() if isinstance(values, Mapping) else iter(values)
        for key, value in items:
            where = f"{place}.{key}" if place else str(key)
            if by_name and isinstance(value, str) and is_secret_name(str(key)):
                if not _is_harmless(value):
                    yield where
            elif by_name and _is_secret_number(str(key), value):
                yield where
            else:
                yield from find_secrets(value, where, by_name=by_name or key in _SECTIONS)
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from find_secrets(value, f"{place}[{index}]", by_name=by_name)
    elif isinstance(values, str) and hide_secrets(values) != values:
        yield place


def _is_secret_number(name: str, value: object) -> bool:
    """Whether it is a password of digits alone, which YAML takes for a number; `token_limit: 128` is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    words = [word.lower() for word in _WORD_BREAK.split(name) if word]
    return bool(words) and words[-1] in _SECRET_WORDS


def check_no_secrets(values: object, where: str) -> None:
    """Refuse to send secrets.

    Raises:
        ConfigError: names the keys, and not what they hold.
    """
    found = list(find_secrets(values))
    if found:
        raise ConfigError(
            f"{where}: expected a job without secrets, since Ray records what a job is submitted with, found "
            f"{', '.join(found)}; give the cluster's machines the value as an environment variable (of a Kubernetes "
            "secret, say) or a role, and name the variable with --secret"
        )


def check_secret_names(names: tuple[str, ...]) -> None:
    """Refuse what is no name of an environment variable, without printing what may be a secret.

    Raises:
        ConfigError: a name has a value behind it, or is none.
    """
    for name in names:
        if _VARIABLE.fullmatch(name) is None:
            variable = _VARIABLE.match(name)
            beginning = variable[0] if "=" in name and variable else "something else"
            raise ConfigError(
                f"--secret: expected the name of an environment variable that the cluster's machines have, found "
                f"{beginning} with more behind it; give the name alone"
            )


def _is_harmless(value: str) -> bool:
    """Whether it is where a secret lies, or nothing at all."""
    is_elsewhere = value.startswith(("/", "~")) or _REFERENCE.fullmatch(value) is not None
    return not value or is_elsewhere or value in _WAYS_TO_LOG_IN
