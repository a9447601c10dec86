// Applications: the list, making one by what it is, and the page of each.
import { all, get, now, path, send } from "../api.js";
import { go, href, setQuery } from "../route.js";
import { ago, has, moment, t } from "../words.js";
import {
  Button, Card, Empty, Facts, Failure, Head, html, Loading, Name, State, Tabs, useAct, useLoad, useMemo, useRef, useState, visible, When,
} from "../parts/base.js";
import { ask, Dialog } from "../parts/dialog.js";
import { Filters } from "../parts/filters.js";
import { Check, Field, Form, Lines, reason, Select, useForm } from "../parts/form.js";
import { Claims } from "../parts/jwt.js";
import { Who } from "../parts/names.js";
import { Person } from "../parts/person.js";
import { SecretOnce } from "../parts/secret.js";
import { Table, useList, useSearch, whole } from "../parts/table.js";
import { toast } from "../parts/toast.js";
import Connect from "./connect.js";

const TABS = ["connect", "secrets", "addresses", "rights", "tokens", "preview", "who", "danger"];
const GRANTS = ["authorization_code", "refresh_token", "client_credentials", "password"];

// What it is decides type, grants and what is asked for.
const KINDS = [
  { id: "service", client_type: "confidential", grant_types: ["client_credentials"] },
  { id: "web", client_type: "confidential", grant_types: ["authorization_code", "refresh_token"], uris: true },
  { id: "spa", client_type: "public", grant_types: ["authorization_code", "refresh_token"], uris: true, origins: true },
  { id: "native", client_type: "public", grant_types: ["authorization_code", "refresh_token"], uris: true },
  { id: "device", client_type: "confidential", grant_types: ["client_credentials"] },
  { id: "api", client_type: "confidential", grant_types: [], may_introspect: true },
];

/** What an application is, in a word, by its type and grants. */
export function kindOf(client) {
  const logsIn = client.grant_types.includes("authorization_code");
  if (client.client_type === "public") return t(logsIn ? "kind_public_app" : "kind_public");
  if (logsIn) return t("kind_web_app");
  return t(client.grant_types.includes("client_credentials") ? "kind_service" : client.may_introspect ? "kind_api" : "kind_other");
}

let fresh = null; // { client_id, secret, note }: the secret that was just made, until it is closed or another is made

// -- the list --

const CLEAR = { q: "", page: "", client_type: "", grant_type: "", is_active: "" };

const useClients = (query) => useList("/clients", {
  q: query.q, client_type: query.client_type, grant_type: query.grant_type, is_active: query.is_active,
},
  { sort: "display_name" });

function List({ query, current }) {
  const list = useClients(query);
  const choices = [
    { name: "client_type", label: t("type"), options: ["confidential", "public"].map((value) => ({ value, label: t(`only_${value}`) })) },
    { name: "grant_type", label: t("grants"), options: GRANTS.map((value) => ({ value, label: t(`grant_${value}`) })) },
    { name: "is_active", label: t("state"), options: [{ value: "true", label: t("on") }, { value: "false", label: t("off") }] },
  ];
  const columns = [
    { id: "display_name", label: t("name"), sort: true, cell: (row) => html`<span class="strong"><${Name} text=${row.display_name || row.client_id} /></span>
      <span class="quiet small under"><${Name} text=${row.client_id} /></span>` },
    { id: "kind", label: t("kind"), kind: current ? "gone" : "", cell: (row) => html`${kindOf(row)}${!row.is_first_party && html` <span class="quiet">· ${t("third_party")}</span>`}` },
    { id: "last_token_at", label: t("last_token"), kind: current ? "gone" : "", cell: (row) => html`<${When} at=${row.last_token_at} none=${t("never")} />` },
    { id: "created_at", label: t("made"), sort: true, kind: current ? "gone" : "", cell: (row) => html`<${When} at=${row.created_at} />` },
    { id: "is_active", label: t("state"), cell: (row) => row.is_active ? html`<${State} kind="on">${t("on")}<//>` : html`<${State} kind="off">${t("off")}<//>` },
  ];
  const make = html`<${Button} kind=${current ? "" : "primary"} icon="plus" onClick=${() => go(["applications", "new"])}>${t("make_application")}<//>`;
  return html`<${Head} title=${t("applications")} level=${current ? 2 : 1}>${make}<//>
    <${Filters} label=${t("search_applications")} total=${list.total} choices=${choices} />
    <${Table} list=${list} columns=${columns} keyOf=${(row) => row.client_id} current=${current} caption=${t("applications")}
      href=${(row) => href(["applications", row.client_id, "connect"], query)} clear=${() => setQuery(CLEAR)}
      empty=${html`<${Empty} title=${t("no_applications")} action=${make}>${t("no_applications_text")}<//>`} />`;
}

