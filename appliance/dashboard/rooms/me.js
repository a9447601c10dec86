// Oneself: password, second factor, and where one is signed in.
import { get, path, resume, send, session } from "../api.js";
import { browserName, t } from "../words.js";
import {
  Button, Card, Facts, Failure, Head, html, Name, State, useEffect, useId, useLoad, useMemo, useState, When,
} from "../parts/base.js";
import { ask } from "../parts/dialog.js";
import { Copy } from "../parts/copy.js";
import { Field, Form, useForm } from "../parts/form.js";
import { Table, whole } from "../parts/table.js";
import { toast } from "../parts/toast.js";

function Password() {
  const { user } = session.value;
  const form = useForm({ new_password: "", again: "" }, async ({ new_password, again }) => {
    if (new_password !== again) throw Object.assign(new Error(), { code: "invalid_request", errors: { again: t("not_the_same") } });
    await send("POST", path("users", user.id, "reset"), { new_password });
    form.reset({ new_password: "", again: "" });
    toast(t("password_changed"));
  });
  return html`<${Card} title=${t("password")}><p class="quiet">${t("password_text")}</p>
    <${Form} form=${form} submit=${t("change_password")} kind="">
      <${Field} form=${form} name="new_password" type="password" label=${t("new_password")} autocomplete="new-password" />
      <${Field} form=${form} name="again" type="password" label=${t("new_password_again")} autocomplete="new-password" />
    <//><//>`;
}

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

function SecondFactor() {
  const { user, totp_enabled: isOn } = session.value;
  const [seed, setSeed] = useState(null);
  const [codes, setCodes] = useState(null);
  const [code, setCode] = useState("");
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const id = useId();
  const picture = useMemo(() => seed && URL.createObjectURL(new Blob([seed.svg], { type: "image/svg+xml" })), [seed]);
  useEffect(() => () => picture && URL.revokeObjectURL(picture), [picture]);
  const act = (work) => async (event) => {
    event?.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await work();
    } catch (failure) {
      if (failure.code !== "proof_refused") setError(failure);
    } finally {
      setBusy(false);
    }
  };
  const begin = act(async () => setSeed((await send("POST", path("users", user.id, "totp", "enroll"), {})).data));
  const confirm = act(async () => {
    const { data } = await send("POST", path("users", user.id, "totp", "verify"), { code });
    setSeed(null);
    setCode("");
    setCodes(data.recovery_codes || null);
    await resume();
    toast(t("factor_is_on"));
  });
  const off = async () => {
    if (!(await ask({ title: t("factor_off_title"), text: t("factor_off_text"), confirm: t("turn_off"), danger: true, proof: true }))) return;
    await act(async () => {
      await send("POST", path("users", user.id, "disable-totp"));
      await resume();
      toast(t("factor_is_off"));
    })();
  };
  return html`<${Card} title=${t("second_factor")}>
    <p>${isOn ? html`<${State} kind="on">${t("factor_is_on")}<//>` : html`<${State} kind="off">${t("factor_is_off")}<//> ${t("factor_why")}`}</p>
    ${codes && html`<${Codes} codes=${codes} name=${user.username} onClose=${() => setCodes(null)} />`}
    ${seed ? html`<form class="form" onSubmit=${confirm}>
        <p>${t("scan_text")}</p>
        <img class="qr" src=${picture} alt=${t("qr_alt")} />
        <${Copy} text=${seed.secret} label=${t("seed")} />
        <div class="field"><label for=${id}>${t("first_code")}</label><input id=${id} class="code" inputmode="numeric" autocomplete="one-time-code"
          required value=${code} onInput=${(event) => setCode(event.target.value)} /></div>
        <${Failure} error=${error} />
        <div class="buttons start"><${Button} type="submit" kind="primary" busy=${busy}>${t("turn_on")}<//>
          <${Button} onClick=${() => { setSeed(null); setError(null); }}>${t("cancel")}<//></div></form>`
      : html`<${Failure} error=${error} /><div class="buttons start"><${Button} busy=${busy} onClick=${begin}>${t(isOn ? "set_up_again" : "set_up")}<//>
          ${isOn && html`<${Button} onClick=${off}>${t("turn_off")}<//>`}</div>`}
  <//>`;
}

function OwnSessions() {
  const found = useLoad((signal) => get("/dashboard/sessions", { signal }).then(({ data }) => data), []);
  const [error, setError] = useState(null);
  const end = (at) => async () => {
    setError(null);
    try {
      await send("DELETE", at);
      toast(t("session_ended_done"));
      found.reload();
    } catch (failure) {
      setError(failure);
    }
  };
  const others = found.data?.filter((row) => !row.is_current).length;
  return html`<${Card} title=${t("where_signed_in")} actions=${others > 0 && html`<${Button} onClick=${end("/dashboard/sessions")}>${t("end_other_sessions")}<//>`}>
    <${Failure} error=${error} />
    <${Table} list=${whole(found)} columns=${[
      { id: "what", label: t("where"), cell: (row) => row.kind === "token" ? "mad" : html`<span title=${row.user_agent}>${browserName(row.user_agent)}</span>` },
      { id: "ip_address", label: t("address"), cell: (row) => row.ip_address ? html`<span class="mono">${row.ip_address}</span>` : "–" },
      { id: "created_at", label: t("begun"), cell: (row) => html`<${When} at=${row.created_at} />` },
      { id: "last_seen_at", label: t("last_used"), cell: (row) => html`<${When} at=${row.last_seen_at} />` },
      { id: "end", label: "", kind: "action", cell: (row) => row.is_current ? html`<span class="quiet">${t("this_one")}</span>`
        : html`<${Button} kind="small" onClick=${end(path("dashboard", "sessions", row.id))}>${t("end")}<//>` },
    ]} /><//>`;
}

export default function Me() {
  const { user, expires_at, idle_at } = session.value;
  return html`<${Head} title=${t("me")} aside=${html`<${Name} text=${user.username} />`} />
    <${Card}><${Facts} rows=${[
      [t("user_name"), html`<${Name} text=${user.username} />`], [t("email"), user.email ? html`<${Name} text=${user.email} />` : "–"],
      [t("session_until"), html`<${When} at=${expires_at} />`], [t("unused_until"), html`<${When} at=${idle_at} />`],
    ]} /><//>
    <${SecondFactor} /><${Password} /><${OwnSessions} />`;
}
