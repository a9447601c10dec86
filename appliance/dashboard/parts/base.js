// What every room is made of. Rooms import html and the hooks from here, and the small parts:
// Icon, When, Name, Head, Tabs, Empty, Failure, Loading, State, Facts, Button, useLoad.
import { h, Fragment } from "../vendor/preact.js";
import { useCallback, useEffect, useId, useMemo, useRef, useState } from "../vendor/hooks.js";
import htm from "../vendor/htm.js";
import { signal } from "../vendor/signals.js";
import { session, ended } from "../api.js";
import { ago, dated, exact, explain, t } from "../words.js";
import { go, href, route } from "../route.js";

export const html = htm.bind(h);
export { Fragment, h, useCallback, useEffect, useId, useMemo, useRef, useState };

// -- the brand that this document wears, which changes when an administrator saves another one here --

const box = document.querySelector("meta[name=box]");

/** The address of a picture of the brand by its file name, or "". */
export const pictureOf = (file) => (file ? new URL(`../${file}`, import.meta.url).href : "");

export const worn = signal({ name: box.content, logo: pictureOf(box.dataset.logo) });

/** Wear another brand, of this name, colour such as #1f5fbf, and picture: one more sheet, over that of the document. */
export function wear(name, color, logo) {
  worn.value = { name, logo };
  const href = new URL(`../brand.${color.slice(1)}.css`, import.meta.url).href;
  document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
}

/** The picture and the name of the box. */
export const Box = () => html`${worn.value.logo && html`<img src=${worn.value.logo} alt="" />`}<bdi>${worn.value.name}</bdi>`;

// -- small parts --

const SYMBOLS = new URL("../symbols.svg", import.meta.url).href;

/** A symbol of symbols.svg. It is decoration: the word stands beside it, or the button has an aria-label. */
export const Icon = ({ name }) =>
  html`<svg class="icon" aria-hidden="true" focusable="false"><use href=${`${SYMBOLS}#${name}`} /></svg>`;

export const exactly = signal(false); // whether moments are shown as dates: the palette changes it, and a tap on any of them

const toggle = (event) => {
  if (!event.target.closest("a, button, label")) exactly.value = !exactly.value;
};

/** A moment: relative, with the exact time in a title, or `fixed` as a date; `none` where there is none. */
export function When({ at, none = "–", fixed }) {
  const [, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((count) => count + 1), 30000);
    return () => clearInterval(timer);
  }, []);
  return at ? html`<time datetime=${at} title=${exact(at)} onClick=${toggle}>${exactly.value || fixed ? dated(at) : ago(at)}</time>` : html`<span class="quiet none">${none}</span>`;
}

// Characters that show nothing or change the order of others: a name must not pose as another one. Unicode TR 36.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

/** A stored text as it is, in its own direction, with hidden characters made visible. */
export const visible = (text) =>
  String(text ?? "").replace(HIDDEN, (found) => `⟨${found.charCodeAt(0).toString(16).padStart(4, "0")}⟩`);

/** A stored name. */
export const Name = ({ text, mono }) => html`<bdi class=${mono ? "mono" : null}>${visible(text)}</bdi>`;

