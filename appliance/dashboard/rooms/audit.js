// The audit log: who did what to whom, live, filtered, its chain verified, and to take away.
// #/audit?q=&action=&target=&result=&since=&ip_address=&request_id=&about=&live=1&page=, #/audit/<id>; `page` is the id
// before which a page begins
import { ApiError, get, now, path, query as makeQuery } from "../api.js";
import { setQuery } from "../route.js";
import { compare, exact, has, stamp, t } from "../words.js";
import { Button, Card, Empty, Facts, Failure, Head, href, html, Loading, Name, State, useAct, useEffect, useLoad, useRef, useState, visible, When } from "../parts/base.js";
import { Copy } from "../parts/copy.js";
import { Filters } from "../parts/filters.js";
import { Deed, Details, Target, Who } from "../parts/names.js";
import { useSearch, Table, PAGE } from "../parts/table.js";

const SINCE = { "1h": 3600, "1d": 86400, "7d": 604800, "30d": 2592000 };
const LIVE_ROWS = 500; // that stay on the screen while it is live
const EVERY = 2000; // milliseconds between two looks
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
const TEXTS = ["target", "ip_address", "request_id", "about"];

export const inWords = (action) => (has(`action_${action}`) ? t(`action_${action}`) : action);
const Result = ({ row }) => row.result === "failure" ? html`<${State} kind="bad">${t("refused")}<//>` : html`<span class="quiet">${t("done")}</span>`;

const ids = new Map(); // of names that were looked for: the log holds ids of people

/** The id of a person by name; whatever is nobody's name stays as it is: client ids, roles and `system` are. */
async function idOf(text, signal) {
  if (!text || UUID.test(text)) return text;
  if (!ids.has(text)) {
    const found = await get(path("users", text), { signal, passive: true }).catch((error) => {
      if (error instanceof ApiError && error.status === 404) return { data: { id: text } };
      throw error;
    });
    ids.set(text, found.data.id);
  }
  return ids.get(text);
}

/** The filters of ADMIN for those of the address; while a name is looked for, the ones before. */
function useFilters(query) {
  const { q = "", target = "", action, result, since, ip_address, request_id, about } = query;
  const looked = useLoad(async (signal) => ({ of: `${q} ${target}`, who: await idOf(q, signal), target: await idOf(target, signal) }), [q, target]);
  const kept = useRef();
  if (looked.data?.of !== `${q} ${target}`) return { filters: kept.current, error: looked.error };
  const from = SINCE[since] ? Math.floor(now() / 1000 / 60) * 60 - SINCE[since] : ""; // by the minute: a page is asked for once
  kept.current = { user_id: looked.data.who, target: looked.data.target, action, result, since: from, ip_address, request_id, about };
  return { filters: kept.current };
}

/** A filter that is a text, as a field of its own. */
function TextFilter({ name, label, query }) {
  const [text, setText] = useState(query[name] || "");
  const timer = useRef();
  useEffect(() => setText(query[name] || ""), [query[name]]);
  useEffect(() => () => clearTimeout(timer.current), []);
  const type = (event) => {
    const { value } = event.target;
    setText(value);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => setQuery({ [name]: value.trim(), page: "" }, true), 350);
  };
  return html`<input class="filter" type="search" aria-label=${label} placeholder=${label} value=${text} onInput=${type}
    autocomplete="off" autocapitalize="off" spellcheck=${false} />`;
}

/** The rows that follow those of `list`, looked for every two seconds while `isOn`. */
function useLive(list, filters, isOn) {
  const [rows, setRows] = useState([]);
  const [error, setError] = useState(null);
  const last = useRef(0);
  const key = JSON.stringify(filters);
  useEffect(() => setRows([]), [key, list.data]);
  useEffect(() => {
    if (!isOn || !list.rows) return;
    last.current = Math.max(0, ...list.rows.map((row) => Number(row.id)));
    const abort = new AbortController();
    let timer;
    const look = async () => {
      let isBehind = false;
      try {
        if (!document.hidden) {
          const { data, next, headers } = await get("/audit-logs" + makeQuery({ ...filters, after: last.current, limit: LIVE_ROWS }), { signal: abort.signal, passive: true });
          isBehind = next;
          last.current = Number(headers.get("X-Next-After"));
          if (data.length) setRows((before) => [...data.reverse(), ...before].slice(0, LIVE_ROWS));
          setError(null);
        }
      } catch (failure) {
        if (abort.signal.aborted) return;
        setError(failure);
      }
      if (!abort.signal.aborted) timer = setTimeout(look, isBehind ? 200 : EVERY);
    };
    timer = setTimeout(look, EVERY);
    return () => {
      abort.abort();
      clearTimeout(timer);
    };
  }, [isOn, key, list.data]);
  return { rows, error };
}

