// What is said and how times and numbers are written. The only module that formats. The words are the member `console`
// of appliance/pages/<language>.json; a text with forms ({"one": …, "other": …}) is chosen by its value `n`.
import { file, now } from "./api.js";

export const language = document.documentElement.lang || "en";
// Dates and numbers as in the reader's country, if that is where the language is spoken: 16:30 and not 04:30 PM.
const locale = navigator.languages.find((one) => one.toLowerCase().startsWith(language)) || language;
let words = JSON.parse(document.querySelector("meta[name=words]").content); // those of the sign-in, then all

export async function loadWords() {
  words = await file(`words/${language}.json`);
}

const plural = new Intl.PluralRules(locale);

/** The words of a key, with {name} replaced by values. */
export function t(key, values = {}) {
  let text = words[key] ?? key;
  if (typeof text === "object") text = text[plural.select(Number(values.n))] ?? text.other;
  return text.replace(/\{(\w+)\}/g, (gap, name) =>
    name in values ? (typeof values[name] === "number" ? number(values[name]) : String(values[name])) : gap);
}

/** Whether there are words for a key: codes of errors and actions have some. */
export const has = (key) => key in words;

export const number = (value) => new Intl.NumberFormat(locale).format(value);

export function bytes(value) {
  const units = ["byte", "kilobyte", "megabyte", "gigabyte", "terabyte"];
  let at = 0;
  for (; value >= 1000 && at < units.length - 1; at++) value /= 1000;
  return new Intl.NumberFormat(locale, {
    style: "unit", unit: units[at], unitDisplay: "short", maximumFractionDigits: value < 10 && at ? 1 : 0,
  }).format(value);
}

export const seconds = (value) => duration(value * 1000);

/** A length of time in its largest fitting unit: 12 days. */
export function duration(ms) {
  const steps = [["day", 86400000], ["hour", 3600000], ["minute", 60000], ["second", 1000]];
  const [unit, size] = steps.find(([, length]) => Math.abs(ms) >= length) || steps[3];
  return new Intl.NumberFormat(locale, { style: "unit", unit, unitDisplay: "long" }).format(Math.round(ms / size));
}

const relative = new Intl.RelativeTimeFormat(locale, { numeric: "auto" });
const exactForm = new Intl.DateTimeFormat(locale, { dateStyle: "full", timeStyle: "long" });
const dayForm = new Intl.DateTimeFormat(locale, { day: "numeric", month: "short", year: "numeric" });
const datedForm = new Intl.DateTimeFormat(locale, { dateStyle: "medium", timeStyle: "short" });
const timeForm = new Intl.DateTimeFormat(locale, { hour: "2-digit", minute: "2-digit" });
const momentForm = new Intl.DateTimeFormat(locale, { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
const stampForm = new Intl.DateTimeFormat(locale, {
  day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit",
});

/** A moment as one says it: 2 minutes ago, in 6 days; further than a month away, the day. */
export function ago(moment) {
  const ms = Date.parse(moment) - now();
  const away = Math.abs(ms);
  if (away > 30 * 86400000) return dayForm.format(Date.parse(moment));
  if (away < 45000) return relative.format(0, "second");
  const [unit, size] = [["day", 86400000], ["hour", 3600000], ["minute", 60000]].find(([, length]) => away >= length - 30000)
    || ["minute", 60000];
  return relative.format(Math.round(ms / size), unit);
}

export const exact = (moment) => exactForm.format(Date.parse(moment));
export const dated = (moment) => datedForm.format(Date.parse(moment));
export const stamp = (moment) => stampForm.format(Date.parse(moment));
export const moment = (time) => momentForm.format(Date.parse(time));
export const clock = (moment) => timeForm.format(Date.parse(moment));
export const list = (items) => new Intl.ListFormat(locale, { type: "conjunction" }).format(items);
export const compare = new Intl.Collator(locale, { numeric: true }).compare;

const BROWSERS = [["Edg/", "Edge"], ["OPR/", "Opera"], ["Firefox/", "Firefox"], ["Chrome/", "Chrome"], ["Safari/", "Safari"],
  ["curl/", "curl"], ["mad/", "mad"], ["python", "Python"]];
const SYSTEMS = [["Android", "Android"], ["iPhone", "iPhone"], ["iPad", "iPad"], ["Windows", "Windows"], ["Mac OS X", "macOS"],
  ["CrOS", "ChromeOS"], ["Linux", "Linux"]];

/** What a User-Agent means to people: Chrome on Linux. Unknown ones are given as they are, shortened. */
export function browserName(agent) {
  const find = (names) => (names.find(([mark]) => agent.includes(mark)) || [])[1];
  const [program, system] = [find(BROWSERS), find(SYSTEMS)];
  return program && system ? t("browser_on", { program, system }) : program || agent.slice(0, 40) || t("unknown");
}

/** The sentence for an ApiError: by its code, else by its status, else what the box says. */
export function explain(error) {
  if (error.unknownRoute) return t("error_method_not_allowed");
  const keys = [`error_${error.code}`, `error_${error.status}`];
  const key = keys.find(has);
  return key ? t(key, { n: error.retryAfter || 1 }) : error.message || t("error_server_error");
}
