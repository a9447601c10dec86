// Forms. They send only what changed, keep what was typed whatever happens, and say what is wrong at its field.
//
//   const form = useForm({ display_name: client.display_name }, (changes) => send("PUT", path, changes, { etag }));
//   html`<${Form} form=${form} submit=${t("save")}>
//     <${Field} form=${form} name="display_name" label=${t("name")} />
//   <//>`
//
// A 412 (somebody else changed it) becomes form.conflict; give `reread` to useForm and <Conflict> shows both.
import { get, send, session } from "../api.js";
import { guard } from "../route.js";
import { has, t } from "../words.js";
import { Button, Failure, html, useEffect, useId, useMemo, useRef, useState, visible } from "./base.js";

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

/**
 * The state of a form. `initial` are the values as they are now; `save(changes, values)` sends them.
 * `whole: true` is for what is made anew: everything is sent, and a form without changes can be sent too.
 */
export function useForm(initial, save, { whole = false, reread } = {}) {
  const [values, setValues] = useState(initial);
  const [base, setBase] = useState(initial);
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const [conflict, setConflict] = useState(null);
  const element = useRef();
  const changes = Object.fromEntries(Object.entries(values).filter(([name, value]) => !same(value, base[name])));
  const isChanged = Object.keys(changes).length > 0;
  const state = useRef();
  state.current = isChanged && !busy;
  useEffect(() => guard(() => state.current), []);

  const form = {
    values, changes, isChanged, error, busy, conflict, element, whole,
    errors: error?.errors || {},
    set: (name, value) => setValues((before) => ({ ...before, [name]: value })),
    reset: (next = base) => {
      setValues(next);
      setBase(next);
      setError(null);
      setConflict(null);
    },
    /** Take what is there now as the ground, and go on with some of one's own changes. */
    settle: (theirs, kept) => {
      setBase(theirs);
      setValues({ ...theirs, ...kept });
      setConflict(null);
      setError(null);
    },
    submit: async (event) => {
      event?.preventDefault();
      setBusy(true);
      setError(null);
      try {
        await save(whole ? values : changes, values);
        state.current = false;
        setBase(values);
      } catch (failure) {
        if (failure.code !== "proof_refused") setError(failure);
        if (failure.status === 412 && reread) setConflict({ theirs: await reread(), yours: changes, before: base });
        requestAnimationFrame(() => element.current?.querySelector("[aria-invalid=true], [role=alert]")?.focus?.());
      } finally {
        setBusy(false);
      }
    },
  };
  return form;
}

/**
 * A form on some `members` of a record of ADMIN, saved by PUT with If-Match; `done` gets the answer. What else changes
 * the record gives it a new tag, which is taken as long as these members stay. If somebody else changed these, the form
 * follows while nothing is typed, and otherwise saving it says what both did. `members` may be a function that makes
 * the values of a record, and `write` one that makes a body of what changed.
 */
export function useRecord(at, row, etag, members, done, write = (changes) => changes) {
  const pick = typeof members === "function" ? members : (data) => Object.fromEntries(members.map((name) => [name, data[name]]));
  const now = JSON.stringify(pick(row));
  const version = useMemo(() => ({ etag, of: now }), []);
  if (version.of === now) version.etag = etag;
  const form = useForm(pick(row), async (changes) => done(await send("PUT", at, await write(changes), { etag: version.etag })), { reread: async () => {
    const { data, etag: latest } = await get(at);
    Object.assign(version, { etag: latest, of: JSON.stringify(pick(data)) });
    return pick(data);
  } });
  useEffect(() => {
    if (form.isChanged || version.of === now) return;
    Object.assign(version, { etag, of: now });
    form.reset(pick(row));
  }, [now, form.isChanged]);
  return form;
}

