"use strict";
/* Shared by the views: elements, the model in its worker, token lists, tabs.

Text of the model folder is inserted only as text nodes and attributes, never as markup. */

const page = JSON.parse(document.getElementById("data").textContent);
const tokenizer = new Tokenizer(page.tokenizer);
const byId = (id) => document.getElementById(id);
const integer = (n) => n.toLocaleString("en");

// -- elements ----------------------------------------------------------------------------------------------------------

// element("p.note", { title: "…", onclick: … }, "text", child): properties that start with "on" are listeners, "--" variables.
function element(selector, properties = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  return filled(document.createElement(tag), classes, properties, children);
}

function svg(selector, properties = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), classes, properties, children);
}

function filled(node, classes, properties, children) {
  if (classes.length) node.classList.add(...classes);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (typeof value === "boolean" && !name.startsWith("aria-")) node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat());
  return node;
}

// A slider with its label and value, bound to `target[name]`.
function slider(label, target, name, { min, max, step, value, format = String, onchange = () => {} }) {
  const output = element("output");
  const input = element("input", { type: "range", min, max, step, value });
  const show = () => {
    output.textContent = format(target[name]);
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", () => {
    target[name] = Number(input.value);
    show();
    onchange();
  });
  target[name] = value; // exactly; the input rounds it to a step and limits it to its range
  show();
  return element("label.slider", {}, element("span", {}, label), input, output); // a label names its first control
}

// -- numbers and tokens ------------------------------------------------------------------------------------------------

function percent(p) {
  if (p >= 0.9995) return "100 %";
  if (p >= 0.0995) return `${(100 * p).toFixed(0)} %`;
  if (p < 0.000095) return "< 0.01 %";
  return p >= 0.00095 ? `${(100 * p).toFixed(1)} %` : `${(100 * p).toFixed(2)} %`;
}

const bits = (p) => -Math.log2(p);
// Surprisal on a scale from 0 (certain) to 1 (8 bits or more): the strength of the shading.
const heat = (p) => Math.min(1, bits(p) / 8);

// A visible name of one token: white space as symbols, incomplete UTF-8 as hexadecimal bytes.
function tokenLabel(id) {
  if (tokenizer.tokens[id] == null) return `[${id}]`;
  if (tokenizer.special.has(id)) return tokenizer.tokens[id];
  const bytes = tokenizer.bytes(id);
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return text.replace(/ /g, "␣").replace(/\r?\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍") || "∅";
  } catch {
    return `⟨${Array.from(bytes, (byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ")}⟩`;
  }
}

// Decodes token after token: a character appears with the last of its bytes.
function tokenDecoder() {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return (id) => (tokenizer.special.has(id) ? "" : decoder.decode(tokenizer.bytes(id), { stream: true }));
}

/* Text as a list of selectable tokens, with one tab stop: arrow keys, Home and End move the selection.
   A token: { id, p (probability, or undefined), isPrompt }, or { id, share (shading from 0 to 1), note }. */
class TokenList {
  constructor(node, label, onselect) {
    Object.assign(this, { node, onselect, tokens: [], selected: -1, decode: tokenDecoder() });
    filled(
      node,
      ["tokens"],
      { role: "listbox", tabindex: "0", "aria-label": label, "aria-orientation": "horizontal" },
      [],
    );
    node.addEventListener("click", (event) => {
      const option = event.target.closest("[role=option]");
      if (option) this.select([...this.node.children].indexOf(option));
    });
    node.addEventListener("keydown", (event) => {
      const last = this.tokens.length - 1;
      const moves = { ArrowLeft: this.selected - 1, ArrowRight: this.selected + 1, Home: 0, End: last };
      if (!(event.key in moves) || last < 0) return;
      event.preventDefault();
      this.select(Math.min(Math.max(moves[event.key], 0), last));
    });
  }

  append(tokens) {
    for (const token of tokens) {
      const [text, label] = [this.decode(token.id), tokenLabel(token.id)];
      const option = element("span.token", {
        role: "option",
        "aria-selected": "false",
        id: `${this.node.id}-${this.tokens.length}`,
      });
      if (!text) option.dataset.label = label;
      // A visible symbol before each line ending, which is not part of the text when it is copied.
      text.split(/(\r?\n)/).forEach((part, i) => option.append(...(i % 2 ? [element("span.line-end"), part] : [part])));
      if (token.isPrompt) option.classList.add("prompt");
      if (token.p !== undefined) {
        option.style.setProperty("--heat-share", heat(token.p).toFixed(3));
        option.title = `${label}   ${percent(token.p)}   ${bits(token.p).toFixed(2)} bits`;
      } else if (token.share !== undefined) {
        option.style.setProperty("--heat-share", token.share.toFixed(3));
        option.title = `${label}   ${token.note}`;
      } else {
        option.title = `${label}   id ${token.id}`;
      }
      option.setAttribute("aria-label", option.title);
      this.node.append(option);
      this.tokens.push(token);
    }
  }

