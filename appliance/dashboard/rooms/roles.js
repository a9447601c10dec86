// Roles, permissions, scopes: the matrix of who may do what by which role, the page of each, and the question whether
// somebody may. Four addresses, one navigation entry: main.js takes each component from here.
import { all, get, path, send } from "../api.js";
import { go, href } from "../route.js";
import { compare, list as listed, t } from "../words.js";
import {
  Button, Card, Empty, Failure, Head, html, Loading, Name, State, Tabs, useAct, useEffect, useId, useLoad, useMemo, useState, visible, When,
} from "../parts/base.js";
import { Choices } from "../parts/choices.js";
import { ask, Dialog } from "../parts/dialog.js";
import { Filters } from "../parts/filters.js";
import { Check as Tick, Field, Form, reason, useForm, useRecord } from "../parts/form.js";
import { Person } from "../parts/person.js";
import { Table, useList } from "../parts/table.js";
import { toast } from "../parts/toast.js";

const PARTS = ["roles", "scopes", "check"];
const Places = ({ current }) => html`<${Tabs} base=${[]} current=${current} label=${t("roles")} tabs=${PARTS.map((id) => ({ id, label: t(`place_${id}`) }))} />`;

const givePermission = (role, permission, gives) => gives
  ? send("POST", path("roles", role.id, "permissions"), { permission_id: permission.id })
  : send("DELETE", path("roles", role.id, "permissions", permission.id));

const saidOfPermission = (role, permission, gives) =>
  t(gives ? "permission_given" : "permission_taken", { role: visible(role.name), name: visible(permission.name) });

// -- making one --

/** The dialog that makes a role, a permission or a scope. */
function Make({ kind, onClose }) {
  const form = useForm({ name: "", description: "", is_privileged: false }, async ({ name, description, is_privileged }) => {
    const body = { name: name.trim() };
    if (kind !== "permission") body.description = description.trim();
    if (kind === "role") body.is_privileged = is_privileged;
    const { data } = await send("POST", `/${kind}s`, body);
    onClose();
    toast(t(`${kind}_made`, { name: visible(data.name) }));
    go([`${kind}s`, data.name]);
  }, { whole: true });
  return html`<${Dialog} title=${t(`make_${kind}`)} onClose=${onClose}>
    <p class="quiet">${t(`make_${kind}_text`)}</p>
    <${Form} form=${form} submit=${t(`make_${kind}`)} last cancel=${html`<${Button} onClick=${onClose}>${t("cancel")}<//>`}>
      <${Field} form=${form} name="name" label=${t("name")} autofocus autocapitalize="off" spellcheck=${false} mono />
      ${kind !== "permission" && html`<${Field} form=${form} name="description" label=${t("description")} optional />`}
      ${kind === "role" && html`<${Tick} form=${form} name="is_privileged" label=${t("is_privileged")} hint=${t("is_privileged_hint")} />`}
    <//><//>`;
}

// -- the matrix --

function Matrix({ roles, permissions, changed }) {
  const [pending, setPending] = useState({});
  const { act, error } = useAct();
  const held = useMemo(() => new Set(roles.flatMap((role) => role.permissions.map((one) => `${role.id} ${one.id}`))), [roles]);
  const toggle = (role, permission) => async (event) => {
    const gives = event.target.checked;
    const key = `${role.id} ${permission.id}`;
    if (key in pending) return;
    setPending((before) => ({ ...before, [key]: gives }));
    await act(async () => {
      await givePermission(role, permission, gives);
      changed(role, permission, gives);
      toast(saidOfPermission(role, permission, gives), { undo: async () => {
        await givePermission(role, permission, !gives);
        changed(role, permission, !gives);
      } });
    });
    setPending(({ [key]: done, ...others }) => others);
  };
  return html`<${Failure} error=${error} />
    <div class="scroll sheet"><table class="plain matrix"><caption class="hidden">${t("matrix")}</caption>
      <thead><tr><td class="quiet small">${t("permission")}</td>${roles.map((role) => html`<th scope="col" key=${role.id}>
        <a href=${href(["roles", role.name])}><${Name} text=${role.name} /></a><span class="quiet small">${t("n_holders", { n: role.user_count })}</span></th>`)}</tr></thead>
      <tbody>${permissions.map((permission) => html`<tr key=${permission.id}>
        <th scope="row"><a href=${href(["permissions", permission.name])}><code><${Name} text=${permission.name} /></code></a></th>
        ${roles.map((role) => {
          const key = `${role.id} ${permission.id}`;
          return html`<td key=${role.id}><label class="cell"><input type="checkbox" checked=${pending[key] ?? held.has(key)} onChange=${toggle(role, permission)}
            aria-label=${t("role_and_permission", { role: visible(role.name), name: visible(permission.name) })} /></label></td>`;
        })}</tr>`)}</tbody></table></div>`;
}

