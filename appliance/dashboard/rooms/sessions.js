// Sessions: which tokens live, who is signed in at which browser, which logins can be refreshed; of a person, an
// application or an address. #/sessions?what=tokens|browsers|refresh&by=person|application|address&q=, #/sessions/<jti>
import { get, now, path, query as makeQuery, send } from "../api.js";
import { rooms, setQuery } from "../route.js";
import { browserName, t } from "../words.js";
import { Button, Card, Empty, Facts, Failure, Head, href, html, Icon, Loading, Name, State, useAct, useEffect, useLoad, useRef, useState, visible, When } from "../parts/base.js";
import { ask } from "../parts/dialog.js";
import { search, Table } from "../parts/table.js";
import { toast } from "../parts/toast.js";

const WHAT = {
  tokens: { path: "/sessions", fixed: { living: true }, by: { person: "user_id", application: "client_id", address: "ip_address" } },
  browsers: { path: "/browser-sessions", fixed: {}, by: { person: "user_id", address: "ip_address" } },
  refresh: { path: "/refresh-tokens", fixed: {}, by: { person: "user_id" } },
};
const SIZE = 50;

/** A page of a list that goes on behind an id: as quick deep in a million rows as at its begin; back is the browser's. */
function useRows(what, filters, { after = "", page = 1 }) {
  const { path: list, fixed } = WHAT[what];
  const ofPerson = what === "refresh" && filters.user_id;
  const asked = { ...fixed, ...filters };
  const load = (signal) => ofPerson
    ? get(path("refresh-tokens", "user", filters.user_id) + makeQuery({ limit: SIZE, offset: (page - 1) * SIZE || "" }), { signal })
      .then(({ data, ...more }) => ({ ...more, rows: data, page, size: SIZE }))
    : search(list, asked, { begin: after, cursor: "after", size: SIZE, signal }).then((data) => ({ ...data, isSearched: true }));
  const found = useLoad((signal) => load(signal).catch((error) => {
    if (error.status === 404 && !error.unknownRoute) return { rows: [], total: 0 }; // nobody is called so
    throw error;
  }).then((data) => ({ ...data, what })), [what, makeQuery(asked), after, page]);
  const data = found.data?.what === what ? found.data : {}; // rows of another kind have other members
  return {
    ...found, rows: undefined, ...data, data: found.data, sort: "", named: ofPerson ? "page" : "after",
    isFiltered: Boolean(filters.user_id || filters.client_id || filters.ip_address || filters.sid || after),
  };
}

const NONE = html`<span class="quiet none">–</span>`;
/** Where a login came from: the browser in words, its own words behind it. */
const From = ({ row }) => row.user_agent ? html`<span title=${visible(row.user_agent)}>${browserName(row.user_agent)}</span>` : NONE;
const Address = ({ row }) => row.ip_address ? html`<a class="mono" href=${href(["sessions"], { by: "address", q: row.ip_address })}>${visible(row.ip_address)}</a>` : NONE;
const Person = ({ row }) => row.username
  ? html`<a href=${href(["sessions"], { by: "person", q: row.username })}><${Name} text=${row.username} /></a>`
  : html`<span class="quiet">${t("itself")}</span>`;
const Client = ({ row }) => row.client_id
  ? html`<a href=${href(["sessions"], { by: "application", q: row.client_id })}><${Name} text=${row.client_id} /></a>` : NONE;

function Search({ what, by, q }) {
  const [text, setText] = useState(q);
  const timer = useRef();
  useEffect(() => setText(q), [q]);
  useEffect(() => () => clearTimeout(timer.current), []);
  const type = (event) => {
    const { value } = event.target;
    setText(value);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => setQuery({ q: value.trim(), after: "", page: "", sid: "" }, true), 350);
  };
  const label = t(`sessions_by_${by}`);
  return html`<search class="filters">
    <div class="segments" role="group" aria-label=${t("which_sessions")}>${Object.keys(WHAT).map((one) => html`<button key=${one} type="button"
      aria-pressed=${one === what ? "true" : "false"} onClick=${() => setQuery({ what: one === "tokens" ? "" : one, by: by in WHAT[one].by ? by : "", q: by in WHAT[one].by ? q : "", after: "", page: "", sid: "" })}>${t(`sessions_${one}`)}</button>`)}</div>
    <select aria-label=${t("of_which")} value=${by} onChange=${(event) => setQuery({ by: event.target.value, q: "", after: "", page: "", sid: "" })}>
      ${Object.keys(WHAT[what].by).map((one) => html`<option key=${one} value=${one}>${t(`by_${one}`)}</option>`)}</select>
    <span class="searchbox"><${Icon} name="search" /><input type="search" aria-label=${label} placeholder=${label} value=${text} onInput=${type}
      autocomplete="off" autocapitalize="off" spellcheck=${false} /></span>
  </search>`;
}

