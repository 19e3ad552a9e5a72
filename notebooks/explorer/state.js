"use strict";
// The state of the page, all of it in the URL's hash, so that a link is a view.

const DATA = JSON.parse(document.getElementById("data").textContent);
const MIB = 2 ** 20;
const VIEWS = {
  memory: "Memory", macs: "MACs", latency: "Latency", pareto: "Pareto", bra: "BRA's options",
  speed: "BRA's speed", compare: "Two devices",
};

const ranges = (() => {
  const sides = DATA.rows.height.concat(DATA.rows.width);
  const measured = {
    side: [Math.min(...sides), Math.min(1024, Math.max(...sides))], dim: [16, 512], heads: [1, 16],
  };
  return (DATA.predictions && DATA.predictions.range) || measured;
})();

// Each field: its default, and how it is read from the hash; null where the text is not valid.
const whole = (low, high) => (text) => {
  const value = Number(text);
  return Number.isInteger(value) && value >= low && value <= high ? value : null;
};
const positive = (text) => (Number(text) > 0 && Number.isFinite(Number(text)) ? Number(text) : null);
const among = (values) => (text) => (values.includes(text) ? text : null);
const clamp = (value, [low, high]) => Math.min(high, Math.max(low, value));

const dtypes = DATA.rows.dtype.values.slice().sort((a, b) => (b === "fp32") - (a === "fp32"));
for (const candidate of DATA.predictions ? DATA.predictions.candidates : []) {
  for (const key of Object.keys(candidate.memory)) {
    if (!dtypes.includes(key.split(" ")[1])) dtypes.push(key.split(" ")[1]);
  }
}
const folders = DATA.devices.map((device) => device.folder);
const counts = folders.map((_, number) => DATA.rows.device.filter((device) => device === number).length);
const largest = counts.indexOf(Math.max(...counts));

const FIELDS = {
  view: ["memory", among(Object.keys(VIEWS))],
  height: [clamp(56, ranges.side), whole(...ranges.side)],
  width: [clamp(56, ranges.side), whole(...ranges.side)],
  square: [true, (text) => (text === "1" ? true : text === "0" ? false : null)],
  dim: [clamp(64, ranges.dim), whole(...ranges.dim)],
  heads: [clamp(2, ranges.heads), whole(...ranges.heads)],
  mode: ["forward", among(["forward", "forward_backward"])],
  dtype: [dtypes[0], among(dtypes)],
  device: [largest, whole(0, folders.length - 1)],
  other: [folders.length > 1 ? (largest + 1) % folders.length : largest, whole(0, folders.length - 1)],
  memory: [1024, positive],
  latency: [null, positive],
  all: [false, (text) => (text === "1" ? true : text === "0" ? false : null)],
  sort: ["rank", among(["rank", "name", "ms", "memory", "macs"])],
  down: [false, (text) => (text === "1" ? true : text === "0" ? false : null)],
  off: ["", (text) => (/^[a-z,]*$/.test(text) ? text : null)],
  task: ["", (text) => text],
  pin: ["", (text) => text],
  theme: ["", among(["light", "dark"])],
};

const state = {};

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const [name, [usual, read]] of Object.entries(FIELDS)) {
    const value = given.has(name) ? read(given.get(name)) : null;
    state[name] = value === null ? usual : value;
  }
  if (state.height !== state.width && !given.has("square")) state.square = false;
}

function writeHash() {
  const words = [];
  for (const [name, [usual]] of Object.entries(FIELDS)) {
    if (state[name] === usual || state[name] === null) continue;
    const value = state[name] === true ? "1" : state[name] === false ? "0" : String(state[name]);
    words.push(`${name}=${encodeURIComponent(value)}`);
  }
  // A page from a file may not replace its address in every browser.
  try {
    history.replaceState(null, "", `#${words.join("&")}`);
  } catch {
    location.replace(`#${words.join("&")}`);
  }
}

const device = () => DATA.devices[state.device];
const hidden = () => new Set(state.off.split(",").filter(Boolean));
const dark = () =>
  state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const narrow = () => innerWidth < 700;
const words = { forward: "forward", forward_backward: "forward and backward" };

// Three significant digits, in the unit that suits.
const digits = (value) => (value >= 99.95 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3))));
function bytes(count) {
  if (count === null) return "";
  for (const [unit, factor] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", MIB]]) {
    if (count >= 0.9995 * factor) return `${digits(count / factor)} ${unit}`;
  }
  return `${digits(count / 1024)} KiB`;
}
function amount(count) {
  if (count === null) return "";
  for (const [unit, factor] of [["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (count >= 0.9995 * factor) return `${digits(count / factor)} ${unit}`;
  }
  return digits(count);
}
const millis = (ms) => (ms === null ? "" : ms >= 9995 ? `${digits(ms / 1000)} s` : `${digits(ms)} ms`);
const escaped = (text) =>
  String(text).replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);
