// Things of which somebody has some: a box for each, which takes effect at once and can be undone.
//
//   html`<${Choices} rows=${roles} chosen=${new Set(ids)} toggle=${(row, gives) => …} label=${t("roles")} />`
//
// A row is { id, name, description, href }; `toggle` gives a Promise. What was ticked stays ticked while the box is
// asked, and what it refuses stands as it was, with the reason above.
import { compare, t } from "../words.js";
import { Failure, html, Icon, Name, useId, useState, visible } from "./base.js";

const MANY = 12; // rows from which on there is a search

export function Choices({ rows, chosen, toggle, label, empty }) {
  const [pending, setPending] = useState({});
  const [error, setError] = useState(null);
  const [text, setText] = useState("");
  const id = useId();
  if (!rows.length) return html`<p class="quiet">${empty}</p>`;
  const change = (row) => async (event) => {
    if (row.id in pending) return;
    const gives = event.target.checked;
    setError(null);
    setPending((before) => ({ ...before, [row.id]: gives }));
    try {
      await toggle(row, gives);
    } catch (failure) {
      if (failure.code !== "proof_refused") setError(failure);
    } finally {
      setPending(({ [row.id]: done, ...others }) => others);
    }
  };
  const wanted = text.trim().toLowerCase();
  const shown = rows.filter((row) => !wanted || `${row.name} ${row.description || ""}`.toLowerCase().includes(wanted))
    .sort((one, other) => compare(one.name, other.name));
  return html`<${Failure} error=${error} />
    ${rows.length > MANY && html`<span class="searchbox"><${Icon} name="search" /><input id=${id} type="search" aria-label=${t("search_in", { what: label })}
      placeholder=${t("search_in", { what: label })} value=${text} onInput=${(event) => setText(event.target.value)} /></span>`}
    <ul class="choices" aria-label=${label}>${shown.map((row) => html`<li key=${row.id}><label class="check">
      <input type="checkbox" checked=${pending[row.id] ?? chosen.has(row.id)} aria-busy=${row.id in pending ? "true" : null}
        onChange=${change(row)} />
      <span><${Name} text=${row.name} />${row.description && html`<span class="quiet small line">${visible(row.description)}</span>`}</span></label>
      ${row.href && html`<a class="small" href=${row.href} aria-label=${t("open_what", { what: visible(row.name) })}><${Icon} name="next" /></a>`}</li>`)}</ul>
    ${!shown.length && html`<p class="quiet" role="status">${t("nothing_matches")}</p>`}`;
}