// -- making one --

const clientId = (name) => name.toLowerCase().normalize("NFKD").replace(/[^a-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 60);

function Make() {
  const [kind, setKind] = useState(null);
  const [typed, setTyped] = useState(false);
  const form = useForm({ display_name: "", client_id: "", redirect_uris: "", cors_origins: "", is_first_party: true }, async (values) => {
    const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
    const body = {
      client_id: values.client_id.trim(), display_name: values.display_name.trim(), client_type: kind.client_type,
      grant_types: kind.grant_types, may_introspect: Boolean(kind.may_introspect), is_first_party: values.is_first_party,
      redirect_uris: kind.uris ? lines(values.redirect_uris) : undefined, cors_origins: kind.origins ? lines(values.cors_origins) : undefined,
    };
    const { data } = await send("POST", "/clients", body);
    fresh = data.client_secret ? { client_id: data.client_id, secret: data.client_secret } : null;
    toast(t("application_made", { name: visible(data.display_name || data.client_id) }));
    go(["applications", data.client_id, data.client_secret ? "secrets" : "connect"]);
  }, { whole: true });
  const below = useRef(); // what follows from the choice: on a telephone it lies under the edge
  const show = () => setTimeout(() => innerWidth < 640 && below.current?.scrollIntoView());
  const head = html`<${Head} title=${t("what_is_it")} back=${{ href: href(["applications"]), label: t("applications") }} />`;
  const choice = html`<div class="kinds" role="radiogroup" aria-label=${t("what_is_it")}>${KINDS.map((one) => html`<label key=${one.id}
    class=${`kind ${kind === one ? "chosen" : ""}`} onPointerUp=${show}><input type="radio" name="kind" checked=${kind === one} onChange=${() => setKind(one)} />
    <span class="strong">${t(`make_${one.id}`)}</span><span class="quiet small">${t(`make_${one.id}_text`)}</span></label>`)}</div>`;
  if (!kind) return html`${head}${choice}`;
  const name = (event) => {
    form.set("display_name", event.target.value);
    if (!typed) form.set("client_id", clientId(event.target.value));
  };
  return html`${head}${choice}
    <div ref=${below} class="below"><${Card}><${Form} form=${form} submit=${t("make_application")} cancel=${html`<a class="button" href=${href(["applications"])}>${t("cancel")}</a>`}>
      <${Field} form=${form} name="display_name" label=${t("name")} hint=${t("name_hint")} onInput=${name} />
      <${Field} form=${form} name="client_id" label="client_id" mono hint=${t("client_id_hint")} required
        onInput=${(event) => { setTyped(true); form.set("client_id", event.target.value); }} />
      ${kind.uris && html`<${Lines} form=${form} name="redirect_uris" label=${t("redirect_uris")} hint=${t(`redirect_hint_${kind.id}`)} />`}
      ${kind.origins && html`<${Lines} form=${form} name="cors_origins" label=${t("cors_origins")} hint=${t("cors_hint")} rows=${2} />`}
      ${kind.uris && html`<${Check} form=${form} name="is_first_party" label=${t("is_first_party")} hint=${t("is_first_party_hint")} />`}
      <${Facts} rows=${[
        [t("type"), t(`type_${kind.client_type}`)],
        [t("grants"), kind.grant_types.length ? kind.grant_types.map((grant) => t(`grant_${grant}`)).join(" · ") : t("no_grants")],
        ["PKCE", kind.uris ? t(kind.client_type === "public" ? "pkce_required" : "pkce_offered") : null],
      ]} />
    <//><//></div>`;
}

// -- the page of one --

function Secrets({ client, changed }) {
  const found = useLoad((signal) => get(path("clients", client.client_id, "secrets"), { signal }).then(({ data }) => data), [client.client_id]);
  const [overlap, setOverlap] = useState("3600");
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  if (client.client_type === "public") return html`<p>${t("public_has_no_secret")}</p>`;
  const act = (work) => async () => {
    setBusy(true);
    setError(null);
    try {
      await work();
      found.reload();
    } catch (failure) {
      if (failure.code !== "proof_refused") setError(failure);
    } finally {
      setBusy(false);
    }
  };
  const make = act(async () => {
    const { data } = await send("POST", "/clients/secret", { client_id: client.client_id, overlap_seconds: Number(overlap) });
    fresh = { client_id: client.client_id, secret: data.message, note: overlap === "0" ? t("earlier_secret_ended") : t("earlier_secret_works", { time: moment(new Date(now() + overlap * 1000).toISOString()) }) };
    changed();
  });
  const end = (row) => async () => {
    const last = found.data.length === 1;
    const used = row.last_used_at ? t("secret_last_used", { time: ago(row.last_used_at) }) : t("secret_no_use");
    const text = `${used} ${t(last ? "end_last_secret_text" : "end_secret_text")}`;
    if (await ask({ title: t("end_secret_title"), text, confirm: t("end_secret"), danger: true,
      typed: last ? client.client_id : "" })) {
      await act(async () => {
        await send("DELETE", path("clients", client.client_id, "secrets", row.id));
        if (found.data.every((other) => row.created_at >= other.created_at)) fresh = null;
        else if (fresh) fresh.note = t("earlier_secret_ended");
        toast(t("secret_ended"));
      })();
    }
  };
  return html`${fresh?.client_id === client.client_id && html`<${SecretOnce} value=${fresh.secret} name=${client.client_id} note=${fresh.note}
      onClose=${() => { fresh = null; changed(); }} />`}
    <${Card} title=${t("secrets")} actions=${html`<label class="inline">${t("earlier_works")} <select value=${overlap} onChange=${(event) => setOverlap(event.target.value)}>
        ${["0", "3600", "86400", "604800"].map((value) => html`<option key=${value} value=${value}>${t(`overlap_${value}`)}</option>`)}</select></label>
        <${Button} busy=${busy} onClick=${make}>${t("make_another")}<//>`}>
      <${Failure} error=${error} />
      <${Table} list=${whole(found)} empty=${html`<p>${t("no_secrets")}</p>`} columns=${[
        { id: "created_at", label: t("made"), cell: (row) => html`<${When} at=${row.created_at} />` },
        { id: "expires_at", label: t("works_until"), cell: (row) => html`<${When} at=${row.expires_at} none=${t("no_end")} />` },
        { id: "last_used_at", label: t("last_used"), cell: (row) => html`<${When} at=${row.last_used_at} none=${t("no_use_seen")} />` },
        { id: "end", label: "", kind: "action", cell: (row) => html`<${Button} kind="small" onClick=${end(row)}>${t("end")}<//>` },
      ]} /><//>`;
}

/** One kind of address of an application, with an immediate answer why one would be refused. */
function Uris({ client, kind, at, title, hint }) {
  const base = path("clients", client.client_id, at);
  const found = useLoad((signal) => get(base, { signal }).then(({ data }) => data), [base]);
  const [uri, setUri] = useState("");
  const [verdict, setVerdict] = useState(null);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const timer = useMemo(() => ({ id: 0 }), []);
  const type = (event) => {
    const { value } = event.target;
    setUri(value);
    setVerdict(null);
    setError(null);
    clearTimeout(timer.id);
    timer.id = setTimeout(async () => {
      if (!value.trim()) return;
      const answer = await send("POST", path("clients", client.client_id, "uris", "check"), { kind, uri: value.trim() }).catch(() => null);
      if (answer && timer.value === value) setVerdict(answer.data);
    }, 250);
    timer.value = value;
  };
  const add = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await send("POST", base, uri.trim());
      setUri("");
      setVerdict(null);
      found.reload();
    } catch (failure) {
      setError(failure);
    } finally {
      setBusy(false);
    }
  };
  const remove = async (row) => {
    try {
      await send("DELETE", `${base}/${encodeURIComponent(row.id)}`);
      found.reload();
      toast(t("address_removed"), { undo: async () => { await send("POST", base, row.uri); found.reload(); } });
    } catch (failure) {
      setError(failure);
    }
  };
  const wrong = verdict && !verdict.ok ? verdict.reason : error?.errors?.uri || "";
  return html`<${Card} title=${title}>
    ${found.error && html`<${Failure} error=${found.error} retry=${found.reload} />`}
    ${found.data?.length === 0 && html`<p class="quiet">${hint}</p>`}
    <ul class="rows">${found.data?.map((row) => html`<li key=${row.id}><code class="wrap">${visible(row.uri)}</code>
      <${Button} kind="small" label=${t("remove_what", { what: visible(row.uri) })} onClick=${() => remove(row)}>${t("remove")}<//></li>`)}</ul>
    <form class="adder" onSubmit=${add}><label class="hidden" for=${`new-${kind}`}>${t("add_address")}</label>
      <input id=${`new-${kind}`} class="mono" value=${uri} onInput=${type} placeholder=${t("add_address")} autocomplete="off" spellcheck=${false} autocapitalize="off"
        aria-invalid=${wrong ? "true" : null} aria-describedby=${`verdict-${kind}`} />
      <${Button} type="submit" busy=${busy} disabled=${!uri.trim() || (verdict && !verdict.ok)}>${t("add")}<//></form>
    <p id=${`verdict-${kind}`} class=${wrong ? "error" : "small quiet"} role="status">${wrong ? reason(wrong) : verdict?.ok ? t("address_good") : ""}
      ${verdict && !verdict.ok && verdict.nearest && html` ${t("nearest")} <code class="wrap">${visible(verdict.nearest)}</code>`}</p>
    ${error && !wrong && html`<${Failure} error=${error} />`}
  <//>`;
}

