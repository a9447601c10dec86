// Backups: make one, fetch it by pieces and compare its hash, remove it, and how to restore.
import { get, path, query, send } from "../api.js";
import { bytes, duration, number, t } from "../words.js";
import { Button, Card, Empty, Facts, Failure, Head, html, Name, State, useAct, useEffect, useLoad, useRef, useState, visible, When } from "../parts/base.js";
import { Copy } from "../parts/copy.js";
import { ask } from "../parts/dialog.js";
import { Sha256 } from "../parts/sha256.js";
import { Table, whole } from "../parts/table.js";
import { toast } from "../parts/toast.js";

/** Make one; of a database without encryption it can only be one without keys, which is asked for. */
async function make() {
  if (!(await ask({ title: t("make_backup_title"), text: t("make_backup_text"), confirm: t("make_backup"), proof: true }))) return false;
  const post = (body) => send("POST", "/backup", body).then(({ data }) => data);
  let made;
  try {
    made = await post({});
  } catch (error) {
    if (!error.errors?.without_keys) throw error;
    if (!(await ask({ title: t("without_keys_title"), text: t("without_keys_text"), confirm: t("without_keys_do"), proof: true }))) return false;
    made = await post({ without_keys: true });
  }
  toast(t("backup_made", { name: made.name, size: bytes(made.bytes) }));
  return true;
}

async function remove(row) {
  const question = { title: t("remove_backup_title"), text: t("remove_backup_text"), confirm: t("remove_backup"), danger: true, typed: row.name.slice(-15, -7), proof: true };
  if (!(await ask(question))) return false;
  await send("DELETE", path("backup", row.name));
  toast(t("backup_removed", { name: row.name }));
  return true;
}

const save = (parts, name) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(parts, { type: "application/octet-stream" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
};

/** Fetch one, a mebibyte at a time. What has come stays when it breaks off, and it goes on from there. */
function useFetching() {
  const [state, setState] = useState(null); // { row, got, isRunning, error, verdict }
  const kept = useRef(null); // { row, parts, hash, at, abort }
  useEffect(() => () => kept.current?.abort.abort(), []);
  const run = async () => {
    const one = kept.current;
    one.abort = new AbortController();
    const show = (more) => kept.current === one && setState({ row: one.row, got: one.at, isRunning: true, ...more });
    show({});
    try {
      while (one.at < one.row.bytes || one.at === 0) {
        const answer = await get(path("backup", one.row.name) + query({ offset: one.at || "" }), { raw: true, signal: one.abort.signal });
        const piece = new Uint8Array(await answer.arrayBuffer());
        if (!piece.length) break;
        one.parts.push(new Blob([piece])); // the browser may put it on the disk
        one.hash.update(piece);
        one.at += piece.length;
        show({});
        if (!answer.headers.get("X-Next-Offset")) break;
      }
      const digest = one.hash.hex();
      const verdict = !one.row.sha256 ? "unknown" : digest === one.row.sha256 ? "same" : "other";
      if (verdict !== "other") save(one.parts, one.row.name);
      one.parts = [];
      show({ isRunning: false, verdict, digest });
    } catch (error) {
      show({ isRunning: false, error: ["AbortError", "TypeError"].includes(error.name) || error.code === "proof_refused" ? null : error });
    }
  };
  return {
    state,
    begin: (row) => {
      kept.current?.abort.abort();
      kept.current = { row, parts: [], hash: new Sha256(), at: 0, abort: new AbortController() };
      return run();
    },
    goOn: run,
    stop: () => kept.current.abort.abort(),
    forget: () => {
      kept.current?.abort.abort();
      kept.current = null;
      setState(null);
    },
  };
}

function Fetching({ fetching }) {
  const { row, got, isRunning, error, verdict, digest } = fetching.state;
  return html`<${Card} title=${t(verdict ? "fetched" : "fetching")}>
    <p><${Name} text=${row.name} mono /></p>
    ${!verdict && html`<progress max=${row.bytes} value=${got} aria-label=${t("fetching")} /><p class="small" aria-live=${isRunning ? "off" : "polite"}>
      ${t(isRunning ? "got_of" : "broken_off", { got: bytes(got), of: bytes(row.bytes) })}</p>`}
    ${verdict === "same" && html`<p><${State} kind="good">${t("hash_same")}<//></p>`}
    ${verdict === "unknown" && html`<p><${State} kind="warn">${t("hash_unknown")}<//></p>`}
    ${verdict === "other" && html`<p><${State} kind="bad">${t("hash_other")}<//></p>`}
    ${digest && html`<${Copy} text=${digest} label="SHA-256" />`}
    <${Failure} error=${error} />
    <div class="buttons start">
      ${isRunning ? html`<${Button} onClick=${fetching.stop}>${t("pause")}<//>`
        : html`${!verdict && html`<${Button} kind="primary" onClick=${fetching.goOn}>${t("go_on")}<//>`}
          ${verdict === "other" && html`<${Button} kind="primary" onClick=${() => fetching.begin(row)}>${t("fetch_again")}<//>`}
          <${Button} onClick=${fetching.forget}>${t(verdict ? "close" : "cancel")}<//>`}
    </div><//>`;
}

function Schedule({ plan }) {
  return html`<${Card} title=${t("by_itself")}><${Facts} rows=${[
    [t("how_often"), plan.every ? duration(plan.every * 1000) : html`<${State} kind="off">${t("off")}<//> <code class="quiet">backup-every</code>`],
    [t("are_kept"), plan.every ? number(plan.keep) : null],
    [t("next_one"), plan.next_at ? html`<${When} at=${plan.next_at} />` : null],
    [t("folder"), plan.folder ? html`<code>${visible(plan.folder)}</code>` : null],
    [t("last_failure"), plan.failure ? html`<${State} kind="bad">${visible(plan.failure)}<//> <${When} at=${plan.failed_at} />` : null],
  ]} /><//>`;
}