/** A link that may stand in an href: rooms, http and https; anything else is text. */
export const safeHref = (target) => (/^(https?:\/\/|#)/i.test(target) ? target : undefined);

/** The head of a room: title, what stands beside it, and the buttons on the right. A list beside a page has level 2. */
export function Head({ title, back, aside, level = 1, children }) {
  return html`<header class="head">
    ${back && html`<a class="back" href=${back.href}><${Icon} name="back" />${back.label}</a>`}
    ${h(`h${level}`, { tabindex: "-1", class: "title" }, title)}
    ${aside && html`<div class="aside">${aside}</div>`}
    <div class="actions">${children}</div>
  </header>`;
}

/** The tabs of a page, each with a URL; a select at 320 px. tabs: [{ id, label }]; `query` is kept from tab to tab. */
export function Tabs({ base, tabs, current, label, query }) {
  return html`<nav class="tabs" aria-label=${label}>
    <select class="narrow" aria-label=${label} value=${current}
      onChange=${(event) => go([...base, event.target.value], query)}>
      ${tabs.map((tab) => html`<option key=${tab.id} value=${tab.id}>${tab.label}</option>`)}
    </select>
    <ul class="wide">${tabs.map((tab) => html`<li key=${tab.id}>
      <a href=${href([...base, tab.id], query)} aria-current=${tab.id === current ? "page" : null}>${tab.label}</a>
    </li>`)}</ul>
  </nav>`;
}

/** A room or a list with nothing in it: what belongs here, and the one button. */
export const Empty = ({ title, children, action }) =>
  html`<div class="empty"><p class="strong">${title}</p>${children && html`<p>${children}</p>`}${action}</div>`;

/** What went wrong, what to do, the request's id, and another try. */
export function Failure({ error, retry, title }) {
  if (!error) return null;
  const members = Object.entries(error.errors || {});
  return html`<div class="note bad" role="alert">
    ${title && html`<p class="strong">${title}</p>`}
    <p>${explain(error)}</p>
    ${members.map(([name, text]) => html`<p key=${name}><code>${name}</code> ${visible(text)}</p>`)}
    ${error.requestId && html`<p class="small">${t("quote_this")} <code class="select">${error.requestId}</code></p>`}
    ${retry && html`<p><${Button} onClick=${retry}>${t("try_again")}<//></p>`}
  </div>`;
}

/** Still bars where rows will be, and what is waited for, should it take a while: a file of the console or an answer. */
export const Loading = ({ rows = 5, what = t("loading") }) =>
  html`<div class="loading" role="status" aria-busy="true"><p class="quiet small">${what}</p>${Array.from({ length: rows }, (_, at) =>
    html`<div class="bar" key=${at}></div>`)}</div>`;

/** A state: a mark and a word, never colour alone. kind: on, off, locked, good, warn, bad. */
export function State({ kind, children }) {
  const mark = { on: "●", off: "○", locked: "▲", good: "✓", warn: "!", bad: "✕" }[kind];
  return html`<span class=${`state ${kind}`}><span aria-hidden="true">${mark}</span> ${children}</span>`;
}

/** Terms and what they are. rows: [[term, value]]; a value that is null is left out. */
export const Facts = ({ rows }) =>
  html`<dl class="facts">${rows.filter(([, value]) => value != null).map(([term, value]) =>
    html`<div key=${term}><dt>${term}</dt><dd>${value}</dd></div>`)}</dl>`;

/**
 * A button. kind: primary (one a view), danger, plain. While `busy` it says so and cannot be pressed again; it is not
 * disabled, because a disabled button loses the focus. Enter in a field presses the button of its form. HTML §4.10.21.2
 */
export function Button({ kind = "", busy, icon, children, type = "button", label, onClick, ...rest }) {
  const press = (event) => (busy ? event.preventDefault() : onClick?.(event));
  return html`<button type=${type} class=${kind} aria-busy=${busy ? "true" : null} aria-disabled=${busy ? "true" : null}
    aria-label=${label} title=${label} onClick=${press} ...${rest}>${icon && html`<${Icon} name=${icon} />`}${children}</button>`;
}

/** A card with a heading, and buttons beside it. */
export const Card = ({ title, actions, kind = "", children }) => html`<section class=${`card ${kind}`}>
  ${(title || actions) && html`<header><h2>${title}</h2>${actions && html`<div class="actions">${actions}</div>`}</header>`}
  ${children}
</section>`;

/**
 * Load something, and again when `deps` change: { data, error, loading, reload }. `load(signal)` gives a Promise.
 * What was there stays while the next is fetched; after the network was gone, and after a sign-in, it is read again.
 */
export function useLoad(load, deps) {
  const [state, set] = useState({ loading: true });
  const [round, setRound] = useState(0);
  const reload = useCallback(() => setRound((count) => count + 1), []);
  useEffect(() => {
    const abort = new AbortController();
    set((before) => ({ ...before, loading: true }));
    load(abort.signal).then(
      (data) => !abort.signal.aborted && set({ data, loading: false }),
      (error) => !abort.signal.aborted && set((before) => ({ data: before.data, error, loading: false })),
    );
    window.addEventListener("answering", reload);
    return () => {
      abort.abort();
      window.removeEventListener("answering", reload);
    };
  }, [...deps, round]);
  const put = (next) => set(({ data }) => ({ data: typeof next === "function" ? next(data) : next, loading: false }));
  return { ...state, reload, set: put };
}

/** What a button does: act(work) runs it, and tells whether it went well; `error` and `busy` are for the room. */
export function useAct() {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const act = async (work) => {
    setError(null);
    setBusy(true);
    try {
      await work();
      return true;
    } catch (failure) {
      if (failure.code !== "proof_refused") setError(failure);
      return false;
    } finally {
      setBusy(false);
    }
  };
  return { act, busy, error };
}

export { ended, session, route, go, href, t };
