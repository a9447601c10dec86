// A second factor: set up, confirmed by its first code, turned off; and its recovery codes. One's own or somebody's.
import { path, send } from "../api.js";
import { t } from "../words.js";
import { Button, Card, Failure, html, State, useAct, useEffect, useId, useMemo, useState } from "./base.js";
import { Copy } from "./copy.js";
import { ask } from "./dialog.js";
import { toast } from "./toast.js";

/** Recovery codes, shown once. */
export function Codes({ codes, name, onClose }) {
  const text = codes.join("\n");
  const save = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text + "\n"], { type: "text/plain" }));
    link.download = `${name}-recovery-codes.txt`;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  return html`<section class="card secret"><p class="strong">${t("recovery_codes")}</p><p>${t("recovery_codes_text")}</p>
    <${Copy} text=${text} label=${t("recovery_codes")} lines />
    <div class="buttons start"><${Button} onClick=${save}>${t("save_as_file")}<//><${Button} onClick=${() => print()}>${t("print")}<//>
      <${Button} onClick=${onClose}>${t("i_noted_them")}<//></div></section>`;
}

/** `own` is said of oneself; `left` is how many recovery codes there are; `changed` reads the account again. */
export function Factor({ user, isOn, own, left, changed }) {
  const [seed, setSeed] = useState(null);
  const [codes, setCodes] = useState(null);
  const [code, setCode] = useState("");
  const { act, busy, error } = useAct();
  const id = useId();
  const picture = useMemo(() => seed && URL.createObjectURL(new Blob([seed.svg], { type: "image/svg+xml" })), [seed]);
  useEffect(() => () => picture && URL.revokeObjectURL(picture), [picture]);
  const name = user.username;
  const at = (...more) => path("users", user.id, ...more);
  const begin = () => act(async () => setSeed((await send("POST", at("totp", "enroll"), {})).data));
  const confirm = (event) => {
    event.preventDefault();
    act(async () => {
      const { data } = await send("POST", at("totp", "verify"), { code });
      setSeed(null);
      setCode("");
      setCodes(data.recovery_codes || null);
      await changed();
      toast(t("factor_is_on"));
    });
  };
  const renew = async () => {
    if (!(await ask({ title: t("renew_codes_title"), text: t("renew_codes_text"), confirm: t("renew_codes"), proof: true }))) return;
    await act(async () => {
      setCodes((await send("POST", at("recovery-codes"))).data.recovery_codes);
      await changed();
    });
  };
  const off = async () => {
    const words = own ? { title: t("factor_off_title"), text: t("factor_off_text") }
      : { title: t("their_factor_off_title", { name }), text: t("their_factor_off_text") };
    if (!(await ask({ ...words, confirm: t("turn_off"), danger: true, proof: true }))) return;
    await act(async () => {
      await send("POST", at("disable-totp"));
      setCodes(null);
      await changed();
      toast(t("factor_is_off"));
    });
  };
  return html`<${Card} title=${t("second_factor")}>
    <p>${isOn ? html`<${State} kind="on">${t("factor_is_on")}<//> ${left != null && html`<span class="quiet">${t("codes_left", { n: left })}</span>`}`
      : html`<${State} kind="off">${t("factor_is_off")}<//> ${t(own ? "factor_why" : "their_factor_why")}`}</p>
    ${codes && html`<${Codes} codes=${codes} name=${name} onClose=${() => setCodes(null)} />`}
    ${seed ? html`<form class="form" onSubmit=${confirm}>
        <p>${t(own ? "scan_text" : "their_scan_text", { name })}</p>
        <img class="qr" src=${picture} alt=${t("qr_alt")} />
        <${Copy} text=${seed.secret} label=${t("seed")} />
        <div class="field"><label for=${id}>${t("first_code")}</label><input id=${id} class="code" inputmode="numeric" autocomplete="one-time-code"
          required value=${code} onInput=${(event) => setCode(event.target.value)} /></div>
        <${Failure} error=${error} />
        <div class="buttons start"><${Button} type="submit" kind="primary" busy=${busy}>${t("turn_on")}<//>
          <${Button} onClick=${() => setSeed(null)}>${t("cancel")}<//></div></form>`
      : html`<${Failure} error=${error} /><div class="buttons start"><${Button} busy=${busy} onClick=${begin}>${t(isOn ? "set_up_again" : "set_up")}<//>
          ${isOn && html`<${Button} onClick=${renew}>${t("renew_codes")}<//><${Button} onClick=${off}>${t("turn_off")}<//>`}</div>`}
  <//>`;
}
