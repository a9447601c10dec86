// Oneself: password, second factor, and where one is signed in.
import { get, path, resume, send, session } from "../api.js";
import { browserName, t } from "../words.js";
import {
  Button, Card, Facts, Failure, Head, html, Name, useLoad, useState, When,
} from "../parts/base.js";
import { Factor } from "../parts/factor.js";
import { Field, Form, NewPassword, useForm } from "../parts/form.js";
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
      <${NewPassword} form=${form} name="new_password" label=${t("new_password")} />
      <${Field} form=${form} name="again" type="password" label=${t("new_password_again")} autocomplete="new-password" />
    <//><//>`;
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
  const { user, expires_at, idle_at, totp_enabled: isOn } = session.value;
  return html`<${Head} title=${t("me")} aside=${html`<${Name} text=${user.username} />`} />
    <${Card}><${Facts} rows=${[
      [t("user_name"), html`<${Name} text=${user.username} />`], [t("email"), user.email ? html`<${Name} text=${user.email} />` : "–"],
      [t("session_until"), html`<${When} at=${expires_at} fixed />`], [t("unused_until"), html`<${When} at=${idle_at} fixed />`],
    ]} /><//>
    <${Factor} user=${user} isOn=${isOn} own changed=${resume} /><${Password} /><${OwnSessions} />`;
}
