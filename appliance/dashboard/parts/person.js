// A field for the name of a person, which proposes those that begin like what is typed.
import { get, query } from "../api.js";
import { html, useEffect, useId, useState, visible } from "./base.js";

const SHOWN = 10;

/** An <input>; `props` are its attributes, and `value` what is typed. */
export function Person({ value, ...props }) {
  const [found, setFound] = useState([]);
  const list = useId();
  const typed = value.trim();
  useEffect(() => {
    if (!typed || found.some((row) => row.username === typed)) return;
    const abort = new AbortController();
    const timer = setTimeout(() => get(`/users${query({ q: typed, limit: SHOWN })}`, { signal: abort.signal })
      .then(({ data }) => setFound(data)).catch(() => {}), 200); // without proposals a name can be typed all the same
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [typed]);
  return html`<input list=${list} autocomplete="off" autocapitalize="off" spellcheck=${false} value=${value} ...${props} />
    <datalist id=${list}>${found.map((row) => html`<option key=${row.id} value=${row.username}>${visible(row.email)}</option>`)}</datalist>`;
}
