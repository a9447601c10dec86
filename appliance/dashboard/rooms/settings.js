// Settings: every option with its value, origin and meaning; the brand; upkeep. #/settings?q=&changed=1,
// #/settings/brand, #/settings/upkeep
import { get, send } from "../api.js";
import { setQuery } from "../route.js";
import { has, t } from "../words.js";
import { Button, Card, Failure, Head, html, Loading, Name, State, Tabs, useAct, useId, useLoad, useState, visible } from "../parts/base.js";
import { ask } from "../parts/dialog.js";
import { Filters } from "../parts/filters.js";
import { Table, whole } from "../parts/table.js";
import { toast } from "../parts/toast.js";
import Brand from "./brand.js";

const group = (name) => { // the heading of a group, in words where we have them
  const key = `group_${name.toLowerCase().replace(/[^a-z0-9]+/g, "_")}`;
  return has(key) ? t(key) : name;
};

function Value({ row }) {
  if (row.is_secret) return html`<span class="quiet">${t(row.value ? "is_set" : "is_not_set")}</span>`;
  if (typeof row.value === "boolean") return html`<${State} kind=${row.value ? "on" : "off"}>${t(row.value ? "on" : "off")}<//>`;
  const text = Array.isArray(row.value) ? row.value.join(", ") : String(row.value);
  return text === "" ? html`<span class="quiet">–</span>` : html`<code>${visible(text)}</code>`;
}

const Origin = ({ row }) => row.origin === "default" ? html`<span class="quiet">${t("origin_default")}</span>`
  : html`<${Name} text=${row.origin} />`;

const COLUMNS = [
  { id: "name", label: t("option"), cell: (row) => html`<code class="strong">${row.name}</code>` },
  { id: "value", label: t("value"), cell: (row) => html`<${Value} row=${row} />` },
  { id: "origin", label: t("from_where"), cell: (row) => html`<${Origin} row=${row} />` },
  { id: "meaning", label: t("meaning"), cell: (row) => html`<span class="quiet">${row.meaning}</span>` },
];

function Options({ query, found }) {
  const wanted = (query.q || "").toLowerCase();
  const isOpen = (row) => (!wanted || [row.name, row.meaning, row.group].some((text) => text.toLowerCase().includes(wanted)))
    && (query.origin !== "changed" || row.origin !== "default");
  const rows = found.data?.filter(isOpen);
  const groups = [...new Set(rows?.map((row) => row.group))];
  return html`<p class="quiet">${t("options_text")}</p>
    <${Filters} label=${t("search_options")} total=${rows?.length} choices=${[{ name: "origin", label: t("all_options"), options: [{ value: "changed", label: t("only_changed") }] }]} />
    <${Failure} error=${found.error} retry=${found.reload} />
    ${!rows ? !found.error && html`<${Loading} />` : rows.length === 0
      ? html`<div class="empty"><p>${t("nothing_matches")}</p><${Button} onClick=${() => setQuery({ q: "", origin: "" })}>${t("clear_filters")}<//></div>`
      : groups.map((name) => html`<${Card} key=${name} kind="options" title=${group(name)}>
          <${Table} list=${{ ...whole(found, rows.filter((row) => row.group === name)), page: undefined }} keyOf=${(row) => row.name} columns=${COLUMNS} caption=${group(name)} /><//>`)}`;
}

/** A purge: what it deletes, of what age, and the button. */
function Purge({ title, text, unit, usual, least, question, run }) {
  const [age, setAge] = useState(usual);
  const { act, busy, error } = useAct();
  const id = useId();
  const isGood = Number.isInteger(Number(age)) && Number(age) >= least;
  const submit = (event) => {
    event.preventDefault();
    return act(async () => {
      if (!(await ask({ danger: true, confirm: t("purge_do"), ...question(Number(age)) }))) return;
      const { data } = await run(Number(age));
      toast(t("purged", { n: Number(/^\d+/.exec(data.message)?.[0] || 0) }));
    });
  };
  return html`<${Card} title=${title}><p class="quiet">${text}</p>
    <form class="adder" onSubmit=${submit}><label for=${id} class="inline">${t("older_than")}
        <input id=${id} type="number" inputmode="numeric" min=${least} step="1" class="days" value=${age} required onInput=${(event) => setAge(event.target.value)} /> ${unit}</label>
      <${Button} type="submit" busy=${busy} disabled=${!isGood}>${t("purge_do")}<//></form>
    <${Failure} error=${error} /><//>`;
}

const DAY = 86400;

function AllConsents() {
  const { act, busy, error } = useAct();
  const take = () => act(async () => {
    const word = t("everybody_word");
    if (!(await ask({ title: t("all_consents_title"), text: t("all_consents_lost"), confirm: t("take_consents"), danger: true, typed: word, proof: true }))) return;
    await send("DELETE", "/consents");
    toast(t("consents_taken"));
  });
  return html`<${Card} title=${t("all_consents")} kind="danger"><ul class="rows acts"><li><span>${t("all_consents_text")}</span>
    <${Button} kind="danger" busy=${busy} onClick=${take}>${t("take_consents_dots")}<//></li></ul><${Failure} error=${error} /><//>`;
}

function Upkeep() {
  const days = (age) => t("n_days", { n: age });
  const tokens = (at) => (age) => send("POST", at, { older_than_seconds: age * DAY });
  return html`<p class="quiet">${t("upkeep_text")}</p>
    <${Purge} title=${t("purge_sessions")} text=${t("purge_sessions_text")} unit=${t("days")} usual=${1} least=${0}
      question=${(age) => ({ title: t("purge_sessions_title"), text: t("purge_rows_text", { age: days(age) }) })} run=${tokens("/sessions/purge")} />
    <${Purge} title=${t("purge_refresh")} text=${t("purge_refresh_text")} unit=${t("days")} usual=${1} least=${0}
      question=${(age) => ({ title: t("purge_refresh_title"), text: t("purge_rows_text", { age: days(age) }) })} run=${tokens("/refresh-tokens/purge")} />
    <${Purge} title=${t("purge_audit")} text=${t("purge_audit_text")} unit=${t("days")} usual=${365} least=${1}
      question=${(age) => ({ title: t("purge_audit_title"), text: t("purge_audit_lost", { age: days(age) }), proof: true })}
      run=${(age) => send("POST", "/audit-logs/purge", { older_than_days: age })} />
    <${AllConsents} />`;
}

export default function Settings({ segments, query }) {
  const tab = ["brand", "upkeep"].includes(segments[0]) ? segments[0] : "options";
  const found = useLoad((signal) => get("/options", { signal }).then(({ data }) => data), []);
  const swagger = found.data?.find((row) => row.name === "enable-admin-swagger")?.value === true;
  return html`<${Head} title=${t("settings")}>${swagger && html`<a class="button" href="../swagger">${t("api_description")}</a>`}<//>
    <${Tabs} base=${["settings"]} label=${t("parts_of_settings")} current=${tab}
      tabs=${["options", "brand", "upkeep"].map((one) => ({ id: one, label: t(`settings_${one}`) }))} />
    ${tab === "brand" ? html`<${Brand} />` : tab === "upkeep" ? html`<${Upkeep} />` : html`<${Options} query=${query} found=${found} />`}`;
}
