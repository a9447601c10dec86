// The only module that fetches. It carries the form token, tells apart what may be repeated and what may not, and
// keeps the state of the session and of the line to the box.
//
//   const { data, etag, total, next } = await get("/clients?limit=50")
//   await send("PUT", "/clients/web", { display_name: "Web" }, { etag })
//
// Every failure is an ApiError. Reads wait for a new sign-in and are repeated; writes are not: their form stays, and
// its button sends them again.
import { signal } from "./vendor/signals.js";

const ROOT = new URL("../../../", import.meta.url); // above dashboard/files/<version>/
// Milliseconds without an answer after which the line at the top says so. On a slow network a request may wait two
// seconds for a connection and two for its answer.
const SLOW = 6000;

export const session = signal(null); // what /dashboard/session says, or null before anybody signed in
export const ended = signal(false); // the session of `session` is over: the sign-in card stands over the room
export const silent = signal(null); // the Date since which the box does not answer, or null
export const proofAsked = signal(null); // {resolve, reject} of a request that needs the password, or null
const KEPT = "form-token"; // in sessionStorage, which is of this tab and of this port alone: a cookie is of every port
const tabs = new BroadcastChannel(KEPT); // those of this console: one that is opened asks the others with ""
let formToken = "";
let heard = null; // what the answer of another tab goes to, while one is waited for
let skew = 0; // milliseconds that the box is ahead of this computer
const waiting = []; // reads that go on when somebody has signed in

export class ApiError extends Error {
  constructor(status, body = {}, headers = new Headers()) {
    super(body.message || "");
    this.status = status; // 0: there was no answer
    this.code = body.error || (status ? "server_error" : "no_answer");
    this.errors = body.errors || {};
    this.requestId = body.request_id || headers.get("X-Request-Id") || "";
    this.retryAfter = Number(headers.get("Retry-After")) || 0;
    this.unknownRoute = headers.get("X-Not-Found") === "route"; // this box has no such route
  }
}

/** The time as the box has it: never by the reader's clock. */
export const now = () => Date.now() + skew;

/** A file of the console, such as words/en.json. */
export async function file(name) {
  const answer = await fetch(new URL(name, import.meta.url));
  if (!answer.ok) throw new ApiError(answer.status);
  return answer.json();
}

