// The page of `ask --web`. What documents, policy and people wrote reaches the page as text nodes and nothing else.
// A link fills its question in and no more: following somebody's link must not make this machine compute.

const find = (id) => document.getElementById(id);
const box = find("question");
const NAMES = ["k", "max_searches", "temperature", "seed"];
const KEY = "searche1-lite token";

const earlier = []; // questions of this tab, the oldest first
const saved = []; // what `ask --json` would have given for them
let place = 0; // in `earlier`, of what the box shows; its length: what was not asked yet
let draft = "";
let session = null;
let running = null; // the AbortController of the answer that is being given

function make(tag, className, text, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined && text !== null) {
    element.textContent = text;
    element.dir = "auto";
  }
  element.append(...children);
  return element;
}

function quoted({ before, match, after }) {
  const element = make("q", "", null, before, make("mark", "", match), after);
  element.dir = "auto";
  return element;
}

function say(text, failed = false) {
  find("status").textContent = text;
  find("status").classList.toggle("failed", failed);
}

function call(path, options = {}) {
  const token = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  return fetch(path, { ...options, headers, cache: "no-store" });
}

async function reason(response) {
  try {
    return (await response.json()).error ?? `status ${response.status}`;
  } catch {
    return `status ${response.status}`;
  }
}

async function begin() {
  let response;
  try {
    response = await call("api/session");
  } catch {
    return say("The server does not answer; is it still running?", true);
  }
  const locked = response.status === 401;
  find("unlock").hidden = !locked;
  find("form").inert = locked;
  if (locked) {
    if (sessionStorage.getItem(KEY)) say("That is not the token.", true);
    sessionStorage.removeItem(KEY);
    return find("token").focus();
  }
  if (!response.ok) return say(await reason(response), true);
  say("");
  session = await response.json();
  const facts = { Model: session.model, Search: session.retriever };
  find("facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) => make("div", "", null, make("dt", "", name), make("dd", "", value))),
  );
  find("adapter-row").hidden = find("compare").hidden = session.adapter === null;
  find("adapter-name").textContent = session.adapter ?? "";
  defaults();
  fillIn();
}

function defaults() {
  for (const name of NAMES) find(name).value = session.settings[name];
  if (session.sample) find("question").placeholder = `For instance: ${session.sample}`;
  summarise();
}

function summarise() {
  const number = (name) => find(name).value || "?";
  find("settings-now").textContent =
    `k ${number("k")}, at most ${number("max_searches")} searches, ` +
    (Number(find("temperature").value) === 0 ? "greedy" : `temperature ${number("temperature")}, seed ${number("seed")}`);
}

function fillIn() {
  const wanted = new URLSearchParams(location.hash.slice(1)).get("q");
  if (wanted === null) return;
  box.value = wanted;
  box.focus();
  say("The link's question is filled in; Enter asks it.");
}

const link = (question) => `#q=${encodeURIComponent(question)}`;

function setRunning(controller) {
  if (running && !controller && document.activeElement === find("stop")) box.focus();
  running = controller;
  find("stop").disabled = !controller;
  // Not `disabled`, which would take the focus away from who asks by keyboard.
  for (const id of ["ask", "compare"]) find(id).setAttribute("aria-disabled", Boolean(controller));
}

async function ask(compare) {
  if (running || !session) return;
  const invalid = NAMES.map(find).find((input) => !input.checkValidity());
  if (invalid) {
    find("settings").open = true;
    invalid.focus();
    return say(`${invalid.parentElement.textContent.trim()}: ${invalid.validationMessage}`, true);
  }
  const question = box.value.split(/\s+/).join(" ").trim();
  const settings = Object.fromEntries(NAMES.map((name) => [name, Number(find(name).value)]));
  const adapter = find("adapter").checked;
  const controller = new AbortController();
  setRunning(controller);
  say(compare ? "Answering twice …" : "Answering …");
  let view = null;
  try {
    const response = await call("api/ask", {
      method: "POST",
      signal: controller.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ question: box.value, ...settings, adapter, compare }),
    });
    if (response.status === 401) begin();
    if (!response.ok) return say(await reason(response), true);
    remember(question);
    view = new View(question, settings, adapter, compare);
    for await (const note of notes(response.body)) view.take(note);
    view.end();
  } catch (error) {
    if (error.name === "AbortError") {
      say("Stopped.");
      view?.fail("Stopped.");
    } else {
      const lost = "The connection was lost; is the server still running?";
      say(lost, true);
      view?.fail(lost);
    }
  } finally {
    setRunning(null);
  }
}