const PROVIDER = { provider_key: "", display_name: "", issuer: "", client_identifier: "", scopes: "openid email profile" };

/** The dialog that notes a provider, or changes the one that is there. */
function Provider({ base, row, onClose, changed }) {
  const form = useForm(row ? Object.fromEntries(Object.keys(PROVIDER).map((name) => [name, row[name]])) : PROVIDER, async (values) => {
    await (row ? send("PUT", path(...base, row.id), values) : send("POST", path(...base), values));
    onClose();
    changed();
    toast(t("saved"));
  }, { whole: true });
  return html`<${Dialog} title=${t(row ? "change_provider" : "add_provider")} onClose=${onClose}>
    <${Form} form=${form} submit=${t(row ? "save" : "add")} last cancel=${html`<${Button} onClick=${onClose}>${t("cancel")}<//>`}>
      <${Field} form=${form} name="provider_key" label=${t("provider_key")} hint=${t("provider_key_hint")} mono autofocus autocapitalize="off" spellcheck=${false} />
      <${Field} form=${form} name="display_name" label=${t("name")} optional />
      <${Field} form=${form} name="issuer" label=${t("issuer")} mono optional />
      <${Field} form=${form} name="client_identifier" label=${t("client_there")} mono optional />
      <${Field} form=${form} name="scopes" label=${t("scopes")} mono optional />
    <//><//>`;
}