  set(tokens) {
    this.node.replaceChildren();
    this.node.removeAttribute("aria-activedescendant");
    Object.assign(this, { tokens: [], selected: -1, decode: tokenDecoder() });
    this.append(tokens);
  }

  select(index, notify = true) {
    this.node.children[this.selected]?.setAttribute("aria-selected", "false");
    this.selected = index;
    const option = this.node.children[index];
    if (!option) return;
    option.setAttribute("aria-selected", "true");
    this.node.setAttribute("aria-activedescendant", option.id);
    if (notify) this.onselect(index, this.tokens[index]);
  }
}

// A row of a list of probabilities; `mark` is the value before an ablation, `onclick` makes it a button.
function probabilityRow(id, p, { mark, onclick, isChosen = false, text = percent(p), share = p } = {}) {
  const bar = element("span.bar", { "--share": Math.max(0, share).toFixed(4) });
  if (mark !== undefined)
    bar.append(element("span.mark", { "--share": mark.toFixed(4), title: `${percent(mark)} without ablation` }));
  const parts = [element("span.label", {}, tokenLabel(id)), bar, element("span.number", {}, text)];
  const properties = onclick ? { type: "button", onclick } : {};
  return element(`${onclick ? "button" : "div"}.probability${isChosen ? ".chosen" : ""}`, properties, parts);
}

// -- the model in its worker -------------------------------------------------------------------------------------------

const engine = {
  jobs: new Map(),
  next: 0,

  start() {
    const code = ["tokenizer", "gpt", "weights", "kernel", "worker"].map((name) => byId(`code-${name}`).textContent);
    this.worker = new Worker(URL.createObjectURL(new Blob([code.join("\n")], { type: "text/javascript" })));
    this.worker.onmessage = ({ data: { job, type, result, message, ...rest } }) => {
      const { resolve, reject, onprogress } = this.jobs.get(job);
      if (type === "done") resolve(result);
      else if (type === "failed") reject(new Error(message));
      else onprogress?.(rest);
    };
    this.worker.onerror = (event) => reportError(new Error(event.message));
    return this.run("load", { data: page, weights: byId("weights").textContent });
  },

  // Returns a promise of the result, with the number of the job as `job`.
  run(type, message, onprogress) {
    const job = this.next++;
    const promise = new Promise((resolve, reject) => this.jobs.set(job, { resolve, reject, onprogress }));
    this.worker.postMessage({ type, job, ...message });
    return Object.assign(
      promise.finally(() => this.jobs.delete(job)),
      { job },
    );
  },

  stop(job) {
    this.worker.postMessage({ type: "stop", job });
  },
};

function reportError(error) {
  byId("error").textContent = error.message;
  byId("error").hidden = false;
}

function clearError() {
  byId("error").hidden = true;
}

// The ids of a text, or of the BOS token for an empty one; null if there are none, which is reported.
function encoded(text) {
  try {
    clearError();
    if (text === "" && page.bos === null) throw new Error("the model has no token that starts a text; enter a text");
    return text === "" ? [page.bos] : tokenizer.encode(text);
  } catch (error) {
    reportError(error);
    return null;
  }
}

// -- tabs --------------------------------------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];
const views = {}; // name -> { show() }

function showTab(tab) {
  for (const other of tabs) {
    const isShown = other === tab;
    other.setAttribute("aria-selected", String(isShown));
    other.tabIndex = isShown ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !isShown;
  }
  clearError();
  views[tab.id.replace("tab-", "")].show();
}

function startPage(loaded) {
  const { config } = page;
  document.title = page.name;
  byId("version").textContent = page.version;
  byId("name").textContent = page.name;
  const layers = config.num_hidden_layers === 1 ? "1 layer" : `${config.num_hidden_layers} layers`;
  byId("summary").textContent =
    `${integer(page.parameters)} parameters · ${layers} of ${config.num_attention_heads} attention heads · ` +
    `vocabulary of ${integer(config.vocab_size)} tokens · runs in this page, offline`;
  for (const tab of tabs) {
    tab.addEventListener("click", () => showTab(tab));
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = tabs[(tabs.indexOf(tab) + move + tabs.length) % tabs.length];
      next.focus();
      showTab(next);
    });
  }
  const themes = ["auto", "light", "dark"];
  const theme = byId("theme");
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3];
    document.documentElement.dataset.theme = next;
    theme.textContent = `Theme: ${next}`;
    views.inside.redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => views.inside.redraw());
  loaded.then(({ backend, milliseconds }) => {
    byId("status").textContent = `ready in ${Math.round(milliseconds)} ms, ${backend}`;
    document.body.dataset.ready = backend;
  }, reportError);
}
