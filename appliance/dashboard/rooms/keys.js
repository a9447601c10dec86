// Keys: of both rings, which signs, which waits to, which retires and until when; rotate, and revoke a stolen one after
// reading what that ends.
import { get, path, send } from "../api.js";
import { duration, moment, t } from "../words.js";
import { Button, Card, Failure, Head, html, Loading, Name, State, useAct, useLoad, When } from "../parts/base.js";
import { ask } from "../parts/dialog.js";
import { Table, whole } from "../parts/table.js";
import { toast } from "../parts/toast.js";

const RINGS = ["auth", "admin"];
const ORDER = { active: 0, next: 1, retired: 2 };
const KIND = { active: "on", next: "warn", retired: "off" };
const short = (kid) => `${kid.slice(0, 8)}…`;

/** What happens to the keys of a ring, in its order and not to scale: months lie behind now and minutes before it. */
function Timeline({ keys, at }) {
  const events = keys.flatMap((key) => [
    key.state === "active" && { at: key.signs_from, key, word: "key_signs_since", kind: "on" },
    key.state === "next" && { at: key.signs_from, key, word: "key_will_sign", kind: "warn" },
    key.state === "retired" && { at: key.since, key, word: "key_stopped", kind: "off" },
    key.state === "retired" && { at: key.gone_after, key, word: "key_gone", kind: "off" },
  ].filter((event) => event && event.at));
  const shown = [...events, { at, word: "now_word", kind: "now" }].sort((one, other) => Date.parse(one.at) - Date.parse(other.at));
  return html`<ol class="timeline" aria-label=${t("timeline")}>${shown.map((event) => html`<li key=${`${event.word}${event.key?.kid}`} class=${event.kind}>
    <span class="small">${event.key ? html`<${When} at=${event.at} />` : html`<span class="strong">${t("now_word")}</span>`}</span>
    ${event.key && html`<span class="small quiet">${t(event.word, { kid: short(event.key.kid), alg: event.key.alg })}</span>`}</li>`)}</ol>`;
}

const until = (key) => key.state === "retired" ? html`${t("gone")} <${When} at=${key.gone_after} />`
  : key.state === "next" ? html`${t("signs_word")} <${When} at=${key.signs_from} />` : html`${t("since")} <${When} at=${key.signs_from} fixed />`;

async function rotate(ring) {
  const isSure = await ask({ title: t("rotate_title", { ring: ring.toUpperCase() }), text: t("rotate_text"), confirm: t("rotate_keys"), proof: true });
  if (!isSure) return false;
  const { data } = await send("POST", "/keys/rotate", { ring });
  toast(t("rotated", { n: data.length, time: moment(data[0].signs_from) }));
  return true;
}

/** Say what a revocation ends before it is done. */
async function revoke(key) {
  const { data } = await get(path("keys", key.kid, "impact"));
  const counted = { n: data.tokens, users: t("n_people", { n: data.users }), clients: t("n_applications", { n: data.clients }) };
  const text = html`<p>${t(data.is_lower_bound ? "impact_at_least" : "impact", counted)}</p>
    ${key.state === "active" && html`<p>${t("impact_new_key")}</p>`}
    ${data.cached_seconds > 0 && html`<p>${t("impact_cached", { time: duration(data.cached_seconds * 1000) })}</p>`}
    <p class="quiet">${t("impact_undo")}</p>`;
  const isSure = await ask({ title: t("revoke_key_title", { kid: short(key.kid) }), text, confirm: t("revoke_key"), danger: true,
    typed: key.kid.slice(0, 8), proof: true });
  if (!isSure) return false;
  await send("POST", path("keys", key.kid, "revoke"));
  toast(t("key_revoked_done", { kid: short(key.kid) }));
  return true;
}

function Ring({ ring, keys, found, at }) {
  const { act, busy, error } = useAct();
  const run = (work) => act(async () => (await work()) && found.reload());
  const own = keys.filter((key) => key.ring === ring).sort((one, other) => ORDER[one.state] - ORDER[other.state]);
  const waits = own.some((key) => key.state === "next");
  return html`<${Card} title=${t(`ring_${ring}`)} actions=${html`
      ${waits && html`<span class="quiet small">${t("one_waits")}</span>`}
      <${Button} busy=${busy} disabled=${waits} onClick=${() => run(() => rotate(ring))}>${t("rotate_keys")}<//>`}>
    <${Failure} error=${error} />
    <${Timeline} keys=${own} at=${at} />
    <${Table} list=${whole(found, own)} keyOf=${(key) => key.kid} caption=${t(`ring_${ring}`)} columns=${[
      { id: "state", label: t("state"), cell: (key) => html`<${State} kind=${KIND[key.state]}>${t(`key_${key.state}`)}<//>` },
      { id: "kid", label: t("key"), cell: (key) => html`<${Name} text=${key.kid} mono />` },
      { id: "alg", label: t("algorithm"), cell: (key) => html`<code>${key.alg}</code>` },
      { id: "signs", label: t("what_it_signs"), cell: (key) => key.signs.length ? key.signs.map((one) => t(one)).join(", ") : html`<span class="quiet">–</span>` },
      { id: "until", label: t("when"), cell: until },
      { id: "revoke", label: "", kind: "action", cell: (key) => html`<${Button} kind="small" label=${t("revoke_what", { what: short(key.kid) })}
        onClick=${() => run(() => revoke(key))}>${t("revoke_word")}<//>` },
    ]} /><//>`;
}

export default function Keys() {
  const found = useLoad((signal) => get("/keys", { signal }).then(({ data, headers }) => ({ keys: data, at: new Date(headers.get("Date") || Date.now()).toISOString() })), []);
  return html`<${Head} title=${t("keys")} aside=${t("keys_aside")} />
    <${Failure} error=${found.error} retry=${found.reload} />
    ${found.data ? RINGS.map((ring) => html`<${Ring} key=${ring} ring=${ring} keys=${found.data.keys} at=${found.data.at} found=${found} />`)
      : !found.error && html`<${Loading} />`}`;
}
