"use strict";
// The trajectory viewer. Data reaches the page as text nodes only (`el`), never as HTML.
(() => {
  const PAGE = 40;
  // KL in nats at which a shade begins; the last two also get a line below, for eyes that do not tell shades apart.
  const SHADES = [0.01, 0.03, 0.1, 0.3, 1, 3];
  const index = JSON.parse(document.getElementById("index").textContent);
  const { files, groups } = index;
  const root = document.getElementById("viewer");

  // As escaping.py: what would hide or reorder its surroundings is shown as what it is.
  const HIDDEN =
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
  const visible = (text) =>
    String(text).replace(HIDDEN, (character) => {
      const code = character.charCodeAt(0);
      return code < 32
        ? String.fromCharCode(0x2400 + code)
        : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
    });

  /** An element with attributes (a class under `class`, listeners under `on`) and children; strings become text. */
  function el(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "on") for (const [event, call] of Object.entries(value)) element.addEventListener(event, call);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, visible(value));
    }
    element.append(...children.flat().filter((child) => child != null && child !== false).map(asNode));
    return element;
  }
  const asNode = (child) => (child instanceof Node ? child : document.createTextNode(visible(child)));

  // Groups by file; an evaluation's groups are those that have an answer in it.
  const byFile = files.map(() => []);
  groups.forEach((group, number) => {
    group.number = number;
    group.needle = `${group.question}\n${group.id}`.toLowerCase();
    if (group.file != null) byFile[group.file].push(group);
    else for (const [file] of group.rows) byFile[file].push(group);
  });
  const isRight = (row) => row[1] >= 1;
  const rowAt = (group, file) => group.rows.find((row) => row[0] === file);
  const previousEvaluation = (file) => files.findLastIndex((f, i) => i < file && f.kind === "evaluation");

  function outcome(group, file) {
    const rows = group.file == null ? [rowAt(group, file)] : group.rows;
    const right = rows.filter(isRight).length;
    return right === rows.length ? "right" : right === 0 ? "wrong" : "mixed";
  }

  function change(group, file) {
    const now = rowAt(group, file);
    const before = rowAt(group, previousEvaluation(file));
    if (group.file != null || !now || !before) return null;
    return isRight(now) === isRight(before) ? "same" : isRight(now) ? "improved" : "worse";
  }

  // Chunks are unpacked when a group of theirs is opened; the last few stay.
  const unpacked = new Map();
  function chunk(number) {
    if (!unpacked.has(number)) {
      unpacked.set(number, unpack(number));
      if (unpacked.size > 12) unpacked.delete(unpacked.keys().next().value);
    }
    return unpacked.get(number);
  }
  async function unpack(number) {
    const id = `chunk-${number}`;
    if (document.readyState === "loading")
      await new Promise((ready) => document.addEventListener("DOMContentLoaded", ready, { once: true }));
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  // ---- the controls

  const controls = {};
  function choice(name, title, options) {
    controls[name] = el("select", { id: `filter-${name}`, on: { change: refilter } });
    setOptions(controls[name], options);
    return el("label", { for: `filter-${name}` }, title, controls[name]);
  }
  function setOptions(select, options) {
    const chosen = select.value;
    select.replaceChildren(...options.map(([value, text]) => el("option", { value }, text)));
    if (options.some(([value]) => value === chosen)) select.value = chosen;
  }

  const status = el("p", { id: "count", role: "status" });
  const list = el("ol", { id: "questions" });
  const pageOf = el("span", { id: "page" });
  const back = el("button", { type: "button", on: { click: () => turnTo(state.page - 1) } }, "‹ Previous");
  const on = el("button", { type: "button", on: { click: () => turnTo(state.page + 1) } }, "Next ›");
  const detail = el("div", { id: "detail", tabindex: "-1" });
  const hint = el("div", { id: "tip", role: "tooltip", hidden: true });
  const state = { file: 0, found: [], page: 0, group: null };

  function build() {
    const fileSelect = el("select", { id: "filter-file", on: { change: () => openFile(Number(controls.file.value)) } });
    controls.file = fileSelect;
    for (const [kind, title] of [["rollouts", "Rollouts (siblings)"], ["evaluation", "Evaluations"]]) {
      const options = files.map((f, i) => [f, i]).filter(([f, i]) => f.kind === kind && byFile[i].length);
      if (options.length)
        fileSelect.append(el("optgroup", { label: title }, options.map(([f, i]) => el("option", { value: i }, `${f.stage} ${kind}`))));
    }
    const search = el("input", { type: "search", id: "filter-text", autocomplete: "off", on: { input: refilter } });
    controls.text = search;
    controls.kl = el("input", { type: "checkbox", id: "filter-kl", on: { change: refilter } });
    const form = el(
      "form",
      { class: "filters", on: { submit: (event) => event.preventDefault() } },
      el("label", { for: "filter-file" }, "File", fileSelect),
      choice("outcome", "Outcome", []),
      choice("change", "Since the stage before", [
        ["", "any"], ["improved", "improved"], ["worse", "got worse"], ["same", "same"],
      ]),
      choice("hops", "Hops", []),
      choice("order", "Order", []),
      el("label", { for: "filter-text" }, "Question contains", search),
      el("label", { for: "filter-kl", class: "check" }, controls.kl, "has token KL"),
    );
    root.replaceChildren(
      form,
      el(
        "div",
        { class: "panes" },
        el(
          "div",
          { class: "pane" },
          status,
          list,
          el("div", { class: "pager" }, back, pageOf, on),
        ),
        detail,
      ),
      hint,
    );
  }

  function openFile(file) {
    state.file = file;
    controls.file.value = String(file);
    const evaluation = files[file].kind === "evaluation";
    setOptions(controls.outcome, [
      ["", "any"], ["right", evaluation ? "right" : "all right"], ["wrong", evaluation ? "wrong" : "all wrong"],
      ...(evaluation ? [] : [["mixed", "mixed"]]),
    ]);
    controls.change.disabled = !evaluation || previousEvaluation(file) < 0;
    if (controls.change.disabled) controls.change.value = "";
    const hops = [...new Set(byFile[file].map((group) => group.hops).filter((h) => h != null))].sort();
    setOptions(controls.hops, [["", "any"], ...hops.map((h) => [h, h])]);
    controls.hops.disabled = hops.length === 0;
    const withKl = byFile[file].some((group) => group.kl != null);
    controls.kl.disabled = !withKl;
    if (!withKl) controls.kl.checked = false;
    setOptions(controls.order, [
      ...(withKl ? [["kl", "highest KL first"]] : []), ["file", "as in the file"], ["searches", "most searches first"],
    ]);
    refilter();
  }

  function refilter() {
    const { file } = state;
    const wanted = { outcome: controls.outcome.value, change: controls.change.value, hops: controls.hops.value };
    const needle = controls.text.value.trim().toLowerCase();
    state.found = byFile[file].filter(
      (group) =>
        (!wanted.outcome || outcome(group, file) === wanted.outcome) &&
        (!wanted.change || change(group, file) === wanted.change) &&
        (!wanted.hops || group.hops === wanted.hops) &&
        (!controls.kl.checked || group.kl != null) &&
        (!needle || group.needle.includes(needle)),
    );
    const order = controls.order.value;
    const searches = (group) =>
      group.file == null ? rowAt(group, file)[2] : Math.max(...group.rows.map((row) => row[2]));
    if (order === "kl") state.found.sort((a, b) => (b.kl ?? -1) - (a.kl ?? -1));
    if (order === "searches") state.found.sort((a, b) => searches(b) - searches(a));
    const total = byFile[file].length;
    status.textContent = `${state.found.length} of ${total} question${total === 1 ? "" : "s"}`;
    turnTo(0);
    // What is open stays open if it is among them; of an evaluation, another stage may be the one looked at.
    if (state.found.length) select(state.found.includes(state.group) ? state.group : state.found[0], false);
  }

  // ---- the list

  const badge = (kind, text) => el("span", { class: `badge ${kind}` }, text);
  const CHANGES = { improved: "improved", worse: "got worse" };

  function item(group) {
    const { file } = state;
    const badges = [];
    if (group.file == null) {
      const row = rowAt(group, file);
      badges.push(badge(isRight(row) ? "right" : "wrong", isRight(row) ? "right" : "wrong"));
      const changed = CHANGES[change(group, file)];
      if (changed) badges.push(badge(change(group, file), changed));
      badges.push(badge("", count(row[2], "search", "searches")));
    } else {
      badges.push(badge(outcome(group, file), `${group.rows.filter(isRight).length}/${group.rows.length} right`));
      const searches = group.rows.map((row) => row[2]);
      const [low, high] = [Math.min(...searches), Math.max(...searches)];
      badges.push(badge("", low === high ? count(low, "search", "searches") : `${low}–${high} searches`));
    }
    if (group.hops != null) badges.push(badge("", `${group.hops} hop${group.hops === "1" ? "" : "s"}`));
    if (group.kl != null) badges.push(badge(`kl k${shade(group.kl)}`, `KL ${group.kl.toFixed(2)}`));
    const current = group === state.group;
    return el(
      "li",
      {},
      el(
        "button",
        { type: "button", "aria-current": current ? "true" : null, on: { click: () => select(group, true) } },
        el("span", { class: "question", dir: "auto" }, group.question),
        el("span", { class: "badges" }, badges),
      ),
    );
  }
  const count = (n, one, many) => `${n} ${n === 1 ? one : many}`;

  function turnTo(page) {
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    state.page = Math.min(Math.max(page, 0), pages - 1);
    list.replaceChildren(...state.found.slice(state.page * PAGE, (state.page + 1) * PAGE).map(item));
    list.scrollTop = 0;
    pageOf.textContent = `page ${state.page + 1} of ${pages}`;
    back.disabled = state.page === 0;
    on.disabled = state.page === pages - 1;
  }

  // ---- one question

  const address = (group) =>
    `#trajectory=${[files[state.file].name, group.id, group.visit].map((part) => encodeURIComponent(String(part).toWellFormed())).join("/")}`;

  function select(group, byUser) {
    state.group = group;
    for (const button of list.querySelectorAll("button")) button.removeAttribute("aria-current");
    const place = state.found.indexOf(group);
    const shown = place - state.page * PAGE;
    if (place >= 0 && shown >= 0 && shown < PAGE)
      list.children[shown].firstElementChild.setAttribute("aria-current", "true");
    if (byUser && location.hash !== address(group)) location.hash = address(group);
    return show(group, byUser);
  }

  function fromAddress() {
    const match = /^#trajectory=([^/]+)\/([^/]+)\/(\d+)$/.exec(location.hash);
    if (!match) return false;
    let name, id;
    try {
      [name, id] = [decodeURIComponent(match[1]), decodeURIComponent(match[2])];
    } catch {
      return false;
    }
    const file = files.findIndex((f) => f.name === name);
    const group = file >= 0 && byFile[file].find((g) => g.id === id && g.visit === Number(match[3]));
    if (!group) return false;
    if (group === state.group && file === state.file) return true;
    if (file !== state.file) openFile(file);
    const place = state.found.indexOf(group);
    if (place >= 0) turnTo(Math.floor(place / PAGE));
    select(group, false);
    root.scrollIntoView();
    return true;
  }

  function step(by) {
    const place = state.found.indexOf(state.group);
    const next = state.found[place < 0 ? 0 : place + by];
    if (!next) return;
    const page = Math.floor((place + by) / PAGE);
    if (page !== state.page) turnTo(page);
    select(next, true);
  }

  async function show(group, byUser) {
    let data;
    try {
      data = await chunk(group.chunk);
    } catch (error) {
      detail.replaceChildren(el("p", { class: "failed" }, `This question cannot be unpacked: ${error}`));
      return;
    }
    if (group !== state.group) return; // another was chosen meanwhile
    const { golds, metadata, trajectories } = data.groups[group.place];
    const facts = Object.entries(metadata && typeof metadata === "object" ? metadata : {});
    const evaluation = group.file == null;
    const columns = evaluation ? trajectories : [...trajectories].sort(bySibling);
    const hasKl = columns.some((t) => t.kl);
    const mover = (by, text) => el("button", { type: "button", on: { click: () => step(by) } }, text);
    const track = el(
      "div",
      { class: "columns", tabindex: "0", role: "group", "aria-label": "Trajectories side by side" },
      columns.map((t, i) => column(t, data.passages, evaluation ? columns[i - 1] : null, evaluation)),
    );
    detail.replaceChildren(
      el("div", { class: "movers" }, mover(-1, "‹ Previous question"), mover(1, "Next question ›")),
      el("h3", { dir: "auto" }, group.question),
      el(
        "p",
        { class: "golds", dir: "auto" },
        el("b", {}, "Right: "),
        golds.map((gold, i) => [i ? " or " : "", el("q", {}, gold)]).flat(),
      ),
      el(
        "p",
        { class: "meta" },
        [["id", group.id], ...facts].map(([key, value]) =>
          el("span", {}, `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`),
        ),
      ),
      ...(hasKl ? [legend()] : []),
      track,
    );
    const here = evaluation && track.querySelector(".here");
    if (here) track.scrollLeft = here.offsetLeft - track.offsetLeft - 24;
    if (byUser && detail.getBoundingClientRect().top > innerHeight * 0.6) {
      detail.scrollIntoView({ block: "start" });
      detail.focus({ preventScroll: true });
    }
  }

  const ROLES = ["reference", "student"];
  /** The reference, the student, then right before wrong and few searches before many. */
  function bySibling(a, b) {
    const rank = (t) => (ROLES.includes(t.role) ? ROLES.indexOf(t.role) : ROLES.length);
    return (
      rank(a) - rank(b) || b.reward - a.reward || a.searches.length - b.searches.length ||
      a.tokens - b.tokens || a.sample - b.sample
    );
  }

  const shade = (kl) => SHADES.filter((limit) => kl >= limit).length;

  function legend() {
    const steps = SHADES.map((limit, i) => el("span", { class: `k${i + 1}` }, `${limit}`));
    return el(
      "p",
      { class: "legend" },
      "KL(teacher‖student) at each token, nats from: ",
      el("span", { class: "scale" }, el("span", { class: "k0" }, "0"), steps),
      el("span", { class: "how" }, " Point at a token, tap it, or go along with the arrow keys."),
    );
  }

  const STOPPED = {
    answer: "answered", end: "ended without an answer", turn_budget: "turns used up", token_budget: "tokens used up",
  };

  function column(t, passages, before, evaluation) {
    const right = t.reward >= 1;
    const title = evaluation ? files[t.file].stage : `sample ${t.sample}`;
    const changed = before && right !== before.reward >= 1 ? (right ? "improved" : "worse") : null;
    const values = t.kl ? t.kl.flatMap(([, kl]) => kl).filter((value) => value != null) : [];
    const here = evaluation && t.file === state.file;
    const body = [];
    let searched = 0;
    t.turns.forEach(([kind, text], turn) => {
      body.push(el("div", { class: "said" }, t.kl ? tokens(t.kl[turn]) : tagged(text)));
      if (kind === "search" && searched < t.searches.length) body.push(found(t.searches[searched++], passages));
      else if (kind === "search") body.push(aside("No search was made: none were left, or the episode had ended."));
      else if (kind === "invalid") body.push(aside("Neither a search nor an answer."));
    });
    return el(
      "article",
      { class: `column${here ? " here" : ""}${t.role ? ` ${ROLES.includes(t.role) ? t.role : "sibling"}` : ""}` },
      el(
        "header",
        {},
        el("h4", {}, title),
        ROLES.includes(t.role) && badge(`role ${t.role}`, t.role),
        badge(right ? "right" : "wrong", right ? "right" : "wrong"),
        changed && badge(changed, CHANGES[changed]),
        el(
          "p",
          { class: "sum" },
          `reward ${t.reward}, F1 ${t.f1.toFixed(2)}, ${count(t.searches.length, "search", "searches")}, ` +
            `${t.tokens} tokens, ${STOPPED[t.stopped] ?? t.stopped}` +
            (values.length ? `, mean KL ${(values.reduce((a, b) => a + b, 0) / values.length).toFixed(3)} nats` : ""),
        ),
      ),
      body,
      el(
        "p",
        { class: `answer ${right ? "right" : "wrong"}`, dir: "auto" },
        el("b", {}, "Answer: "),
        t.answer == null ? el("i", {}, "none") : t.answer,
      ),
    );
  }
  const aside = (text) => el("p", { class: "aside" }, text);

  /** Model-written text without KL; its tags are set apart. */
  const tagged = (text) =>
    text.split(/(<\/?(?:think|search|answer)>)/).map((part, i) => (i % 2 ? el("span", { class: "tag" }, part) : part));

  function found([query, hits, failed], passages) {
    const documents = hits.map(([number, score], rank) => {
      const [title, text] = passages[number];
      return el(
        "li",
        {},
        el("b", { dir: "auto" }, title || "(no title)"),
        score != null && el("small", {}, ` ${score}`),
        el("p", { dir: "auto" }, text),
      );
    });
    const titles = failed
      ? `the search failed: ${failed}`
      : hits.map(([number]) => passages[number][0]).join(" · ") || "nothing found";
    return el(
      "details",
      { class: "found" },
      el(
        "summary",
        {},
        el("span", { class: "query", dir: "auto" }, query),
        el("span", { class: "titles", dir: "auto" }, titles),
      ),
      el("ol", {}, documents),
    );
  }

  // ---- tokens: one of each text can be tabbed to, arrow keys go along

  const told = new WeakMap();

  /** Spans of a turn's tokens. Pieces that are empty, parts of one character, go with the next that is not. */
  function tokens([pieces, kls, teachers]) {
    const spans = [];
    let held = [];
    pieces.forEach((piece, i) => {
      held.push([kls[i], teachers[i]]);
      if (piece === "" && i < pieces.length - 1) return;
      const most = Math.max(0, ...held.map(([kl]) => kl ?? 0));
      const span = el("span", { class: `token k${shade(most)}`, tabindex: spans.length ? "-1" : "0" }, piece);
      told.set(span, held);
      spans.push(span);
      held = [];
    });
    return spans;
  }

  const describe = (span) =>
    told
      .get(span)
      .map(([kl, teacher]) => `KL ${kl == null ? "unknown" : kl.toFixed(2)} nats, teacher: '${teacher}'`)
      .join("\n");

  function tell(span) {
    hint.textContent = visible(describe(span));
    hint.hidden = false;
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { width, height } = hint.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left), innerWidth - width - 8);
    hint.style.left = `${Math.max(8, left)}px`;
    hint.style.top = `${at.top - height - 6 < 0 ? at.bottom + 6 : at.top - height - 6}px`;
    span.setAttribute("aria-describedby", "tip");
  }
  function hush() {
    hint.hidden = true;
    document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
  }
  const tokenOf = (event) => (event.target instanceof Element ? event.target.closest(".token") : null);

  detail.addEventListener("pointerover", (event) => {
    const span = tokenOf(event);
    hush();
    if (span) tell(span);
  });
  detail.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hush());
  detail.addEventListener("focusin", (event) => {
    const span = tokenOf(event);
    if (span) tell(span);
  });
  detail.addEventListener("focusout", hush);
  detail.addEventListener("click", (event) => {
    const span = tokenOf(event);
    if (span) moveTo(span, span);
  });
  function moveTo(span, from) {
    for (const other of from.closest(".said").querySelectorAll('[tabindex="0"]')) other.setAttribute("tabindex", "-1");
    span.setAttribute("tabindex", "0");
    span.focus({ preventScroll: span === from });
    tell(span);
  }
  detail.addEventListener("keydown", (event) => {
    const span = tokenOf(event);
    if (!span) return;
    if (event.key === "Escape") return hush();
    const all = [...span.closest(".column").querySelectorAll(".token")];
    const to = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = to && all[all.indexOf(span) + to];
    if (!next) return;
    event.preventDefault();
    if (next.closest(".said") !== span.closest(".said")) {
      const first = span.closest(".said").querySelector(".token");
      span.setAttribute("tabindex", "-1");
      first.setAttribute("tabindex", "0");
    }
    moveTo(next, next);
  });
  addEventListener("scroll", hush, { passive: true, capture: true });
  addEventListener("hashchange", fromAddress);

  build();
  const withKl = files.findIndex((f, i) => byFile[i].some((group) => group.kl != null));
  const filled = files.findLastIndex((f, i) => byFile[i].length > 0);
  openFile(withKl >= 0 ? withKl : filled);
  fromAddress();
})();
