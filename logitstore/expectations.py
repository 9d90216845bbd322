"""What a validation library says of a wrong value, in the words of the project's errors: what was expected."""

from __future__ import annotations

import re

_FORMS = (
    (r"Input should be (?P<what>(?:greater|less) than .*)", "expected a number {what}"),
    (r"Input should be (?P<what>.*?)(?:, unable to parse .*)?", "expected {what}"),
    (r"(?:Value error, )?'.*' is not (?P<what>one of .*?)\.?", "expected {what}"),
    (
        r"Input tag '(?P<found>.*?)' found using .* expected tags: (?P<tags>.*)",
        "expected one of {tags}, found {found!r}",
    ),
    (r"Unable to extract tag using discriminator (?P<key>.*)", "expected a section with the key {key}, found none"),
    (r"Field required", "expected a value, found none"),
    (r"Extra inputs are not permitted", "expected no such key"),
    (r"Value error, (?P<what>.*)", "{what}"),
)


def describe_expectation(message: str) -> str:
    """`Input should be a valid integer` as `expected a valid integer`; what has no such form stays as it is."""
    for pattern, form in _FORMS:
        if match := re.fullmatch(pattern, message, re.DOTALL):
            return form.format(**match.groupdict())
    return message