const Restore = ({ name }) => html`<${Card} title=${t("how_to_restore")}>
  <ol class="steps"><li>${t("restore_1")}<${Copy} text="systemctl stop microauthd" label=${t("command")} /></li>
    <li>${t("restore_2")}<${Copy} text=${`microauthd.pyz restore ${name}`} label=${t("command")} /></li>
    <li>${t("restore_3")}<${Copy} text="systemctl start microauthd" label=${t("command")} /></li></ol>
  <p class="quiet">${t("restore_text")}</p><//>`;

export default function Backups() {
  const found = useLoad((signal) => get("/backup", { signal }).then(({ data }) => data), []);
  const status = useLoad((signal) => get("/status", { signal, passive: true }).then(({ data }) => data), []);
  const fetching = useFetching();
  const { act, busy, error } = useAct();
  const run = (work) => act(async () => (await work()) && found.reload());
  const plan = status.data?.backups;
  const isOff = plan && !plan.folder;
  const button = html`<${Button} kind="primary" busy=${busy} onClick=${() => run(make)}>${t("make_backup")}<//>`;
  return html`<${Head} title=${t("backups")}>${!isOff && button}<//>
    <${Failure} error=${error || found.error} retry=${found.error && found.reload} />
    ${fetching.state && html`<${Fetching} fetching=${fetching} />`}
    ${isOff ? html`<${Empty} title=${t("no_backup_folder")}>${t("no_backup_folder_text")}<${Copy} text="backup-folder = /var/backups/microauthd" label="mad.conf" /><//>`
      : html`<${Table} list=${whole(found)} keyOf=${(row) => row.name} caption=${t("backups")} empty=${html`<${Empty} title=${t("no_backups")}>${t("no_backups_text")}<//>`} columns=${[
        { id: "made", label: t("made"), cell: (row) => html`<${When} at=${row.created_at} /> ` },
        { id: "name", label: t("name"), cell: (row) => html`<span title=${row.sha256 ? `SHA-256 ${row.sha256}` : null}><${Name} text=${row.name} mono /></span>` },
        { id: "kind", label: t("kind"), cell: (row) => t(`backup_kind_${row.kind}`) },
        { id: "bytes", label: t("size"), kind: "number", cell: (row) => bytes(row.bytes) },
        { id: "acts", label: "", kind: "action", cell: (row) => html`<span class="pair">
          <${Button} kind="small" disabled=${fetching.state?.isRunning} onClick=${() => fetching.begin(row)}>${t("fetch")}<//>
          <${Button} kind="small" onClick=${() => run(() => remove(row))}>${t("remove")}<//></span>` },
      ]} />`}
    ${plan && !isOff && html`<${Schedule} plan=${plan} />`}
    <${Restore} name=${found.data?.[0]?.name || "microauthd.backup"} />`;
}
