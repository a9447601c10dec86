// The page around oidc.js: sign in, ask userinfo, refresh, renew silently, sign out, and show what came.
// Tokens live in this page's memory only: a reload forgets them, and renewing silently brings new ones.

import { Client, claimsOf } from "./oidc.js";

const at = (selector) => document.querySelector(selector);
const out = at("#out");
const page = location.origin + location.pathname;
const chosen = JSON.parse(sessionStorage.getItem("pkce demo") ?? "{}");
let client = null;
let tokens = null;
let clock = 0;

out.client_id.value = chosen.client_id ?? "spa";
out.scope.value = chosen.scope ?? out.scope.value;
at("#recipe").textContent = [
  "mad client create --client-id spa --public",
  `mad client add-redirect-uri --id spa --uri ${page}`,
  `mad client add-post-logout-uri --id spa --uri ${page}`,
].join("\n");

/** Do something for a button; say what went wrong in words. */
async function attempt(work) {
  at("#problem").hidden = true;
  try {
    client ??= await Client.discover(new URL("../.well-known/openid-configuration", location.href), out.client_id.value, page);
    await work();
  } catch (error) {
    at("#problem").textContent = error.message;
    at("#problem").hidden = false;
  }
}

function show(said) {
  at("#said").textContent = JSON.stringify(said, (name, value) => (/_token$/.test(name) ? value.slice(0, 12) + "..." : value), 1);
  const claims = claimsOf(tokens.access_token);
  at("#who").textContent = claims.preferred_username;
  at("#access_token").textContent = JSON.stringify(claims, null, 1);
  at("#id_token").textContent = tokens.id_token ? JSON.stringify(claimsOf(tokens.id_token), null, 1) : "(none: the scope has no openid)";
  at("#refresh").hidden = !tokens.refresh_token;
  out.hidden = true;
  at("#in").hidden = false;
  clearInterval(clock);
  const end = Date.now() + tokens.expires_in * 1000;
  const tick = () => (at("#left").value = Math.max(0, Math.round((end - Date.now()) / 1000)));
  tick();
  clock = setInterval(tick, 1000);
}

function take(body) {
  tokens = { ...tokens, ...body };
  show(body);
}

out.addEventListener("submit", (event) => {
  event.preventDefault();
  client = null;
  sessionStorage.setItem("pkce demo", JSON.stringify({ client_id: out.client_id.value, scope: out.scope.value }));
  attempt(async () => location.assign(await client.authorizationUrl(out.scope.value)));
});
at("#userinfo").addEventListener("click", () => attempt(async () => show(await client.userinfo(tokens.access_token))));
at("#refresh").addEventListener("click", () => attempt(async () => take(await client.refresh(tokens.refresh_token))));
at("#silent").addEventListener("click", () => attempt(async () => take(await client.renew(out.scope.value))));
at("#signout").addEventListener("click", () => attempt(async () => location.assign(client.logoutUrl(tokens.id_token))));

// In the hidden frame this page only carries the answer; the page outside reads it.
if (window === window.parent && (location.search.includes("code=") || location.search.includes("error="))) {
  const search = location.search;
  history.replaceState(null, "", page); // the code leaves the address bar, and with it the history
  attempt(async () => take(await client.finish(search)));
}
