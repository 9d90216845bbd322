"""Finds out whether another package stands where one of the project's four should.

`trainer`, `cluster` and `tools` are names that others may use too; in an environment with such a package, or in a
folder that holds one, Python may import it instead of ours. Nothing here imports what it looks at. Should `tools`
itself be shadowed, Python reports `No module named 'tools.cli'` before anything of this project runs.
"""

from __future__ import annotations

import ast
import importlib.util
from importlib.metadata import packages_distributions
from pathlib import Path

from logitstore.errors import ConfigError

PACKAGES = ("logitstore", "trainer", "cluster", "tools")
OWNER = "logitstore"


def check_packages_are_ours(home: Path = Path(__file__).parents[1]) -> None:
    """Check that the four package names lead to this project's packages, all of them in one folder.

    Args:
        home: the folder that the packages have to be in; by default the one of the running code.

    Raises:
        ConfigError: names each package that is shadowed or missing, what was found and where, and how to mend it.
    """
    problems = [problem for name in PACKAGES if (problem := _find_problem(name, home)) is not None]
    if problems:
        raise ConfigError(
            f"python environment: expected the packages {', '.join(PACKAGES)} of {OWNER}, found\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + f"\ngive {OWNER} an environment of its own, or start from a folder without these names"
        )


def _find_problem(name: str, home: Path) -> str | None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return f"{name}: no such package; install {OWNER} again"
    if spec.origin is None:
        folders = ", ".join(spec.submodule_search_locations or ())
        return f"{name}: a folder without __init__.py at {folders} shadows {home / name}"
    found = Path(spec.origin)
    if not _is_marked(found):
        return f"{name}: {found}{_describe_distribution(name)} shadows {home / name}"
    if found.resolve().parent.parent != home.resolve():
        return f"{name}: {found}, of another copy of {OWNER}, shadows {home / name}"
    return None


def _is_marked(init: Path) -> bool:
    """Whether an `__init__.py` assigns the mark, told from its text."""
    try:
        tree = ast.parse(init.read_bytes())
    except (OSError, SyntaxError, ValueError):  # built in, compiled or broken: not ours in any case
        return False
    return any(
        isinstance(node, ast.Assign)
        and [ast.unparse(target) for target in node.targets] == ["OWNER"]
        and isinstance(node.value, ast.Constant)
        and node.value.value == OWNER
        for node in tree.body
    )


def _describe_distribution(name: str) -> str:
    distributions = sorted(set(packages_distributions().get(name, ())) - {OWNER})
    return f" (installed by {', '.join(distributions)})" if distributions else ""
