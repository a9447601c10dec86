// What was done, for eight seconds; longer while a mouse is over it or it has the focus. A finger leaves nothing behind
// that would tell when it is gone. Failures stay where they happened instead.
//
//   toast(t("saved"), { undo: () => send("POST", "/roles/unassign", …) })
import { signal } from "../vendor/signals.js";
import { explain, t } from "../words.js";
import { Button, html, useEffect, useState } from "./base.js";

const shown = signal([]);
let count = 0;

export function toast(text, { undo } = {}) {
  shown.value = [...shown.value.slice(-2), { id: ++count, text, undo }];
}

const drop = (id) => { shown.value = shown.value.filter((one) => one.id !== id); };

function Toast({ id, text, undo }) {
  const [held, setHeld] = useState(false);
  const [busy, setBusy] = useState(false);
  useEffect(() => {
    if (held || busy) return;
    const timer = setTimeout(() => drop(id), 8000);
    return () => clearTimeout(timer);
  }, [held, busy]);
  const takeBack = async () => {
    setBusy(true);
    try {
      await undo();
      drop(id);
      toast(t("undone"));
    } catch (error) {
      drop(id);
      toast(explain(error));
    }
  };
  return html`<div class="toast" onPointerEnter=${(event) => setHeld(event.pointerType === "mouse")} onPointerLeave=${() => setHeld(false)}
    onFocusIn=${(event) => setHeld(event.target.matches(":focus-visible"))} onFocusOut=${() => setHeld(false)}>
    <span>${text}</span>
    ${undo && html`<${Button} busy=${busy} onClick=${takeBack}>${t("undo")}<//>`}
    <${Button} kind="plain" icon="close" label=${t("close")} onClick=${() => drop(id)} />
  </div>`;
}

export const Toasts = () =>
  html`<div class="toasts" role="status">${shown.value.map((one) => html`<${Toast} key=${one.id} ...${one} />`)}</div>`;
