// Comforts of the login pages. Each page works without this script; its words stand in the page.
const words = document.body.dataset;

function addReveal(field) {
  if (!words.showPassword) return; // a layout of one's own, without these words
  const button = document.createElement("button");
  const turn = (shown) => {
    field.type = shown ? "text" : "password";
    button.textContent = shown ? words.hide : words.show;
    button.setAttribute("aria-label", shown ? words.hidePassword : words.showPassword);
  };
  button.type = "button";
  button.className = "reveal";
  button.setAttribute("aria-controls", field.id);
  button.addEventListener("click", () => turn(field.type === "password"));
  // As a password again, or the browser would remember it among what was typed, and Back would show it.
  field.form.addEventListener("submit", () => turn(false));
  addEventListener("pagehide", () => turn(false));
  turn(false);
  field.after(button);
}

function select(element) {
  const range = document.createRange();
  range.selectNodeContents(element);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
}

async function copyCodes(button) {
  const list = document.getElementById("recovery");
  const text = [...list.querySelectorAll("code")].map((code) => code.textContent).join("\n");
  try {
    await navigator.clipboard.writeText(text); // absent where http is not loopback
  } catch {
    select(list);
    if (!document.execCommand("copy")) return; // the codes stay selected, to be copied by hand
    getSelection().removeAllRanges();
  }
  document.getElementById("copied").textContent = button.dataset.done;
}

const acts = { copy: copyCodes, print: () => print() };
for (const button of document.querySelectorAll("button[data-act]")) {
  button.hidden = false;
  button.addEventListener("click", () => acts[button.dataset.act](button));
}
for (const field of document.querySelectorAll('.field input[type="password"]')) addReveal(field);
const exact = new Intl.DateTimeFormat(document.documentElement.lang, { dateStyle: "medium", timeStyle: "short" });
for (const time of document.querySelectorAll("time")) time.title = exact.format(Date.parse(time.dateTime));
