// People: the list, making one, inviting, and the page of each.
import { all, get, now, path, send, session } from "../api.js";
import { go, href, rooms, setQuery } from "../route.js";
import { browserName, compare, has, list as listed, moment, t } from "../words.js";
import {
  Button, Card, Empty, Facts, Failure, Head, html, Loading, Name, State, Tabs, useAct, useEffect, useLoad, useRef, useState, visible, When,
} from "../parts/base.js";
import { Choices } from "../parts/choices.js";
import { ask, Dialog } from "../parts/dialog.js";
import { Factor } from "../parts/factor.js";
import { Filters } from "../parts/filters.js";
import { Check, Field, Form, NewPassword, Select, useForm, useRecord } from "../parts/form.js";
import { Deed, Details, Who } from "../parts/names.js";
import { SecretOnce } from "../parts/secret.js";
import { Table, useList, useSearch, whole } from "../parts/table.js";
import { toast } from "../parts/toast.js";
import { signal } from "../vendor/signals.js";

const TABS = ["profile", "rights", "sessions", "factor", "consents", "history"];
const DAY = 86400000;
const isLater = (time) => Boolean(time) && Date.parse(time) > now();
const isForever = (time) => time.startsWith("9999");

const fresh = signal(null); // the invitation that was just made, with its link, until it is closed or one leaves the person
const failed = signal(null); // { id, error }: what went wrong after a person was made

function StateOf({ user }) {
  if (!user.is_active) return html`<${State} kind="off">${t("deactivated")}<//>`;
  if (isLater(user.lockout_until) || isLater(user.totp_locked_until)) return html`<${State} kind="locked">${t("locked")}<//>`;
  return html`<${State} kind="on">${t("active")}<//>`;
}

// -- the list --

const STATES = { active: { is_active: "true" }, locked: { is_active: "all", locked: true }, off: { is_active: "false" } };
const CLEAR = { q: "", page: "", state: "", role: "", totp: "", unused: "" };

/** The moment that lies some days before today, so that it is the same all day. */
const daysAgo = (days) => days && new Date((Math.floor(now() / DAY) - Number(days)) * DAY).toISOString();

function List({ query, current }) {
  const roles = useLoad((signal) => all("/roles", { signal }), []);
  const list = useList("/users", {
    q: query.q, is_active: "all", ...STATES[query.state], role: query.role, totp: query.totp, unused_since: daysAgo(query.unused),
  }, { sort: "username" });
  const side = current ? "gone" : "";
  const columns = [
    { id: "username", label: t("user_name"), sort: true, cell: (row) => html`<span class="strong"><${Name} text=${row.username} /></span>
      ${row.email && html`<span class="quiet small under"><${Name} text=${row.email} /></span>`}` },
    { id: "roles", label: t("its_roles"), kind: side, cell: (row) => row.roles.length ? html`<span class="clip" title=${row.roles.map(visible).join(", ")}>${
      row.roles.map((name) => html`<span key=${name} class="chip"><${Name} text=${name} /></span> `)}</span>` : html`<span class="quiet none">–</span>` },
    { id: "totp", label: t("second_factor"), kind: `labelled ${side}`, cell: (row) => row.totp_enabled ? html`<${State} kind="good">${t("on")}<//>` : html`<span class="quiet none">–</span>` },
    { id: "last_login_at", label: t("last_sign_in"), sort: true, kind: side, cell: (row) => html`<${When} at=${row.last_login_at} none=${t("never")} />` },
    { id: "state", label: t("state"), cell: (row) => html`<${StateOf} user=${row} />` },
  ];
  const choices = [
    { name: "state", label: t("state"), options: [["active", t("active")], ["locked", t("locked")], ["off", t("deactivated")]] },
    { name: "role", label: t("role"), options: (roles.data || []).map((role) => [role.name, visible(role.name)]).sort((one, other) => compare(one[1], other[1])) },
    { name: "totp", label: t("second_factor"), options: [["true", t("on")], ["false", t("off")]] },
    { name: "unused", label: t("not_signed_in"), options: ["30", "90", "365"].map((days) => [days, t("for_days", { n: Number(days) })]) },
  ].map((choice) => ({ ...choice, options: choice.options.map(([value, label]) => ({ value, label })) }));
  const make = html`<${Button} kind=${current ? "" : "primary"} icon="plus" onClick=${() => go(["people", "new"])}>${t("make_person")}<//>`;
  return html`<${Head} title=${t("people")} level=${current ? 2 : 1}>${make}<//>
    <${Filters} label=${t("search_people")} total=${list.total} choices=${choices} />
    <${Table} list=${list} columns=${columns} keyOf=${(row) => row.username} current=${current} caption=${t("people")}
      href=${(row) => href(["people", row.username === "new" ? row.id : row.username, "profile"], query)} clear=${() => setQuery(CLEAR)}
      empty=${html`<${Empty} title=${t("no_people")} action=${make}>${t("no_people_text")}<//>`} />`;
}

