// Figures over time. Spark is a line of 30 points in a row; Chart is the real one (uPlot, fetched when it is first
// shown): time on x in the reader's zone, zero on y, gaps as gaps, series that differ by dash as well as by colour, and
// a table of the same figures one step away.
import { clock, number, stamp, t } from "../words.js";
import { Button, html, useEffect, useRef, useState } from "./base.js";

const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The largest value of a series and a step above it, so that few logins are no flat line on the top. */
const ceiling = (points) => Math.max(4, ...points.filter((value) => value != null)) * 1.1;

/** `points` are numbers, or null for a gap. */
export function Spark({ points, label }) {
  const top = ceiling(points);
  const step = 100 / Math.max(1, points.length - 1);
  let line = "";
  points.forEach((value, at) => {
    if (value == null) return;
    const isFirst = at === 0 || points[at - 1] == null;
    line += `${isFirst ? "M" : "L"}${(at * step).toFixed(2)} ${(28 - (value / top) * 26).toFixed(2)}`;
  });
  return html`<svg class="spark" viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label=${label}>
    <path d=${line} vector-effect="non-scaling-stroke" /></svg>`;
}

async function draw(ref, { from, step, series, names }) {
  const [{ default: uPlot }] = await Promise.all([import("../vendor/uplot.js"), style()]);
  const place = ref.current;
  if (!place) return null; // it was left meanwhile
  const length = Math.max(...names.map((name) => series[name].length));
  const times = Array.from({ length }, (_, at) => from + at * step);
  const axis = { font: "12px sans-serif", stroke: color("--quiet"), grid: { stroke: color("--hair"), width: 1 }, ticks: { stroke: color("--hair") } };
  return new uPlot({
    width: place.clientWidth, height: place.clientHeight, legend: { show: false }, cursor: { y: false, drag: { x: false } },
    scales: { y: { range: (_, low, high) => [0, Math.max(4, high || 0) * 1.1] } },
    axes: [
      { ...axis, space: 64, size: 30, values: (_, ticks) => ticks.map((tick) => clock(new Date(tick * 1000).toISOString())) },
      { ...axis, space: 26, size: 44, values: (_, ticks) => ticks.map((tick) => (tick % 1 ? "" : number(tick))) },
    ],
    series: [{}, ...names.map((name, at) => ({
      label: name, stroke: color(`--series-${(at % 4) + 1}`), width: 1.5, dash: DASHES[at % 4], points: { show: false },
    }))],
  }, [times, ...names.map((name) => series[name])], place);
}

let sheet;
function style() {
  sheet ??= new Promise((resolve) => {
    const link = document.createElement("link");
    Object.assign(link, { rel: "stylesheet", href: new URL("../vendor/uplot.css", import.meta.url), onload: resolve, onerror: resolve });
    document.head.append(link);
  });
  return sheet;
}

/** `from` and `step` are seconds, `series` {name: [number or null]}; `words` {name: what it is called}. */
export function Chart({ from, step, series, words = {}, label }) {
  const names = Object.keys(series);
  const place = useRef();
  const plot = useRef();
  const [at, setAt] = useState(null);
  const [table, setTable] = useState(false);
  const length = Math.max(0, ...names.map((name) => series[name].length));
  useEffect(() => {
    if (table) return;
    let isGone = false;
    const size = new ResizeObserver(() => place.current && plot.current?.setSize({ width: place.current.clientWidth, height: place.current.clientHeight }));
    draw(place, { from, step, series, names }).then((made) => {
      if (isGone || !made) return made?.destroy();
      plot.current = made;
      size.observe(place.current);
    }, () => isGone || setTable(true)); // without uPlot, as when the network is gone, the figures are a table
    return () => {
      isGone = true;
      size.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [from, step, series, table]);
  const key = (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -length, End: length }[event.key];
    if (!move) return;
    event.preventDefault();
    setAt(Math.min(length - 1, Math.max(0, (at ?? length) + move)));
  };
  const time = (index) => stamp(new Date((from + index * step) * 1000).toISOString());
  const reading = at == null ? "" : `${time(at)}: ` +
    names.map((name) => `${words[name] || name} ${series[name][at] == null ? "–" : number(series[name][at])}`).join(", ");
  return html`<figure class="chart">
    ${table ? html`<div class="scroll tall"><table class="plain"><thead><tr><th scope="col">${t("time")}</th>${names.map((name) =>
        html`<th scope="col" class="number" key=${name}>${words[name] || name}</th>`)}</tr></thead><tbody>
        ${Array.from({ length }, (_, index) => length - 1 - index).map((index) => html`<tr key=${index}><td>${time(index)}</td>
          ${names.map((name) => html`<td class="number" key=${name}>${series[name][index] == null ? "–" : number(series[name][index])}</td>`)}</tr>`)}
      </tbody></table></div>`
      : html`<div class="plot" ref=${place} tabindex="0" role="img" aria-label=${label} onKeyDown=${key} onBlur=${() => setAt(null)}></div>`}
    <figcaption>
      ${names.length > 1 && names.map((name, index) => html`<span key=${name} class=${`legend series-${(index % 4) + 1}`}>${words[name] || name}</span>`)}
      <span role="status">${reading}</span>
      <${Button} kind="plain" onClick=${() => setTable(!table)}>${t(table ? "as_chart" : "as_table")}<//>
    </figcaption>
  </figure>`;
}