const PATH_OF = { tokens: "sessions", browsers: "browser-sessions", refresh: "refresh-tokens" };

async function endOne(what, row) {
  const words = what === "browsers" ? { title: t("end_browser_title"), text: t("end_browser_text") } : { title: t("end_session_title"), text: t("end_session_text") };
  if (!(await ask({ ...words, confirm: t("end_session"), danger: true }))) return false;
  await send("DELETE", path(PATH_OF[what], row.id));
  toast(t("session_ended_done"));
  return true;
}

/**
 * End every session of an address: there is no person and no application whose right could be taken. Page by page until
 * none is left, or none of a page could be ended.
 */
async function endAllOfAddress(address) {
  for (const what of ["browsers", "tokens"]) {
    for (let isGoing = true; isGoing; ) {
      const { data } = await get(WHAT[what].path + makeQuery({ ...WHAT[what].fixed, ip_address: address, limit: 200 }));
      isGoing = false;
      for (const row of data) {
        try {
          await send("DELETE", path(PATH_OF[what], row.id));
          isGoing = true;
        } catch (error) {
          if (error.status !== 404 && error.code !== "unchanged") throw error; // else it ended with another
        }
      }
    }
  }
}

/** End all of the person, application or address that is chosen. */
async function endAllOf(by, q, list) {
  const question = { title: t(`end_all_${by}_title`, { name: visible(q) }), confirm: t("end_all"), danger: true,
    text: html`<p>${t(list.atLeast ? "end_at_least" : "end_count", { n: list.total || 0 })} ${t(`end_all_${by}_text`)}</p>` };
  if (!(await ask(question))) return false;
  if (by === "address") await endAllOfAddress(q);
  else await send("POST", path(by === "person" ? "users" : "clients", q, "revoke"));
  toast(t("ended_all_of", { name: visible(q) }));
  return true;
}

async function endEverything() {
  const { total, atLeast } = await get("/sessions?living=true&limit=1");
  const word = t("everybody_word");
  const isSure = await ask({ title: t("end_everything_title"), confirm: t("end_everything"), danger: true, typed: word, proof: true,
    text: html`<p>${t(atLeast ? "end_at_least" : "end_count", { n: total })} ${t("end_everything_text")}</p>` });
  if (!isSure) return false;
  await send("POST", "/sessions/revoke-all");
  toast(t("ended_everything"));
  return true;
}

const columnsOf = (what, end) => ({
  tokens: [
    { id: "person", label: t("person"), cell: (row) => row.username ? html`<span class="strong"><${Name} text=${row.username} /></span>` : html`<span class="strong"><${Name} text=${row.client_id} /></span> <span class="quiet">${t("itself")}</span>` },
    { id: "client", label: t("by_application"), cell: (row) => html`<${Client} row=${row} />` },
    { id: "begun", label: t("begun"), cell: (row) => html`<${When} at=${row.issued_at} />` },
    { id: "from", label: t("where"), cell: (row) => html`<${From} row=${row} />` },
    { id: "address", label: t("address"), cell: (row) => html`<${Address} row=${row} />` },
    { id: "until", label: t("until"), cell: (row) => html`<${When} at=${row.expires_at} />` },
    end,
  ],
  browsers: [
    { id: "person", label: t("person"), cell: (row) => html`<${Person} row=${row} />` },
    { id: "from", label: t("where"), cell: (row) => html`<${From} row=${row} />` },
    { id: "address", label: t("address"), cell: (row) => html`<${Address} row=${row} />` },
    { id: "amr", label: t("signed_in_by"), cell: (row) => row.amr.map((one) => html`<code class="chip" key=${one}>${visible(one)}</code> `) },
    { id: "seen", label: t("last_used"), cell: (row) => html`<${When} at=${row.last_seen_at} />` },
    { id: "until", label: t("until"), cell: (row) => html`<${When} at=${row.expires_at} />` },
    end,
  ],
  refresh: [
    { id: "person", label: t("person"), cell: (row) => html`<${Person} row=${row} />` },
    { id: "client", label: t("by_application"), cell: (row) => html`<${Client} row=${row} />` },
    { id: "begun", label: t("begun"), cell: (row) => html`<${When} at=${row.issued_at} />` },
    { id: "until", label: t("until"), cell: (row) => html`<${When} at=${row.expires_at} />` },
    { id: "state", label: t("state"), cell: (row) => row.is_revoked ? html`<${State} kind="off">${t("ended")}<//>` : html`<${State} kind="on">${t("living")}<//>` },
    end,
  ],
}[what]);

