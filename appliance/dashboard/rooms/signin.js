// Signing in. It is no address: it stands in place of the room, or over it when the session has ended.
import { leave, signIn } from "../api.js";
import { explain, t } from "../words.js";
import { Button, html, useEffect, useId, useRef, useState } from "../parts/base.js";

/** `again`: the name of whoever was signed in before. */
export default function SignIn({ again }) {
  const [values, setValues] = useState({ username: again || "", password: "", totp: "" });
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const [wait, setWait] = useState(0);
  const [shown, show] = useState(false);
  const form = useRef();
  const id = useId();
  useEffect(() => {
    if (!wait) return;
    const timer = setTimeout(() => setWait(wait - 1), 1000);
    return () => clearTimeout(timer);
  }, [wait]);
  const set = (name) => (event) => setValues((before) => ({ ...before, [name]: event.target.value }));
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await signIn(values.username, values.password, values.totp);
    } catch (failure) {
      setError(failure);
      setBusy(false);
      if (failure.status === 429) setWait(failure.retryAfter || 30);
      setValues((before) => ({ ...before, password: "", totp: "" }));
      form.current.querySelector("[type=password], [name=password]").focus();
    }
  };
  const field = (name, label, more) => html`<div class="field"><label for=${id + name}>${label}</label>
    <input id=${id + name} name=${name} value=${values[name]} onInput=${set(name)} autocapitalize="off" spellcheck=${false}
      aria-describedby=${error ? `${id}error` : null} ...${more} /></div>`;
  return html`<form ref=${form} class="signin" onSubmit=${submit}>
    ${again ? html`<p>${t("session_ended_text")}</p>` : html`<h1>${t("sign_in")}</h1>`}
    ${field("username", t("user_name"), { autocomplete: "username", required: true, readonly: Boolean(again), autofocus: !again })}
    <div class="field shown"><label for=${`${id}password`}>${t("password")}</label>
      <input id=${`${id}password`} name="password" type=${shown ? "text" : "password"} value=${values.password} required
        autocomplete="current-password" autocapitalize="off" spellcheck=${false} onInput=${set("password")}
        autofocus=${Boolean(again)} aria-describedby=${error ? `${id}error` : null} />
      <button type="button" class="link" aria-pressed=${shown ? "true" : "false"} onClick=${() => show(!shown)}>${t(shown ? "hide" : "show")}</button></div>
    ${field("totp", t("code_if_any"), { autocomplete: "one-time-code", inputmode: "numeric", class: "code" })}
    ${error && html`<p class="note bad" role="alert" id=${`${id}error`}>${
      error.code === "invalid_grant" ? t("sign_in_failed") : wait ? t("error_429", { n: wait }) : explain(error)}</p>`}
    <${Button} type="submit" kind="primary whole" busy=${busy} disabled=${wait > 0}>${t("sign_in")}<//>
    ${again && html`<button type="button" class="link" onClick=${leave}>${t("somebody_else")}</button>`}
  </form>`;
}