/** The providers elsewhere that an application names: it reads them, the box asks none of them. */
function Providers({ client }) {
  const base = ["clients", client.client_id, "idp"];
  const found = useLoad((signal) => get(path("clients", client.client_id, "idp"), { signal }).then(({ data }) => data), [client.client_id]);
  const [open, setOpen] = useState(null); // a row, or {} for a new one
  const { act, busy, error } = useAct();
  const remove = (row) => act(async () => {
    await send("DELETE", path("clients", client.client_id, "idp", row.id));
    found.reload();
    toast(t("provider_removed", { name: visible(row.provider_key) }), { undo: async () => {
      await send("POST", path("clients", client.client_id, "idp"), Object.fromEntries(Object.keys(PROVIDER).map((name) => [name, row[name]])));
      found.reload();
    } });
  });
  return html`<${Card} title=${t("providers")} actions=${html`<${Button} onClick=${() => setOpen({})}>${t("add_dots")}<//>`}>
    <${Failure} error=${error || found.error} retry=${found.error && found.reload} />
    ${found.data?.length === 0 && html`<p class="quiet">${t("no_providers")}</p>`}
    <ul class="rows">${found.data?.map((row) => html`<li key=${row.id}><span class="wrap"><span class="strong"><${Name} text=${row.display_name || row.provider_key} /></span>
        ${" "}<code class="quiet"><${Name} text=${row.issuer || row.provider_key} /></code></span>
      <span class="pair"><${Button} kind="small" label=${t("change_what", { what: visible(row.provider_key) })} onClick=${() => setOpen(row)}>${t("change")}<//>
        <${Button} kind="small" busy=${busy} label=${t("remove_what", { what: visible(row.provider_key) })} onClick=${() => remove(row)}>${t("remove")}<//></span></li>`)}</ul>
    ${open && html`<${Provider} base=${base} row=${open.id ? open : null} onClose=${() => setOpen(null)} changed=${found.reload} />`}<//>`;
}

