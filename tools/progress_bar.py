"""The one progress bar of the commands."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from tools.look import format_count, format_seconds


class _Count(ProgressColumn):
    """How many are done: 1,200 of 3,000."""

    def render(self, task: Task) -> Text:
        return Text(format_count(task.completed) + ("" if task.total is None else f" of {format_count(task.total)}"))


class _TimeLeft(ProgressColumn):
    """How long it will take, as far as that can be told."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("" if not left else f"{format_seconds(left)} left", style="dim")


def build_progress(name: str, console: Console) -> Progress:
    """A bar that is gone when it has ended; its tasks have a field `text`, shown behind it."""
    text = TextColumn("{task.fields[text]}", markup=False)
    return Progress(TextColumn(name), BarColumn(), _Count(), text, _TimeLeft(), console=console, transient=True)