const MANY = 12; // permissions from which on there is a search

function List({ query }) {
  const [making, make] = useState("");
  const found = useLoad(async (signal) => {
    const [roles, permissions] = await Promise.all([all("/roles?with=permissions,user_count", { signal }), all("/permissions", { signal })]);
    return { roles: roles.sort((one, other) => compare(one.name, other.name)), permissions: permissions.sort((one, other) => compare(one.name, other.name)) };
  }, []);
  const changed = (role, permission, gives) => found.set((held) => ({ ...held, roles: held.roles.map((one) => one.id !== role.id ? one
    : { ...one, permissions: gives ? [...one.permissions, permission] : one.permissions.filter(({ id }) => id !== permission.id) }) }));
  const { roles, permissions } = found.data || {};
  const wanted = (query.q || "").toLowerCase();
  const shown = permissions?.filter((one) => one.name.toLowerCase().includes(wanted));
  const newPermission = html`<${Button} icon="plus" onClick=${() => make("permission")}>${t("make_permission")}<//>`;
  return html`<${Head} title=${t("roles")}>${permissions?.length > 0 && newPermission}<${Button} kind="primary" icon="plus" onClick=${() => make("role")}>${t("make_role")}<//><//>
    <${Places} current="roles" />
    <${Failure} error=${found.error} retry=${found.reload} />
    ${!found.data ? !found.error && html`<${Loading} />` : html`
      <p class="quiet">${t("matrix_text")}</p>
      ${permissions.length > MANY && html`<${Filters} label=${t("search_permissions")} total=${shown.length} />`}
      ${permissions.length ? html`<${Matrix} roles=${roles} permissions=${shown} changed=${changed} />` : html`<${Card}>
        <${Empty} title=${t("no_permissions")} action=${newPermission}>${t("no_permissions_text")}<//>
        <ul class="rows">${roles.map((role) => html`<li key=${role.id}><a href=${href(["roles", role.name])}><${Name} text=${role.name} /></a>
          <span class="quiet small">${t("n_holders", { n: role.user_count })}</span></li>`)}</ul><//>`}`}
    ${making && html`<${Make} kind=${making} onClose=${() => make("")} />`}`;
}

// -- the page of a role, a permission, a scope --

/** The members of a role, permission or scope, saved with If-Match. `members` are those that may change. */
function Members({ kind, row, etag, members, adopt }) {
  const form = useRecord(path(`${kind}s`, row.id), row, etag, members, ({ data, etag: latest }) => {
    toast(t("saved"));
    if (data.name !== row.name) go([`${kind}s`, data.name]);
    else adopt({ data, etag: latest });
  });
  const names = { name: t("name"), description: t("description"), is_privileged: t("is_privileged") };
  return html`<${Card}><${Form} form=${form} submit=${t("save")} names=${names}>
    ${members.includes("name") && html`<${Field} form=${form} name="name" label=${t("name")} mono autocapitalize="off" spellcheck=${false} hint=${t(`rename_${kind}_hint`)} />`}
    ${members.includes("description") && html`<${Field} form=${form} name="description" label=${t("description")} />`}
    ${members.includes("is_privileged") && html`<${Tick} form=${form} name="is_privileged" label=${t("is_privileged")} hint=${t("is_privileged_hint")} />`}
  <//><//>`;
}

function Delete({ kind, row, etag, text }) {
  const { act, busy, error } = useAct();
  const remove = async () => {
    const name = visible(row.name);
    if (!(await ask({ title: t("delete_title", { name }), text, confirm: t(`delete_${kind}`), danger: true, typed: row.name }))) return;
    await act(async () => {
      await send("DELETE", path(`${kind}s`, row.id), undefined, { etag });
      toast(t("deleted", { name }));
      go([kind === "scope" ? "scopes" : "roles"]);
    });
  };
  return html`<${Failure} error=${error} /><${Card} title=${t("danger")} kind="danger"><ul class="rows acts">
    <li><span>${text}</span><${Button} kind="danger" busy=${busy} onClick=${remove}>${t("delete_dots")}<//></li></ul><//>`;
}