function Verdict({ verdict, onClose }) {
  const { found, at } = verdict;
  return html`<section class=${found.valid ? "card" : "note bad"} role="status">
    <p class="strong"><${State} kind=${found.valid ? "good" : "bad"}>${found.valid ? t("chain_whole", { n: found.rows }) : t("chain_broken")}<//>
      <span class="under quiet small">${stamp(at)}</span></p>
    ${!found.valid && html`<p>${visible(found.reason)}</p>`}
    ${found.head && html`<p class="small quiet">${t("chain_head", { n: found.last_seq })}</p><${Copy} text=${found.head} label=${t("hash")} />`}
    <div class="buttons start"><${Button} kind="small" onClick=${onClose}>${t("close")}<//></div></section>`;
}

/** Take the rows away as a file, ten thousand at a time. */
function useExport(filters) {
  const [state, setState] = useState(null); // {rows, abort} while it runs
  const begin = async () => {
    const abort = new AbortController();
    const parts = [];
    setState({ rows: 0, abort });
    try {
      for (let after = "0", rows = 0; after; ) {
        const answer = await get("/audit-logs/export" + makeQuery({ ...filters, after }), { raw: true, signal: abort.signal });
        const text = await answer.text();
        parts.push(text);
        rows += text.split("\n").length - 1;
        after = answer.headers.get("X-Next-After");
        setState({ rows, abort });
      }
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob(parts, { type: "application/x-ndjson" }));
      link.download = `audit-${new Date(now()).toISOString().slice(0, 19).replace(/:/g, "")}.jsonl`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      setState(null);
    }
  };
  return { state, begin };
}

const COLUMNS = [
  { id: "at", label: t("time"), cell: (row) => html`<time class="figures-only" datetime=${row.timestamp} title=${exact(row.timestamp)}>${stamp(row.timestamp)}</time>` },
  { id: "who", label: t("who"), cell: (row) => html`<${Who} id=${row.actor_id} />` },
  { id: "action", label: t("deed"), cell: (row) => html`<${Deed} action=${row.action} />` },
  { id: "target", label: t("target"), kind: "brief", cell: (row) => !(row.target && row.target !== row.actor_id) && !row.secondary ? html`<span class="quiet none">–</span>`
    : html`${row.target && row.target !== row.actor_id && html`<${Target} row=${row} />`}
      ${row.secondary && html`<span class="quiet small under"><${Details} row=${row} brief /></span>`}` },
  { id: "result", label: t("result"), cell: (row) => html`<${Result} row=${row} />` },
  { id: "address", label: t("address"), cell: (row) => html`<span class="mono">${visible(row.ip_address) || "–"}</span>` },
];

function List({ query }) {
  const isLive = query.live === "1" && !query.page;
  const { filters, error: unlooked } = useFilters(query);
  const actions = useLoad((signal) => get("/audit-logs/actions", { signal, passive: true }).then(({ data }) => data), []);
  return html`
    ${filters ? html`<${Rows} query=${query} filters=${filters} actions=${actions.data || []} isLive=${isLive} />`
      : html`<${Head} title=${t("audit")} /><${Failure} error=${unlooked} />${!unlooked && html`<${Loading} />`}`}`;
}

