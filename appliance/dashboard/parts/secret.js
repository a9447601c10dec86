// A secret that is shown once. It stays in the one variable of whoever shows it, is masked after a minute and when the
// tab is hidden, and goes when somebody says that it is stored.
import { t } from "../words.js";
import { Button, html, useEffect, useId, useRef, useState } from "./base.js";
import { CopyButton } from "./copy.js";

/** `note` is a sentence below, such as how long the earlier secret works; `name` names the file. A link has other words. */
export function SecretOnce({ value, name, note, onClose, title = t("secret_once"), stored: isStored = t("i_stored_it") }) {
  const [shown, show] = useState(true);
  const [stored, setStored] = useState(false);
  const field = useRef();
  const id = useId();
  useEffect(() => {
    if (!shown) return;
    const hide = () => show(false);
    const timer = setTimeout(hide, 60000);
    const look = () => document.hidden && hide();
    document.addEventListener("visibilitychange", look);
    return () => {
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", look);
    };
  }, [shown]);
  const save = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([value + "\n"], { type: "text/plain" }));
    link.download = `${name}.txt`;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  const select = () => getSelection().selectAllChildren(field.current);
  return html`<section class="card secret" aria-label=${title}>
    <p class="strong">${title}</p>
    <div class="copy"><code ref=${field} tabindex="0" onFocus=${select}>${shown ? value : "•".repeat(24)}</code></div>
    ${note && html`<p>${note}</p>`}
    <div class="buttons start">
      <${CopyButton} text=${value} select=${() => { show(true); field.current.focus(); }} />
      <${Button} onClick=${save}>${t("save_as_file")}<//>
      <${Button} onClick=${() => show(!shown)}>${shown ? t("hide") : t("show")}<//>
    </div>
    <div class="buttons start">
      <label class="check" for=${id}><input id=${id} type="checkbox" checked=${stored}
        onChange=${(event) => setStored(event.target.checked)} /> ${isStored}</label>
      <${Button} disabled=${!stored} onClick=${onClose}>${t("close")}<//>
    </div>
  </section>`;
}