async function ask(method, path, body, { etag, passive, signal: abort, raw } = {}) {
  const headers = { Accept: "application/json" };
  if (formToken) headers["X-Form-Token"] = formToken;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (etag) headers["If-Match"] = etag;
  if (passive) headers["X-Passive"] = "1";
  const slow = setTimeout(() => noAnswer(), SLOW);
  let answer;
  try {
    answer = await fetch(new URL(path.replace(/^\//, ""), ROOT), {
      method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal: abort, cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    noAnswer();
    throw new ApiError(0, { error: method === "GET" ? "no_answer" : "outcome_unknown" });
  } finally {
    clearTimeout(slow);
  }
  silent.value = null;
  const date = Date.parse(answer.headers.get("Date") || "");
  if (date && Math.abs(date - now()) > 2000) skew = date - Date.now();
  if (raw && answer.ok) return answer;
  const data = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new ApiError(answer.status, data, answer.headers);
  const link = answer.headers.get("Link") || "";
  const following = link.match(/<\?([^>]*)>; rel="next"/)?.[1];
  return {
    data, etag: answer.headers.get("ETag"), next: link.includes('rel="next"'), following: new URLSearchParams(following),
    total: answer.headers.has("X-Total-Count") ? Number(answer.headers.get("X-Total-Count")) : undefined,
    atLeast: answer.headers.get("X-Total-Count-Relation") === "gte", headers: answer.headers,
  };
}

/** As ask(), and once more after the password or, for a read, after a sign-in. */
async function request(method, path, body, options = {}) {
  try {
    return await ask(method, path, body, options);
  } catch (error) {
    if (error.code === "reauthentication_required" && !options.passive) {
      await new Promise((resolve, reject) => { proofAsked.value = { resolve, reject }; });
      return ask(method, path, body, options); // it was refused, so nothing is done twice
    }
    if (error.status !== 401 || !session.value) throw error;
    ended.value = true;
    keep("");
    if (method !== "GET" || options.passive) throw Object.assign(error, { code: "session_ended" });
    await new Promise((resolve) => { waiting.push(resolve); });
    return request(method, path, body, options);
  }
}

export const get = (path, options) => request("GET", path, undefined, options);
export const send = (method, path, body, options) => request(method, path, body, options);

/** The whole of a list that has few rows, page by page. */
export async function all(path, options) {
  const rows = [];
  for (let more = true; more; ) {
    const page = await get(`${path}${path.includes("?") ? "&" : "?"}limit=200&offset=${rows.length}`, options);
    rows.push(...page.data);
    more = page.next;
  }
  return rows;
}

/** A path of encoded segments: path("clients", id, "secrets"). */
export const path = (...segments) => "/" + segments.map(encodeURIComponent).join("/");

/** A query without what is empty: query({ q: "", limit: 50 }) is "?limit=50". */
export function query(values) {
  const found = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== "" && value != null));
  return found.size ? `?${found}` : "";
}

// -- the session --

function keep(token) {
  formToken = token;
  if (token) sessionStorage.setItem(KEPT, token);
  else sessionStorage.removeItem(KEPT);
}

tabs.onmessage = ({ data }) => {
  if (!data && formToken) tabs.postMessage(formToken);
  if (!data || data === formToken) return;
  keep(data); // another tab has signed in anew, or answers: perhaps late, when the sign-in stands here already
  if (heard) heard(data);
  else resume().catch(() => {});
};

/** The form token of another tab, or "" if none answers. */
const askTabs = () => new Promise((resolve) => {
  heard = (token) => {
    heard = null;
    resolve(token);
  };
  setTimeout(heard, 200, "");
  tabs.postMessage("");
});

function adopt(found) {
  const isOther = session.value && session.value.user.id !== found.user.id;
  keep(found.form_token);
  if (isOther) return location.reload(); // the cookie is another person's now: nothing may be left of the first
  skew = Date.parse(found.now) - Date.now();
  session.value = found;
  ended.value = false;
  waiting.splice(0).forEach((go) => go());
}

/** Take up the session that this tab or another has begun, if there is one. */
export async function resume(passive = true) {
  if (!formToken) keep(sessionStorage.getItem(KEPT) || (await askTabs()));
  if (!formToken) return;
  try {
    adopt((await ask("GET", "/dashboard/session", undefined, { passive })).data);
  } catch (error) {
    const isOver = error.status === 401 || error.code === "access_denied"; // or the cookie is of another session
    if (isOver) keep("");
    if (isOver && session.value) ended.value = true;
    if (!isOver && error.status !== 0) throw error;
  }
}

export async function signIn(username, password, totp) {
  keep("");
  adopt((await ask("POST", "/dashboard/session", { username, password, totp })).data);
  tabs.postMessage(formToken);
}

export async function prove(password, totp) {
  adopt((await ask("POST", "/dashboard/session/proof", { password, totp })).data);
}

/** Whether the last proof is too old for what asks for one; half a minute early, for whoever reads before pressing. */
export const needsProof = () =>
  !session.value?.proven_until || Date.parse(session.value.proven_until) < now() + 30000;

/** Forget everything that this tab knows. */
export function leave() {
  keep("");
  location.hash = "";
  location.reload();
}

export async function signOut() {
  try {
    await ask("DELETE", "/dashboard/session");
  } finally {
    leave();
  }
}

// -- the line to the box --

function noAnswer() {
  if (silent.value) return;
  silent.value = new Date();
  let pause = 2000;
  const again = async () => {
    if (!silent.value) return;
    try {
      await fetch(new URL("health", ROOT), { cache: "no-store" });
      silent.value = null;
      window.dispatchEvent(new Event("answering"));
    } catch {
      pause = Math.min(2 * pause, 30000);
      setTimeout(again, pause);
    }
  };
  setTimeout(again, pause);
}

/** Look after the session each minute and whenever the tab is looked at again. */
export function watch() {
  const look = () => session.value && !ended.value && !document.hidden && resume().catch(() => {});
  setInterval(look, 60000);
  document.addEventListener("visibilitychange", look);
}
