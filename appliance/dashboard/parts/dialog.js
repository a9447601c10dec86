// Dialogs. The title is the question and the button the answer: "Revoke key", never "OK".
//
//   if (await ask({ title, text, confirm: "Delete", danger: true, typed: "web", proof: true })) …
//
// `typed` is a name to be typed, `proof: true` asks for the password too if the last proof is old. Dialog is the frame
// for dialogs with a form of their own.
import { signal } from "../vendor/signals.js";
import { needsProof, proofAsked, prove, session } from "../api.js";
import { t } from "../words.js";
import { Button, Failure, html, useEffect, useId, useRef, useState } from "./base.js";

const asked = signal(null);

export const ask = (question) => new Promise((resolve) => { asked.value = { ...question, resolve }; });

/** A modal <dialog>: focus inside, back to where it was, Escape closes unless `stays`. */
export function Dialog({ title, onClose, stays, wide, children }) {
  const box = useRef();
  const id = useId();
  useEffect(() => {
    const before = document.activeElement;
    box.current.showModal();
    return () => before?.isConnected && before.focus();
  }, []);
  const cancel = (event) => {
    event.preventDefault();
    if (!stays) onClose();
  };
  // A second Escape without anything between closes at once, whatever an event handler says. HTML §6.10.3
  const closed = () => (stays ? box.current.showModal() : onClose());
  return html`<dialog ref=${box} class=${wide ? "wide" : ""} aria-labelledby=${id} onCancel=${cancel} onClose=${closed}>
    <h2 id=${id}>${title}</h2>
    ${children}
  </dialog>`;
}

/** The fields of a proof; `value` is { password, totp }. */
export function ProofFields({ value, onChange, focus }) {
  const ids = [useId(), useId()];
  return html`<div class="fields">
    <input type="text" class="hidden" autocomplete="username" value=${session.value?.user.username} readonly
      tabindex="-1" aria-hidden="true" />
    <div class="field"><label for=${ids[0]}>${t("your_password")}</label>
      <input id=${ids[0]} type="password" autocomplete="current-password" required value=${value.password}
        autofocus=${focus} onInput=${(event) => onChange({ ...value, password: event.target.value })} /></div>
    ${session.value?.totp_enabled && html`<div class="field"><label for=${ids[1]}>${t("code")}</label>
      <input id=${ids[1]} inputmode="numeric" autocomplete="one-time-code" required value=${value.totp}
        onInput=${(event) => onChange({ ...value, totp: event.target.value })} /></div>`}
  </div>`;
}

function Question({ question, onDone }) {
  const { title, text, confirm, danger, typed, proof, resolve } = question;
  const [name, setName] = useState("");
  const [value, setValue] = useState({ password: "", totp: "" });
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const [asks] = useState(() => proof && needsProof());
  const id = useId();
  const done = (answer) => {
    onDone();
    resolve(answer);
  };
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      if (asks) await prove(value.password, value.totp);
      done(true);
    } catch (failure) {
      setError(failure);
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${title} onClose=${() => done(false)}>
    <form onSubmit=${submit}>
      ${text && html`<div class="text">${text}</div>`}
      ${asks && html`<p>${t("prove_text")}</p><${ProofFields} value=${value} onChange=${setValue} focus=${!typed} />`}
      ${typed && html`<div class="field"><label for=${id}>${t("type_to_confirm", { name: typed })}</label>
        <input id=${id} value=${name} autocomplete="off" autocapitalize="off" spellcheck=${false} autofocus
          onInput=${(event) => setName(event.target.value)} /></div>`}
      <${Failure} error=${error} />
      <div class="buttons">
        <${Button} onClick=${() => done(false)}>${t("cancel")}<//>
        <${Button} type="submit" kind=${danger ? "danger" : "primary"} busy=${busy} disabled=${typed && name !== typed}>
          ${confirm}<//>
      </div>
    </form>
  <//>`;
}

/** The proof that a request turned out to need: its answer waits for it. */
function Proof({ wanted, onDone }) {
  const [value, setValue] = useState({ password: "", totp: "" });
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await prove(value.password, value.totp);
      onDone();
      wanted.resolve();
    } catch (failure) {
      setError(failure);
      setBusy(false);
    }
  };
  const close = () => {
    onDone();
    wanted.reject(Object.assign(new Error("no proof"), { code: "proof_refused", errors: {} }));
  };
  return html`<${Dialog} title=${t("prove_title")} onClose=${close}>
    <form onSubmit=${submit}>
      <p>${session.value?.proven_until ? t("prove_text") : t("prove_moved")}</p>
      <${ProofFields} value=${value} onChange=${setValue} focus />
      <${Failure} error=${error} />
      <div class="buttons">
        <${Button} onClick=${close}>${t("cancel")}<//>
        <${Button} type="submit" kind="primary" busy=${busy}>${t("go_on")}<//>
      </div>
    </form>
  <//>`;
}

/** Where the shell shows what was asked. */
export function Dialogs() {
  const question = asked.value;
  const wanted = proofAsked.value;
  return html`
    ${question && html`<${Question} question=${question} onDone=${() => { asked.value = null; }} />`}
    ${wanted && html`<${Proof} wanted=${wanted} onDone=${() => { proofAsked.value = null; }} />`}
  `;
}