/** Who has it, a page at a time, and a line that gives it to somebody else. `give(username, gives)` is a Promise. */
function Holders({ from, title, empty, give, given, taken }) {
  const list = useList(from, {}, { inner: true });
  const [name, setName] = useState("");
  const { act, busy, error } = useAct();
  const id = useId();
  const change = (username, gives) => act(async () => {
    await give(username, gives);
    list.reload();
    toast(t(gives ? given : taken, { name: visible(username) }), { undo: async () => {
      await give(username, !gives);
      list.reload();
    } });
  });
  const add = async (event) => {
    event.preventDefault();
    if (await change(name.trim(), true)) setName("");
  };
  const unknown = error?.status === 404;
  return html`<${Card} title=${title}>
    <form class="adder" onSubmit=${add}><label class="hidden" for=${id}>${t("add_person")}</label>
      <${Person} id=${id} value=${name} placeholder=${t("add_person")}
        aria-invalid=${unknown ? "true" : null} aria-describedby=${unknown ? `${id}e` : null} onInput=${(event) => setName(event.target.value)} />
      <${Button} type="submit" busy=${busy} disabled=${!name.trim()}>${t("add")}<//></form>
    ${unknown ? html`<p class="error" id=${`${id}e`} role="alert">${t("nobody_of_this_name")}</p>` : html`<${Failure} error=${error} />`}
    <${Table} list=${list} empty=${html`<p class="quiet">${empty}</p>`} columns=${[
      { id: "username", label: t("person"), cell: (row) => html`<a href=${href(["people", row.username, "rights"])}><${Name} text=${row.username} /></a>
        ${row.email && html`<span class="quiet small under"><${Name} text=${row.email} /></span>`}` },
      { id: "last_login_at", label: t("last_sign_in"), cell: (row) => html`<${When} at=${row.last_login_at} none=${t("never")} />` },
      { id: "end", label: "", kind: "action", cell: (row) => html`<${Button} kind="small" busy=${busy}
        label=${t("remove_what", { what: visible(row.username) })} onClick=${() => change(row.username, false)}>${t("remove")}<//>` },
    ]} /><//>`;
}

/** What the pages have in common: the row with its tag, a heading, and what `children(row, etag, found)` draws. */
function Page({ kind, id, place, aside, children }) {
  const found = useLoad((signal) => get(path(`${kind}s`, id), { signal }), [id]);
  const back = { href: href([place]), label: t(place === "scopes" ? "scopes" : "roles") };
  const head = (title, beside) => html`<${Head} title=${title} back=${back} aside=${beside} />`;
  if (found.error && !found.data) return html`${head(visible(id))}<${Failure} error=${found.error} retry=${found.reload} />`;
  if (!found.data) return html`${head(visible(id))}<${Loading} />`;
  const { data: row, etag } = found.data;
  return html`${head(html`<${Name} text=${row.name} />`, html`${t(`a_${kind}`)} ${aside?.(row)}`)}${children(row, etag, found.set)}`;
}

const Marks = (row) => html`${row.is_protected && html` · ${t("belongs_to_box")}`}${row.is_privileged && html` · <${State} kind="warn">${t("privileged")}<//>`}
  ${row.is_active === false && html` · <${State} kind="off">${t("off")}<//>`}`;

function RolePermissions({ role }) {
  const every = useLoad((signal) => all("/permissions", { signal }), []);
  const own = useLoad((signal) => get(path("roles", role.id, "permissions"), { signal }).then(({ data }) => new Set(data.map((row) => row.id))), [role.id]);
  const mark = (permission, gives) => own.set((held) => new Set(gives ? [...held, permission.id] : [...held].filter((id) => id !== permission.id)));
  const toggle = async (permission, gives) => {
    await givePermission(role, permission, gives);
    mark(permission, gives);
    toast(saidOfPermission(role, permission, gives), { undo: async () => {
      await givePermission(role, permission, !gives);
      own.reload();
    } });
  };
  const error = every.error || own.error;
  return html`<${Card} title=${t("permissions")}>${error ? html`<${Failure} error=${error} retry=${() => { every.reload(); own.reload(); }} />`
    : every.data && own.data ? html`<${Choices} rows=${every.data.map((row) => ({ ...row, href: href(["permissions", row.name]) }))} chosen=${own.data}
      toggle=${toggle} label=${t("permissions")} empty=${t("no_permissions")} />` : html`<${Loading} />`}<//>`;
}