// -- making one --

const ENTRIES = ["invite", "password", "none"];

function Make() {
  const [entry, setEntry] = useState("invite");
  const [roles, setRoles] = useState(new Set());
  const every = useLoad((signal) => all("/roles", { signal }), []);
  const form = useForm({ username: "", email: "", email_verified: false, password: "" }, async (values) => {
    const withPassword = entry === "password";
    const email = values.email.trim();
    const { data: user } = await send("POST", "/users", {
      username: values.username.trim(), ...(email ? { email, email_verified: values.email_verified } : { user_email: null }),
      password: withPassword ? values.password : undefined, without_password: !withPassword,
    });
    toast(t("person_made", { name: visible(user.username) }));
    try { // the person is there from now on: what fails is said on the page
      if (roles.size) await send("PUT", path("users", user.id, "roles"), { roles: [...roles].map((id) => ({ id })) });
      if (entry === "invite") fresh.value = (await invite(user, "invite")).data;
    } catch (error) {
      failed.value = { id: user.id, error };
    }
    go(["people", user.username, "profile"]);
  }, { whole: true });
  const give = async (role, gives) => setRoles((before) => new Set(gives ? [...before, role.id] : [...before].filter((id) => id !== role.id)));
  const isAdmin = every.data?.some((role) => role.name === "MadAdmin" && roles.has(role.id));
  return html`<${Head} title=${t("make_person")} back=${{ href: href(["people"]), label: t("people") }} />
    <${Card}><${Form} form=${form} submit=${t("make_person")} cancel=${html`<a class="button" href=${href(["people"])}>${t("cancel")}</a>`}>
      <${Field} form=${form} name="username" label=${t("user_name")} hint=${t("user_name_hint")} required autocapitalize="off" spellcheck=${false} />
      <${Field} form=${form} name="email" type="email" label=${t("email")} optional />
      ${form.values.email.trim() && html`<${Check} form=${form} name="email_verified" label=${t("email_is_theirs")} hint=${t("email_is_theirs_hint")} />`}
      <fieldset><legend>${t("how_in")}</legend>${ENTRIES.map((one) => html`<label key=${one} class="check"><input type="radio" name="entry"
        checked=${entry === one} onChange=${() => setEntry(one)} /> <span>${t(`entry_${one}`)} <span class="quiet small line">${t(`entry_${one}_text`)}</span></span></label>`)}</fieldset>
      ${entry === "password" && html`<${NewPassword} form=${form} name="password" label=${t("password")} required />`}
      <fieldset><legend>${t("its_roles")} <span class="quiet">${t("optional")}</span></legend>
        ${every.data ? html`<${Choices} rows=${every.data} chosen=${roles} toggle=${give} label=${t("its_roles")} empty=${t("no_roles")} />`
          : html`<${Failure} error=${every.error} retry=${every.reload} />`}</fieldset>
      ${isAdmin && html`<p class="note warn">${t("makes_administrator")}</p>`}
    <//><//>`;
}

// -- the page of one --

const invite = (user, purpose) => send("POST", path("users", user.id, "invitations"), { purpose });

