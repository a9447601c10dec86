// The example login page: posts to /token, shows the claims, refreshes, signs out.
// Tokens live in this page's memory only: a reload forgets them, and no other script can read them.

const form = document.querySelector("#login");
const problem = document.querySelector("#problem");
const answer = document.querySelector("#answer");
const left = document.querySelector("#left");
let tokens = null;
let client = {};
let clock = 0;

/** POST a form; the JSON answer, or an Error with a sentence for people. */
async function post(path, fields, headers = {}) {
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/x-www-form-urlencoded", ...headers },
    body: new URLSearchParams(fields),
    cache: "no-store",
    credentials: "omit",
  });
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const wait = response.headers.get("Retry-After");
  if (response.status === 429 || response.status === 503) throw new Error(`Please try again in ${wait ?? "a few"} seconds.`);
  if (body.error === "invalid_grant") throw new Error("That did not work. Check the user name, the password and the one-time code.");
  throw new Error(body.error_description ?? body.message ?? "The server did not answer as expected.");
}

/** Claims of a JWT. Only to show them: what a browser decodes proves nothing. */
function claimsOf(token) {
  const raw = atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"));
  return JSON.parse(new TextDecoder().decode(Uint8Array.from(raw, (letter) => letter.charCodeAt(0))));
}

function show(body) {
  tokens = { ...tokens, ...body };
  const rows = Object.entries(claimsOf(tokens.access_token)).map(([name, value]) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    const cell = document.createElement("td");
    head.scope = "row";
    head.textContent = name;
    const isTime = ["iat", "nbf", "exp", "auth_time"].includes(name);
    cell.textContent = isTime ? new Date(value * 1000).toLocaleString() : typeof value === "string" ? value : JSON.stringify(value);
    row.append(head, cell);
    return row;
  });
  document.querySelector("#claims").replaceChildren(...rows);
  document.querySelector("#refresh").hidden = !tokens.refresh_token;
  answer.hidden = false;
  form.hidden = true;
  const end = Date.now() + body.expires_in * 1000;
  clearInterval(clock);
  const tick = () => (left.value = Math.max(0, Math.round((end - Date.now()) / 1000)));
  tick();
  clock = setInterval(tick, 1000);
}

function forget() {
  tokens = null;
  clearInterval(clock);
  answer.hidden = true;
  form.hidden = false;
  form.elements.password.value = form.elements.totp.value = "";
  form.elements.username.focus();
}

/** Run one step; say what went wrong where people will see it. */
async function attempt(step) {
  problem.hidden = true;
  try {
    await step();
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
    return false;
  }
  return true;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const fields = Object.fromEntries([...new FormData(form)].filter(([, value]) => value));
  client = { client_id: fields.client_id, ...(fields.client_secret && { client_secret: fields.client_secret }) };
  attempt(async () => show(await post("token", { grant_type: "password", ...fields })));
});

document.querySelector("#refresh").addEventListener("click", async () => {
  const fields = { grant_type: "refresh_token", refresh_token: tokens.refresh_token, ...client };
  if (!(await attempt(async () => show(await post("token", fields))))) forget();
});

document.querySelector("#logout").addEventListener("click", async () => {
  await attempt(() => post("logout", {}, { Authorization: `Bearer ${tokens.access_token}` }));
  forget();
});
