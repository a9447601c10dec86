// Home: is the box well, and what must I do? One question to /status, the figures of /status/history, the last changes.
import { get, send, session } from "../api.js";
import { href, rooms, setQuery } from "../route.js";
import { bytes, duration, has, number, t } from "../words.js";
import { Button, Card, Failure, Head, html, Icon, Loading, Name, State, useEffect, useLoad, useState, visible, When } from "../parts/base.js";
import { Chart } from "../parts/chart.js";
import { Copy } from "../parts/copy.js";
import { ask } from "../parts/dialog.js";
import { Deed, Details, Target, Who } from "../parts/names.js";
import { toast } from "../parts/toast.js";

const RANGES = ["1h", "1d", "7d"];
const BACKUP = ["backup_old", "backup_failed", "backup_none"]; // what a backup settles

/** What a route gives, or null where this release has no such route. */
const optional = (path, signal) => get(path, { signal, passive: true }).then(({ data }) => data).catch((error) => {
  if (error.unknownRoute) return null;
  throw error;
});

/** Load again each minute while the tab is looked at and `isLive`. */
function useLive(found, isLive = true) {
  useEffect(() => {
    if (!isLive) return;
    const timer = setInterval(() => document.hidden || found.reload(), 60000);
    return () => clearInterval(timer);
  }, [isLive]);
  return found;
}

async function makeBackup() {
  const isSure = await ask({ title: t("make_backup_title"), text: t("make_backup_text"), confirm: t("make_backup"), proof: true });
  if (!isSure) return;
  const { data } = await send("POST", "/backup", {});
  toast(t("backup_made", { name: data.name, size: bytes(data.bytes) }));
}

function Need({ need, reload }) {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const mend = async () => {
    setBusy(true);
    setError(null);
    try {
      await makeBackup();
      reload();
    } catch (failure) {
      if (failure.code !== "proof_refused") setError(failure);
    } finally {
      setBusy(false);
    }
  };
  const isError = need.severity === "error";
  return html`<li class=${isError ? "bad" : "warn"}><span class="mark" aria-hidden="true">${isError ? "✕" : "!"}</span>
    <div><p>${has(`attention_${need.code}`) ? t(`attention_${need.code}`) : visible(need.text)}
      ${need.since && html` <span class="quiet small">${t("since")} <${When} at=${need.since} fixed /></span>`}</p>
      ${has(`attention_${need.code}`) && html`<p class="quiet small">${visible(need.text)}</p>`}
      ${need.command && !BACKUP.includes(need.code) && html`<${Copy} text=${need.command} label=${t("command")} />`}
      <${Failure} error=${error} /></div>
    ${BACKUP.includes(need.code) && html`<${Button} busy=${busy} onClick=${mend}>${t("make_backup")}<//>`}</li>`;
}

function Attention({ status, reload }) {
  const needs = status.attention;
  if (!needs.length) return html`<p class="note good"><${Icon} name="check" /> ${t("box_is_well")}</p>`;
  return html`<section class="card needs"><h2>${t("needs_attention", { n: needs.length })}</h2>
    <ul>${needs.map((need) => html`<${Need} key=${need.code} need=${need} reload=${reload} />`)}</ul></section>`;
}

const Tile = ({ title, children, more }) => html`<section class="tile"><h2>${title}</h2><p class="value">${children}</p>
  ${more && html`<p class="quiet small">${more}</p>`}</section>`;