/** What stands above the tabs while it is so: the lock, the state, what is missing. */
function Notes({ user, changed }) {
  const { act, busy, error } = useAct();
  const name = visible(user.username);
  const lock = user.lockout_until;
  const unlock = () => act(async () => {
    await send("POST", path("users", user.id, "clear-lockout"));
    changed();
    toast(t("unlocked", { name }), isLater(lock) ? { undo: async () => {
      await send("POST", path("users", user.id, "set-lockout"), { lockout_until: lock, reason: user.lockout_reason });
      changed();
    } } : {});
  });
  const activate = () => act(async () => {
    await send("POST", path("users", user.id, "activate"));
    changed();
    toast(t("activated", { name }));
  });
  const by = user.lockout_by && (has(`actor_${user.lockout_by}`) ? t(`actor_${user.lockout_by}`) : visible(user.lockout_by));
  const note = (text, button, work) => html`<div class="note warn split"><p>${text}</p><${Button} busy=${busy} onClick=${work}>${button}<//></div>`;
  return html`<${Failure} error=${error} />
    ${isLater(lock) ? note(html`<${State} kind="locked">${isForever(lock) ? t("locked_forever") : t("locked_until", { time: moment(lock) })}<//>
        ${by && ` ${t("by_who", { who: by })}`}${user.lockout_reason && html`: <q><${Name} text=${user.lockout_reason} /></q>`}`, t("unlock"), unlock)
      : isLater(user.totp_locked_until) && note(html`<${State} kind="locked">${t("codes_locked_until", { time: moment(user.totp_locked_until) })}<//>`, t("unlock"), unlock)}
    ${!user.is_active && note(html`<${State} kind="off">${t("deactivated_text")}<//>`, t("activate"), activate)}`;
}

/** The link that was just made: above everything, for it is not shown again. */
function Link({ user, link }) {
  const box = useRef();
  useEffect(() => box.current.scrollIntoView({ block: "nearest" }), []);
  return html`<div ref=${box}><${SecretOnce} value=${link.url} name=${`${user.username}-link`} title=${t("link_made")} stored=${t("i_gave_it")}
    note=${t("link_works_once", { time: moment(link.expires_at), name: visible(user.username) })} onClose=${() => { fresh.value = null; }} /></div>`;
}

const SPANS = [["1", 1 / 24], ["24", 1], ["168", 7], ["720", 30]]; // hours, days

function Lock({ user, changed, onClose }) {
  const form = useForm({ span: "24", until: "", reason: "" }, async ({ span, until, reason }) => {
    const days = SPANS.find(([value]) => value === span)?.[1];
    if (span === "time" && !(Date.parse(until) > now())) {
      throw Object.assign(new Error(), { code: "invalid_request", errors: { until: t("must_be_later") } });
    }
    const end = span === "never" ? "9999-12-31T23:59:59Z" : new Date(days ? now() + days * DAY : Date.parse(until)).toISOString();
    await send("POST", path("users", user.id, "set-lockout"), { lockout_until: end, reason: reason.trim() });
    onClose();
    changed();
    toast(t("locked_done", { name: visible(user.username) }), { undo: async () => {
      await send("POST", path("users", user.id, "clear-lockout"));
      changed();
    } });
  }, { whole: true });
  const spans = [...SPANS.map(([value]) => ({ value, label: t(`lock_${value}`) })), { value: "time", label: t("lock_time") }, { value: "never", label: t("lock_never") }];
  return html`<${Dialog} title=${t("lock_title", { name: visible(user.username) })} onClose=${onClose}>
    <p>${t("lock_text")}</p>
    <${Form} form=${form} submit=${t("lock")} kind="danger" last cancel=${html`<${Button} onClick=${onClose}>${t("cancel")}<//>`}>
      <${Select} form=${form} name="span" label=${t("until_when")} options=${spans} autofocus />
      ${form.values.span === "time" && html`<${Field} form=${form} name="until" type="datetime-local" label=${t("lock_time")} required />`}
      <${Field} form=${form} name="reason" label=${t("why")} hint=${t("why_hint")} maxlength="200" />
    <//><//>`;
}

