"""The page's section with the sampled records: its controls, and the data that its script reads."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from tools.page import write_text
from tools.store_report.token_table import escape_invisible

_CONTROLS = """
<div class="controls">
<p><label>Record <select id="record"></select></label>
<button type="button" id="previous-record">Previous record</button>
<button type="button" id="next-record">Next record</button>
<label>Colour <select id="colour"></select></label></p>
<fieldset id="filters"><legend>Find positions</legend>
<label>Entropy, nats, from <input id="min-entropy" type="number" min="0" step="any"></label>
<label>to <input id="max-entropy" type="number" min="0" step="any"></label>
<label>Surprise, nats, from <input id="min-surprise" type="number" min="0" step="any"></label>
<label>to <input id="max-surprise" type="number" min="0" step="any"></label>
<label class="further">KL, nats, from <input id="min-kl" type="number" min="0" step="any"></label>
<label>Text <input id="wanted-text" type="search" autocomplete="off" spellcheck="false"></label>
<label><input id="is-other-first" type="checkbox"> only where the first candidate did not come next</label>
<button type="button" id="clear">Clear</button></fieldset>
<p><button type="button" id="previous-match">Previous found</button>
<button type="button" id="next-match">Next found</button> <output id="found"></output></p>
</div>
<p id="legend" class="legend"></p>
<div class="browser">
<div id="tokens" role="listbox" aria-orientation="horizontal" aria-label="Text of the record, token by token"
 aria-describedby="keys"></div>
<aside id="panel" aria-label="At this position" tabindex="0"><p>Point at a token, or move to it with the keyboard, to
see what was expected in its place.</p></aside>
</div>
<p id="keys" class="keys">Keys in the text: arrows move from token to token and line to line, Home and End to the first
and last, N and P to the next and previous found, Page Down and Page Up to the next and previous record.</p>"""


def read_asset(name: str) -> str:
    """The script or style sheet of the page."""
    return (files("tools.store_report") / name).read_text(encoding="utf-8")


def build_policy(script: str) -> str:
    """What the browser is told to allow: this one script and style sheets in the page, and nothing from anywhere."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">'


def build_text_view(payload: str, script: str, *, note: str, trouble: str | None) -> str:
    """HTML of the section.

    Args:
        payload: of `tools.store_report.payload.build_payload`.
        script: as `build_policy` was told.
        note: text about which records there are.
        trouble: why there is no text, where there is none.
    """
    instead = f'<p class="trouble">Ids instead of text: {write_text(escape_invisible(trouble))}</p>' if trouble else ""
    return (
        f"<p>{write_text(note)}</p>{instead}<noscript><p>This part needs JavaScript.</p></noscript>"
        f'<p id="failure" class="trouble" role="alert" hidden></p><div id="text-view" hidden>{_CONTROLS}</div>'
        f'<script type="application/octet-stream" id="payload">{payload}</script><script>{script}</script>'
    )