function Addresses({ client }) {
  if (!client.grant_types.includes("authorization_code")) return html`<p>${t("no_addresses_needed")}</p>`;
  return html`<${Uris} client=${client} kind="redirect" at="redirect-uris" title=${t("redirect_uris")} hint=${t("no_redirect_uris")} />
    <${Uris} client=${client} kind="post_logout" at="post-logout-redirect-uris" title=${t("post_logout_uris")} hint=${t("no_post_logout_uris")} />
    ${client.client_type === "public" && html`<${Uris} client=${client} kind="cors_origin" at="cors-origins" title=${t("cors_origins")} hint=${t("no_cors_origins")} />`}
    <${Providers} client=${client} />`;
}

/** A form on members of the application, which saves what changed with If-Match. */
function useClientForm(client, etag, members, changed) {
  const pick = (row) => Object.fromEntries(members.map((name) => [name, row[name]]));
  const version = useMemo(() => ({ etag }), [etag]);
  const reread = async () => {
    const { data, etag: latest } = await get(path("clients", client.client_id));
    version.etag = latest;
    return pick(data);
  };
  return useForm(pick(client), async (changes) => {
    const { data } = await send("PUT", path("clients", client.client_id), changes, { etag: version.etag });
    toast(t("saved"));
    if (data.client_id !== client.client_id) go(["applications", data.client_id, "rights"]);
    else changed();
  }, { reread });
}

function Rights({ client, etag, changed }) {
  const form = useClientForm(client, etag, ["display_name", "grant_types", "may_introspect", "is_first_party", "allow_http_redirects", "allow_short_schemes"], changed);
  const scopes = useLoad((signal) => all("/scopes", { signal }), []);
  const [error, setError] = useState(null);
  const grants = form.values.grant_types;
  const toggle = (grant) => form.set("grant_types", grants.includes(grant) ? grants.filter((one) => one !== grant) : [...grants, grant]);
  const give = (scope, isGiven) => async () => {
    setError(null);
    const base = path("clients", client.client_id, "scopes");
    const work = (gives) => gives ? send("POST", base, { ids: [scope.id] }) : send("DELETE", `${base}/${encodeURIComponent(scope.id)}`);
    try {
      await work(!isGiven);
      changed();
      toast(t(isGiven ? "scope_taken" : "scope_given", { name: visible(scope.name) }), { undo: () => work(isGiven).then(changed) });
    } catch (failure) {
      setError(failure);
    }
  };
  const names = { display_name: t("name"), grant_types: t("grants"), may_introspect: t("may_introspect"), is_first_party: t("is_first_party") };
  return html`<${Card} title=${t("what_it_may")}><${Form} form=${form} submit=${t("save")} names=${names}>
      <${Field} form=${form} name="display_name" label=${t("name")} />
      <fieldset><legend>${t("grants")}</legend>${GRANTS.map((grant) => html`<label key=${grant} class="check"><input type="checkbox"
        checked=${grants.includes(grant)} onChange=${() => toggle(grant)} /> <span>${t(`grant_${grant}`)} <code class="quiet">${grant}</code></span></label>`)}</fieldset>
      <${Check} form=${form} name="is_first_party" label=${t("is_first_party")} hint=${t("is_first_party_hint")} />
      ${client.client_type !== "public" && html`<${Check} form=${form} name="may_introspect" label=${t("may_introspect")} hint=${t("may_introspect_hint")} />`}
      <${Check} form=${form} name="allow_http_redirects" label=${t("allow_http")} hint=${t("allow_http_hint")} />
      <${Check} form=${form} name="allow_short_schemes" label=${t("allow_short")} hint=${t("allow_short_hint")} />
    <//><//>
    <${Card} title=${t("scopes_it_may_ask")}>
      <${Failure} error=${error || scopes.error} retry=${scopes.error && scopes.reload} />
      ${scopes.data ? html`<ul class="rows">${scopes.data.map((scope) => {
        const isGiven = client.scopes.includes(scope.name);
        return html`<li key=${scope.id}><label class="check"><input type="checkbox" checked=${isGiven} onChange=${give(scope, isGiven)} />
          <span><code><${Name} text=${scope.name} /></code> <span class="quiet small">${visible(scope.description)}</span></span></label></li>`;
      })}</ul>` : html`<${Loading} />`}<//>`;
}

