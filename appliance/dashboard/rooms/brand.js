// The brand of the pages: name, colour and picture, beside the sign-in page as it would look. #/settings/brand
import { get, send } from "../api.js";
import { bytes, language, number, t } from "../words.js";
import {
  Button, Card, Failure, html, Loading, pictureOf, useAct, useEffect, useLoad, useMemo, useRef, useState, visible, wear, When,
} from "../parts/base.js";
import { ask } from "../parts/dialog.js";
import { Field, Form, useRecord } from "../parts/form.js";
import { toast } from "../parts/toast.js";

const GAP = "\ue000"; // where the page of the preview has a gap for the name
const MOST = 40960; // octets of a picture
const HEIGHTS = [320, 160, 80]; // pixels to which a picture that has more is made smaller
const KINDS = "image/png,image/jpeg,image/webp,image/svg+xml";

// A picture is a word in the form, so that a conflict can say whose is which: its kind, size and hash, or its file.
const pick = ({ name, color, logo }) => ({
  name, color, logo: logo ? `${logo.media_type.split("/")[1].split("+")[0]}, ${bytes(logo.bytes)}, ${logo.sha256.slice(0, 12)}` : "",
});

const hex = (text) => /^\s*#?([0-9a-f]{6})\s*$/i.exec(text)?.[1].toLowerCase();

/** The contrast of black and white on a colour, as the server has it. WCAG 2.2, relative luminance */
function contrasts(color) {
  const [red, green, blue] = [0, 2, 4].map((at) => parseInt(color.slice(at, at + 2), 16) / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return { white: 1.05 / (luminance + 0.05), black: (luminance + 0.05) / 0.05 };
}

/** A picture of at most MOST octets: the file itself, or a smaller copy of what is no SVG. */
async function fit(file) {
  if (file.size <= MOST || file.type === "image/svg+xml") return file;
  const bitmap = await createImageBitmap(file);
  let copy = file;
  for (const height of HEIGHTS.filter((one) => one < bitmap.height)) {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: Math.max(1, Math.round(bitmap.width * height / bitmap.height)), height });
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    copy = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    if (copy.size <= MOST) break;
  }
  return copy;
}

async function base64(file) {
  const octets = new Uint8Array(await file.arrayBuffer());
  return btoa(Array.from(octets, (octet) => String.fromCharCode(octet)).join(""));
}

