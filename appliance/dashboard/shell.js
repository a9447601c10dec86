// The shell of the console: navigation and rooms, once somebody has signed in.
//
// How a room is made
// * A file rooms/<name>.js whose default export is a component; its props are `segments` (what stands behind the room
//   in the address) and `query`. A row in ROOMS below imports it when somebody enters. A room with lists also has a
//   line in LISTS of parts/palette.js.
// * It begins with <Head title=…>, loads with useLoad() or useList(), and says of itself what is empty (Empty), what
//   failed (Failure, with the request's id) and what waits (Loading). Everything that one may want to send to somebody
//   stands in the address: object, tab, filters, page. A secret never does.
// * It talks to ADMIN by get() and send() of api.js and by nothing else. These ask for the password where the box wants
//   it and for a new sign-in when the session is over; a room need not know. Before a dangerous act ask() of
//   parts/dialog.js names it, its consequence in numbers, and has the name typed; `proof: true` where the route asks for
//   one. useAct() runs what a button does. After an act toast() says what was done, with `undo` where there is one. A
//   failure stays where it happened.
// * What it says are words of pages/en.json and de.json, member `console`: t(key, { name }). Stored text is shown by
//   <Name>, times by <When>; numbers, sizes and dates by words.js. Nothing is ever made from a string of HTML.
// * Classes of console.css: card, note (bad warn good info), facts, buttons, field, small, quiet, mono, strong, number,
//   hidden. A room needs no sheet of its own. It works by keyboard, at 320 px and in both schemes, or it is not done.
import { ended, get, session, signOut, silent } from "./api.js";
import { follow, rooms } from "./route.js";
import { clock, t } from "./words.js";
import { Box, Button, exactly, Head, href, html, Icon, Loading, route, useEffect, useRef, useState, worn } from "./parts/base.js";
import { ask, Dialog, Dialogs } from "./parts/dialog.js";
import { isOpen, listen, Palette } from "./parts/palette.js";
import { Toasts } from "./parts/toast.js";
import SignIn from "./rooms/signin.js";

/** Another component of the room of roles. */
const from = (name) => import("./rooms/roles.js").then((module) => ({ default: module[name] }));

// address: where it stands in the URL. group: its place in the navigation; without one it has none, or that of the room
// that `within` names.
const ROOMS = [
  { address: "", icon: "home", word: "home", group: "work", load: () => import("./rooms/home.js") },
  { address: "applications", icon: "applications", word: "applications", group: "work", load: () => import("./rooms/applications.js") },
  { address: "people", icon: "people", word: "people", group: "work", load: () => import("./rooms/people.js") },
  { address: "roles", icon: "roles", word: "roles_short", group: "work", load: () => import("./rooms/roles.js") },
  { address: "permissions", icon: "roles", word: "permissions", within: "roles", load: () => from("Permissions") },
  { address: "scopes", icon: "roles", word: "scopes", within: "roles", load: () => from("Scopes") },
  { address: "check", icon: "roles", word: "check_access", within: "roles", load: () => from("Check") },
  { address: "sessions", icon: "sessions", word: "sessions", group: "work", load: () => import("./rooms/sessions.js") },
  { address: "audit", icon: "audit", word: "audit", group: "work", load: () => import("./rooms/audit.js") },
  { address: "keys", icon: "keys", word: "keys", group: "box", load: () => import("./rooms/keys.js") },
  { address: "backups", icon: "backups", word: "backups", group: "box", load: () => import("./rooms/backups.js") },
  { address: "settings", icon: "settings", word: "settings", group: "box", load: () => import("./rooms/settings.js") },
  { address: "inspect", icon: "search", word: "inspect_token", load: () => import("./rooms/inspect.js") },
  { address: "me", icon: "me", word: "me", load: () => import("./rooms/me.js") },
];
const ACTS = () => [
  { icon: "plus", name: t("make_application"), kind: t("kind_act"), to: ["applications", "new"] },
  { icon: "plus", name: t("make_person"), kind: t("kind_act"), to: ["people", "new"] },
  { icon: "backups", name: t("make_backup"), kind: t("kind_act"), to: ["backups"] },
  { icon: "keys", name: t("rotate_keys"), kind: t("kind_act"), to: ["keys"] },
  { icon: "audit", name: t("verify_chain"), kind: t("kind_act"), to: ["audit"] },
  { icon: "settings", name: t("brand"), kind: t("kind_act"), to: ["settings", "brand"] },
  { icon: "settings", name: t("upkeep"), kind: t("kind_act"), to: ["settings", "upkeep"] },
  { icon: "me", name: t("end_other_sessions"), kind: t("kind_act"), to: ["me"] },
  { icon: "audit", name: t(exactly.value ? "times_relative" : "times_exact"), kind: t("kind_act"), run: () => { exactly.value = !exactly.value; } },
];