function Tiles({ status }) {
  const { checks, workers, clock, last_backup: backup, certificate, disk } = status;
  const isReady = Object.values(checks).every(Boolean);
  const isRight = clock.state === "right";
  return html`<div class="tiles">
    <${Tile} title=${t("ready")} more=${t("auth_processes", { n: workers.running, of: workers.expected })}>
      <${State} kind=${isReady ? "good" : "bad"}>${t(isReady ? "yes" : "no")}<//><//>
    <${Tile} title=${t("clock")} more=${has(`clock_${clock.state}`) ? t(`clock_${clock.state}`) : clock.state}>
      <${State} kind=${isRight ? "good" : "warn"}>${t(isRight ? "believed" : "not_believed")}<//><//>
    <${Tile} title=${t("last_backup")} more=${backup && `${visible(backup.name)} · ${bytes(backup.bytes)}`}>
      ${backup ? html`<${When} at=${backup.at} />` : t("none_yet")}<//>
    ${certificate && html`<${Tile} title=${t("certificate")} more=${visible(certificate.names.join(", "))}>${t("ends")} <${When} at=${certificate.not_after} /><//>`}
    <${Tile} title=${t("disk")} more=${t("disk_parts", { database: bytes(disk.database + disk.wal), log: bytes(disk.log) })}>
      ${t("free", { size: bytes(disk.free) })}<//>
  </div>`;
}

function Figures({ query }) {
  const range = RANGES.includes(query.range) ? query.range : "1h";
  const [isPaused, pause] = useState(false);
  const found = useLive(useLoad((signal) => optional(`/status/history?range=${range}`, signal), [range]), !isPaused);
  if (found.data === null) return html`<p class="quiet">${t("no_history")}</p>`;
  const history = found.data;
  const from = history && (typeof history.from === "number" ? history.from : Date.parse(history.from) / 1000);
  return html`<section class="figures"><div class="split"><div class="segments" role="group" aria-label=${t("range")}>${RANGES.map((one) => html`<button key=${one} type="button"
        aria-pressed=${one === range ? "true" : "false"} onClick=${() => setQuery({ range: one === "1h" ? "" : one }, true)}>${t(`range_${one}`)}</button>`)}</div>
      <span class="quiet small">${t(isPaused ? "paused" : "live")} <${Button} kind="small" onClick=${() => pause(!isPaused)}>${t(isPaused ? "go_live" : "pause")}<//></span></div>
    <${Failure} error=${found.error} retry=${found.reload} />
    ${history ? html`<div class="charts">${["tokens", "logins", "failures"].filter((name) => history.series[name]).map((name) => {
      const sum = history.series[name].reduce((total, value) => total + (value || 0), 0);
      return html`<section class="tile" key=${name}><h2>${t(`figure_${name}`)}</h2><p class="value">${number(sum)}</p>
        <${Chart} from=${from} step=${history.step} series=${{ [name]: history.series[name] }} words=${{ [name]: t(`figure_${name}`) }}
          label=${t("chart_label", { what: t(`figure_${name}`), n: sum })} /></section>`;
    })}</div>` : !found.error && html`<${Loading} rows=${3} />`}</section>`;
}

function Steps() {
  const found = useLoad(async (signal) => {
    const count = (path) => get(path, { signal, passive: true }).then(({ total, data }) => total ?? data.length);
    const [clients, users] = await Promise.all([count("/clients?limit=1"), count("/users?limit=2")]);
    return { clients, users };
  }, []);
  if (!found.data) return null;
  const steps = [
    ["step_factor", session.value.totp_enabled, ["me"]], ["step_application", found.data.clients > 0, ["applications", "new"]],
    ["step_person", found.data.users > 1, ["people", "new"]],
  ];
  if (steps.every(([, isDone]) => isDone)) return null;
  return html`<${Card} title=${t("first_steps")}><ul class="rows acts">${steps.map(([key, isDone, to]) => html`<li key=${key}>
    <span>${isDone ? html`<${State} kind="good">${t(key)}<//>` : html`<${State} kind="off">${t(key)}<//>`}</span>
    ${!isDone && rooms.has(to[0]) && html`<a class="button" href=${href(to)}>${t(`${key}_do`)}</a>`}</li>`)}</ul><//>`;
}

function Changes() {
  const found = useLive(useLoad((signal) => get("/audit-logs?limit=8", { signal, passive: true }).then(({ data }) => data), []));
  return html`<${Card} title=${t("last_changes")} actions=${html`<a href=${href(["audit"])}>${t("all_of_them")}</a>`}>
    <${Failure} error=${found.error} retry=${found.reload} />
    ${found.data ? html`<ul class="rows log">${found.data.map((row) => html`<li key=${row.id}><span class="quiet"><${When} at=${row.timestamp} /></span>
      <span class="strong"><${Who} id=${row.actor_id} link /></span>
      <span><${Deed} action=${row.action} /> ${row.target && row.target !== row.actor_id && html`<span class="quiet"><${Target} row=${row} link /></span>`}
        ${row.secondary && html` <span class="quiet small"><${Details} row=${row} link brief /></span>`}</span>
      ${row.result && row.result !== "success" && html`<${State} kind="bad">${t("refused")}<//>`}</li>`)}</ul>` : !found.error && html`<${Loading} />`}<//>`;
}

export default function Home({ query }) {
  const found = useLive(useLoad((signal) => optional("/status", signal), []));
  const status = found.data;
  const aside = status && html`<${Name} text=${new URL(status.issuer).host} /> · ${visible(status.version)}${
    status.since && html` · ${t("up", { time: duration(Date.parse(status.now) - Date.parse(status.since)) })}`}`;
  return html`<${Head} title=${t("home")} aside=${aside} />
    <${Failure} error=${found.error} retry=${found.reload} />
    ${status === undefined ? !found.error && html`<${Loading} rows=${3} />` : status === null ? html`<p class="quiet">${t("no_status")}</p>`
      : html`<${Attention} status=${status} reload=${found.reload} /><${Tiles} status=${status} />`}
    <${Steps} />
    <${Figures} query=${query} />
    <${Changes} />`;
}