function Tokens({ client, etag, changed }) {
  const form = useClientForm(client, etag, ["audience", "access_token_signed_alg", "id_token_signed_response_alg"], changed);
  const flags = useLoad((signal) => get(path("clients", client.client_id, "options"), { signal }).then(({ data }) => data), [client.client_id]);
  return html`<${Card} title=${t("tokens")}><${Form} form=${form} submit=${t("save")} names=${{ audience: t("audience") }}>
      <${Field} form=${form} name="audience" label=${t("audience")} hint=${t("audience_hint")} mono />
      <${Select} form=${form} name="access_token_signed_alg" label=${t("access_token_alg")} options=${[
        { value: "", label: t("as_the_box") }, { value: "ES256", label: "ES256" }, { value: "RS256", label: "RS256" }]} />
      <${Select} form=${form} name="id_token_signed_response_alg" label=${t("id_token_alg")} options=${[
        { value: "RS256", label: "RS256" }, { value: "ES256", label: "ES256" }]} />
    <//><//>
    <${Card} title=${t("flags")}>${flags.data ? Object.entries(flags.data).map(([name, flag]) =>
      html`<${Flag} key=${name} name=${name} flag=${flag} client=${client} changed=${flags.reload} />`)
      : html`<${Failure} error=${flags.error} retry=${flags.reload} />`}<//>`;
}