ROOMS.forEach((room) => rooms.add(room.address));

const entered = new Map(); // address: the component, once fetched

/** The component of a room, fetched when somebody enters it. */
function Room({ room, segments, query }) {
  const [Found, setFound] = useState(() => entered.get(room.address));
  const [error, setError] = useState(null);
  useEffect(() => {
    if (Found) return;
    let isLeft = false;
    const enter = () => isLeft || room.load().then((module) => {
      entered.set(room.address, module.default);
      if (!isLeft) setFound(() => module.default);
    }, async (failure) => {
      const health = await get("/health", { passive: true }).catch((error) => error);
      // Without a network it is tried again with one. Else a new version of the box has other files: loading the
      // document again gets them.
      if (health.status === 0) window.addEventListener("answering", enter, { once: true });
      else setError(failure);
    });
    enter();
    return () => { isLeft = true; };
  }, [Found]);
  if (error) return html`<div class="note warn"><p>${t("new_version")}</p><${Button} onClick=${() => location.reload()}>${t("load_again")}<//></div>`;
  return Found ? html`<${Found} segments=${segments} query=${query} />` : html`<${Loading} what=${t("loading_room", { name: t(room.word) })} />`;
}

const Links = ({ current, onGo }) => html`<ul>${ROOMS.filter((room) => room.group).map((room, at, shown) => html`<li
    key=${room.address} class=${at && shown[at - 1].group !== room.group ? "apart" : ""}>
  <a href=${href(room.address ? [room.address] : [])} aria-current=${current && room.address === (current.within ?? current.address) ? "page" : null} onClick=${onGo}>
    <${Icon} name=${room.icon} />${t(room.word)}</a></li>`)}</ul>`;

function UserMenu() {
  const { username } = session.value.user;
  return html`<details class="menu" onFocusOut=${(event) => {
      if (!event.currentTarget.contains(event.relatedTarget)) event.currentTarget.open = false;
    }} onKeyDown=${(event) => {
      if (event.key !== "Escape") return;
      event.currentTarget.open = false;
      event.currentTarget.querySelector("summary").focus();
    }}>
    <summary aria-label=${t("signed_in_as", { name: username })}><${Icon} name="me" /><bdi>${username}</bdi><${Icon} name="down" /></summary>
    <ul onClick=${(event) => { event.currentTarget.parentNode.open = false; }}>
      <li><a href=${href(["me"])}>${t("me")}</a></li>
      <li><button type="button" onClick=${signOut}>${t("sign_out")}</button></li>
    </ul>
  </details>`;
}

/** Focus the heading of a room that was just entered, once it is there: whoever listens hears where they are. */
function focusHeading(main) {
  const find = () => {
    const heading = main.querySelector("h1");
    heading?.focus({ preventScroll: true });
    return Boolean(heading);
  };
  const watcher = new MutationObserver(() => find() && watcher.disconnect());
  requestAnimationFrame(() => find() || watcher.observe(main, { childList: true, subtree: true }));
  return () => watcher.disconnect();
}

