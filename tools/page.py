"""The look of the project's HTML pages: self-contained, no network, light and dark."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from logitstore.errors import ConfigError

# Colours of students in charts; a ninth begins again.
_NUM_STYLES = 8
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2125; --soft: #5c6670; --paper: #fcfcfb; --line: #dfe3e6;
  --s0: #9a5b00; --s1: #0b62b0; --s2: #00755e; --s3: #a3417f; --s4: #5b50c9; --s5: #b3261e; --s6: #5c6b12;
  --s7: #007a8c; --bar: #7d8fa1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaed; --soft: #a2acb6; --paper: #15181b; --line: #31373d;
  --s0: #f0a33f; --s1: #6db3f2; --s2: #4fc9a5; --s3: #e88cc3; --s4: #aaa2ff; --s5: #ff8a80; --s6: #b9cc5e;
  --s7: #5fd0de; --bar: #6b7d8f; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, dt, caption, summary { color: var(--soft); } p { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem 1.2rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } summary { cursor: pointer; margin: .8rem 0 .4rem; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; padding-bottom: .5rem; }
th, td { text-align: right; padding: .35rem .7rem; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
thead th { white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; padding-left: 0; } td.best { font-weight: 700; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.2rem;
  margin: 1.2rem 0; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .title { fill: var(--ink); font-weight: 600; font-size: 13px; } svg .grid { stroke: var(--line); }
svg polyline { fill: none; } svg polyline, svg .key { stroke-width: 2; } svg circle { stroke: var(--paper); }
svg .bar { fill: var(--bar); } circle.faint { display: none; }
.faint { stroke: var(--soft); stroke-dasharray: 4 4; } .teacher { stroke: var(--soft); }
svg circle.teacher { fill: var(--paper); stroke: var(--soft); stroke-width: 1.6; }
"""


def build_page(title: str, subtitle: str, body: str, *, head: str = "") -> str:
    """A whole page; `body` and what comes first of its `head` are HTML, the others are text."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{head}<meta name="viewport" content="width=device-width">
<title>{write_text(title)}</title><link rel="icon" href="data:,"><style>{_build_style()}</style></head><body><main>
<h1>{write_text(title)}</h1><p>{write_text(subtitle)}</p>
{body}
</main></body></html>
"""


def build_facts(facts: Mapping[str, str]) -> str:
    """A list of labels with their values, in order."""
    parts = (f"<div><dt>{write_text(label)}</dt><dd>{write_text(value)}</dd></div>" for label, value in facts.items())
    return f"<dl>{''.join(parts)}</dl>"


def build_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML: `<td>…</td>` each, but for the first of a row, the text of its head."""
    head = "".join(f'<th scope="col">{write_text(name)}</th>' for name in columns)
    body = "".join(f'<tr><th scope="row">{write_text(row[0])}</th>{"".join(row[1:])}</tr>' for row in rows)
    table = f"<caption>{write_text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{table}</table></div>'


def build_notes(summary: str, notes: Sequence[str]) -> str:
    """Sentences, folded away below a summary; nothing of none."""
    items = "".join(f"<li>{write_text(note)}</li>" for note in notes)
    return f"<details><summary>{write_text(summary)}</summary><ul>{items}</ul></details>" if notes else ""


def build_charts(charts: Sequence[str]) -> str:
    """Charts side by side where there is room; empty ones are left out."""
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def check_page_path(path: Path, option: str) -> None:
    """Check before anything takes time that a page can be written: a new file, or an earlier page.

    Raises:
        ConfigError: it cannot.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: {path}: expected a folder to write it in, found none; make it first")
    if path.is_dir():
        raise ConfigError(f"{option}: {path}: expected a file, found a folder; name a page in it")
    if path.exists() and not path.read_bytes()[:15].lower().startswith(b"<!doctype html>"):
        raise ConfigError(f"{option}: {path}: expected a new file or an earlier page, found another; choose a name")


def choose_style(number: int) -> str:
    """The CSS class of a student, by its number."""
    return f"s{number % _NUM_STYLES}"


def write_text(value: str) -> str:
    """Text as HTML."""
    return html.escape(value)


def _build_style() -> str:
    styles = range(_NUM_STYLES)
    return _STYLE + "".join(f".s{n} {{ stroke: var(--s{n}); }} circle.s{n} {{ fill: var(--s{n}); }}\n" for n in styles)