function Flag({ name, flag, client, changed }) {
  const [value, setValue] = useState(flag.options || "");
  const [error, setError] = useState(null);
  const act = (work) => async (event) => {
    event.preventDefault();
    setError(null);
    try {
      await work(event);
      toast(t("saved"));
      changed();
    } catch (failure) {
      setError(failure);
    }
  };
  const set = act((event) => send("POST", path("client", "options", name), { client_id: client.client_id, enabled: event.target.checked }));
  const setOption = act(() => send("POST", path("client", "options", name, "ext"), { client_id: client.client_id, options: value.trim() }));
  return html`<div class="flag"><label class="check"><input type="checkbox" checked=${flag.is_enabled} onChange=${set} />
      <span>${t(`flag_${name.toLowerCase()}`)} <code class="quiet small">${name}</code></span></label>
    ${"options" in flag && name !== "ENABLE_TOTP" && name !== "SESSION_BASED_AUTH" && html`<form class="adder" onSubmit=${setOption}>
      <input aria-label=${t(`flag_${name.toLowerCase()}`)} value=${value} inputmode=${name === "TOTP_ISSUER" ? "text" : "numeric"} onInput=${(event) => setValue(event.target.value)} />
      <${Button} type="submit" kind="small" disabled=${value === (flag.options || "")}>${t("save")}<//></form>`}
    <${Failure} error=${error} /></div>`;
}

/** Why there would be no token, in words where we have some. */
const obstacle = (text) => {
  const key = `obstacle_${text.replace(/\W+/g, "_")}`;
  return has(key) ? t(key) : visible(text);
};

function Preview({ client }) {
  const [values, setValues] = useState({ user: "", scope: "openid profile email" });
  const [found, setFound] = useState(null);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const show = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      setFound((await send("POST", path("clients", client.client_id, "preview"), { user_id: values.user.trim(), scope: values.scope.trim() || null })).data);
    } catch (failure) {
      setFound(null);
      setError(failure);
    } finally {
      setBusy(false);
    }
  };
  const field = (name, label, hint) => html`<div class="field"><label for=${`preview-${name}`}>${label}</label>
    <${name === "user" ? Person : "input"} id=${`preview-${name}`} value=${values[name]} autocomplete="off" autocapitalize="off" spellcheck=${false}
      onInput=${(event) => setValues({ ...values, [name]: event.target.value })} />${hint && html`<p class="hint">${hint}</p>`}</div>`;
  const left = Object.entries(found?.scopes.left_out || {});
  return html`<${Card} title=${t("preview")}><p class="quiet">${t("preview_text")}</p>
      <form class="form" onSubmit=${show}>${field("user", t("person"), client.grant_types.includes("client_credentials") ? t("preview_blank") : "")}
        ${field("scope", t("scopes"))}
        <${Failure} error=${error} />
        <div class="buttons start"><${Button} type="submit" kind="primary" busy=${busy}>${t("show_claims")}<//></div></form><//>
    ${found && html`<div role="status" class="stack">
      ${(found.refused || found.obstacles.length > 0) && html`<div class="note warn"><p>${t("preview_refused", { reason: [found.refused, ...found.obstacles].filter(Boolean).map(obstacle).join(" ") })}</p></div>`}
      <p><span class="strong">${t("granted")}:</span> ${found.scopes.granted.length ? found.scopes.granted.map((name) => html`<code key=${name} class="chip">${visible(name)}</code> `) : "–"}</p>
      ${left.length > 0 && html`<p class="strong">${t("left_out")}</p><ul class="rows">${left.map(([name, why]) => html`<li key=${name}><code>${visible(name)}</code> <span>${reason(why)}</span></li>`)}</ul>`}
      ${found.consent.length > 0 && html`<p>${t("asks_consent", { scopes: found.consent.join(" ") })}</p>`}
      ${["access_token", "id_token"].map((name) => found[name] && html`<${Card} key=${name} title=${t(name)}><${Claims} claims=${found[name].header} /><${Claims} claims=${found[name].claims} /><//>`)}
      ${found.userinfo && html`<${Card} title="userinfo"><${Claims} claims=${found.userinfo} /><//>`}</div>`}`;
}

function WhoIsIn({ client }) {
  const list = useSearch("/sessions", { client_id: client.client_id, living: true }, { inner: true, cursor: "after" });
  const consents = useList(path("clients", client.client_id, "consents"), {}, { inner: "consents" });
  const { act, busy, error } = useAct();
  const takeAll = async () => {
    const question = { title: t("take_consents_title", { name: visible(client.display_name || client.client_id) }), confirm: t("take_consents"),
      text: t("take_consents_text", { n: consents.total ?? consents.rows.length }), danger: true, proof: true };
    if (!(await ask(question))) return;
    await act(async () => {
      await send("DELETE", path("clients", client.client_id, "consents"));
      toast(t("consents_taken"));
      [list, consents].forEach((one) => one.reload());
    });
  };
  const end = (row) => async () => {
    if (!(await ask({ title: t("end_session_title"), text: t("end_session_text"), confirm: t("end_session"), danger: true }))) return;
    await send("DELETE", path("sessions", row.id));
    toast(t("session_ended_done"));
    list.reload();
  };
  return html`<${Card} title=${t("living_tokens")}><${Table} list=${{ ...list, isFiltered: false }} empty=${html`<p class="quiet">${t("nobody_is_in")}</p>`} columns=${[
      { id: "user_id", label: t("person"), cell: (row) => row.username ? html`<a href=${href(["people", row.username, "sessions"])}><${Name} text=${row.username} /></a>` : html`<span class="quiet">${t("itself")}</span>` },
      { id: "issued_at", label: t("begun"), cell: (row) => html`<${When} at=${row.issued_at} />` },
      { id: "expires_at", label: t("until"), cell: (row) => html`<${When} at=${row.expires_at} />` },
      { id: "state", label: t("state"), cell: (row) => row.is_revoked ? html`<${State} kind="off">${t("ended")}<//>` : html`<${State} kind="on">${t("living")}<//>` },
      { id: "end", label: "", kind: "action", cell: (row) => !row.is_revoked && html`<${Button} kind="small" onClick=${end(row)}>${t("end")}<//>` },
    ]} /><//>
    <${Card} title=${t("consents")} actions=${consents.rows?.length > 0 && html`<${Button} busy=${busy} onClick=${takeAll}>${t("take_consents_dots")}<//>`}>
      <${Failure} error=${error} />
      <${Table} list=${consents} keyOf=${(row) => row.user_id} empty=${html`<p class="quiet">${t("no_consents")}</p>`} columns=${[
        { id: "user", label: t("person"), cell: (row) => row.username ? html`<a href=${href(["people", row.username, "consents"])}><${Name} text=${row.username} /></a>` : html`<${Who} id=${row.user_id} link />` },
        { id: "scopes", label: t("scopes"), cell: (row) => row.scopes.map((name) => html`<code key=${name} class="chip">${visible(name)}</code> `) },
        { id: "given_at", label: t("given"), cell: (row) => html`<${When} at=${row.given_at} />` },
      ]} /><//>`;
}