const RolePage = ({ id }) => html`<${Page} kind="role" id=${id} place="roles" aside=${Marks}>${(role, etag, adopt) => html`
  <${Members} kind="role" row=${role} etag=${etag} adopt=${adopt} members=${role.is_protected ? ["description"] : ["name", "description", "is_privileged"]} />
  <${RolePermissions} role=${role} />
  <${Holders} from=${path("roles", role.id, "users")} title=${t("who_has_role")} empty=${t("nobody_has_role")} given="role_given_to" taken="role_taken_from"
    give=${(username, gives) => send("POST", gives ? "/roles/assign" : "/roles/unassign", { user_id: username, role_id: role.id })} />
  ${!role.is_protected && html`<${Delete} kind="role" row=${role} etag=${etag} text=${t("delete_role_text")} />`}`}<//>`;

function PermissionRoles({ permission }) {
  const every = useLoad((signal) => all("/roles", { signal }), []);
  const own = useLoad((signal) => get(path("permissions", permission.id, "roles"), { signal }).then(({ data }) => new Set(data.map((row) => row.id))), [permission.id]);
  const toggle = async (role, gives) => {
    await givePermission(role, permission, gives);
    own.set((held) => new Set(gives ? [...held, role.id] : [...held].filter((id) => id !== role.id)));
    toast(saidOfPermission(role, permission, gives), { undo: async () => {
      await givePermission(role, permission, !gives);
      own.reload();
    } });
  };
  const error = every.error || own.error;
  return html`<${Card} title=${t("roles_with_it")}>${error ? html`<${Failure} error=${error} retry=${() => { every.reload(); own.reload(); }} />`
    : every.data && own.data ? html`<${Choices} rows=${every.data.map((row) => ({ ...row, href: href(["roles", row.name]) }))} chosen=${own.data}
      toggle=${toggle} label=${t("roles_with_it")} empty=${t("no_roles")} />` : html`<${Loading} />`}<//>`;
}

export function Permissions({ segments: [id], query }) {
  if (!id) return html`<${List} query=${query} />`;
  return html`<${Page} key=${id} kind="permission" id=${id} place="roles">${(permission, etag, adopt) => html`
    <${Members} kind="permission" row=${permission} etag=${etag} adopt=${adopt} members=${["name"]} />
    <${PermissionRoles} permission=${permission} />
    <${Delete} kind="permission" row=${permission} etag=${etag} text=${t("delete_permission_text")} />`}<//>`;
}

// -- scopes --

function ScopeList({ query }) {
  const [making, make] = useState(false);
  const list = useList("/scopes", { q: query.q }, { sort: "name" });
  const button = html`<${Button} kind="primary" icon="plus" onClick=${() => make(true)}>${t("make_scope")}<//>`;
  return html`<${Head} title=${t("roles")}>${button}<//>
    <${Places} current="scopes" />
    <${Filters} label=${t("search_scopes")} total=${list.total} />
    <${Table} list=${list} keyOf=${(row) => row.name} caption=${t("scopes")} href=${(row) => href(["scopes", row.name])} columns=${[
      { id: "name", label: t("name"), sort: true, cell: (row) => html`<code class="strong"><${Name} text=${row.name} /></code>` },
      { id: "description", label: t("description"), cell: (row) => visible(row.description) },
      { id: "created_at", label: t("made"), sort: true, cell: (row) => row.is_protected ? html`<span class="quiet">${t("belongs_to_box")}</span>` : html`<${When} at=${row.created_at} />` },
    ]} empty=${html`<${Empty} title=${t("no_scopes")} action=${button}>${t("no_scopes_text")}<//>`} />
    ${making && html`<${Make} kind="scope" onClose=${() => make(false)} />`}`;
}

function ScopeClients({ scope }) {
  const found = useLoad((signal) => get(`${path("scopes", scope.id, "clients")}?limit=200`, { signal }).then(({ data }) => data), [scope.id]);
  return html`<${Card} title=${t("applications_with_it")}>
    ${found.error && html`<${Failure} error=${found.error} retry=${found.reload} />`}
    ${found.data && (found.data.length ? html`<ul class="rows">${found.data.map((row) => html`<li key=${row.client_id}>
      <a href=${href(["applications", row.client_id, "rights"])}><${Name} text=${row.display_name || row.client_id} /></a><code class="quiet small">${visible(row.client_id)}</code></li>`)}</ul>`
      : html`<p class="quiet">${t("no_application_with_it")}</p>`)}<//>`;
}

