// Where the reader is: everything behind # – #/applications/web/secrets?q=x – so that names reach no log and no proxy.
import { signal } from "./vendor/signals.js";

function read() {
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const segments = path.split("/").filter(Boolean).map((segment) => {
    try { return decodeURIComponent(segment); } catch { return segment; }
  });
  return { segments, query: Object.fromEntries(new URLSearchParams(search)) };
}

export const route = signal(read());
export const rooms = new Set(); // the addresses of the rooms that there are: main.js fills it
let at = location.hash; // the address that `route` is of
const guards = new Set(); // functions that give whether a form has changes

/** A link to a room: href(["applications", id, "secrets"], { q: "x" }). What is empty is left out. */
export function href(segments, query = {}) {
  const kept = Object.entries(query).filter(([, value]) => value !== "" && value != null);
  return "#/" + segments.map(encodeURIComponent).join("/") + (kept.length ? `?${new URLSearchParams(kept)}` : "");
}

export function go(segments, query) {
  location.hash = href(segments, query);
}

/** Change some of the query where one is; `replace` leaves no entry in the history, as while typing. */
export function setQuery(changes, replace = false) {
  const target = href(route.value.segments, { ...route.value.query, ...changes });
  if (!replace) return void (location.hash = target);
  history.replaceState(null, "", target);
  at = location.hash;
  route.value = read();
}

/** Say that a form has changes as long as `isChanged()` is true. Returns what takes that back. */
export function guard(isChanged) {
  guards.add(isChanged);
  return () => guards.delete(isChanged);
}

const hasChanges = () => [...guards].some((isChanged) => isChanged());

/** Follow the address; `mayLeave` asks, and gives a Promise of whether to go. */
export function follow(mayLeave) {
  window.addEventListener("hashchange", async () => {
    if (location.hash === at) return;
    const wanted = location.hash;
    const stays = read().segments.join("/") === route.value.segments.join("/");
    if (!stays && hasChanges()) {
      history.replaceState(null, "", at || "#/");
      if (!(await mayLeave())) return;
      guards.clear();
      history.pushState(null, "", wanted);
    }
    at = location.hash;
    route.value = read();
  });
  window.addEventListener("beforeunload", (event) => hasChanges() && event.preventDefault());
}
