// Lists: a real <table> of fifty rows, whose page, order and filters stand in the URL. Arrows or j and k move, Enter
// opens. At 320 px a row becomes two lines: the first column, then the others.
//
//   const list = useList("/clients", { q, client_type });
//   html`<${Table} list=${list} columns=${[{ id: "display_name", label: t("name"), sort: true, cell: (row) => … }]}
//     href=${(row) => href(["applications", row.client_id])} empty=${…} />`
import { get, query as makeQuery } from "../api.js";
import { setQuery } from "../route.js";
import { number, stamp, t } from "../words.js";
import { Button, Failure, Icon, Loading, href, html, route, useEffect, useLoad, useRef, useState } from "./base.js";

export const PAGE = 50;
const SEARCHES = 10; // parts of a long list that are searched for one page

/**
 * A page of a list of ADMIN. `filters` go into its query; page and sort come from the URL. `inner` is for a list within
 * the page of something that stands beside its own list: it has a page of its own, and a second one gives it a name.
 */
export function useList(path, filters = {}, { size = PAGE, sort: usual = "", inner = false } = {}) {
  const named = inner === true ? "at" : inner || "page";
  const { [named]: page = "1" } = route.value.query;
  const sort = (!inner && route.value.query.sort) || usual;
  const at = Math.max(1, Number(page) || 1);
  const asked = makeQuery({ ...filters, sort, limit: size, offset: (at - 1) * size || "" });
  const found = useLoad((signal) => get(path + asked, { signal }), [path, asked]);
  return {
    ...found, rows: found.data?.data, total: found.data?.total, atLeast: found.data?.atLeast, next: found.data?.next,
    page: at, named, size, sort, isFiltered: Object.values(filters).some((value) => value !== "" && value != null),
  };
}

/**
 * A page of a list of which one request searches a part: it is searched on until the page is full, the list ends or
 * SEARCHES parts were searched. `cursor` is the parameter that says where a page begins.
 */
export async function search(path, filters, { begin, cursor, size = PAGE, signal }) {
  const rows = [];
  let [place, first, searches] = [begin, null, 0];
  do {
    const page = await get(path + makeQuery({ ...filters, [cursor]: place, limit: size - rows.length }), { signal });
    first ||= page;
    rows.push(...page.data);
    place = page.following.get(cursor) || "";
    searches += 1;
  } while (place && rows.length < size && searches < SEARCHES);
  const isWhole = !place && !begin;
  const end = place && rows.length < size ? await get(`${path}/${place}`, { signal, passive: true }).catch(() => null) : null;
  return {
    rows, place, begin, size, searchedTo: end?.data.timestamp || end?.data.issued_at, atLeast: first.atLeast && !isWhole,
    total: begin ? undefined : isWhole ? rows.length : Math.max(first.total, rows.length) || undefined,
  };
}

/** Such a page of a room, whose place stands in the URL as its page; a button leads on. */
export function useSearch(path, filters = {}, { size = PAGE, inner = false, cursor = "before" } = {}) {
  const named = inner ? "at" : "page";
  const { [named]: begin = "" } = route.value.query;
  const found = useLoad((signal) => search(path, filters, { begin, cursor, size, signal }), [path, makeQuery(filters), begin]);
  const isFiltered = Object.values(filters).some((value) => value !== "" && value != null);
  return { ...found, ...found.data, data: found.data, named, isFiltered, isSearched: true };
}

/** Where a search goes on; back is the browser's own. */
function Further({ list }) {
  const { rows, size, place, begin, named, total, atLeast, searchedTo } = list;
  if (!place && !begin) return rows.length > 10 ? html`<p class="pages quiet small">${t("rows", { n: rows.length })}</p>` : null;
  const isFull = rows.length >= size;
  return html`<nav class="pages" aria-label=${t("pages")}>
    <span>${isFull && total != null && t(atLeast ? "first_of_at_least" : "first_of", { n: rows.length, of: total })}
      ${!isFull && searchedTo && t("searched_back_to", { time: stamp(searchedTo) })}</span>
    ${begin && html`<${Button} onClick=${() => setQuery({ [named]: "" })}>${t("to_begin")}<//>`}
    <${Button} disabled=${!place} onClick=${() => setQuery({ [named]: place })}>${t(isFull || !place ? "next" : "search_further")}<//></nav>`;
}