/** The sign-in page of AUTH, filled in: its gaps are found once, so a page of the operator's own works as well. */
function Preview({ name, color, logo }) {
  const frame = useRef();
  const [gaps, setGaps] = useState(null);
  const [scheme, setScheme] = useState(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const loaded = () => {
    const page = frame.current.contentDocument;
    const sheet = page?.querySelector("link[rel=stylesheet]");
    if (!sheet) return;
    const walker = page.createTreeWalker(page.documentElement, NodeFilter.SHOW_TEXT);
    const texts = [];
    for (let node = walker.nextNode(); node; node = walker.nextNode()) if (node.data.includes(GAP)) texts.push([node, node.data]);
    setGaps({ sheet, texts, picture: page.querySelector("img") });
  };
  useEffect(() => {
    if (!gaps) return;
    for (const [node, text] of gaps.texts) node.data = text.replaceAll(GAP, () => name);
    if (!gaps.picture) return;
    gaps.picture.hidden = !logo;
    if (logo) gaps.picture.src = logo;
  }, [gaps, name, logo]);
  useEffect(() => {
    if (!gaps) return;
    const change = () => { gaps.sheet.href = pictureOf(`login.${color}.${scheme}.css`); };
    const timer = setTimeout(change, 120); // a picker says each colour on the way
    return () => clearTimeout(timer);
  }, [gaps, color, scheme]);
  return html`<${Card} title=${t("brand_preview")}>
    <div class="segments" role="group" aria-label=${t("brand_scheme")}>${["light", "dark"].map((one) => html`<button key=${one} type="button"
      aria-pressed=${one === scheme ? "true" : "false"} onClick=${() => setScheme(one)}>${t(`scheme_${one}`)}</button>`)}</div>
    <iframe ref=${frame} class="preview" inert title=${t("brand_preview")} tabindex="-1" sandbox="allow-same-origin" src=${`preview?lang=${language}`} onLoad=${loaded}></iframe><//>`;
}

function Editor({ row, etag, adopt, reload }) {
  const { host } = row;
  const files = useMemo(() => new Map(), []); // what is chosen here: its word in the form, {file, address}
  const chooser = useRef();
  const { act, busy, error } = useAct();
  useEffect(() => () => { for (const { address } of files.values()) URL.revokeObjectURL(address); }, []);
  const done = ({ data, etag: latest }) => {
    wear(data.name || host, data.color, data.logo ? pictureOf(`logo.${data.logo.sha256.slice(0, 12)}`) : "");
    adopt({ data, etag: latest });
    toast(t("brand_saved"));
  };
  const write = async (changes) => ("logo" in changes && files.has(changes.logo)
    ? { ...changes, logo: await base64(files.get(changes.logo).file) } : changes);
  const form = useRecord("/brand", row, etag, pick, done, write);
  const { name, color, logo } = form.values;
  const shade = hex(color) || row.color.slice(1);
  const address = files.get(logo)?.address || pictureOf(logo && `logo.${logo.slice(-12)}`);
  const { white, black } = contrasts(shade);
  const choose = (event) => act(async () => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    const fitting = await fit(file).catch(() => file);
    const word = `${visible(file.name)}, ${bytes(fitting.size)}`;
    if (!files.has(word)) files.set(word, { file: fitting, address: URL.createObjectURL(fitting) });
    form.set("logo", word);
  });
  const reset = () => act(async () => {
    if (!(await ask({ title: t("brand_reset_title"), text: t("brand_reset_text"), confirm: t("brand_reset") }))) return;
    await send("DELETE", "/brand", undefined, { etag });
    const { data, etag: latest } = await get("/brand");
    form.reset(pick(data));
    wear(data.name || host, data.color, data.logo ? pictureOf(`logo.${data.logo.sha256.slice(0, 12)}`) : "");
    adopt({ data, etag: latest });
    toast(t("brand_is_reset"));
  });
  const from = (part) => row.origins[part] === "option" && t("brand_of_option", { option: `brand-${part}` });
  const isSet = Object.values(row.origins).includes("set");
  const names = { name: t("brand_name"), color: t("brand_color"), logo: t("brand_logo") };
  return html`<div class="beside-preview"><${Card}>
    <${Form} form=${form} submit=${t("save")} names=${names}>
      <${Field} form=${form} name="name" label=${t("brand_name")} maxlength="80" placeholder=${host}
        hint=${[t("brand_name_hint", { host: visible(host) }), from("name")].filter(Boolean).join(" ")} />
      <${Field} form=${form} name="color" label=${t("brand_color")} mono
        hint=${[t(white >= black ? "brand_text_white" : "brand_text_black", { ratio: number(Math.floor(Math.max(white, black) * 10) / 10) }), from("color")].filter(Boolean).join(" ")}
        control=${(props) => html`<span class="colour"><input type="color" aria-label=${t("brand_pick_color")} value=${`#${shade}`}
          onInput=${(event) => form.set("color", event.target.value)} /><input class="mono" maxlength="9" spellcheck=${false} autocomplete="off" ...${props} /></span>`} />
      <${Field} form=${form} name="logo" label=${t("brand_logo")}
        hint=${[t("brand_logo_hint", { most: bytes(40000) }), from("logo")].filter(Boolean).join(" ")}
        control=${({ id, value, "aria-describedby": described }) => html`<div class="picture">
          ${address && html`<img src=${address} alt="" />`}<span>${value || html`<span class="quiet">${t("brand_no_logo")}</span>`}</span>
          <input type="file" id=${id} hidden ref=${chooser} accept=${KINDS} onChange=${choose} />
          <${Button} aria-describedby=${described} onClick=${() => chooser.current.click()}>${t("brand_choose")}<//>
          ${value && html`<${Button} onClick=${() => form.set("logo", "")}>${t("brand_remove_logo")}<//>`}</div>`} />
    <//>
    <${Failure} error=${error} retry=${error?.status === 412 && reload} />
    ${isSet && html`<div class="split below-line"><span class="small quiet">${row.modified_at && html`${t("brand_changed")} <${When} at=${row.modified_at} />`}</span>
      <${Button} busy=${busy} onClick=${reset}>${t("brand_reset")}<//></div>`}<//>
    <${Preview} name=${name.trim() || host} color=${shade} logo=${address} /></div>`;
}

export default function Brand() {
  const found = useLoad((signal) => get("/brand", { signal }), []);
  if (!found.data) return found.error ? html`<${Failure} error=${found.error} retry=${found.reload} />` : html`<${Loading} />`;
  return html`<p class="quiet">${t("brand_text")}</p>
    <${Editor} row=${found.data.data} etag=${found.data.etag} adopt=${found.set} reload=${found.reload} />`;
}
