// An OpenID Connect client for a single-page application: authorization code with PKCE. RFC 6749 §4.1, RFC 7636, RFC 9207.
// Tokens are kept by whoever calls; between the redirect and the return only state, nonce and verifier
// stand in sessionStorage, which are worth nothing without the code.

const encode = (octets) => btoa(String.fromCharCode(...new Uint8Array(octets))).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
const random = () => encode(crypto.getRandomValues(new Uint8Array(32)));

/** SHA-256 as base64url. crypto.subtle is there in secure contexts only: https, or this machine. */
async function challengeOf(verifier) {
  if (!crypto.subtle) throw new Error("This page needs https, or http://localhost: the browser hashes nothing elsewhere.");
  return encode(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(verifier)));
}

/** Claims of a JWT. Only to show them, and to compare the nonce: it came over TLS from the token endpoint. OpenID Connect Core §3.1.3.7 (6). */
export function claimsOf(token) {
  const raw = atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"));
  return JSON.parse(new TextDecoder().decode(Uint8Array.from(raw, (letter) => letter.charCodeAt(0))));
}

export class Client {
  constructor(server, clientId, redirectUri) {
    this.server = server;
    this.clientId = clientId;
    this.redirectUri = redirectUri;
  }

  static async discover(url, clientId, redirectUri) {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error("The server does not describe itself at " + url);
    return new Client(await answer.json(), clientId, redirectUri);
  }

  /** Return the URL to send a browser to; what its answer must fit is remembered. */
  async authorizationUrl(scope, more = {}) {
    const state = random();
    const pending = { nonce: random(), verifier: random() };
    sessionStorage.setItem("pkce " + state, JSON.stringify(pending));
    const url = new URL(this.server.authorization_endpoint);
    url.search = new URLSearchParams({
      client_id: this.clientId, redirect_uri: this.redirectUri, response_type: "code", scope, state, nonce: pending.nonce,
      code_challenge: await challengeOf(pending.verifier), code_challenge_method: "S256", ...more,
    });
    return url;
  }

  /** Exchange what the browser brought back for tokens. Throws what the server says. */
  async finish(search) {
    const brought = new URLSearchParams(search);
    const key = "pkce " + brought.get("state");
    const pending = JSON.parse(sessionStorage.getItem(key) ?? "null");
    sessionStorage.removeItem(key);
    if (!pending) throw new Error("This answer belongs to no question of this page.");
    if (brought.get("iss") !== this.server.issuer) throw new Error("This answer comes from another server.");
    if (brought.has("error")) throw Object.assign(new Error(brought.get("error_description") ?? brought.get("error")), { code: brought.get("error") });
    const tokens = await this.post(this.server.token_endpoint, { grant_type: "authorization_code", code: brought.get("code"), redirect_uri: this.redirectUri, code_verifier: pending.verifier });
    if (tokens.id_token && claimsOf(tokens.id_token).nonce !== pending.nonce) throw new Error("The ID token answers another question.");
    return tokens;
  }

  refresh(refreshToken) {
    return this.post(this.server.token_endpoint, { grant_type: "refresh_token", refresh_token: refreshToken });
  }

  /** Get tokens from the session of the browser, in a frame nobody sees. Works where application and server are one site. */
  async renew(scope) {
    const frame = document.createElement("iframe");
    frame.hidden = true;
    const url = await this.authorizationUrl(scope, { prompt: "none" });
    const search = await new Promise((resolve, reject) => {
      const late = setTimeout(() => reject(new Error("No answer came into the frame.")), 10000);
      frame.addEventListener("load", () => {
        try {
          resolve(frame.contentWindow.location.search);
        } catch {
          reject(new Error("The frame does not tell: application and server are not one site."));
        }
        clearTimeout(late);
      });
      frame.src = url;
      document.body.append(frame);
    }).finally(() => frame.remove());
    return this.finish(search);
  }

  async userinfo(accessToken) {
    const answer = await fetch(this.server.userinfo_endpoint, { headers: { Authorization: "Bearer " + accessToken }, cache: "no-store", credentials: "omit" });
    if (!answer.ok) throw new Error("userinfo: " + answer.status);
    return answer.json();
  }

  /** Return the URL that logs the browser out. OpenID Connect RP-Initiated Logout. */
  logoutUrl(idToken, state) {
    const url = new URL(this.server.end_session_endpoint);
    url.search = new URLSearchParams({ id_token_hint: idToken, post_logout_redirect_uri: this.redirectUri, ...(state ? { state } : {}) });
    return url;
  }

  async post(url, form) {
    const answer = await fetch(url, { method: "POST", body: new URLSearchParams({ client_id: this.clientId, ...form }), cache: "no-store", credentials: "omit" });
    const body = await answer.json().catch(() => ({}));
    if (!answer.ok) throw Object.assign(new Error(body.error_description ?? body.message ?? "The server answered " + answer.status), { code: body.error });
    return body;
  }
}
