// A value to be copied: monospace, wrapped anywhere, selected as a whole on focus.
import { t } from "../words.js";
import { Button, html, useEffect, useRef, useState } from "./base.js";

/** Put text on the clipboard; false where the browser does not allow it, as over plain http. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** A button that copies; `select` is what to select where it may not. */
export function CopyButton({ text, select, kind = "", what = "" }) {
  const [said, say] = useState("");
  useEffect(() => {
    if (!said) return;
    const timer = setTimeout(() => say(""), said === t("copied") ? 2000 : 6000);
    return () => clearTimeout(timer);
  }, [said]);
  const press = async () => {
    if (await copyText(text)) return say(t("copied"));
    select?.();
    say(t("copy_by_hand"));
  };
  return html`<${Button} kind=${kind} onClick=${press} label=${what ? t("copy_what", { what }) : undefined}>
    <span aria-live="polite">${said || t("copy")}</span><//>`;
}

/** A value with its button. `lines` for several lines; `label` is read out. */
export function Copy({ text, label, lines }) {
  const field = useRef();
  const select = () => {
    const range = document.createRange();
    range.selectNodeContents(field.current);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  };
  return html`<div class=${`copy ${lines ? "lines" : ""}`}>
    <code ref=${field} tabindex="0" aria-label=${label} onFocus=${select}>${text}</code>
    <${CopyButton} text=${text} select=${() => field.current.focus()} what=${label} kind="small" />
  </div>`;
}
