// The brand that this document wears. It changes when an administrator saves another one here.
import { signal } from "./vendor/signals.js";

const box = document.querySelector("meta[name=box]");
const sheet = document.querySelector("#brand");

/** The address of a picture of the brand by its file name, or "". */
export const pictureOf = (file) => (file ? new URL(file, import.meta.url).href : "");

export const worn = signal({ name: box.content, logo: pictureOf(box.dataset.logo) });

/** Wear another brand, of this name, colour such as #1f5fbf, and picture. */
export function wear(name, color, logo) {
  worn.value = { name, logo };
  sheet.href = new URL(`brand.${color.slice(1)}.css`, import.meta.url).href;
}
