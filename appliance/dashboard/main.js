// The console before anybody has signed in, and the way from there to the rooms: shell.js says how one is made.
//
// The first view is small, for a slow network: this module, what it imports, one sheet, and the words of the sign-in in
// the document. What the rooms need is fetched while somebody types.
import { render } from "./vendor/preact.js";
import { resume, session, watch } from "./api.js";
import { loadWords, t } from "./words.js";
import { Box, Failure, html, useEffect, useState } from "./parts/base.js";
import SignIn from "./rooms/signin.js";

// What shell.js imports and what most rooms do. Named here, they come at once and not one after the other.
const AHEAD = [
  "shell.js", "parts/dialog.js", "parts/palette.js", "parts/jwt.js", "parts/toast.js", "rooms/home.js", "parts/chart.js",
  "parts/copy.js", "parts/names.js", "parts/table.js", "parts/form.js", "parts/filters.js", "parts/choices.js",
  "parts/factor.js", "parts/person.js", "parts/secret.js",
];

/** Fetch the shell, and the words of all rooms: a Promise of the component. */
async function enter() {
  for (const name of AHEAD) {
    const link = Object.assign(document.createElement("link"), { rel: "modulepreload", href: new URL(name, import.meta.url).href });
    document.head.append(link);
  }
  const [shell] = await Promise.all([import("./shell.js"), loadWords()]);
  return shell.default;
}

let isSignedInHere = false; // by the form, and not by a reload

function App() {
  const [Shell, setShell] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => { enter().then((found) => setShell(() => found), (failure) => setError({ code: "no_answer", ...failure })); }, []);
  if (!session.value) isSignedInHere = true;
  if (session.value && Shell) return html`<${Shell} isSignedInHere=${isSignedInHere} />`;
  return html`<div class="front"><header><${Box} /></header><main>${
    session.value && error ? html`<${Failure} error=${error} retry=${() => location.reload()} />`
      : isSignedInHere ? html`<${SignIn} />` : html`<p role="status">${t("loading_console")}</p>`}</main></div>`;
}

let failure = null;
await resume().catch((error) => { failure = error; });
watch();
document.body.replaceChildren();
render(failure ? html`<div class="front"><main><${Failure} error=${failure} retry=${() => location.reload()} /></main></div>`
  : html`<${App} />`, document.body);
