"""The page of `logitstore report` in a real browser: it opens from disk, shows the store's numbers, finds things."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import NAMES, Page, find_chromium, open_chromium
from made_up import build_identity, build_plan, build_signal, put_shard
from made_up_draws import build_drawn_records

from logitstore.records import DocumentSpan, Record, RecordAddress
from logitstore.store.commit import build_attempt, commit_unit
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.manifest import write_manifest
from logitstore.store.plan import create_plan
from logitstore.teacher.protocol import HeadTailMethod, Method, TopKMethod
from logitstore.teacher.tokenizer import load_tokenizer

PROGRAM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason=f"expected a browser on the path ({', '.join(NAMES)}), found none"),
]
# What a corpus may hold to break out of the page, to turn it around or to hide.
HOSTILE = [
    "</script><script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">",
    "right to left \u202egnirts\u202c, a bell \x07, nothing \u200b here, &lt; &amp; ' \" \\ \u2028 end\n\n\tdone",
    "Grüße, 東京, 👩‍👩‍👧, שלום, naïve ﬁne",
]
# The least contrast between letters and what is behind them (WCAG 2), over all elements with text of their own.
LEAST_CONTRAST = """(() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith("color(") ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((value, i) => a * value + (1 - a) * below[i]);
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    const colour = parse(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 ? colour.slice(0, 3) : over(colour, behind(element.parentElement));
  };
  const luminance = (colour) => colour.map((value) => value / 255)
    .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const own = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return Math.min(...[...document.querySelectorAll("main *")]
    .filter((element) => own(element) && element.getClientRects().length && !element.disabled)
    .filter((element) => !element.closest("svg, script, style, option"))
    .map((element) => {
      const below = behind(element), letters = over(parse(getComputedStyle(element).color), below);
      const [low, high] = [luminance(letters), luminance(below)].sort((a, b) => a - b);
      return (high + 0.05) / (low + 0.05);
    }));
})()"""
READY = "!document.querySelector('#text-view')?.hidden && document.querySelector('#tokens .token') !== null"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    assert PROGRAM is not None
    with open_chromium(PROGRAM) as page:
        page.look()
        yield page


Fill = Callable[..., LogitStore]


@pytest.fixture
def fill(tmp_path: Path, teacher_folder: Path) -> Fill:
    """Function that makes a store of one record for every text, or of another store, with what a teacher says."""

    def fill(
        name: str,
        texts: list[str] | LogitStore,
        seed: int = 0,
        method: Method = TopKMethod(k=8),  # noqa: B008  # frozen
    ) -> LogitStore:
        tokenizer = load_tokenizer(str(teacher_folder))
        identity = build_identity(
            model=str(teacher_folder),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            padded_vocab_size=tokenizer.vocab_size,
        )
        files = StoreFiles(str(tmp_path / name))
        plan = create_plan(files, build_plan(1, teacher=identity, method=method))
        records = [
            build_text_record(np.array(token_ids, dtype=np.int32), index, seed, tokenizer.vocab_size)
            for index, token_ids in enumerate(
                tokenizer.encode(texts) if isinstance(texts, list) else [record.token_ids for record in texts]
            )
        ]
        if method.is_drawn:
            records = build_drawn_records(6, method.kind, vocab_size=tokenizer.vocab_size)
        commit_unit(files, put_shard(files, plan, 0, records, build_attempt(), tmp_path))
        write_manifest(files, plan.compute_fingerprint())
        return LogitStore.open(files.url)

    return fill


def build_text_record(token_ids: np.ndarray, index: int, seed: int, vocab_size: int) -> Record:
    generator = np.random.default_rng([seed, index])
    positions = len(token_ids) - 1
    # From sure to unsure along the text, and half of the time about what comes.
    logits = generator.normal(0, 1, (positions, vocab_size)) * np.linspace(9, 1, positions)[:, None]
    expected = np.flatnonzero(generator.random(positions) < 0.5)
    logits[expected, token_ids[1:][expected]] = logits.max(-1)[expected] + 1
    return Record(
        address=RecordAddress(unit=0, index=index),
        token_ids=token_ids,
        loss_mask=np.arange(positions) != 1,
        signal=build_signal(logits, token_ids[1:], 8),
        documents=(DocumentSpan(document_id=f"<b>{index}</b>\u202e.txt", start=0, document_offset=0),),
    )


def open_report(browser: Page, logitstore: Any, store: str, path: Path, *options: object) -> None:
    logitstore("report", store, "--output", path, "--quiet", *options)
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(path)
    browser.wait_for(READY)


def read_panel(browser: Page) -> dict[str, Any]:
    """Cells of every candidate by token id, which one came next, and the facts by name."""
    return json.loads(
        browser.evaluate(
            """JSON.stringify({
              position: Number(document.querySelector('#panel').dataset.position),
              title: document.querySelector('#panel h3').textContent,
              next: [...document.querySelectorAll('#panel .candidate.next')].map(row => Number(row.dataset.token)),
              candidates: Object.fromEntries([...document.querySelectorAll('#panel .candidate')].map(
                row => [row.dataset.token, [...row.querySelectorAll('td')].map(cell => cell.textContent)])),
              order: [...document.querySelectorAll('#panel .candidate')].map(row => Number(row.dataset.token)),
              facts: Object.fromEntries([...document.querySelectorAll('#panel .facts tr')].map(
                row => [row.cells[0].textContent, [...row.querySelectorAll('td')].map(cell => cell.textContent)])),
            })"""
        )
    )


def write_share(probability: float) -> str:
    """As the page writes it: three digits from 10% on, two below."""
    if probability < 1e-15:
        return "<1e-13 %"
    digits = 3 if probability >= 0.0995 else 2
    rounded = f"{100 * probability:.{digits - 1}e}"
    if float(rounded) < 1e-6:
        return f"{rounded.replace('e-0', 'e-')} %"
    return f"{Decimal(rounded):f} %"


def write_nats(nats: float) -> str:
    """As the page writes them: two decimals, from 10 on one."""
    return f"{nats:.2f}" if nats < 9.995 else f"{nats:.1f}"


def compute_expected(record: Record, position: int, top: int = 5) -> tuple[list[int], dict[str, str], dict[str, str]]:
    """Candidates in order, their shares, and the facts, from the store."""
    ids, logprobs = record.signal.support_at(position)
    next_id = int(record.token_ids[position + 1])
    logprob = float(record.signal.next_token_logprob[position])
    shares = {int(one): math.exp(float(value)) for one, value in zip(ids, logprobs, strict=True)}
    order = [
        one for slot, one in enumerate(shares) if (slot < top and (slot == 0 or shares[one] >= 0.01)) or one == next_id
    ]
    if next_id not in order:
        order.append(next_id)
        shares[next_id] = math.exp(logprob)
    facts = {
        "came next with": write_share(math.exp(logprob)),
        "surprise, nats": write_nats(-logprob),
        "entropy, nats": write_nats(float(record.signal.entropy[position])),
        "outside the support": write_share(math.exp(float(record.signal.tail_logprob[position]))),
    }
    return order, {str(one): write_share(shares[one]) for one in order}, facts


def hover(browser: Page, position: int) -> dict[str, Any]:
    """What the panel says while the mouse is on a token."""
    for _ in range(10):
        selector = f"#tokens [data-position='{position}']"
        browser.hover(selector, until=f"document.querySelector('#panel').dataset.position === '{position}'")
        panel = read_panel(browser)
        if panel["position"] == position:  # on a busy machine the mouse's way out of the last token may be told late
            return panel
    raise AssertionError(f"the panel does not stay at {position}")


def check_panel(panel: dict[str, Any], record: Record, position: int) -> None:
    order, shares, facts = compute_expected(record, position)
    assert panel["title"] == f"Position {position} of record {record.address}"
    assert panel["order"] == order
    assert {token: cells[0] for token, cells in panel["candidates"].items()} == shares
    assert {name: cells[0] for name, cells in panel["facts"].items()} == facts
    assert panel["next"] == [int(record.token_ids[position + 1])]


def test_hovered_and_focused_tokens_show_the_numbers_of_the_store(
    browser: Page, fill: Fill, logitstore: Any, tmp_path: Path
) -> None:
    store = fill("store", ["def read(path):\n    return open(path).read()\n"])
    open_report(browser, logitstore, store.url, tmp_path / "page.html")
    record = store[0]
    for position in range(record.num_positions):
        check_panel(hover(browser, position), record, position)
    browser.click("#tokens [data-position='2']")
    for key, position in (("ArrowRight", 3), ("ArrowRight", 4), ("ArrowLeft", 3), ("Home", 0)):
        browser.press(key)
        check_panel(read_panel(browser), record, position)
        assert browser.evaluate("document.activeElement.dataset.position") == str(position)
    browser.press("End")
    assert browser.evaluate("document.activeElement.dataset.position") == str(record.num_positions - 1)
    assert "came next with" in browser.evaluate("document.activeElement.getAttribute('aria-label')")
    assert browser.evaluate("document.querySelectorAll('#tokens [tabindex=\"0\"]').length") == 1
    assert browser.evaluate("document.querySelectorAll('#tokens .untaught').length") == 1


def test_page_opens_from_disk_without_a_network_or_complaints(
    browser: Page, fill: Fill, logitstore: Any, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    open_report(browser, logitstore, fill("store", ["one two three", "four five six"]).url, path)
    assert browser.complaints == []
    assert set(browser.requests) == {path.as_uri()}
    browser.evaluate("fetch('http://127.0.0.1:1/').catch(() => null)")
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


def test_hostile_text_stays_text(browser: Page, fill: Fill, logitstore: Any, tmp_path: Path) -> None:
    store = fill("store", HOSTILE)
    open_report(browser, logitstore, store.url, tmp_path / "page.html")
    assert browser.complaints == []
    assert browser.evaluate("document.title").startswith("What the teacher said")
    assert browser.evaluate("document.querySelectorAll('img, #tokens script').length") == 0
    texts = []
    for number in range(len(HOSTILE)):
        if number:
            browser.click("#next-record")
        text = browser.evaluate("document.querySelector('#tokens').innerText")
        texts.append(text.replace("‥", ""))  # stands for a token that ends a character of several
    assert HOSTILE[0] in texts[0]
    assert r"\u202egnirts\u202c, a bell \x07, nothing \u200b here" in texts[1]
    assert "&lt; &amp; ' \" \\ \\u2028 end" in texts[1]
    for word in ("Grüße", "東京", "שלום", "naïve"):
        assert word in texts[2]
    assert all("\u202e" not in text for text in texts)
    assert r"<b>0</b>\u202e.txt" in browser.evaluate("document.querySelector('#record').options[0].textContent")


def read_found(browser: Page) -> list[int]:
    return json.loads(
        browser.evaluate(
            "JSON.stringify([...document.querySelectorAll('#tokens .found')].map(one => Number(one.dataset.position)))"
        )
    )


def test_filters_find_the_positions_that_meet_them(browser: Page, fill: Fill, logitstore: Any, tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog and the Quick cat"
    store = fill("store", [text, "nothing of it"])
    open_report(browser, logitstore, store.url, tmp_path / "page.html")
    record = store[0]
    entropy = np.round(record.signal.entropy.astype(float), 2)
    surprise = np.round(-record.signal.next_token_logprob.astype(float), 2)
    browser.write_into("#min-entropy", "0.5")
    assert read_found(browser) == np.flatnonzero(entropy >= 0.5).tolist()
    browser.write_into("#max-surprise", "2")
    expected = np.flatnonzero((entropy >= 0.5) & (surprise <= 2)).tolist()
    assert 0 < len(expected) < record.num_positions
    assert read_found(browser) == expected
    found = browser.evaluate("document.querySelector('#found').textContent")
    assert found.startswith(f"{len(expected)} of {record.num_positions} positions in this record, ")
    browser.click("#clear")
    assert read_found(browser) == []
    browser.click("#is-other-first")
    slots = [list(record.signal.support_at(t)[0]).index(record.token_ids[t + 1]) if record.token_ids[t + 1] in
             record.signal.support_at(t)[0] else 99 for t in range(record.num_positions)]  # fmt: skip
    assert read_found(browser) == [t for t, slot in enumerate(slots) if slot]
    browser.click("#clear")
    browser.write_into("#wanted-text", "quick")
    pieces = browser.evaluate(
        "[...document.querySelectorAll('#tokens .found')].map(span => span.textContent).join('').replaceAll(' ', '')"
    )
    assert pieces.lower().replace("the", "").count("quick") == 2
    browser.click("#next-match")
    first = int(browser.evaluate("document.activeElement.dataset.position"))
    assert first == read_found(browser)[0]
    browser.press("p", "p")
    assert int(browser.evaluate("document.activeElement.dataset.position")) == read_found(browser)[-1]


def test_second_store_and_its_distance_stand_beside_the_first(
    browser: Page, fill: Fill, logitstore: Any, tmp_path: Path
) -> None:
    from logitstore.comparison import compare_signals
    from logitstore.records import RecordBatch

    text = ["def add(first, second):\n    return first + second\n"]
    first, second = fill("first", text), fill("second", text, seed=1)
    open_report(browser, logitstore, first.url, tmp_path / "page.html", "--against", second.url)
    assert browser.complaints == []
    kl = compare_signals(*(RecordBatch.from_records([store[0]]) for store in (first, second))).kl
    for position in (0, 3, first[0].num_positions - 1):
        panel = hover(browser, position)
        for side, store in enumerate((first, second)):
            _, shares, facts = compute_expected(store[0], position)
            assert {token: panel["candidates"][token][side] for token in shares} == shares
            assert {name: panel["facts"][name][side] for name in facts} == facts
        assert float(panel["facts"]["KL, nats"][1]) == pytest.approx(kl[position], rel=0.05)
    browser.write_into("#min-kl", str(np.median(kl)))
    assert len(read_found(browser)) == pytest.approx(len(kl) / 2, abs=3)
    browser.evaluate("(() => { const colour = document.querySelector('#colour');"
                     "colour.value = 'kl:1'; colour.dispatchEvent(new Event('change')); })()")  # fmt: skip
    assert browser.evaluate("document.querySelector('#legend').textContent").startswith("KL from the first, second")
    assert "most different positions" in browser.evaluate("document.querySelector('#stores').textContent")


def test_drawn_candidates_show_their_draws(browser: Page, fill: Fill, logitstore: Any, tmp_path: Path) -> None:
    store = fill("store", ["some text"], method=HeadTailMethod())
    open_report(browser, logitstore, store.url, tmp_path / "page.html", "--top", 50)
    record = store[0]
    panel = hover(browser, 0)
    ids, logprobs = record.signal.support_at(0)
    draws = record.signal.draws_at(0)
    assert draws is not None
    for token, logprob, count in zip(ids.tolist(), logprobs, draws, strict=True):
        expected = f"drawn ×{count}" if count else write_share(math.exp(float(logprob)))
        if str(token) in panel["candidates"]:
            assert panel["candidates"][str(token)] == [expected]
    assert any(cells[0].startswith("drawn") for cells in panel["candidates"].values())
    assert "drawn from" in panel["facts"]


def test_store_without_a_tokenizer_shows_ids(
    browser: Page, build_store: Callable[..., LogitStore], logitstore: Any, tmp_path: Path
) -> None:
    store = build_store()
    open_report(browser, logitstore, store.url, tmp_path / "page.html")
    text = browser.evaluate("document.querySelector('#tokens').textContent")
    number = next(number for number in range(len(store)) if str(store[number].address) == browser.evaluate(
        "document.querySelector('#record').options[0].textContent.split(' ')[0]"))  # fmt: skip
    assert text.endswith(" ".join(map(str, store[number].token_ids.tolist())) + " ")
    assert browser.complaints == []


def test_page_in_the_dark_and_in_a_narrow_window_is_readable(
    browser: Page, fill: Fill, logitstore: Any, tmp_path: Path
) -> None:
    open_report(browser, logitstore, fill("store", ["a few words " * 20]).url, tmp_path / "page.html")
    try:
        for width, dark in ((1280, True), (380, False)):
            browser.look(width=width, dark=dark)
            assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert browser.evaluate(
                "getComputedStyle(document.body).color !== getComputedStyle(document.body).backgroundColor"
            )
        browser.save_screenshot(tmp_path / "narrow.png", is_whole=True)
    finally:
        browser.look()


def test_letters_stand_out_from_every_colour_in_both_schemes(
    browser: Page, fill: Fill, logitstore: Any, tmp_path: Path
) -> None:
    open_report(browser, logitstore, fill("store", ["some\nlines\nof words\n" * 20]).url, tmp_path / "page.html")
    hover(browser, 3)
    try:
        for dark in (False, True):
            browser.look(dark=dark)
            # All of the text in the strongest colour, which no token of a made-up teacher may have.
            browser.evaluate("document.querySelectorAll('#tokens .token').forEach((one) => { one.dataset.level = 4; })")
            assert browser.evaluate(LEAST_CONTRAST) >= 4.5
    finally:
        browser.look()


def test_tails_of_a_kept_and_a_drawn_store_have_one_name(
    browser: Page, fill: Fill, logitstore: Any, tmp_path: Path
) -> None:
    second = fill("second", [], method=HeadTailMethod())
    first = fill("first", second)
    open_report(browser, logitstore, first.url, tmp_path / "page.html", "--against", second.url)
    assert "not kept" in hover(browser, 0)["facts"]
    assert "Probability not kept" in browser.evaluate("document.querySelector('#distributions').textContent")