function Rows({ query, filters, actions, isLive }) {
  const page = useSearch("/audit-logs", filters);
  const live = useLive(page, filters, isLive);
  const taken = useExport(filters);
  const { act, busy, error } = useAct();
  const [verdict, setVerdict] = useState(null);
  const verify = () => act(async () => {
    const { data } = await get("/audit-logs/verify");
    setVerdict({ found: data, at: new Date(now()).toISOString() });
  });
  const list = { ...page, rows: page.rows && [...live.rows, ...page.rows].slice(0, Math.max(PAGE, LIVE_ROWS)) };
  if (isLive && page.rows) Object.assign(list, { isSearched: false, place: "", loading: false });
  const choices = [
    { name: "action", label: t("deed"), options: actions.map((one) => ({ value: one, label: inWords(one) })).sort((one, other) => compare(one.label, other.label)) },
    { name: "result", label: t("result"), options: [{ value: "success", label: t("done") }, { value: "failure", label: t("refused") }] },
    { name: "since", label: t("since_when"), options: Object.keys(SINCE).map((one) => ({ value: one, label: t(`since_${one}`) })) },
  ];
  const texts = TEXTS.filter((name) => query[name] && name !== "target" && name !== "ip_address");
  const clear = () => setQuery(Object.fromEntries(["q", "page", ...TEXTS, ...choices.map(({ name }) => name)].map((name) => [name, ""])));
  return html`<${Head} title=${t("audit")} aside=${isLive && html`<${State} kind="on">${t("live")}<//>`}>
      <${Button} onClick=${() => setQuery({ live: isLive ? "" : "1", page: "" }, true)}>${t(isLive ? "pause" : "watch_live")}<//>
      <${Button} busy=${busy} onClick=${verify}>${t("verify_chain")}<//>
      ${taken.state ? html`<${Button} onClick=${() => taken.state.abort.abort()}>${t("stop_export", { n: taken.state.rows })}<//>`
        : html`<${Button} onClick=${() => act(taken.begin)}>${t("export")}<//>`}<//>
    <div class="narrowly"><${Filters} label=${t("audit_who")} total=${page.total} choices=${choices} onClear=${clear}>
      <${TextFilter} name="target" label=${t("target")} query=${query} /><${TextFilter} name="ip_address" label=${t("address")} query=${query} /><//></div>
    ${texts.length > 0 && html`<ul class="tokens">${texts.map((name) => html`<li key=${name}><span>${t(`audit_${name}`)}: ${visible(query[name])}</span>
      <${Button} kind="plain" icon="close" label=${t("remove_filter", { name: t(`audit_${name}`) })} onClick=${() => setQuery({ [name]: "", page: "" })} /></li>`)}</ul>`}
    ${verdict && html`<${Verdict} verdict=${verdict} onClose=${() => setVerdict(null)} />`}
    <${Failure} error=${error || live.error} />
    <${Table} list=${list} columns=${COLUMNS} href=${(row) => href(["audit", row.id], query)} caption=${t("audit")} clear=${clear}
      empty=${html`<${Empty} title=${t("no_audit")}>${t("no_audit_text")}<//>`} />
    ${isLive && page.rows && html`<p class="pages quiet small">${t("live_rows", { n: list.rows.length })}</p>`}`;
}

function One({ id, query }) {
  const found = useLoad((signal) => get(path("audit-logs", id), { signal }).then(({ data }) => data), [id]);
  const row = found.data;
  const narrow = (changes, label) => html`<a class="button" href=${href(["audit"], changes)}>${label}</a>`;
  return html`<${Head} title=${t("audit_row", { id: Number(id) || 0 })} back=${{ href: href(["audit"], query), label: t("audit") }} />
    <${Failure} error=${found.error} retry=${found.reload} />
    ${!row ? !found.error && html`<${Loading} />` : html`<${Card}><${Facts} rows=${[
        [t("time"), html`${exact(row.timestamp)} <span class="quiet">· <${When} at=${row.timestamp} /></span>`],
        [t("who"), html`<${Who} id=${row.actor_id} link /> ${UUID.test(row.actor_id) && html`<span class="quiet mono">${row.actor_id}</span>`}`],
        [t("deed"), html`<${Deed} action=${row.action} /> ${has(`action_${row.action}`) && html`<code class="quiet">${visible(row.action)}</code>`}`],
        [t("target"), row.target ? html`<${Target} row=${row} link /> ${UUID.test(row.target) && html`<span class="quiet mono">${row.target}</span>`}` : "–"],
        [t("details"), row.secondary ? html`<${Details} row=${row} link /> ${UUID.test(row.secondary) && html`<span class="quiet mono">${row.secondary}</span>`}` : "–"],
        [t("result"), html`<${Result} row=${row} />`],
        [t("address"), html`<span class="mono">${visible(row.ip_address) || "–"}</span>`],
        [t("browser"), row.user_agent ? html`<${Name} text=${row.user_agent} />` : "–"],
        [t("request"), row.request_id ? html`<code>${visible(row.request_id)}</code>` : "–"],
        [t("hash"), html`<code>${row.row_sha256}</code>`],
      ]} />
      <div class="buttons start">
        ${row.request_id && narrow({ request_id: row.request_id }, t("all_of_request"))}
        ${row.actor_id && narrow(UUID.test(row.actor_id) ? { about: row.actor_id } : { q: row.actor_id }, t("all_of_actor"))}
        ${row.target && narrow({ target: row.target }, t("all_of_target"))}
        ${row.ip_address && narrow({ ip_address: row.ip_address }, t("all_of_address"))}
      </div><//>`}`;
}

export default function Audit({ segments, query }) {
  return segments[0] ? html`<${One} id=${segments[0]} query=${query} />` : html`<${List} query=${query} />`;
}