function List({ query }) {
  const what = query.what in WHAT ? query.what : "tokens";
  const by = query.by in WHAT[what].by ? query.by : "person";
  const q = query.q || "";
  const sid = what === "tokens" ? query.sid || "" : "";
  const list = useRows(what, { [WHAT[what].by[by]]: q, sid }, { after: query.after || "", page: Math.max(1, Number(query.page) || 1) });
  const { act, error } = useAct();
  const run = (work) => act(async () => (await work()) && list.reload());
  const end = { id: "end", label: "", kind: "action", cell: (row) => !row.is_revoked
    && html`<${Button} kind="small" onClick=${() => run(() => endOne(what, row))}>${t("end")}<//>` };
  const clear = () => setQuery({ q: "", sid: "", after: "", page: "" });
  const isOff = what === "refresh" && list.error?.unknownRoute;
  return html`<${Head} title=${t("sessions")}>
      <a class="button" href="#/inspect">${t("inspect_token")}</a>
      <${Button} onClick=${() => run(endEverything)}>${t("end_everything_do")}<//><//>
    <${Search} what=${what} by=${by} q=${q} />
    <div class="split"><p class="quiet small" role="status">${list.total == null ? "" : t(list.atLeast ? "found_at_least" : "found", { n: list.total })}
      ${sid && html` ${t("of_one_login")} <${Button} kind="link" onClick=${clear}>${t("clear_filters")}<//>`}</p>
      ${q && list.rows?.length > 0 && html`<${Button} onClick=${() => run(() => endAllOf(by, q, list))}>${t("end_all_of", { name: visible(q) })}<//>`}</div>
    <${Failure} error=${error} />
    ${isOff ? html`<${Empty} title=${t("refresh_off")}><code>enable-token-refresh</code><//>` : html`
      <${Table} list=${list} columns=${columnsOf(what, end)} href=${what === "tokens" ? (row) => href(["sessions", row.id]) : null} clear=${clear}
        caption=${t(`sessions_${what}`)} empty=${html`<${Empty} title=${t("no_sessions")}>${t(`no_sessions_${what}`)}<//>`} />`}`;
}

/** A name as a link to its room, where there is one. */
const Linked = ({ to }) => rooms.has(to[0]) ? html`<a href=${href(to)}><${Name} text=${to[1]} /></a>` : html`<${Name} text=${to[1]} />`;
const Filter = ({ by, q }) => html`<a class="under small" href=${href(["sessions"], { by, q })}>${t("all_sessions")}</a>`;

/** One token's session, by its jti. */
function One({ id }) {
  const found = useLoad((signal) => get(path("sessions", id), { signal }).then(({ data }) => data), [id]);
  const { act, error } = useAct();
  const row = found.data;
  const isOver = row && (row.is_revoked || Date.parse(row.expires_at) < now());
  const method = row?.login_method;
  return html`<${Head} title=${t("session")} back=${{ href: "#/sessions", label: t("sessions") }} aside=${html`<${Name} text=${id} mono />`}>
      ${row && !isOver && html`<${Button} kind="danger" onClick=${() => act(async () => (await endOne("tokens", row)) && found.reload())}>${t("end_session")}<//>`}<//>
    <${Failure} error=${found.error || error} retry=${found.error && found.reload} />
    ${!row ? !found.error && html`<${Loading} />` : html`<${Card}><${Facts} rows=${[
      [t("state"), isOver ? html`<${State} kind="off">${t("ended")}<//>` : html`<${State} kind="on">${t("living")}<//>`],
      [t("person"), row.username ? html`<${Linked} to=${["people", row.username]} /> <${Filter} by="person" q=${row.username} />` : html`<span class="quiet">${t("itself")}</span>`],
      [t("by_application"), html`<${Linked} to=${["applications", row.client_id]} /> <${Filter} by="application" q=${row.client_id} />`],
      [t("port"), row.mad_use ? row.mad_use.toUpperCase() : "–"],
      [t("begun"), html`<${When} at=${row.issued_at} />`], [t("until"), html`<${When} at=${row.expires_at} />`],
      [t("signed_in_by"), method ? html`<code>${visible(method)}</code>` : "–"],
      [t("scopes"), row.scope ? row.scope.split(" ").map((name) => html`<code class="chip" key=${name}>${visible(name)}</code> `) : "–"],
      [t("where"), html`<${From} row=${row} />`], [t("address"), html`<${Address} row=${row} />`],
      [t("login"), row.sid ? html`<a class="mono" href=${href(["sessions"], { sid: row.sid })}>${visible(row.sid)}</a>` : "–"],
      [t("audit"), html`<a href=${href(["audit"], { target: row.id })}>${t("rows_about_it")}</a>`],
    ]} /><//>`}`;
}

export default function Sessions({ segments, query }) {
  return segments[0] ? html`<${One} id=${segments[0]} />` : html`<${List} query=${query} />`;
}