export function Scopes({ segments: [id], query }) {
  if (!id) return html`<${ScopeList} query=${query} />`;
  return html`<${Page} key=${id} kind="scope" id=${id} place="scopes" aside=${Marks}>${(scope, etag, adopt) => html`
    <${Members} kind="scope" row=${scope} etag=${etag} adopt=${adopt} members=${scope.is_protected ? ["description"] : ["name", "description"]} />
    <${Holders} from=${path("scopes", scope.id, "users")} title=${t("who_may_get_it")} empty=${t("nobody_may_get_it")} given="scope_given_to" taken="scope_taken_from"
      give=${(username, gives) => gives ? send("POST", path("users", username, "scopes"), { scope_ids: [scope.id] }) : send("DELETE", path("users", username, "scopes", scope.id))} />
    <${ScopeClients} scope=${scope} />
    ${!scope.is_protected && html`<${Delete} kind="scope" row=${scope} etag=${etag} text=${t("delete_scope_text")} />`}`}<//>`;
}

// -- check-access --

function Verdict({ user, permission, scope }) {
  const name = permission || scope;
  const found = useLoad((signal) => send("POST", "/check-access", { user_id: user, explain: true, ...(scope ? { scope } : { permission }) }, { signal })
    .then(({ data }) => data), [user, permission, scope]);
  if (found.error) return html`<${Failure} error=${found.error} retry=${found.reload} />`;
  if (!found.data || found.loading) return html`<${Loading} rows=${1} />`;
  const { access, reason: why, by_roles: by } = found.data;
  return html`<div class=${`note ${access ? "" : "bad"}`} role="status"><p class="strong"><${State} kind=${access ? "good" : "bad"}>${
      t(access ? "access_yes" : "access_no", { user: visible(user), name: visible(name) })}<//></p>
    <p>${reason(why)}${by.length > 0 && html` ${t("these_roles", { roles: listed(by.map(visible)) })}`}</p></div>`;
}

export function Check({ query }) {
  const [values, setValues] = useState({ user: query.user || "", kind: query.scope ? "scope" : "permission", name: query.scope || query.permission || "" });
  const ids = [useId(), useId(), useId()];
  useEffect(() => setValues({ user: query.user || "", kind: query.scope ? "scope" : "permission", name: query.scope || query.permission || "" }),
    [query.user, query.permission, query.scope]);
  const names = useLoad((signal) => all(`/${values.kind}s`, { signal }), [values.kind]);
  const put = (member) => (event) => setValues({ ...values, [member]: event.target.value });
  const submit = (event) => {
    event.preventDefault();
    go(["check"], { user: values.user.trim(), [values.kind]: values.name.trim() });
  };
  const isAsked = query.user && (query.permission || query.scope);
  return html`<${Head} title=${t("roles")} />
    <${Places} current="check" />
    <${Card} title=${t("check_title")}><form class="form question" onSubmit=${submit}>
      <div class="field"><label for=${ids[0]}>${t("person")}</label><${Person} id=${ids[0]} required value=${values.user}
        placeholder=${t("user_name")} onInput=${put("user")} /></div>
      <fieldset class="segments-of"><legend>${t("may_what")}</legend><div class="segments">${["permission", "scope"].map((kind) => html`<button key=${kind} type="button"
        aria-pressed=${values.kind === kind ? "true" : "false"} onClick=${() => setValues({ ...values, kind, name: "" })}>${t(kind)}</button>`)}</div></fieldset>
      <div class="field"><label for=${ids[1]}>${t("name")}</label><input id=${ids[1]} class="mono" required value=${values.name} list=${ids[2]} autocomplete="off"
        autocapitalize="off" spellcheck=${false} onInput=${put("name")} />
        <datalist id=${ids[2]}>${(names.data || []).map((row) => html`<option key=${row.id} value=${row.name} />`)}</datalist></div>
      <div class="buttons start"><${Button} type="submit" kind="primary">${t("check_access")}<//></div>
    </form>
    ${isAsked && html`<${Verdict} user=${query.user} permission=${query.permission} scope=${query.scope} />`}<//>`;
}

export default function Roles({ segments: [id], query }) {
  return id ? html`<${RolePage} key=${id} id=${id} />` : html`<${List} query=${query} />`;
}