function Heading({ column, sort }) {
  if (!column.sort) return html`<th scope="col" class=${column.kind}>${column.label}</th>`;
  const name = column.sort === true ? column.id : column.sort;
  const state = sort === name ? "ascending" : sort === `-${name}` ? "descending" : "none";
  const target = state === "ascending" ? `-${name}` : name;
  return html`<th scope="col" aria-sort=${state} class=${column.kind}>
    <button type="button" class="sort" onClick=${() => setQuery({ sort: target, page: "" })}>${column.label}
      ${state !== "none" && html`<${Icon} name=${state === "ascending" ? "up" : "down"} />`}</button></th>`;
}

function Pages({ list }) {
  const { page, named = "page", size, rows, total, atLeast, next } = list;
  if (!rows?.length || (page === 1 && !next)) {
    return rows?.length > 10 ? html`<p class="pages quiet small">${t("rows", { n: rows.length })}</p>` : null;
  }
  const from = (page - 1) * size + 1;
  const whole = total == null ? "" : t(atLeast ? "of_at_least" : "of", { n: total });
  const turn = (to) => setQuery({ [named]: to === 1 ? "" : to });
  return html`<nav class="pages" aria-label=${t("pages")}>
    <span>${number(from)}–${number(from + rows.length - 1)} ${whole}</span>
    <${Button} icon="back" label=${t("previous_page")} disabled=${page === 1} onClick=${() => turn(page - 1)} />
    <${Button} disabled=${!next} onClick=${() => turn(page + 1)}>${t("next")}<//>
  </nav>`;
}

/** See above. `current` marks a row's key; `nothing` is what stands there if filters leave nothing. */
export function Table({ list, columns, keyOf = (row) => row.id, href: target, empty, current, caption, clear }) {
  const body = useRef();
  const [slow, setSlow] = useState(false);
  useEffect(() => {
    const timer = setTimeout(() => setSlow(list.loading), list.loading ? 300 : 0);
    return () => clearTimeout(timer);
  }, [list.loading]);
  const { rows } = list;
  if (!rows) return list.error ? html`<${Failure} error=${list.error} retry=${list.reload} />` : html`<${Loading} />`;
  if (!rows.length && !list.loading && list.place) {
    return html`<div class="empty"><p role="status">${t("nothing_found_yet")}</p></div><${Further} list=${list} />`;
  }
  if (!rows.length && !list.loading) {
    return list.isFiltered || list.page > 1 || list.begin
      ? html`<div class="empty"><p>${t("nothing_matches")}</p>
          <${Button} onClick=${clear || (() => setQuery({ q: "", page: "" }))}>${t("clear_filters")}<//></div>`
      : empty || html`<div class="empty"><p>${t("nothing_here")}</p></div>`;
  }
  const move = (event) => {
    const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    if (!step || event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey) return;
    const links = [...body.current.querySelectorAll("a.row")];
    const next = links[links.indexOf(event.target.closest("tr")?.querySelector("a.row")) + step];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  };
  return html`<div class="scroll"><table aria-busy=${list.loading ? "true" : null} class=${slow ? "dim" : ""} onKeyDown=${move}>
    ${caption && html`<caption class="hidden">${caption}</caption>`}
    <thead><tr>${columns.map((column) => html`<${Heading} key=${column.id} column=${column} sort=${list.sort} />`)}</tr></thead>
    <tbody ref=${body}>${rows.map((row) => html`<tr key=${keyOf(row)} class=${current && keyOf(row) === current ? "chosen" : ""}>
      ${columns.map((column, at) => {
        const content = column.cell ? column.cell(row) : row[column.id];
        return at === 0 && target
          ? html`<th scope="row" key=${column.id}><a class="row" href=${target(row)}
              aria-current=${current && keyOf(row) === current ? "true" : null}>${content}</a></th>`
          : html`<td key=${column.id} class=${column.kind} data-label=${column.label}>${content}</td>`;
      })}</tr>`)}</tbody></table></div>
    ${list.error && html`<${Failure} error=${list.error} retry=${list.reload} />`}
    ${list.page !== undefined && html`<${Pages} list=${list} />`}
    ${list.isSearched && html`<${Further} list=${list} />`}`;
}

/** A list that is all here, for Table: useList without pages. */
export const whole = (found, rows = found.data) => ({ ...found, rows, sort: "", page: 1, size: PAGE, next: false });

export { href };
