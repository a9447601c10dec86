// The token inspector: the parts of a token, its claims in words, whether it is alive and if not, why. Its parts are read
// here; only the box itself is asked whether it is good. The token never stands in the address.
import { send } from "../api.js";
import { has, t } from "../words.js";
import { Button, Card, Facts, Failure, Head, href, html, Name, useAct, useEffect, useId, useState, visible, When } from "../parts/base.js";
import { ask } from "../parts/dialog.js";
import { Claims, parseJwt } from "../parts/jwt.js";
import { Who } from "../parts/names.js";
import { inspected } from "../parts/palette.js";
import { toast } from "../parts/toast.js";

const LONGEST = 20000; // characters; more is no token of ours
const OURS = new Set(["kind", "valid", "expired", "active", "reason"]); // what the box adds to the claims
const key = (reason) => `token_${String(reason).toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^_|_$/g, "")}`;
const inWords = (reason) => (has(key(reason)) ? t(key(reason)) : visible(reason));

/** What the box says of a token: { kind, active, reason, … }, or { active: false, reason } of what is none of its own. */
async function judge(token) {
  try {
    return (await send("POST", "/introspect", { token })).data;
  } catch (error) {
    if (error.status === 400 && error.errors.token) return { active: false, isForeign: true, reason: error.errors.token };
    throw error;
  }
}

function Verdict({ verdict, claims, revoke, busy }) {
  const isMachine = verdict.client_id && verdict.sub === verdict.client_id;
  const id = claims?.jti;
  return html`<section class=${`note ${verdict.active ? "good" : "bad"}`} role="status">
      <p class="strong">${verdict.active ? t("token_alive") : html`${t("token_not_alive")} ${inWords(verdict.reason)}`}</p></section>
    ${!verdict.isForeign && html`<${Card} actions=${verdict.active && html`<${Button} kind="danger" busy=${busy} onClick=${revoke}>${t("revoke_token")}<//>`} title=${t(`token_kind_${verdict.kind}`)}>
      <${Facts} rows=${[
        [t("about_whom"), isMachine ? t("itself") : html`<${Who} id=${verdict.sub} link />`],
        [t("by_application"), verdict.client_id ? html`<a href=${href(["applications", verdict.client_id])}><${Name} text=${verdict.client_id} /></a>` : null],
        [t("until"), verdict.exp ? html`<${When} at=${new Date(verdict.exp * 1000).toISOString()} />` : null],
        [t("session"), id ? html`<a class="mono" href=${href(["sessions", id])}>${visible(id)}</a>` : null],
      ]} /><//>`}`;
}

export default function Inspect() {
  const [text, setText] = useState(() => inspected.value);
  const [verdict, setVerdict] = useState(null);
  const { act, busy, error } = useAct();
  const id = useId();
  const token = text.trim();
  const parts = parseJwt(token);
  useEffect(() => { // one that the palette brings while this room is open
    if (!inspected.value) return;
    setText(inspected.value);
    inspected.value = "";
  }, [inspected.value]);
  useEffect(() => setVerdict(null), [token]);
  const check = (event) => {
    event?.preventDefault();
    return act(async () => setVerdict(await judge(token)));
  };
  const revoke = () => act(async () => {
    if (!(await ask({ title: t("revoke_token_title"), text: t("end_session_text"), confirm: t("revoke_token"), danger: true }))) return;
    await send("POST", "/revoke", { token });
    toast(t("token_revoked_done"));
    setVerdict(await judge(token));
  });
  const unread = verdict && !parts && Object.fromEntries(Object.entries(verdict).filter(([name]) => !OURS.has(name) && name !== "isForeign"));
  return html`<${Head} title=${t("inspect_token")} back=${{ href: "#/sessions", label: t("sessions") }} />
    <form class="stack" onSubmit=${check}>
      <div class="field"><label for=${id}>${t("token_to_inspect")}</label>
        <textarea id=${id} class="mono" rows="5" maxlength=${LONGEST} spellcheck=${false} autocapitalize="off" autocomplete="off" value=${text}
          aria-describedby=${`${id}h`} onInput=${(event) => setText(event.target.value)} />
        <p class="hint" id=${`${id}h`}>${t("inspect_hint")}</p></div>
      <div class="buttons start"><${Button} type="submit" kind="primary" busy=${busy} disabled=${!token}>${t("is_it_alive")}<//>
        ${text && html`<${Button} onClick=${() => setText("")}>${t("clear")}<//>`}</div>
    </form>
    <${Failure} error=${error} />
    ${verdict && html`<${Verdict} verdict=${verdict} claims=${parts?.claims || verdict} revoke=${revoke} busy=${busy} />`}
    ${parts && html`<${Card} title=${t("token_header")}><${Claims} claims=${parts.header} /><//>
      <${Card} title=${t("token_claims")}><${Claims} claims=${parts.claims} /><//>
      <${Card} title=${t("token_signature")}><p>${verdict ? t(verdict.isForeign ? "signature_not_ours" : "signature_good") : t("signature_unchecked")}</p><//>`}
    ${unread && Object.keys(unread).length > 0 && html`<${Card} title=${t("token_claims")}><${Claims} claims=${unread} /><//>`}
    ${token && !parts && !verdict && html`<p class="quiet">${t("no_jwt")}</p>`}`;
}