function Danger({ client, etag, changed }) {
  const [error, setError] = useState(null);
  const name = visible(client.display_name || client.client_id);
  const act = (question, work, done, after = changed) => async () => {
    if (!(await ask({ danger: true, ...question }))) return;
    setError(null);
    try {
      await work();
      toast(done);
      after();
    } catch (failure) {
      if (failure.code !== "proof_refused") setError(failure);
    }
  };
  const turn = (is_active) => send("PUT", path("clients", client.client_id), { is_active });
  const off = act({ title: t("turn_off_title", { name }), text: t("turn_off_text"), confirm: t("turn_off") }, () => turn(false), t("turned_off", { name }));
  const on = async () => {
    setError(null);
    try {
      await turn(true);
      toast(t("turned_on", { name }), { undo: () => turn(false).then(changed) });
      changed();
    } catch (failure) {
      setError(failure);
    }
  };
  const revoke = act({ title: t("revoke_client_title", { name }), text: t("revoke_client_text"), confirm: t("revoke_all") },
    () => send("POST", path("clients", client.client_id, "revoke")), t("revoked_all"));
  const remove = act({ title: t("delete_title", { name }), text: t("delete_client_text"), confirm: t("delete_application"), typed: client.client_id, proof: true },
    () => send("DELETE", path("clients", client.client_id), undefined, { etag }), t("deleted", { name }), () => go(["applications"]));
  return html`<${Failure} error=${error} />
    <${Card} title=${t("reversible")}><ul class="rows acts">
      <li><span>${t(client.is_active ? "turn_off_line" : "turn_on_line")}</span>${client.is_active
        ? html`<${Button} onClick=${off}>${t("turn_off")}<//>` : html`<${Button} onClick=${on}>${t("turn_on")}<//>`}</li></ul><//>
    <${Card} title=${t("danger")} kind="danger"><ul class="rows acts">
      <li><span>${t("revoke_client_line")}</span><${Button} onClick=${revoke}>${t("revoke_all")}<//></li>
      <li><span>${t("delete_client_line")}</span><${Button} kind="danger" onClick=${remove}>${t("delete_application")}<//></li></ul><//>`;
}

function Page({ id, tab, query }) {
  const found = useLoad((signal) => get(path("clients", id), { signal }), [id]);
  const uris = useLoad((signal) => get(path("clients", id, "redirect-uris"), { signal }).then(({ data }) => data), [id, tab === "connect"]);
  const back = { href: href(["applications"], query), label: t("applications") };
  if (found.error) return html`<${Head} title=${visible(id)} back=${back} /><${Failure} error=${found.error} retry=${found.reload} />`;
  if (!found.data) return html`<${Head} title=${visible(id)} back=${back} /><${Loading} />`;
  const { data: client, etag } = found.data;
  const parts = { connect: Connect, secrets: Secrets, addresses: Addresses, rights: Rights, tokens: Tokens, preview: Preview, who: WhoIsIn, danger: Danger };
  const Part = parts[tab];
  const aside = html`<span>${kindOf(client)}</span> ${client.is_active ? html`<${State} kind="on">${t("on")}<//>` : html`<${State} kind="off">${t("off")}<//>`}`;
  return html`<${Head} title=${html`<${Name} text=${client.display_name || client.client_id} />`} back=${back} aside=${aside} />
    <${Tabs} base=${["applications", id]} current=${tab} label=${t("parts_of_application")} tabs=${TABS.map((one) => ({ id: one, label: t(`tab_${one}`) }))} />
    <${Part} key=${`${tab} ${etag}`} client=${client} etag=${etag} uris=${uris.data} changed=${found.reload}
      secret=${fresh?.client_id === client.client_id ? fresh.secret : ""} />`;
}

export default function Applications({ segments, query }) {
  const [id, tab = "connect"] = segments;
  if (id === "new") return html`<${Make} />`;
  if (fresh && fresh.client_id !== id) fresh = null;
  if (!id) return html`<${List} query=${query} />`;
  return html`<div class="beside"><aside><${List} query=${query} current=${id} /></aside>
    <div class="page"><${Page} key=${id} id=${id} tab=${TABS.includes(tab) ? tab : "connect"} query=${query} /></div></div>`;
}

