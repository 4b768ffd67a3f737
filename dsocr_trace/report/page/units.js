// Numbers as people read them, as dsocr_trace.report.units writes them.
const PREFIXES = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];
const TIMES = [[1e9, "s"], [1e6, "ms"], [1e3, "µs"], [1, "ns"]];
const NONE = "–";

function scaled(value, scales, unit) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0";
  const [scale, prefix] = scales.find(([size]) => Math.abs(value) >= size) ?? scales.at(-1);
  const number = value / scale;
  return `${number >= 1000 ? number.toFixed(0) : Number(number.toPrecision(3))} ${prefix}${unit}`;
}

const duration = (ns) => scaled(ns, TIMES, "");
const quantity = (value, unit) => scaled(value, PREFIXES, unit);
const percent = (share) => (share === null ? NONE : `${(100 * share).toFixed(1)}%`);
const count = (value) => (value === null ? NONE : value.toLocaleString("en-US"));
const times = (ratio) => (ratio === null ? NONE : `${ratio >= 10 ? count(Math.round(ratio)) : Number(ratio.toPrecision(2))}×`);
const divided = (above, below) => (above === null || !below ? null : above / below);

function escaped(text) {
  const entities = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
  return String(text).replace(/[&<>"]/g, (character) => entities[character]);
}

const signed = (ns) => (ns === null ? NONE : `${ns < 0 ? "−" : "+"}${duration(Math.abs(ns))}`);

// How a number came to be, as the tags of the page show it.
const MARKS = { measured: "●", scaled: "◐", modelled: "○", calibrated: "◆", extrapolated: "◇", datasheet: "▣", estimated: "△" };
const marked = (origin) => `${MARKS[origin]} ${origin}`;

// A hover text: title, a muted line, and pairs of name and value.
function tip(title, subtitle, pairs) {
  const rows = pairs.map(([name, value]) => `<tr><td>${escaped(name)}</td><td>${escaped(value)}</td></tr>`);
  return `<div class="tip"><b>${escaped(title)}</b><br><span class="muted">${escaped(subtitle)}</span><table>${rows.join("")}</table></div>`;
}
