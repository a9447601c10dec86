// Who an id is. The audit log and sessions hold ids; people want names. Each is asked for once.
import { signal } from "../vendor/signals.js";
import { get, path, session } from "../api.js";
import { rooms } from "../route.js";
import { has, t } from "../words.js";
import { href, html, Name, visible } from "./base.js";

const known = signal({}); // id: { name, to } or null where nobody knows it
const asked = new Set();
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

async function find(id, kind) {
  const { user } = session.value;
  if (id === user.id) return { name: user.username, to: ["people", user.username] };
  const nouns = [
    ["users", (row) => ({ name: row.username, to: ["people", row.username] })],
    ["clients", (row) => ({ name: row.display_name || row.client_id, to: ["applications", row.client_id] })],
    ["roles", (row) => ({ name: row.name, to: ["roles", row.name] })],
    ["scopes", (row) => ({ name: row.name, to: ["scopes", row.name] })],
    ["permissions", (row) => ({ name: row.name, to: ["permissions", row.name] })],
  ];
  for (const [noun, read] of nouns.sort(([one], [other]) => Number(other === kind) - Number(one === kind))) {
    try {
      return read((await get(path(noun, id), { passive: true })).data);
    } catch (error) {
      if (error.status !== 404) return null;
    }
  }
  return null;
}

/** The name of a user, client, role, scope or permission by its id; other texts, such as `system`, are themselves. `kind` says what
 * it probably is: "roles". */
export function Who({ id, link, kind }) {
  if (!UUID.test(id)) return html`<${Name} text=${has(`actor_${id}`) ? t(`actor_${id}`) : id || "–"} />`;
  if (!asked.has(id)) {
    asked.add(id);
    find(id, kind).then((found) => { known.value = { ...known.value, [id]: found }; });
  }
  const found = known.value[id];
  const shown = html`<${Name} text=${found?.name || id.slice(0, 8)} />`;
  return link && found && rooms.has(found.to[0]) ? html`<a href=${href(found.to)}>${shown}</a>` : shown;
}

// Of what the ids of a row of the audit log are, by its action: those of the target and of the details.
const NOUNS = [
  [/^permission_unassigned/, ["roles", "permissions"]], [/permission/, ["permissions", "roles"]],
  [/^role_(un)?assigned/, ["users", "roles"]], [/role/, ["roles"]],
  [/^remove_scope_from/, ["scopes", "users"]], [/^assign_scope_to/, ["users"]], [/scope/, ["scopes"]],
];
const nounsOf = (action) => (NOUNS.find(([pattern]) => pattern.test(action)) || [])[1] || [];

/** Whom or what a row of the audit log is about, and the rest that it says; `brief` as in a list. */
export const Target = ({ row, link }) => html`<${Who} id=${row.target} link=${link} kind=${nounsOf(row.action)[0]} />`;
const NUMBERS = /^(jti|sid|amr|user_id)=\S*$/; // what the page of a row says, and no list

export function Details({ row, link, brief }) {
  const noun = nounsOf(row.action)[1];
  if (noun) return html`<${Who} id=${row.secondary} link=${link} kind=${noun} />`;
  return known.value[row.target]?.name === row.secondary || (brief && NUMBERS.test(row.secondary)) ? null : html`<${Name} text=${row.secondary} />`;
}

/** What an action of the audit log is called: there are words for most. */
export const Deed = ({ action }) => has(`action_${action}`) ? t(`action_${action}`) : html`<code>${visible(action)}</code>`;