async function* notes(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

function remember(question) {
  if (earlier.at(-1) !== question) earlier.push(question);
  place = earlier.length - 1; // it is still in the box, selected, so that typing begins the next one
  draft = "";
  if (document.activeElement === box) box.select(); // it would take the focus from a button otherwise
  history.replaceState(null, "", link(question));
}

function recall(step) {
  if (place === earlier.length) draft = box.value;
  place = Math.min(Math.max(place + step, 0), earlier.length);
  box.value = earlier[place] ?? draft;
  box.setSelectionRange(box.value.length, box.value.length);
}

class View {
  // One question, its answer or its two, from top to bottom as they come.
  constructor(question, settings, adapter, compare) {
    this.question = question;
    this.compare = compare;
    this.records = [];
    const by = compare || session.adapter === null ? "" : adapter ? `adapter ${session.adapter}; ` : "base; ";
    const how = `${by}k=${settings.k}, max_searches=${settings.max_searches}, temperature=${settings.temperature}` +
      (settings.temperature ? `, seed=${settings.seed}` : "");
    const again = make("button", "", "Ask again");
    again.type = "button";
    again.addEventListener("click", () => {
      box.value = question;
      box.focus();
    });
    const anchor = make("a", "", "Link to this question");
    anchor.href = link(question);
    this.columns = make("div", "columns");
    this.article = make("article", "busy", null,
      make("header", "", null,
        make("h3", "", question), make("div", "how", null, make("span", "", how), again, anchor)),
      this.columns);
    find("list").prepend(this.article);
    find("bar").hidden = false;
  }

  take(note) {
    const act = {
      waiting: () => this.wait(note.ahead),
      began: () => this.begin(note.side),
      reasoned: () => this.reasoned(note.text),
      searched: () => this.searched(note.query),
      found: () => this.found(note.passages, note.failed),
      told: () => this.step(make("li", "told", note.text)),
      answer: () => this.answer(note),
      stopped: () => this.fail("Stopped."),
      error: () => {
        say(note.error, true);
        this.fail(note.error);
      },
    }[note.type];
    act?.();
  }

  wait(ahead) {
    this.waiting = make("p", "answer none", ahead === 1
      ? "Waiting: one question is being answered first."
      : `Waiting: ${ahead} questions are answered first.`);
    this.columns.append(this.waiting);
    say(this.waiting.textContent);
  }

  begin(side) {
    this.waiting?.remove();
    this.trace = make("ol", "trace");
    this.column = make("section", "column", null, this.trace);
    if (this.compare) {
      const name = side === "base" ? "Base" : `Adapter ${session.adapter}`;
      this.column.prepend(make("h4", "", name));
      this.column.setAttribute("aria-label", name);
    }
    this.thought = null;
    this.columns.append(this.column);
    say(this.compare ? `Answering: ${side} …` : "Answering …");
  }

  step(element) {
    this.thought = null;
    this.trace.append(element);
  }

  reasoned(text) {
    if (!this.thought) {
      if (!text.trim()) return;
      const thought = make("li", "thought", "");
      this.step(thought);
      this.thought = thought;
      text = text.trimStart();
    }
    this.thought.append(text);
  }

  searched(query) {
    this.search = make("li", "search", null, make("p", "", null, make("span", "query", query)));
    this.step(this.search);
    say(`Searching: ${query}`);
  }

  found(passages, failed) {
    if (failed || !passages.length) {
      this.search.append(make("small", failed ? "failed" : "", failed ? `the search failed: ${failed}` : "nothing found"));
      return;
    }
    const counts = new Map();
    for (const { title, id } of passages) counts.set(title || `[${id}]`, (counts.get(title || `[${id}]`) ?? 0) + 1);
    const titles = [...counts].map(([title, count]) => (count > 1 ? `${title} (×${count})` : title)).join(", ");
    const list = make("ol", "", null, ...passages.map(({ id, title, text }) =>
      make("li", "", null, make("b", "", title), " ", make("small", "", `[${id}]`), make("p", "", text))));
    this.search.append(make("details", "", null, make("summary", "", `found ${titles}`), list));
  }

  answer(note) {
    const parts = [];
    if (note.answer === null) parts.push(make("p", "answer none", `No answer: ${note.why_not}.`));
    else parts.push(make("p", "answer", note.answer));
    if (note.sources.length) {
      parts.push(make("ol", "sources", null, ...note.sources.map((source) =>
        make("li", "", null, make("b", "", source.title), " ", make("small", "", `[${source.id}]`), quoted(source)))));
    } else if (note.why_no_source) parts.push(make("p", "without", `No source: ${note.why_no_source}.`));
    parts.push(make("p", "figures", note.figures));
    parts.push(make("details", "written", null, make("summary", "", "All that was written"), make("pre", "", note.text)));
    this.column.append(...parts);
    this.records.push(note.record);
    say(note.answer === null ? `No answer: ${note.why_not}.` : `Answer: ${note.answer}`);
  }

  end() {
    this.article.classList.remove("busy");
    const [first, second] = this.records;
    if (this.compare && second) saved.push({ question: first.question, base: first, adapter: second });
    else if (!this.compare && first) saved.push(first);
  }

  fail(message) {
    this.waiting?.remove();
    this.article.classList.remove("busy");
    (this.column ?? this.columns).append(make("p", "answer broken", message));
  }
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(false);
});
find("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, find("token").value);
  find("token").value = "";
  begin();
});
find("compare").addEventListener("click", () => ask(true));
find("stop").addEventListener("click", () => running?.abort());
find("defaults").addEventListener("click", defaults);
find("settings").addEventListener("input", summarise);
find("save").addEventListener("click", () => {
  if (!saved.length) return say("There is no answer to save yet.");
  const lines = saved.map((record) => `${JSON.stringify(record)}\n`);
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  anchor.download = "answers.jsonl";
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 60_000);
});
box.addEventListener("keydown", (event) => {
  if (event.isComposing || event.ctrlKey || event.altKey || event.metaKey) return;
  const atStart = box.selectionStart === 0 && box.selectionEnd === 0;
  const recalled = place < earlier.length && box.value === earlier[place];
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    ask(false);
  } else if (event.key === "ArrowUp" && earlier.length && (atStart || recalled || wholeSelected())) {
    event.preventDefault();
    recall(-1);
  } else if (event.key === "ArrowDown" && recalled) {
    event.preventDefault();
    recall(1);
  }
});
const wholeSelected = () => box.value && box.selectionStart === 0 && box.selectionEnd === box.value.length;
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
addEventListener("hashchange", fillIn);
begin();