/**
 * When what had the focus goes or is disabled – a card that is closed, a button whose work is done – the focus goes to
 * what is left around it, so that Tab goes on from there and whoever listens is not sent to the begin of the page.
 */
function keepFocus(main) {
  let last = null;
  let around = [];
  const note = ({ target }) => {
    last = target;
    around = [];
    for (let one = target.parentNode; one && one !== document.body; one = one.parentNode) around.push(one);
  };
  const watcher = new MutationObserver(() => {
    if (!last || (last.isConnected && !last.disabled) || ![document.body, last].includes(document.activeElement)) return;
    const near = around.find((one) => one.isConnected && main.contains(one)) || main;
    near.setAttribute("tabindex", "-1");
    near.focus({ preventScroll: true });
  });
  document.addEventListener("focusin", note);
  watcher.observe(document.body, { childList: true, subtree: true, attributeFilter: ["disabled"] });
  return () => {
    document.removeEventListener("focusin", note);
    watcher.disconnect();
  };
}

follow(() => ask({ title: t("leave_title"), text: t("leave_text"), confirm: t("leave") }));
listen();

/** `isSignedInHere`: by the form, and not by a reload. */
export default function Shell({ isSignedInHere }) {
  const [menu, setMenu] = useState(false);
  const { segments, query } = route.value;
  const room = ROOMS.find((one) => one.address === (segments[0] || "")) || null;
  const main = useRef();
  const place = `${room?.address} ${segments[1] || ""}`;
  const first = useRef(true);
  useEffect(() => {
    document.title = `${room ? t(room.word) : t("not_found_title")} – ${worn.value.name}`;
    if (!first.current) {
      scrollTo(0, 0);
      return focusHeading(main.current);
    }
    first.current = false;
    if (isSignedInHere) return focusHeading(main.current);
  }, [place]);
  useEffect(() => keepFocus(main.current), []);
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); main.current.focus(); }}>${t("skip")}</a>
    ${silent.value && html`<div class="silent" role="status">${t("silent", { time: clock(silent.value.toISOString()) })}</div>`}
    <div class="top">
      <${Button} kind="plain menu-button" icon="menu" label=${t("menu")} onClick=${() => setMenu(true)} />
      <a class="brand" href="#/"><${Box} /></a>
      <button type="button" class="find" onClick=${() => { isOpen.value = true; }} aria-label=${t("find_or_do")}>
        <${Icon} name="search" /><span>${t("find_or_do")}</span><kbd>/</kbd></button>
      <${UserMenu} />
    </div>
    <div class="sides">
      <nav class="rooms" aria-label=${t("rooms")}><${Links} current=${room} /></nav>
      <main id="main" ref=${main} tabindex="-1">
        ${room ? html`<${Room} key=${room.address} room=${room} segments=${segments.slice(1)} query=${query} />`
          : html`<${Head} title=${t("not_found_title")} /><p>${t("not_found_text")}</p>`}
      </main>
    </div>
    ${menu && html`<${Dialog} title=${worn.value.name} onClose=${() => setMenu(false)}>
      <nav class="rooms in-dialog" aria-label=${t("rooms")}><${Links} current=${room} onGo=${() => setMenu(false)} /></nav>
      <div class="buttons"><${Button} onClick=${() => setMenu(false)}>${t("close")}<//></div><//>`}
    ${isOpen.value && html`<${Palette} fixed=${[
      ...ROOMS.map((one) => ({ icon: one.icon, name: t(one.word), kind: t("kind_room"), to: one.address ? [one.address] : [] })),
      ...ACTS(),
    ]} />`}
    <${Dialogs} />
    <${Toasts} />
    ${ended.value && html`<${Dialog} title=${t("session_ended_title")} stays><${SignIn} again=${session.value.user.username} /><//>`}
  `;
}
