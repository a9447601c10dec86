// The command palette, by / or Ctrl-K: rooms and acts at once, and what the box finds by four short lists. An act opens
// its dialog or its form and never runs from here.
import { signal } from "../vendor/signals.js";
import { get, query } from "../api.js";
import { go, rooms } from "../route.js";
import { compare, t } from "../words.js";
import { html, Icon, Name, useEffect, useId, useMemo, useRef, useState } from "./base.js";
import { Dialog } from "./dialog.js";
import { parseJwt } from "./jwt.js";

export const isOpen = signal(false);

// What the box is asked for. A room that is added adds its line here.
const LISTS = [
  { icon: "applications", path: "/clients", room: "applications", kind: "application",
    read: (row) => ({ name: row.display_name || row.client_id, more: row.client_id, to: ["applications", row.client_id] }) },
  { icon: "people", path: "/users", room: "people", kind: "person", more: { is_active: "all" },
    read: (row) => ({ name: row.username, more: row.email, to: ["people", row.username] }) },
  { icon: "roles", path: "/roles", room: "roles", kind: "role",
    read: (row) => ({ name: row.name, more: row.description, to: ["roles", row.name] }) },
  { icon: "roles", path: "/permissions", room: "permissions", kind: "permission",
    read: (row) => ({ name: row.name, to: ["permissions", row.name] }) },
  { icon: "roles", path: "/scopes", room: "scopes", kind: "scope",
    read: (row) => ({ name: row.name, more: row.description, to: ["scopes", row.name] }) },
];

/** `fixed` are the rooms and acts: [{ name, icon, to or run, kind }]; of a room that is not there nothing is asked. */
export function Palette({ fixed }) {
  const [text, setText] = useState("");
  const [found, setFound] = useState({ of: "", rows: [] }); // what the box found of a text
  const [at, setAt] = useState(0);
  const id = useId();
  const box = useRef();
  const wanted = text.trim().toLowerCase();

  useEffect(() => {
    setAt(0);
    if (!wanted) return;
    const abort = new AbortController();
    const timer = setTimeout(async () => {
      const answers = await Promise.allSettled(LISTS.filter((list) => rooms.has(list.room)).map(async (list) => {
        const { data } = await get(list.path + query({ q: wanted, limit: 5, ...list.more }), { signal: abort.signal });
        return data.map((row) => ({ icon: list.icon, kind: t(`kind_${list.kind}`), ...list.read(row) }));
      }));
      if (abort.signal.aborted) return;
      const rows = answers.flatMap((answer) => answer.value || []);
      const isExact = (row) => Number([row.name, row.more].some((one) => String(one).toLowerCase() === wanted));
      setFound({ of: wanted, rows: rows.sort((one, other) => isExact(other) - isExact(one) || compare(one.name, other.name)) });
    }, 200);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [wanted]);

  const rows = useMemo(() => {
    const own = fixed.filter((row) => wanted.split(/\s+/).every((word) => row.name.toLowerCase().includes(word)));
    const token = rooms.has("inspect") && parseJwt(text)
      ? [{ icon: "search", name: t("inspect_this"), kind: t("kind_act"), to: ["inspect"], token: text.trim() }] : [];
    // What the box finds comes below what is here at once: a late answer moves nothing under the finger or Enter.
    return [...token, ...own, ...(found.of === wanted ? found.rows : [])];
  }, [wanted, found]);

  const close = () => { isOpen.value = false; };
  const open = (row) => {
    close();
    if (row.run) return row.run();
    if (row.token) inspected.value = row.token;
    go(row.to, row.query);
  };
  const key = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      const next = (at + step + rows.length) % (rows.length || 1);
      setAt(next);
      box.current.children[next]?.scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter" && rows[at]) {
      event.preventDefault();
      open(rows[at]);
    }
  };
  return html`<${Dialog} title=${t("find_or_do")} onClose=${close}>
    <div class="palette">
      <span class="searchbox"><${Icon} name="search" />
        <input role="combobox" aria-expanded="true" aria-controls=${id} aria-autocomplete="list" aria-label=${t("find_or_do")}
          aria-activedescendant=${rows[at] ? `${id}-${at}` : null} autofocus autocomplete="off" spellcheck=${false}
          placeholder=${t("find_hint")} value=${text} onInput=${(event) => setText(event.target.value)} onKeyDown=${key} /></span>
      <ul role="listbox" id=${id} ref=${box} aria-label=${t("find_or_do")}>${rows.map((row, index) => html`<li key=${index}
        role="option" id=${`${id}-${index}`} aria-selected=${index === at} onMouseMove=${() => setAt(index)}
        onClick=${() => open(row)}><${Icon} name=${row.icon} /><span><${Name} text=${row.name} />
          ${row.more && html` <span class="quiet"><${Name} text=${row.more} /></span>`}</span>
        <span class="quiet small">${row.kind}</span></li>`)}</ul>
      ${!rows.length && html`<p class="quiet" role="status">${t("nothing_matches")}</p>`}
    </div>
  <//>`;
}

export const inspected = signal(""); // a token that was pasted, for the inspector: it must not stand in the URL

/** / and Ctrl-K open it, wherever one is and is not typing. */
export function listen() {
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.closest?.("input, textarea, select, [contenteditable]");
    const isCall = (event.key === "k" && (event.ctrlKey || event.metaKey)) || (event.key === "/" && !isTyping);
    if (!isCall || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    isOpen.value = true;
  });
}