/** The frame of a form with its buttons. `names` are the words for members, for a conflict. `last`: as in a dialog. */
export function Form({ form, submit, cancel, kind = "primary", names = {}, last, children }) {
  const rest = form.error && { ...form.error, status: form.error.status, code: form.error.code, errors: {} };
  const atFields = Object.keys(form.errors).length > 0 && Object.keys(form.errors).every((name) => name in form.values);
  return html`<form ref=${form.element} class="form" onSubmit=${form.submit} novalidate>
    ${children}
    ${form.conflict ? html`<${Conflict} form=${form} names=${names} />` : form.error && (atFields
      ? html`<p class="small bad" role="alert">${t("see_fields")}</p>`
      : html`<${Failure} error=${Object.keys(form.errors).length ? form.error : rest} />`)}
    <div class=${last ? "buttons" : "buttons start"}>
      ${last && cancel}
      <${Button} type="submit" kind=${kind} busy=${form.busy} disabled=${!form.whole && !form.isChanged}>${submit}<//>
      ${form.isChanged && !form.whole && html`<${Button} onClick=${() => form.reset()}>${t("discard")}<//>`}
      ${!last && cancel}
    </div>
  </form>`;
}

const shownValue = (value) =>
  value === "" || value == null ? "–" : Array.isArray(value) ? value.join(", ") : typeof value === "boolean"
    ? t(value ? "yes" : "no") : visible(value);

/** Somebody else changed the same thing: what both did, line by line, and the three ways on. */
export function Conflict({ form, names }) {
  const { theirs, yours, before } = form.conflict;
  const rows = Object.keys(before).filter((name) => name in yours || !same(theirs[name], before[name]));
  const mine = Object.fromEntries(Object.entries(yours).filter(([name]) => same(theirs[name], before[name])));
  return html`<div class="note warn" role="alert">
    <p class="strong">${t("conflict_title")}</p>
    <div class="scroll"><table class="plain"><thead><tr><td></td><th scope="col">${t("yours")}</th>
      <th scope="col">${t("theirs")}</th><th scope="col">${t("before")}</th></tr></thead>
      <tbody>${rows.map((name) => html`<tr key=${name}><th scope="row">${names[name] || name}</th>
        <td>${shownValue(name in yours ? yours[name] : before[name])}</td>
        <td>${shownValue(theirs[name])}</td><td>${shownValue(before[name])}</td></tr>`)}</tbody></table></div>
    <div class="buttons start">
      <${Button} onClick=${() => form.settle(theirs, yours)}>${t("take_mine")}<//>
      <${Button} onClick=${() => form.settle(theirs, {})}>${t("take_theirs")}<//>
      <${Button} onClick=${() => form.settle(theirs, mine)}>${t("take_both")}<//>
    </div>
  </div>`;
}

/** A sentence of the box about a member, in the reader's language where we have it: by its first part, numbers as n. */
export const reason = (text) => {
  const said = String(text).split(/[;(]/)[0].toLowerCase();
  const key = `wrong_${said.replace(/\d+/g, "n").replace(/[^a-z]+/g, "_").replace(/^_|_$/g, "")}`;
  if (has(key)) return t(key, { n: Number(said.match(/\d+/g)?.at(-1) || 0) });
  const [, one, why] = /^(\S+): (.+)$/.exec(text) || []; // one address of several
  return one ? `${visible(one)}: ${reason(why)}` : visible(text);
};

/** A labelled field with hint and error. `control(props)` draws the input; without it, an <input>. */
export function Field({ form, name, label, hint, type = "text", mono, control, optional, ...rest }) {
  const id = useId();
  const wrong = form.errors[name];
  const described = [hint && `${id}h`, wrong && `${id}e`].filter(Boolean).join(" ") || null;
  const props = {
    id, name, value: form.values[name] ?? "", "aria-invalid": wrong ? "true" : null, "aria-describedby": described,
    onInput: (event) => form.set(name, event.target.value), ...rest,
  };
  return html`<div class="field">
    <label for=${id}>${label}${optional && html` <span class="quiet">${t("optional")}</span>`}</label>
    ${control ? control(props) : html`<input type=${type} class=${mono ? "mono" : null} autocomplete="off" ...${props} />`}
    ${hint && html`<p class="hint" id=${`${id}h`}>${hint}</p>`}
    ${wrong && html`<p class="error" id=${`${id}e`}>${reason(wrong)}</p>`}
  </div>`;
}

/** A new password: what it must be stands there before one is refused, and it can be looked at. */
export function NewPassword(rest) {
  const [shown, show] = useState(false);
  return html`<${Field} ...${rest} hint=${t("password_rule", { n: session.value.password_min_length })} control=${(props) => html`<div class="adder">
    <input ...${props} type=${shown ? "text" : "password"} autocomplete="new-password" autocapitalize="off" spellcheck=${false} />
    <${Button} aria-pressed=${shown ? "true" : "false"} onClick=${() => show(!shown)}>${t(shown ? "hide" : "show")}<//></div>`} />`;
}

/** A choice among few: options are [{ value, label }]. */
export const Select = ({ options, ...rest }) => html`<${Field} ...${rest} control=${({ value, onInput, ...props }) =>
  html`<select ...${props} value=${value} onChange=${onInput}>${options.map((option) =>
    html`<option key=${option.value} value=${option.value}>${option.label}</option>`)}</select>`} />`;

/** Several lines; `list: true` keeps them as a list of what is not blank. */
export const Lines = ({ list, rows = 3, ...rest }) => html`<${Field} ...${rest} control=${({ value, onInput, ...props }) =>
  html`<textarea rows=${rows} class="mono" spellcheck=${false} autocapitalize="off" ...${props}
    value=${list ? (value || []).join("\n") : value}
    onInput=${list ? (event) => rest.form.set(props.name, event.target.value.split("\n")) : onInput} />`} />`;

/** A switch that belongs to a form. */
export function Check({ form, name, label, hint }) {
  const id = useId();
  return html`<div class="field"><label class="check" for=${id}><input id=${id} type="checkbox"
      checked=${Boolean(form.values[name])} aria-describedby=${hint ? `${id}h` : null}
      onChange=${(event) => form.set(name, event.target.checked)} /> ${label}</label>
    ${hint && html`<p class="hint" id=${`${id}h`}>${hint}</p>`}</div>`;
}


