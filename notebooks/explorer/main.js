"use strict";
// Controls and events: a change of the state shows everything anew, once per frame.

const byId = (id) => document.getElementById(id);
const STEPS = 1000;

// Sliders: their field, range, and the way from a position to a value; most are logarithmic.
const toLog = ([low, high]) => ({
  value: (position) => low * (high / low) ** (position / STEPS),
  position: (value) => Math.round((STEPS * Math.log(value / low)) / Math.log(high / low)),
});
const MEMORY_RANGE = [1, 2 ** 20];
const LATENCY_RANGE = [0.01, 1e5];
const SLIDERS = {
  height: { range: ranges.side, round: Math.round }, width: { range: ranges.side, round: Math.round },
  dim: { range: ranges.dim, round: (value) => clamp(Math.round(value / 8) * 8, ranges.dim) },
  memory: { range: MEMORY_RANGE, round: (value) => (value < 64 ? Number(value.toPrecision(2)) : Math.round(value / 16) * 16),
    text: (value) => bytes(value * MIB) },
  latency: { range: LATENCY_RANGE, round: (value) => Number(value.toPrecision(2)), text: millis },
};

function buildControls() {
  for (const [name, { range }] of Object.entries(SLIDERS)) {
    const field = byId(name);
    const slider = byId(`${name}-slider`);
    const whole = ["height", "width", "dim"].includes(name);
    if (whole) Object.assign(field, { min: range[0], max: range[1], step: 1 });
    Object.assign(slider, { min: 0, max: STEPS, step: 1 });
    slider.addEventListener("input", () => {
      const end = name === "latency" && Number(slider.value) === STEPS;
      set(name, end ? null : SLIDERS[name].round(toLog(range).value(Number(slider.value))));
    });
    field.addEventListener("input", () => {
      const value = field.value === "" && name === "latency" ? null : FIELDS[name][1](field.value);
      const valid = value !== null || (name === "latency" && field.value === "");
      field.setAttribute("aria-invalid", String(!valid));
      if (valid) set(name, value, field);
    });
    field.addEventListener("change", () => { field.setAttribute("aria-invalid", "false"); showControls(); });
  }
  for (const id of ["heads", "heads-slider"]) {
    Object.assign(byId(id), { min: ranges.heads[0], max: ranges.heads[1], step: 1 });
    byId(id).addEventListener("input", () => {
      const value = FIELDS.heads[1](byId(id).value);
      if (value !== null) set("heads", value, byId(id));
    });
  }
  options("mode", Object.entries(words));
  options("dtype", dtypes.map((name) => [name, name]));
  for (const id of ["device", "other"]) options(id, DATA.devices.map(({ name, days }, number) => [number, `${name}, ${days}`]));
  options("task", tasks().map((name) => [name, name]));
  for (const id of ["mode", "dtype", "task"]) byId(id).addEventListener("change", () => set(id, byId(id).value));
  for (const id of ["device", "other"]) byId(id).addEventListener("change", () => set(id, Number(byId(id).value)));
  byId("square").addEventListener("change", () => {
    state.square = byId("square").checked;
    if (state.square) state.width = state.height;
    changed();
  });
  byId("all").addEventListener("change", () => set("all", byId("all").checked));
  byId("theme").addEventListener("click", () => set("theme", dark() ? "light" : "dark"));
  byId("reset").addEventListener("click", () => { history.pushState(null, "", "#"); readHash(); changed(); });
  buildTabs();
  buildLegend();
}

function options(id, pairs) {
  byId(id).innerHTML = pairs.map(([value, text]) => `<option value="${escaped(value)}">${escaped(text)}</option>`).join("");
}

function buildTabs() {
  const tabs = byId("tabs");
  tabs.innerHTML = Object.entries(VIEWS)
    .map(([name, text]) => `<button type="button" role="tab" id="tab-${name}" aria-controls="view" data-view="${name}">${text}</button>`)
    .join("");
  tabs.addEventListener("click", (event) => event.target.dataset.view && set("view", event.target.dataset.view));
  tabs.addEventListener("keydown", (event) => {
    const names = Object.keys(VIEWS);
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const at = { Home: 0, End: names.length - 1 }[event.key] ?? (move ? (names.indexOf(state.view) + move + names.length) % names.length : null);
    if (at === null) return;
    event.preventDefault();
    set("view", names[at]);
    byId(`tab-${names[at]}`).focus();
  });
}

