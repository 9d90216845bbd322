"""What a submitted job runs: a look at the machine it came to, then the command itself.

    python -m tools.submitted [--version VERSION] [--secret NAME]... VERB FILE [ARGUMENT]...

Written by `logitstore submit`, not by people.
"""

from __future__ import annotations

import os
import sys

from logitstore import __version__
from logitstore.errors import ConfigError


def main() -> None:
    """Run the command line of a job."""
    from tools.cli import app

    try:
        arguments = check_machine(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    app(args=arguments, prog_name="logitstore")


def check_machine(arguments: list[str]) -> list[str]:
    """Hold the machine to what the job was submitted with; returns the arguments of `logitstore`.

    Raises:
        ConfigError: another release of logitstore, or no such environment variable.
    """
    rest = list(arguments)
    missing = []
    while rest and rest[0] in ("--version", "--secret"):
        option, value, *rest = rest
        if option == "--version" and value != __version__:
            raise ConfigError(
                "logitstore: expected the release that the job was submitted from, found another; install the same on "
                "both sides, bring yours with --package, or accept the difference with --any-version:\n"
                f"  where it was submitted: {value}\n  on the cluster:         {__version__}"
            )
        if option == "--secret" and not os.environ.get(value):
            missing.append(value)
    if missing:
        raise ConfigError(
            f"secrets: expected the cluster's machines to have {', '.join(missing)} in their environment, found no "
            "value on the head; give it to every machine (env: of a pod with secretKeyRef, or before 'ray start'), "
            "since a job does not carry it"
        )
    return rest


if __name__ == "__main__":
    main()
