"""The whole page of `logitstore report`, from a store, what it is compared with, and runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from logitstore import __version__
from logitstore.errors import CorruptShardError
from logitstore.store.aligned_stores import AlignedStores
from logitstore.store.logit_store import LogitStore
from tools.look import count_things
from tools.opened_store import open_readable, open_store
from tools.page import build_page
from tools.store_diff import compare_stores
from tools.store_overview import StoreOverview, read_overview
from tools.store_report.payload import build_payload
from tools.store_report.sample import Sample, read_sample
from tools.store_report.sections import (
    build_comparison_of_stores,
    build_distributions,
    build_overview,
    build_section,
)
from tools.store_report.text_view import build_policy, build_text_view, read_asset
from tools.store_report.token_table import build_token_table, escape_invisible
from tools.token_text import load_find_text

if TYPE_CHECKING:
    from trainer.evaluation import Evaluation

# Of a comparison of stores: enough for its means, and minutes less than all of a large store.
_COMPARED_RECORDS = 2000
_TITLES = {
    "overview": "Overview",
    "distributions": "Distributions",
    "text": "Text",
    "stores": "Two stores",
    "students": "Students",
    "training": "Training",
}


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """What a page is to be about.

    Attributes:
        store, manifest: its address, and a number; None for what is committed now.
        against: address of a second store over the same corpus; None for none.
        students: folders of students that are run over the records shown.
        runs: folders of training runs, or of several in one folder.
        records: to show.
        top: candidates at each position.
        tokenizer: folder or name of one in place of the teacher's.
    """

    store: str
    manifest: int | None = None
    against: str | None = None
    students: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    records: int = 100
    top: int = 5
    tokenizer: str | None = None


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """A page, and what it shows; `damaged` says what of the store could not be read."""

    html: str
    records: int
    positions: int
    tokenizer_trouble: str | None
    damaged: tuple[str, ...]


def build_store_report(
    request: ReportRequest, report: Callable[..., None] = lambda done, total, text="": None
) -> StoreReport:
    """Read what a page needs and make it.

    Args:
        request: what it is about.
        report: called with steps done and to do, and what is being done.
    Raises:
        ConfigError: a student or a run cannot be loaded.
        IncompatibleStoreError: the two stores are not of the same sequences.
        StoreNotFoundError, CorruptShardError, OutsideError: a store cannot be read, or nothing of it.
    """
    from tools.store_report.students import build_students, build_training, name_voices, read_runs

    runs = read_runs(request.runs, request.students)
    opened = open_readable(request.store, request.manifest)
    overviews = [read_overview(request.store, request.manifest)]
    source: LogitStore | AlignedStores = opened.store
    names = name_voices(request)
    if request.against is not None:
        source = AlignedStores([opened.store, open_store(request.against, None).store])
        overviews.append(read_overview(request.against))
    num_stores = len(overviews)
    sample = read_sample(source, names[:num_stores], max_records=request.records, top=request.top, report=report)
    plan = opened.store.plan
    name = request.tokenizer or plan.teacher.tokenizer_name
    find_text, trouble = load_find_text(name, plan.teacher, may_fetch=request.tokenizer is not None)
    evaluations: dict[str, Evaluation] = {}
    if request.students and sample.records:
        from tools.store_report.student_voice import add_students

        report(0, len(request.students), "students")
        sample, evaluations = add_students(sample, opened.store, request.students, names[num_stores:], request.top)
    damaged = [*opened.unreadable, *sample.damaged]
    sections = {
        "overview": build_overview(overviews[0], sample.damaged),
        "distributions": build_distributions(overviews, names[:num_stores], sample) if sample.records else "",
    }
    script = read_asset("report.js")
    if sample.records:
        tokens = build_token_table(sample.records, [one.candidates.token_ids for one in sample.voices], find_text)
        note = _describe_sample(sample, overviews[0])
        sections["text"] = build_text_view(build_payload(sample, tokens), script, note=note, trouble=trouble)
    if request.against is not None:
        urls, manifests = (request.store, request.against), (request.manifest, None)
        try:
            diff = compare_stores(urls, manifests, max_records=_COMPARED_RECORDS, tokenizer=request.tokenizer)
            sections["stores"] = build_comparison_of_stores(diff, names[:num_stores])
        except CorruptShardError as error:
            damaged.append(f"the comparison of the stores: {error}")
    sections["students"] = build_students(evaluations, runs)
    sections["training"] = build_training(runs)
    return StoreReport(
        html=_lay_out(sections, overviews[0], script),
        records=len(sample.records),
        positions=sample.num_positions,
        tokenizer_trouble=trouble,
        damaged=tuple(damaged),
    )


def _lay_out(sections: dict[str, str], overview: StoreOverview, script: str) -> str:
    shown = {name: body for name, body in sections.items() if body}
    links = "".join(f'<li><a href="#{name}">{_TITLES[name]}</a></li>' for name in shown)
    body = f'<nav aria-label="Parts of the page"><ul>{links}</ul></nav>'
    body += "".join(build_section(name, _TITLES[name], text) for name, text in shown.items())
    name = escape_invisible(Path(overview.store).name or overview.store)
    subtitle = escape_invisible(f"Teacher {overview.teacher.model}, logitstore {__version__}")
    head = f"{build_policy(script)}<style>{read_asset('report.css')}</style>"
    return build_page(f"What the teacher said: {name}", subtitle, body, head=head)


def _describe_sample(sample: Sample, overview: StoreOverview) -> str:
    return (
        f"{count_things(len(sample.records), 'record')} of {overview.records:,}, taken from places spread over the "
        f"store. The colour of a token is what the teacher thought before it came."
    )