function buildLegend() {
  const families = new Map();
  for (const [name, { family, rank: order }] of Object.entries(DATA.marks)) {
    if (BASELINES.includes(name)) continue;
    if (!families.has(family)) families.set(family, { order, names: [] });
    families.get(family).names.push(name);
  }
  const sorted = [...families].sort((a, b) => a[1].order - b[1].order);
  byId("legend").innerHTML = sorted
    .map(([family, { names }]) => `<li><button type="button" data-family="${family}"><b>${family}</b></button><span class="members">` +
      `${names.map((name) => `<span>${swatch(name)}${escaped(name)}</span>`).join(" ")}</span></li>`)
    .join("");
}

function set(name, value, typed = null) {
  state[name] = value;
  if (state.square && name === "height") state.width = value;
  if (state.square && name === "width") state.height = value;
  changed(typed);
}

function pin(id) {
  state.pin = state.pin === id ? "" : id;
  changed();
  if (state.pin) byId("pin").scrollIntoView({ block: "nearest" });
}

function showControls(typed = null) {
  for (const [name, { range, text }] of Object.entries(SLIDERS)) {
    const value = state[name];
    const slider = byId(`${name}-slider`);
    if (byId(name) !== typed) byId(name).value = value ?? "";
    slider.value = value === null ? STEPS : toLog(range).position(clamp(value, range));
    slider.setAttribute("aria-valuetext", value === null ? "no limit" : text ? text(value) : String(value));
    const shown = byId(`${name}-text`);
    if (shown) shown.textContent = value === null ? "no limit" : text(value);
  }
  for (const id of ["heads", "heads-slider"]) if (byId(id) !== typed) byId(id).value = state.heads;
  for (const id of ["mode", "dtype", "device", "other"]) byId(id).value = state[id];
  if (tasks().length) byId("task").value = tasks().includes(state.task) ? state.task : tasks()[0];
  byId("square").checked = state.square;
  byId("all").checked = state.all;
  byId("other-field").hidden = state.view !== "compare";
  byId("task-field").hidden = state.view !== "pareto" || !tasks().length;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const active = tab.dataset.view === state.view;
    tab.setAttribute("aria-selected", String(active));
    tab.tabIndex = active ? 0 : -1;
  }
  byId("view").setAttribute("aria-labelledby", `tab-${state.view}`);
  const off = hidden();
  for (const button of document.querySelectorAll("#legend button")) {
    button.setAttribute("aria-pressed", String(!off.has(button.dataset.family)));
  }
}

let pending = false;
let hashTimer = 0;
let summaryTimer = 0;
function changed(typed = null) {
  showControls(typed);
  clearTimeout(hashTimer);
  hashTimer = setTimeout(writeHash, 150);
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => { pending = false; show(); });
}

let shownTheme = null;
function show() {
  if (shownTheme !== dark()) {
    shownTheme = dark();
    document.documentElement.dataset.theme = shownTheme ? "dark" : "light";
    byId("theme").textContent = shownTheme ? "Light theme" : "Dark theme";
    buildLegend();
    lineCache.clear();
    showControls();
  }
  const ranked = ranking(state);
  const rows = listed(ranked.entries);
  showTable(rows);
  showPin();
  showFailures(rows);
  // Spoken once a movement has ended.
  clearTimeout(summaryTimer);
  summaryTimer = setTimeout(() => { byId("summary").textContent = summary(ranked); }, byId("summary").textContent ? 250 : 0);
  return draw(rows, ranked.entries);
}

document.querySelector("#ranked thead").addEventListener("click", (event) => {
  const header = event.target.closest("th");
  if (!header) return;
  state.down = state.sort === header.dataset.sort && !state.down;
  set("sort", header.dataset.sort);
});
document.querySelector("#ranked tbody").addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (row) pin(row.querySelector("button").dataset.pin);
});
byId("legend").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const off = hidden();
  if (!off.delete(button.dataset.family)) off.add(button.dataset.family);
  set("off", [...off].join(","));
});
byId("families").addEventListener("click", (event) => {
  if (event.target.dataset.all) set("off", event.target.dataset.all === "on" ? "" : Object.values(DATA.marks).map((mark) => mark.family).filter((f, n, all) => all.indexOf(f) === n).join(","));
});
byId("copy").addEventListener("click", async () => {
  const text = byId("command").textContent;
  try {
    await navigator.clipboard.writeText(text);
    byId("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(byId("command"));
    byId("copied").textContent = "Selected: copy it with the keyboard.";
  }
  setTimeout(() => { byId("copied").textContent = ""; }, 3000);
});
byId("unpin").addEventListener("click", () => pin(state.pin));
addEventListener("hashchange", () => { readHash(); changed(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => changed());
let shownNarrow = narrow();
addEventListener("resize", () => { if (shownNarrow !== narrow()) { shownNarrow = narrow(); changed(); } });

readHash();
buildControls();
showControls();
show().then(() => { document.documentElement.dataset.drawn = String(Math.round(performance.now())); });