function Entry({ user, changed }) {
  const { act, busy, error } = useAct();
  const [typing, setTyping] = useState(false);
  const purpose = user.last_login_at ? "reset" : "invite";
  const found = useLoad((signal) => get(path("users", user.id, "invitations"), { signal }).then(({ data }) => data[0] || null).catch((failure) => {
    if (failure.unknownRoute) return undefined; // nobody logs in at pages here
    throw failure;
  }), [user.id]);
  const form = useForm({ new_password: "", again: "" }, async ({ new_password, again }) => {
    if (new_password !== again) throw Object.assign(new Error(), { code: "invalid_request", errors: { again: t("not_the_same") } });
    await send("POST", path("users", user.id, "reset"), { new_password });
    form.reset({ new_password: "", again: "" });
    setTyping(false);
    changed();
    toast(t("their_password_changed"));
  });
  const make = () => act(async () => {
    fresh.value = (await invite(user, purpose)).data;
    found.reload();
  });
  const end = () => act(async () => {
    await send("DELETE", path("invitations", found.data.id));
    fresh.value = null;
    found.reload();
    toast(t("link_ended"));
  });
  const name = visible(user.username);
  const isOffered = found.data !== undefined || found.loading;
  return html`<${Card} title=${t("password")}>
    <${Failure} error=${error || found.error} />
    ${found.data && html`<div class="split"><p>${t(`living_${found.data.purpose}`, { time: moment(found.data.expires_at) })}
      <span class="quiet"> <${Who} id=${found.data.created_by} />, <${When} at=${found.data.created_at} /></span></p>
      <${Button} onClick=${end}>${t("end_link")}<//></div>`}
    ${isOffered && !found.data && html`<p class="quiet">${t(`link_text_${purpose}`, { name })}</p>`}
    ${typing ? html`<${Form} form=${form} submit=${t("set_password")} cancel=${html`<${Button} onClick=${() => { form.reset({ new_password: "", again: "" }); setTyping(false); }}>${t("cancel")}<//>`}>
        <p>${t("their_password_text")}</p>
        <${NewPassword} form=${form} name="new_password" label=${t("new_password")} autofocus />
        <${Field} form=${form} name="again" type="password" label=${t("new_password_again")} autocomplete="new-password" /><//>`
      : html`<div class="buttons start">${isOffered && html`<${Button} busy=${busy} disabled=${!user.is_active} onClick=${make}>${t(found.data ? "make_link_again" : `make_link_${purpose}`)}<//>`}
        <${Button} onClick=${() => setTyping(true)}>${t("set_password")}<//></div>`}<//>`;
}

function Identity({ user, etag, adopt }) {
  const form = useRecord(path("users", user.id), user, etag, ["username", "email", "email_verified"], ({ data, etag: latest }) => {
    toast(t("saved"));
    if (data.username !== user.username) go(["people", data.username, "profile"]);
    else adopt({ data, etag: latest });
  });
  const names = { username: t("user_name"), email: t("email"), email_verified: t("email_is_theirs") };
  return html`<${Form} form=${form} submit=${t("save")} names=${names}>
    <${Field} form=${form} name="username" label=${t("user_name")} autocapitalize="off" spellcheck=${false} />
    <${Field} form=${form} name="email" type="email" label=${t("email")} />
    ${form.values.email && html`<${Check} form=${form} name="email_verified" label=${t("email_is_theirs")} />`}<//>`;
}

function Profile({ user, etag, changed, adopt }) {
  const [locking, setLocking] = useState(false);
  const { act, busy, error } = useAct();
  const name = visible(user.username);
  const deactivate = async () => {
    if (!(await ask({ title: t("deactivate_title", { name }), text: t("deactivate_text"), confirm: t("deactivate"), danger: true, proof: user.is_admin }))) return;
    await act(async () => {
      await send("POST", path("users", user.id, "deactivate"));
      changed();
      toast(t("deactivated_done", { name }), { undo: async () => {
        await send("POST", path("users", user.id, "activate"));
        changed();
      } });
    });
  };
  const remove = async () => {
    if (!(await ask({ title: t("delete_title", { name }), text: t("delete_person_text"), confirm: t("delete_person"), danger: true, typed: user.username, proof: true }))) return;
    await act(async () => {
      await send("DELETE", path("users", user.id), undefined, { etag });
      toast(t("deleted", { name }));
      go(["people"]);
    });
  };
  return html`<${Card}><${Identity} user=${user} etag=${etag} adopt=${adopt} />
    <${Facts} rows=${[
      ["id", html`<code class="select">${user.id}</code>`], [t("made"), html`<${When} at=${user.created_at} />`],
      [t("last_sign_in"), html`<${When} at=${user.last_login_at} none=${t("never")} />`],
    ]} /><//>
    <${Entry} user=${user} changed=${changed} />
    <${Failure} error=${error} />
    <${Card} title=${t("reversible")}><ul class="rows acts">
      ${!isLater(user.lockout_until) && html`<li><span>${t("lock_line")}</span><${Button} onClick=${() => setLocking(true)}>${t("lock_dots")}<//></li>`}
      ${user.is_active ? html`<li><span>${t("deactivate_line")}</span><${Button} busy=${busy} onClick=${deactivate}>${t("deactivate_dots")}<//></li>`
        : html`<li><span class="quiet">${t("deactivated_text")}</span></li>`}</ul><//>
    <${Card} title=${t("danger")} kind="danger"><ul class="rows acts">
      <li><span>${t("delete_person_line")}</span><${Button} kind="danger" busy=${busy} onClick=${remove}>${t("delete_dots")}<//></li></ul><//>
    ${locking && html`<${Lock} user=${user} changed=${changed} onClose=${() => setLocking(false)} />`}`;
}

function Rights({ user, changed }) {
  const roles = useLoad((signal) => all("/roles?with=permissions", { signal }), []);
  const scopes = useLoad((signal) => all("/scopes", { signal }), []);
  const own = useLoad(async (signal) => {
    const [held, asked] = await Promise.all(["roles", "scopes"].map((kind) => get(path("users", user.id, kind), { signal })));
    return { roles: new Set(held.data.map((row) => row.id)), scopes: new Set(asked.data.map((row) => row.id)) };
  }, [user.id]);
  const mark = (kind, id, gives) => {
    own.set((held) => ({ ...held, [kind]: new Set(gives ? [...held[kind], id] : [...held[kind]].filter((one) => one !== id)) }));
  };
  const toggle = (kind, work, given, taken) => async (row, gives) => {
    await work(row, gives);
    mark(kind, row.id, gives);
    if (kind === "roles") changed();
    toast(t(gives ? given : taken, { name: visible(row.name) }), { undo: async () => {
      await work(row, !gives);
      own.reload();
      if (kind === "roles") changed();
    } });
  };
  const giveRole = toggle("roles", (role, gives) => send("POST", gives ? "/roles/assign" : "/roles/unassign", { user_id: user.id, role_id: role.id }), "role_given", "role_taken");
  const giveScope = toggle("scopes", (scope, gives) => gives ? send("POST", path("users", user.id, "scopes"), { scope_ids: [scope.id] })
    : send("DELETE", path("users", user.id, "scopes", scope.id)), "their_scope_given", "their_scope_taken");
  const error = own.error || roles.error || scopes.error;
  if (error) return html`<${Failure} error=${error} retry=${() => [own, roles, scopes].forEach((one) => one.reload())} />`;
  if (!own.data || !roles.data || !scopes.data) return html`<${Loading} />`;
  const by = new Map(); // permission: the roles that give it
  for (const role of roles.data.filter((one) => one.is_active && own.data.roles.has(one.id))) {
    for (const { name } of role.permissions) by.set(name, [...(by.get(name) || []), role.name]);
  }
  const linked = (kind, rows) => rows.map((row) => ({ ...row, href: rooms.has(kind) && href([kind, row.name]) }));
  return html`<${Card} title=${t("its_roles")}><${Choices} rows=${linked("roles", roles.data)} chosen=${own.data.roles} toggle=${giveRole} label=${t("its_roles")} empty=${t("no_roles")} /><//>
    <${Card} title=${t("may_do")} actions=${html`<a class="button" href=${href(["check"], { user: user.username })}>${t("check_access")}</a>`}>
      ${by.size ? html`<ul class="rows">${[...by].sort(([one], [other]) => compare(one, other)).map(([name, givers]) => html`<li key=${name}>
        <a href=${href(["permissions", name])}><code><${Name} text=${name} /></code></a><span class="quiet small">${t("by_role", { roles: listed(givers.map(visible)) })}</span></li>`)}</ul>`
        : html`<p class="quiet">${t("may_nothing")}</p>`}<//>
    <${Card} title=${t("scopes_they_may_get")}><${Choices} rows=${linked("scopes", scopes.data)} chosen=${own.data.scopes} toggle=${giveScope} label=${t("scopes")} empty=${t("no_scopes")} /><//>`;
}

function Sessions({ user, changed }) {
  const browsers = useLoad((signal) => get(`/browser-sessions?limit=200&user_id=${user.id}`, { signal }).then(({ data }) => data), [user.id]);
  const tokens = useList("/sessions", { user_id: user.id, living: true }, { sort: "-id", inner: true });
  const renewable = useLoad((signal) => get(`${path("refresh-tokens", "user", user.id)}?limit=200`, { signal })
    .then(({ data }) => data.filter((row) => !row.is_revoked && isLater(row.expires_at))).catch((failure) => {
      if (failure.unknownRoute) return []; // there are none here
      throw failure;
    }), [user.id]);
  const { act, busy, error } = useAct();
  const reload = () => [browsers, tokens, renewable].forEach((one) => one.reload());
  const end = (at, done = "session_ended_done") => () => act(async () => {
    await send("DELETE", at);
    toast(t(done));
    reload();
  });
  const counts = { n: browsers.data?.length || 0, m: (tokens.total ?? tokens.rows?.length ?? 0) + (renewable.data?.length || 0) };
  const endAll = async () => {
    const text = t("end_of_person_text", { browsers: t("n_browsers", { n: counts.n }), tokens: t("n_tokens", { n: counts.m }) });
    if (!(await ask({ title: t("end_of_person_title", { name: visible(user.username) }), text, confirm: t("end_of_person"), danger: true, proof: user.is_admin }))) return;
    await act(async () => {
      await send("POST", path("users", user.id, "revoke"));
      toast(t("ended_of_person"));
      reload();
      changed();
    });
  };
  const application = { id: "client_id", label: t("application"), cell: (row) => html`<a href=${href(["applications", row.client_id, "who"])}><${Name} text=${row.client_id} /></a>` };
  const until = { id: "expires_at", label: t("until"), cell: (row) => html`<${When} at=${row.expires_at} />` };
  const begun = (member) => ({ id: member, label: t("begun"), cell: (row) => html`<${When} at=${row[member]} />` });
  const address = { id: "ip_address", label: t("address"), cell: (row) => row.ip_address ? html`<span class="mono">${row.ip_address}</span>` : html`<span class="quiet none">–</span>` };
  const ending = (at) => ({ id: "end", label: "", kind: "action", cell: (row) => html`<${Button} kind="small" busy=${busy} onClick=${end(at(row))}>${t("end")}<//>` });
  return html`<${Failure} error=${error} />
    <${Card} title=${t("browsers")} actions=${html`<${Button} busy=${busy} onClick=${endAll}>${t("end_of_person_dots")}<//>`}>
      <${Table} list=${whole(browsers)} empty=${html`<p class="quiet">${t("no_browsers")}</p>`} columns=${[
        { id: "what", label: t("where"), cell: (row) => html`<span title=${row.user_agent}>${browserName(row.user_agent)}</span>` },
        address, begun("authenticated_at"), { id: "last_seen_at", label: t("last_used"), cell: (row) => html`<${When} at=${row.last_seen_at} />` },
        ending((row) => path("browser-sessions", row.id)),
      ]} /><//>
    <${Card} title=${t("living_tokens")}><${Table} list=${{ ...tokens, isFiltered: false }} empty=${html`<p class="quiet">${t("no_living_tokens")}</p>`} columns=${[
        application, { id: "what", label: t("where"), cell: (row) => row.mad_use === "admin" ? "mad" : row.user_agent ? html`<span title=${row.user_agent}>${browserName(row.user_agent)}</span>` : html`<span class="quiet none">–</span>` },
        address, begun("issued_at"), until, ending((row) => path("sessions", row.id)),
      ]} /><//>
    ${renewable.error && html`<${Failure} error=${renewable.error} retry=${renewable.reload} />`}
    ${renewable.data?.length > 0 && html`<${Card} title=${t("kept_signed_in")}><${Table} list=${whole(renewable)} columns=${[
        application, begun("issued_at"), until, ending((row) => path("refresh-tokens", row.id)),
      ]} /><//>`}`;
}

const SecondFactor = ({ user, changed }) => html`<${Factor} user=${user} isOn=${user.totp_enabled} own=${user.id === session.value.user.id}
  left=${user.recovery_codes_left} changed=${changed} />`;

function Consents({ user }) {
  const found = useLoad((signal) => get(path("users", user.id, "consents"), { signal }).then(({ data }) => data), [user.id]);
  const { act, busy, error } = useAct();
  const take = (row) => async () => {
    const name = visible(row.display_name || row.client_id);
    if (!(await ask({ title: t("take_consent_title", { name }), text: t("take_consent_text"), confirm: t("take_consent"), danger: true }))) return;
    await act(async () => {
      await send("DELETE", path("users", user.id, "consents", row.client_id));
      toast(t("consent_taken"));
      found.reload();
    });
  };
  return html`<${Card} title=${t("consents")}><${Failure} error=${error} />
    <${Table} list=${whole(found)} keyOf=${(row) => row.client_id} empty=${html`<p class="quiet">${t("agreed_to_nothing")}</p>`} columns=${[
      { id: "client_id", label: t("application"), cell: (row) => html`<a href=${href(["applications", row.client_id])}><${Name} text=${row.display_name || row.client_id} /></a>` },
      { id: "scopes", label: t("scopes"), cell: (row) => row.scopes.map((name) => html`<code key=${name} class="chip">${visible(name)}</code> `) },
      { id: "given_at", label: t("given"), cell: (row) => html`<${When} at=${row.given_at} />` },
      { id: "end", label: "", kind: "action", cell: (row) => html`<${Button} kind="small" busy=${busy} onClick=${take(row)}>${t("take_consent")}<//>` },
    ]} /><//>`;
}

function History({ user }) {
  const list = useSearch("/audit-logs", { about: user.id }, { inner: true });
  const isIt = (id) => id === user.id ? html`<${Name} text=${user.username} />` : html`<${Who} id=${id} link />`;
  return html`<${Card} title=${t("history")} actions=${rooms.has("audit") && html`<a class="button" href=${href(["audit"], { target: user.id })}>${t("in_audit")}</a>`}>
    <${Table} list=${{ ...list, isFiltered: false }} empty=${html`<p class="quiet">${t("no_history_of")}</p>`} columns=${[
      { id: "timestamp", label: t("time"), cell: (row) => html`<${When} at=${row.timestamp} />` },
      { id: "actor_id", label: t("by_whom"), cell: (row) => isIt(row.actor_id) },
      { id: "action", label: t("what"), cell: (row) => html`<${Deed} action=${row.action} />
        ${row.target && row.target !== row.actor_id && html` <span class="quiet">${isIt(row.target)}</span>`}
        ${row.result && row.result !== "success" && html` <${State} kind="bad">${t("refused")}<//>`}
        ${row.secondary && row.secondary !== user.id && html`<span class="quiet small under"><${Details} row=${row} link /></span>`}` },
      { id: "ip_address", label: t("address"), cell: (row) => row.ip_address ? html`<span class="mono">${row.ip_address}</span>` : html`<span class="quiet none">–</span>` },
    ]} /><//>`;
}

function Page({ id, tab, query }) {
  const found = useLoad((signal) => get(path("users", id), { signal }), [id]);
  const { at, ...kept } = query; // of the list beside; `at` is the page of a list within
  const back = { href: href(["people"], kept), label: t("people") };
  if (found.error && !found.data) return html`<${Head} title=${visible(id)} back=${back} /><${Failure} error=${found.error} retry=${found.reload} />`;
  if (!found.data) return html`<${Head} title=${visible(id)} back=${back} /><${Loading} />`;
  const { data: user, etag } = found.data;
  const Part = { profile: Profile, rights: Rights, sessions: Sessions, factor: SecondFactor, consents: Consents, history: History }[tab];
  const aside = html`${user.email && html`<${Name} text=${user.email} />${user.email_verified && html` <${State} kind="good">${t("verified")}<//>`} · `}
    ${user.is_admin && `${t("administrator")} · `}${user.id === session.value.user.id && `${t("this_is_you")} · `}<${StateOf} user=${user} />`;
  return html`<${Head} title=${html`<${Name} text=${user.username} />`} back=${back} aside=${aside} />
    <${Notes} user=${user} changed=${found.reload} />
    ${failed.value?.id === user.id && html`<${Failure} error=${failed.value.error} title=${t("made_but")} />`}
    ${fresh.value?.user_id === user.id && html`<${Link} key=${fresh.value.id} user=${user} link=${fresh.value} />`}
    <${Tabs} base=${["people", id]} current=${tab} label=${t("parts_of_person")} query=${kept} tabs=${TABS.map((one) => ({ id: one, label: t(`tab_${one}`) }))} />
    <${Part} key=${tab} user=${user} etag=${etag} changed=${found.reload} adopt=${found.set} />`;
}

export default function People({ segments, query }) {
  const [id, tab = "profile"] = segments;
  useEffect(() => () => {
    if (id !== "new") fresh.value = failed.value = null;
  }, [id]);
  if (id === "new") return html`<${Make} />`;
  if (!id) return html`<${List} query=${query} />`;
  return html`<div class="beside"><aside><${List} query=${query} current=${id} /></aside>
    <div class="page"><${Page} key=${id} id=${id} tab=${TABS.includes(tab) ? tab : "profile"} query=${query} /></div></div>`;
}
