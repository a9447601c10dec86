// The parts of a JWT, read here: nothing is sent anywhere. RFC 7515 §3.1, RFC 7519 §4.1
import { has, t } from "../words.js";
import { html, visible, When } from "./base.js";

const decode = (part) => {
  const bytes = Uint8Array.from(atob(part.replace(/-/g, "+").replace(/_/g, "/")), (character) => character.charCodeAt(0));
  return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
};

/** { header, claims } of a text that is a signed JWT, or null. */
export function parseJwt(text) {
  const parts = text.trim().split(".");
  if (parts.length !== 3 || text.length > 20000) return null;
  try {
    const [header, claims] = [decode(parts[0]), decode(parts[1])];
    return typeof header === "object" && header && typeof claims === "object" && claims ? { header, claims } : null;
  } catch {
    return null;
  }
}

const TIMES = new Set(["exp", "iat", "nbf", "auth_time", "updated_at"]);

/** Claims as a table: name, value, and what it means where we know it. */
export const Claims = ({ claims }) => html`<div class="scroll"><table class="plain claims"><tbody>
  ${Object.entries(claims).map(([name, value]) => html`<tr key=${name}>
    <th scope="row"><code>${visible(name)}</code></th>
    <td>${TIMES.has(name) && typeof value === "number"
      ? html`<${When} at=${new Date(value * 1000).toISOString()} /> <span class="quiet mono">${value}</span>`
      : html`<code>${visible(typeof value === "string" ? value : JSON.stringify(value))}</code>`}</td>
    <td class="quiet">${has(`claim_${name}`) ? t(`claim_${name}`) : ""}</td></tr>`)}
</tbody></table></div>`;

