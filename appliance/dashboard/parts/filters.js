// The bar above a list: a search, and choices that stand there as tokens one can take away. All of it is in the URL.
//
//   html`<${Filters} label=${t("search_applications")} total=${list.total}
//     choices=${[{ name: "client_type", label: t("type"), options: [{ value: "public", label: … }] }]} />`
//
// A room whose children are filters too gives `onClear`, which clears all.
import { setQuery } from "../route.js";
import { t } from "../words.js";
import { Button, Icon, html, route, useEffect, useId, useRef, useState } from "./base.js";

export function Filters({ label, choices = [], total, onClear, children }) {
  const { query } = route.value;
  const [text, setText] = useState(query.q || "");
  const timer = useRef();
  const id = useId();
  useEffect(() => setText(query.q || ""), [query.q]);
  useEffect(() => () => clearTimeout(timer.current), []);
  const type = (event) => {
    const { value } = event.target;
    setText(value);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => setQuery({ q: value.trim(), page: "" }, true), 250);
  };
  const chosen = choices.filter((choice) => query[choice.name]);
  const clear = () => setQuery(Object.fromEntries([["q", ""], ["page", ""], ...choices.map(({ name }) => [name, ""])]));
  return html`<search class="filters">
    <label class="hidden" for=${id}>${label}</label>
    <span class="searchbox"><${Icon} name="search" />
      <input id=${id} type="search" placeholder=${label} value=${text} onInput=${type} autocomplete="off" spellcheck=${false} /></span>
    ${choices.map((choice) => html`<select key=${choice.name} aria-label=${choice.label} value=${query[choice.name] || ""}
      onChange=${(event) => setQuery({ [choice.name]: event.target.value, page: "" })}>
      <option value="">${choice.label}</option>
      ${choice.options.map((option) => html`<option key=${option.value} value=${option.value}>${option.label}</option>`)}
    </select>`)}
    ${children}
    <span class="hidden" role="status">${total == null ? "" : t("found", { n: total })}</span>
    ${chosen.length > 0 && html`<ul class="tokens">
      ${chosen.map((choice) => html`<li key=${choice.name}><span>${choice.label}: ${
        choice.options.find((option) => option.value === query[choice.name])?.label || query[choice.name]}</span>
        <${Button} kind="plain" icon="close" label=${t("remove_filter", { name: choice.label })}
          onClick=${() => setQuery({ [choice.name]: "", page: "" })} /></li>`)}
      <li><${Button} kind="plain" onClick=${onClear || clear}>${t("clear_all")}<//></li></ul>`}
  </search>`;
}
