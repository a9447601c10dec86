// How to connect an application: its addresses, and lines ready to be copied, filled in with those of this box. A
// secret is never known here but in the minute in which it is shown; <SECRET> stands for it.
import { get } from "../api.js";
import { t } from "../words.js";
import { Card, Failure, html, Loading, useLoad, useState } from "../parts/base.js";
import { Copy } from "../parts/copy.js";

const REDIRECT = "https://app.example/callback";

// name: for what (code, machine, check; public: code without a secret), and the lines.
// v: issuer, id, secret, redirect, scope, audience, endpoints.
const RECIPES = [
  ["openid-client (Node.js)", "code", (v) => `import * as client from "openid-client";

const config = await client.discovery(new URL("${v.issuer}"), "${v.id}"${v.isPublic ? "" : `, "${v.secret}"`});
const verifier = client.randomPKCECodeVerifier();
const url = client.buildAuthorizationUrl(config, {
  redirect_uri: "${v.redirect}", scope: "${v.scope}",
  code_challenge: await client.calculatePKCECodeChallenge(verifier), code_challenge_method: "S256",
});`],
  ["Authlib (Python)", "code", (v) => `oauth.register(
    "box", client_id="${v.id}"${v.isPublic ? "" : `, client_secret="${v.secret}"`},
    server_metadata_url="${v.issuer}/.well-known/openid-configuration",
    client_kwargs={"scope": "${v.scope}", "code_challenge_method": "S256"},
)`],
  ["go-oidc (Go)", "code", (v) => `provider, err := oidc.NewProvider(ctx, "${v.issuer}")
config := oauth2.Config{
	ClientID: "${v.id}", ClientSecret: "${v.isPublic ? "" : v.secret}", Endpoint: provider.Endpoint(),
	RedirectURL: "${v.redirect}", Scopes: []string{${v.scope.split(" ").map((name) => `"${name}"`).join(", ")}},
}`],
  ["Spring Boot", "code", (v) => `spring.security.oauth2.client.registration.box.client-id=${v.id}
spring.security.oauth2.client.registration.box.client-secret=${v.secret}
spring.security.oauth2.client.registration.box.scope=${v.scope.replaceAll(" ", ",")}
spring.security.oauth2.client.provider.box.issuer-uri=${v.issuer}`],
  ["oauth2-proxy", "code", (v) => `provider = "oidc"
oidc_issuer_url = "${v.issuer}"
client_id = "${v.id}"
client_secret = "${v.secret}"
redirect_url = "${v.redirect}"
scope = "${v.scope}"
code_challenge_method = "S256"
email_domains = ["*"]`],
  ["Grafana", "code", (v) => `[auth.generic_oauth]
enabled = true
client_id = ${v.id}
client_secret = ${v.secret}
scopes = ${v.scope}
auth_url = ${v.endpoints.authorization_endpoint}
token_url = ${v.endpoints.token_endpoint}
api_url = ${v.endpoints.userinfo_endpoint}
use_pkce = true`],
  ["mod_auth_openidc (Apache)", "code", (v) => `OIDCProviderMetadataURL ${v.issuer}/.well-known/openid-configuration
OIDCClientID ${v.id}
OIDCClientSecret ${v.secret}
OIDCRedirectURI ${v.redirect}
OIDCScope "${v.scope}"
OIDCPKCEMethod S256`],
  ["Caddy (caddy-security)", "code", (v) => `oauth identity provider box {
	driver generic
	realm box
	client_id ${v.id}
	client_secret ${v.secret}
	scopes ${v.scope}
	base_auth_url ${v.issuer}
	metadata_url ${v.issuer}/.well-known/openid-configuration
}`],
  ["nginx (oauth2-proxy)", "code", (v) => `location / {
    auth_request /oauth2/auth;           # oauth2-proxy, set up as above
    error_page 401 = /oauth2/sign_in;
}`],
  ["Dovecot", "check", (v) => `passdb oauth2 {
}
oauth2 {
  introspection_mode = post
  introspection_url = ${v.endpoints.introspection_endpoint.replace("://", `://${v.id}:${v.secret}@`)}
  username_attribute = username
}`],
  ["oidc-client-ts (browser)", "public", (v) => `import { UserManager } from "oidc-client-ts";

const manager = new UserManager({
  authority: "${v.issuer}", client_id: "${v.id}", redirect_uri: "${v.redirect}", scope: "${v.scope}",
});
await manager.signinRedirect();`],
  ["AppAuth (Android)", "public", (v) => `AuthorizationServiceConfiguration.fetchFromIssuer(Uri.parse("${v.issuer}")) { config, error ->
    val request = AuthorizationRequest.Builder(
        config!!, "${v.id}", ResponseTypeValues.CODE, Uri.parse("${v.redirect}"),
    ).setScope("${v.scope}").build()
}`],
  ["AppAuth (iOS)", "public", (v) => `OIDAuthorizationService.discoverConfiguration(forIssuer: URL(string: "${v.issuer}")!) { config, error in
    let request = OIDAuthorizationRequest(
        configuration: config!, clientId: "${v.id}", scopes: [${v.scope.split(" ").map((name) => `"${name}"`).join(", ")}],
        redirectURL: URL(string: "${v.redirect}")!, responseType: OIDResponseTypeCode, additionalParameters: nil)
}`],
  ["curl", "machine", (v) => `curl -u '${v.id}:${v.secret}' -d grant_type=client_credentials ${v.endpoints.token_endpoint}`],
  ["mad", "machine", (v) => `mad token get --client-id ${v.id} --auth-url ${v.issuer}`],
  ["openid-client (Node.js)", "machine", (v) => `import * as client from "openid-client";

const config = await client.discovery(new URL("${v.issuer}"), "${v.id}", "${v.secret}");
const { access_token } = await client.clientCredentialsGrant(config);`],
  ["Authlib (Python)", "machine", (v) => `from authlib.integrations.requests_client import OAuth2Session

session = OAuth2Session("${v.id}", "${v.secret}")
session.fetch_token("${v.endpoints.token_endpoint}", grant_type="client_credentials")`],
  ["golang.org/x/oauth2 (Go)", "machine", (v) => `config := clientcredentials.Config{
	ClientID: "${v.id}", ClientSecret: "${v.secret}", TokenURL: "${v.endpoints.token_endpoint}",
}
client := config.Client(ctx)`],
  ["Spring Boot", "machine", (v) => `spring.security.oauth2.client.registration.box.authorization-grant-type=client_credentials
spring.security.oauth2.client.registration.box.client-id=${v.id}
spring.security.oauth2.client.registration.box.client-secret=${v.secret}
spring.security.oauth2.client.provider.box.token-uri=${v.endpoints.token_endpoint}`],
  ["Spring Boot", "check", (v) => `spring.security.oauth2.resourceserver.opaquetoken.introspection-uri=${v.endpoints.introspection_endpoint}
spring.security.oauth2.resourceserver.opaquetoken.client-id=${v.id}
spring.security.oauth2.resourceserver.opaquetoken.client-secret=${v.secret}`],
  ["jose (Node.js)", "check", (v) => `import { createRemoteJWKSet, jwtVerify } from "jose";

const keys = createRemoteJWKSet(new URL("${v.endpoints.jwks_uri}"));
const { payload } = await jwtVerify(token, keys, { issuer: "${v.issuer}", audience: "${v.audience}", typ: "at+jwt" });`],
  ["PyJWT (Python)", "check", (v) => `import jwt

keys = jwt.PyJWKClient("${v.endpoints.jwks_uri}")
key = keys.get_signing_key_from_jwt(token).key
claims = jwt.decode(token, key, algorithms=["ES256", "RS256"], issuer="${v.issuer}", audience="${v.audience}")`],
  ["curl", "check", (v) => `curl -u '${v.id}:${v.secret}' -d token="$TOKEN" ${v.endpoints.introspection_endpoint}`],
];

export default function Connect({ client, uris, secret }) {
  const { data, error, reload } = useLoad((signal) => get("/status", { signal }).then((found) => found.data), []);
  const [chosen, choose] = useState(0);
  if (error) return error.unknownRoute ? html`<p>${t("no_status")}</p>` : html`<${Failure} error=${error} retry=${reload} />`;
  if (!data) return html`<${Loading} />`;
  const { issuer } = data;
  const endpoints = {
    authorization_endpoint: `${issuer}/authorize`, token_endpoint: `${issuer}/token`, userinfo_endpoint: `${issuer}/userinfo`,
    introspection_endpoint: `${issuer}/introspect`, jwks_uri: `${issuer}/jwks.json`, end_session_endpoint: `${issuer}/end-session`,
  };
  const isPublic = client.client_type === "public";
  const kinds = [
    client.grant_types.includes("authorization_code") && "code", client.grant_types.includes("client_credentials") && "machine",
    client.may_introspect && "check", isPublic && client.grant_types.includes("authorization_code") && "public",
  ];
  const offered = RECIPES.filter(([, kind]) => kinds.includes(kind)).filter(([, kind, lines]) => !isPublic || kind === "public" || lines.toString().includes("isPublic"));
  const values = {
    issuer, id: client.client_id, secret: secret || "<SECRET>", isPublic, endpoints, audience: client.audience, redirect: uris?.[0]?.uri || REDIRECT,
    scope: ["openid", "profile", "email", ...client.scopes].join(" "),
  };
  const recipe = offered[Math.min(chosen, offered.length - 1)];
  return html`<${Card} title=${t("its_addresses")}>
      <dl class="facts wide">
        <div><dt>client_id</dt><dd><${Copy} text=${client.client_id} label="client_id" /></dd></div>
        <div><dt>${t("issuer")}</dt><dd><${Copy} text=${issuer} label=${t("issuer")} /></dd></div>
        <div><dt>${t("discovery")}</dt><dd><${Copy} text=${`${issuer}/.well-known/openid-configuration`} label=${t("discovery")} /></dd></div>
        ${Object.entries(endpoints).filter(([name]) => kinds[0] || name === "token_endpoint" || name === "introspection_endpoint" || name === "jwks_uri")
          .map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd><${Copy} text=${value} label=${name} /></dd></div>`)}
      </dl><//>
    ${recipe && html`<${Card} title=${t("ready_lines")} actions=${html`<select aria-label=${t("ready_lines")} value=${chosen}
        onChange=${(event) => choose(Number(event.target.value))}>${offered.map(([name], at) =>
          html`<option key=${at} value=${at}>${name}</option>`)}</select>`}>
      <${Copy} text=${recipe[2](values)} label=${recipe[0]} lines />
      ${!isPublic && !secret && html`<p class="small quiet">${t("secret_stands_for")}</p>`}
      ${kinds[0] && !uris?.length && html`<p class="small quiet">${t("redirect_stands_for", { uri: REDIRECT })}</p>`}<//>`}`;
}
