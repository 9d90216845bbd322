"use strict";
// The text view: shows one record at a time, and at the token that is pointed at or focused what was expected there.
(() => {
const FIRST_DRAWS = 32768, INFINITE = 65534, UNKNOWN = 65535;
// Bounds of the colours, as in the terminal for entropy: about 1, 3, 7, 20 equally likely tokens.
const LEVELS = {entropy: [0.3, 1, 2, 3], surprise: [0.5, 1.5, 3, 6], kl: [0.01, 0.05, 0.2, 1]};
const CONTEXT_TOKENS = 12, LABEL_CANDIDATES = 3;
const find = (id) => document.getElementById(id);
const numbers = new Float64Array(FIRST_DRAWS);
for (let code = 1; code < FIRST_DRAWS; code++) {
  const exponent = Math.floor((code - 1) / 900) - 17;
  numbers[code] = Number(`${100 + (code - 1) % 900}e${exponent}`);
}

function decode(code) {
  return code === UNKNOWN ? NaN : code === INFINITE ? Infinity : numbers[code];
}
// Two decimals, of three digits at most.
function writeNats(code) {
  if (code === UNKNOWN || code === INFINITE) return code === UNKNOWN ? "unknown" : "∞";
  return decode(code).toFixed(decode(code) < 10 ? 2 : 1);
}
// Three digits from 0.1 on, two below, as they were written.
function writeDigits(value, code) {
  return value.toPrecision(decode(code) < 0.1 ? 2 : 3);
}
function writeKl(code) {
  return code === UNKNOWN ? "unknown" : code === INFINITE ? "∞" : code === 0 ? "0" : writeDigits(decode(code), code);
}
function writeShare(code) {
  if (code === UNKNOWN) return "unknown";
  if (code >= FIRST_DRAWS) return `drawn ×${code - FIRST_DRAWS}`;
  return code === 0 ? "0 %" : code === 1 ? "<1e-13 %" : `${writeDigits(100 * decode(code), code)} %`;
}

// Base 85: five digits, the highest first, are four bytes.
const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%/()*+-;,=.?@^_`{|}~";
function unpack(text) {
  const colon = text.indexOf(":"), bytes = new Uint8Array((text.length - colon - 1) / 5 * 4);
  const values = new Uint8Array(128), view = new DataView(bytes.buffer);
  for (let i = 0; i < 85; i++) values[DIGITS.charCodeAt(i)] = i;
  for (let i = colon + 1, place = 0; i < text.length; place += 4) {
    let word = 0;
    for (let end = i + 5; i < end; i++) word = word * 85 + values[text.charCodeAt(i)];
    view.setUint32(place, word);
  }
  return bytes.subarray(0, Number(text.slice(0, colon)));
}

async function readPayload(text) {
  const stream = new Blob([unpack(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const headerBytes = new DataView(bytes.buffer).getUint32(0, true);
  const data = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + headerBytes)));
  let start = 4 + headerBytes;
  for (const {voice, name, bytes: width, length} of data.columns) {
    const values = new {1: Uint8Array, 2: Uint16Array, 4: Uint32Array}[width](length);
    for (let plane = 0; plane < width; plane++, start += length) {
      for (let i = 0; i < length; i++) values[i] += bytes[start + i] * 2 ** (8 * plane);
    }
    const owner = voice === null ? data : data.voices[voice], palette = owner[`${name}Palette`];
    owner[name] = palette ? values.map((place) => palette[place]) : values;
  }
  let positions = 0;
  for (const record of data.records) {
    record.start = positions;
    positions += record.positions;
    record.characters = new Map();
  }
  for (const [record, place, tokens, text] of data.characters) data.records[record].characters.set(place, {tokens, text});
  for (const voice of data.voices) {
    voice.offsets = new Uint32Array(positions + 1);
    for (let i = 0; i < positions; i++) voice.offsets[i + 1] = voice.offsets[i] + voice.counts[i];
  }
  data.positions = positions;
  return data;
}

function view(data) {
  const {records, voices, texts} = data, teacher = voices[0], further = voices.slice(1);
  const found = new Uint8Array(data.positions), foundIn = records.map(() => 0);
  let shown = 0, spans = [], current = null, isFiltered = false;

  // Tokens are places in the vocabulary; place 0 of a record's text is its first token, which nobody predicted.
  const nextToken = (position) => teacher.tokens[teacher.offsets[position] + teacher.nextSlots[position]];
  const tokenAt = (number, place) =>
    place === 0 ? data.firstTokens[number] : nextToken(records[number].start + place - 1);
  function nameToken(token) {
    const text = texts && texts[token];
    if (!text || text.includes("\ufffd")) return texts ? `<${data.vocabulary[token]}>` : String(data.vocabulary[token]);
    return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  }
  function listTexts(number) {
    const record = records[number];
    if (record.texts) return record.texts;
    record.texts = [];
    for (let place = 0; place <= record.positions; place++) {
      const character = record.characters.get(place);
      if (!character) {
        record.texts.push(texts ? texts[tokenAt(number, place)] : `${data.vocabulary[tokenAt(number, place)]} `);
        continue;
      }
      record.texts.push(character.text, ...Array(character.tokens - 1).fill(""));
      place += character.tokens - 1;
    }
    return record.texts;
  }
  function listCandidates(voice, position) {
    const start = voice.offsets[position];
    return Array.from({length: voice.counts[position]}, (_, slot) => ({
      token: voice.tokens[start + slot], code: voice.values[start + slot], isNext: slot === voice.nextSlots[position],
    }));
  }
  function getNextShare(voice, position) {
    return voice.nextValues[position] || voice.values[voice.offsets[position] + voice.nextSlots[position]];
  }

  // What is found.
  function readFilter() {
    const bound = (id, otherwise) => (find(id).value === "" ? otherwise : Number(find(id).value));
    const filter = {
      minEntropy: bound("min-entropy", -Infinity), maxEntropy: bound("max-entropy", Infinity),
      minSurprise: bound("min-surprise", -Infinity), maxSurprise: bound("max-surprise", Infinity),
      minKl: bound("min-kl", -Infinity), text: find("wanted-text").value, isOtherFirst: find("is-other-first").checked,
    };
    filter.isEmpty = !filter.text && !filter.isOtherFirst
      && ["min-entropy", "max-entropy", "min-surprise", "max-surprise", "min-kl"].every((id) => find(id).value === "");
    return filter;
  }
  const isWithin = (value, low, high) => (low === -Infinity && high === Infinity) || (value >= low && value <= high);
  function meets(filter, position) {
    return isWithin(decode(teacher.entropy[position]), filter.minEntropy, filter.maxEntropy)
      && isWithin(decode(teacher.surprise[position]), filter.minSurprise, filter.maxSurprise)
      && (filter.minKl === -Infinity || further.some((voice) => decode(voice.kl[position]) >= filter.minKl))
      && (!filter.isOtherFirst || teacher.nextSlots[position] !== 0);
  }
  function markText(number, text) {
    // Regular expressions know upper and lower case without changing lengths.
    const pattern = new RegExp(text.replace(/[\^$\\.*+?()[\]{}|/]/g, "\\$&"), "giu");
    const pieces = listTexts(number), marks = new Uint8Array(records[number].positions + 1);
    const ends = [];
    pieces.reduce((length, piece) => { ends.push(length + piece.length); return length + piece.length; }, 0);
    let place = 0;
    for (const match of pieces.join("").matchAll(pattern)) {
      while (ends[place] <= match.index) place++;
      for (let i = place; i < pieces.length && ends[i] - pieces[i].length < match.index + match[0].length; i++) marks[i] = 1;
    }
    return marks;
  }
  function applyFilter() {
    const filter = readFilter();
    isFiltered = !filter.isEmpty;
    records.forEach((record, number) => {
      const marks = filter.text ? markText(number, filter.text) : null;
      foundIn[number] = 0;
      for (let i = 0; i < record.positions; i++) {
        const position = record.start + i;
        found[position] = isFiltered && (!marks || marks[i + 1]) && meets(filter, position) ? 1 : 0;
        foundIn[number] += found[position];
      }
    });
    records.forEach((_, number) => { find("record").options[number].textContent = describeRecord(number); });
    markFound();
  }
  function markFound() {
    const all = foundIn.reduce((sum, count) => sum + count, 0), record = records[shown];
    find("tokens").classList.toggle("filtered", isFiltered);
    spans.forEach((span, i) => span.classList.toggle("found", found[record.start + i] === 1));
    find("found").textContent = !isFiltered ? "" : `${foundIn[shown].toLocaleString("en")} of ${
      record.positions.toLocaleString("en")} positions in this record, ${all.toLocaleString("en")} of ${
      data.positions.toLocaleString("en")} in all of the page's records`;
    find("previous-match").disabled = find("next-match").disabled = all === 0;
  }
  function goToFound(direction) {
    let position = records[shown].start + (current ?? (direction > 0 ? -1 : records[shown].positions));
    for (let tries = 0; tries < data.positions; tries++) {
      position = (position + direction + data.positions) % data.positions;
      if (!found[position]) continue;
      const number = records.findIndex((record) => position < record.start + record.positions);
      if (number !== shown) showRecord(number);
      select(position - records[number].start);
      return;
    }
  }

  // One record's text.
  function describeRecord(number) {
    const record = records[number], name = record.documents.length ? ` · ${record.documents[0][0]}` : "";
    const more = record.documents.length > 1 ? ` and ${record.documents.length - 1} more` : "";
    const hits = isFiltered ? ` · ${foundIn[number]} found` : "";
    return `${record.address}${name}${more} · ${record.positions} positions · ${writeNats(record.entropy)} nats${hits}`;
  }
  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }
  function fillToken(span, text) {
    const shownText = text === "" ? "‥" : text;
    shownText.split("\n").forEach((line, i) => {
      if (i) span.append(make("span", "break", "↵"), "\n");
      span.append(line);
    });
  }
  function describeDocument([name, start, offset, label]) {
    return `${name}${offset ? `, from its token ${offset}` : ""}${label ? `, label ${label}` : ""}`;
  }
  function showRecord(number) {
    shown = number;
    current = null;
    const record = records[number], pieces = listTexts(number), content = document.createDocumentFragment();
    spans = [];
    for (let place = 0; place <= record.positions; place++) {
      for (const part of record.documents.filter((one) => one[1] === place)) {
        const mark = make("span", "document", describeDocument(part));
        mark.setAttribute("role", "presentation");
        content.append(mark);
      }
      const span = make("span", place ? "token" : "first");
      fillToken(span, pieces[place]);
      span.setAttribute("role", place ? "option" : "presentation");
      if (place) {
        if (!data.isTaught[record.start + place - 1]) span.classList.add("untaught");
        span.tabIndex = -1;
        span.dataset.position = spans.length;
        spans.push(span);
      }
      content.append(span);
    }
    find("tokens").replaceChildren(content);
    find("tokens").scrollTop = 0;
    if (spans.length) spans[0].tabIndex = 0;
    find("record").selectedIndex = number;
    find("previous-record").disabled = number === 0;
    find("next-record").disabled = number === records.length - 1;
    colour();
    markFound();
  }
  function colour() {
    const [name, voice] = find("colour").value.split(":"), codes = voices[voice][name], bounds = LEVELS[name];
    spans.forEach((span, i) => {
      const value = decode(codes[records[shown].start + i]);
      const level = bounds.filter((bound) => value >= bound).length;
      span.dataset.level = Number.isNaN(value) ? "" : level;
    });
    const ranges = [`below ${bounds[0]}`, ...bounds.map((low, i) => i + 1 < bounds.length ? `${low} to ${bounds[i + 1]}` : `${low} and more`)];
    find("legend").replaceChildren(`${find("colour").selectedOptions[0].textContent}, nats: `, ...ranges.map((range, level) => {
      const key = make("span", "", range);
      key.dataset.level = level;
      return key;
    }));
    const extra = [make("span", "untaught", "dotted: not taught"), make("span", "", "‥ part of the character before it")];
    if (!data.isTaught.every((taught) => taught)) find("legend").append(extra[0]);
    if (data.characters.length) find("legend").append(extra[1]);
  }

  // What was expected at a position.
  function labelToken(i) {
    const position = records[shown].start + i;
    const first = listCandidates(teacher, position).slice(0, LABEL_CANDIDATES);
    const parts = first.map(({token, code}) => `${nameToken(token)} ${writeShare(code)}`);
    spans[i].setAttribute("aria-label", `${nameToken(nextToken(position))}: came next with ${
      writeShare(getNextShare(teacher, position))}, entropy ${writeNats(teacher.entropy[position])} nats; expected ${parts.join(", ")}`);
  }
  function buildRow(name, cells, className) {
    const row = make("tr", className), head = make("th", "", name);
    head.scope = "row";
    row.append(head, ...cells.map((cell) => make("td", "", cell)));
    return row;
  }
  // A tail is what is outside the support, or outside of what drawn supports keep.
  function nameTail(those) {
    const drawn = those.filter((voice) => voice.isDrawn).length;
    return drawn === 0 ? "outside the support" : drawn === those.length ? "drawn from" : "not kept";
  }
  function buildFacts(position) {
    const rows = [
      buildRow("came next with", voices.map((voice) => writeShare(getNextShare(voice, position)))),
      buildRow("surprise, nats", voices.map((voice) => writeNats(voice.surprise[position]))),
      buildRow("entropy, nats", voices.map((voice) => writeNats(voice.entropy[position]))),
    ];
    if (voices.some((voice) => voice.tail[position] !== UNKNOWN)) {
      const tails = voices.map((voice) => voice.tail[position] === UNKNOWN ? "–" : writeShare(voice.tail[position]));
      rows.push(buildRow(nameTail(voices.filter((voice) => voice.tail[position] !== UNKNOWN)), tails));
    }
    if (further.length) {
      rows.push(buildRow("KL, nats", ["–", ...further.map((voice) => writeKl(voice.kl[position]))]));
    }
    return rows;
  }
  function buildCandidates(position) {
    const rows = new Map();
    voices.forEach((voice, number) => {
      for (const {token, code, isNext} of listCandidates(voice, position)) {
        if (!rows.has(token)) rows.set(token, {codes: voices.map(() => null), isNext});
        rows.get(token).codes[number] = code;
      }
    });
    return Array.from(rows, ([token, {codes, isNext}]) => {
      const row = buildRow("", codes.map((code) => code === null ? "–" : writeShare(code)), isNext ? "candidate next" : "candidate");
      row.dataset.token = data.vocabulary[token];
      const name = make("bdi", "name", nameToken(token));
      row.cells[0].append(isNext ? "▸ " : "", name, make("span", "hidden-text", isNext ? " came next" : ""));
      codes.forEach((code, number) => {
        if (code === null || code >= FIRST_DRAWS) return;
        const bar = make("span", "share");
        bar.style.width = `${Math.min(100, 100 * decode(code))}%`;
        row.cells[number + 1].append(bar);
      });
      return row;
    });
  }
  function explain(i) {
    const record = records[shown], position = record.start + i;
    const before = listTexts(shown).slice(Math.max(0, i + 1 - CONTEXT_TOKENS), i + 1).join("");
    const context = make("p", "context", `…${before.replaceAll("\n", "↵")}`);
    const name = make("b", "name", `▸${nameToken(nextToken(position))}`);
    context.append(" ", name);
    const table = make("table"), head = make("thead"), body = make("tbody"), facts = make("tbody", "facts");
    head.append(buildRow("candidate", voices.map((voice) => voice.name)));
    for (const cell of head.rows[0].cells) cell.scope = "col";
    body.append(...buildCandidates(position));
    facts.append(...buildFacts(position));
    table.append(head, body, facts);
    const title = make("h3", "", `Position ${i} of record ${record.address}`);
    const untaught = data.isTaught[position] ? [] : [make("p", "", "Not taught: the loss mask leaves it out.")];
    find("panel").replaceChildren(title, context, ...untaught, table);
    find("panel").dataset.position = position;
  }
  function select(i) {
    const place = Math.max(0, Math.min(i, spans.length - 1));
    for (const span of spans) if (span.tabIndex === 0) span.tabIndex = -1;
    if (current !== null) spans[current].removeAttribute("aria-selected");
    current = place;
    spans[place].tabIndex = 0;
    spans[place].setAttribute("aria-selected", "true");
    labelToken(place);
    if (document.activeElement !== spans[place]) spans[place].focus();
    explain(place);
  }
  function findInLine(i, direction) {
    const here = spans[i];
    let best = i, line = null, distance = Infinity;
    for (let j = i + direction; j >= 0 && j < spans.length; j += direction) {
      const top = spans[j].offsetTop;
      if (Math.abs(top - here.offsetTop) < 4) continue;
      if (line !== null && Math.abs(top - line) >= 4) break;
      line ??= top;
      const away = Math.abs(spans[j].offsetLeft - here.offsetLeft);
      if (away < distance) [best, distance] = [j, away];
    }
    return best;
  }
  const moves = {
    ArrowRight: (i) => select(i + 1), ArrowLeft: (i) => select(i - 1),
    ArrowDown: (i) => select(findInLine(i, 1)), ArrowUp: (i) => select(findInLine(i, -1)),
    Home: () => select(0), End: () => select(spans.length - 1),
    n: () => goToFound(1), p: () => goToFound(-1),
    PageDown: () => turn(1), PageUp: () => turn(-1),
  };
  function turn(step) {
    const number = shown + step;
    if (number < 0 || number >= records.length) return;
    showRecord(number);
    select(0);
  }

  function listen() {
    const tokens = find("tokens");
    const locate = (event) => event.target.closest(".token")?.dataset.position;
    tokens.addEventListener("mouseover", (event) => {
      if (locate(event) !== undefined) explain(Number(locate(event)));
    });
    tokens.addEventListener("mouseleave", () => { if (current !== null) explain(current); });
    tokens.addEventListener("click", (event) => { if (locate(event) !== undefined) select(Number(locate(event))); });
    tokens.addEventListener("focusin", (event) => {
      if (locate(event) !== undefined && Number(locate(event)) !== current) select(Number(locate(event)));
    });
    tokens.addEventListener("keydown", (event) => {
      const move = moves[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      move(current ?? 0);
    });
    find("record").addEventListener("change", () => showRecord(find("record").selectedIndex));
    find("previous-record").addEventListener("click", () => showRecord(shown - 1));
    find("next-record").addEventListener("click", () => showRecord(shown + 1));
    find("colour").addEventListener("change", colour);
    find("filters").addEventListener("input", applyFilter);
    find("clear").addEventListener("click", () => {
      for (const input of find("filters").querySelectorAll("input")) {
        input.value = "";
        input.checked = false;
      }
      applyFilter();
    });
    find("previous-match").addEventListener("click", () => goToFound(-1));
    find("next-match").addEventListener("click", () => goToFound(1));
  }

  for (const [number, voice] of voices.entries()) {
    const kinds = [["entropy", "entropy"], ["surprise", "surprise"], ...(number ? [["kl", "KL from the first"]] : [])];
    for (const [name, title] of kinds) find("colour").append(new Option(`${title}, ${voice.name}`, `${name}:${number}`));
  }
  records.forEach((_, number) => find("record").append(new Option(describeRecord(number))));
  document.querySelector(".browser").classList.toggle("several", further.length > 0);
  for (const label of document.querySelectorAll(".further")) label.hidden = !further.length;
  find("text-view").hidden = false;
  listen();
  showRecord(0);
}

function fail(error) {
  find("failure").textContent = `The records cannot be shown: ${error.message ?? error}. `
    + "Browsers since 2023 can read them (they need DecompressionStream).";
  find("failure").hidden = false;
}
readPayload(find("payload").textContent).then(view).catch((error) => { fail(error); throw error; });
})();
