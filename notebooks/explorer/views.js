"use strict";
// Views that are no curves: Pareto, BRA's options, BRA's speed by implementation, two devices.

const HUES = {
  light: ["#0072B2", "#D55E00", "#009E73", "#B5558B", "#A87000", "#3A3A3A", "#2A7FA8"],
  dark: ["#56B4E9", "#F0875A", "#4DBD99", "#E3A0C5", "#E69F00", "#D0D0D0", "#9AD0F0"],
};
const hues = () => HUES[dark() ? "dark" : "light"];
const logX = (field, name, axis = {}, base = 10) => ({
  field, type: "quantitative", title: name, scale: { type: "log", base, nice: false, padding: 14 }, axis,
});
const MEMORY_AXIS = { labelExpr: bytesExpression(), tickCount: 6 };
const MS_AXIS = { format: "~r", tickCount: 6, values: ONE_TWO_FIVE };
const dots = (extra = {}) => ({ type: "point", filled: true, size: 90, opacity: 1, strokeWidth: 0.7, ...extra });
const house = () => ({ fill: raw("colour"), stroke: { value: INK() }, shape: raw("shape") });

// Pareto: latency against memory, and against accuracy where that was measured.
function paretoData(entries) {
  const points = entries
    .filter((entry) => entry.ms.value !== null && entry.memory.value !== null)
    .map((entry) => ({
      ...looks(entry.configuration, entry.place), ms: entry.ms.value, memory: entry.memory.value,
      time: `${millis(entry.ms.value)}, ${entry.ms.source}`, bytes: `${bytes(entry.memory.value)}, ${entry.memory.source}`,
      hollow: entry.ms.source === "measured" ? 1 : 0.35,
    }));
  const front = [];
  for (const point of points.slice().sort((a, b) => a.memory - b.memory || a.ms - b.ms)) {
    if (!front.length || point.ms < front[front.length - 1].ms) front.push(point);
  }
  const labels = front.map((point) => ({ ...point }));
  return { points, front, labels, memoryBudget: [{ memory: state.memory * MIB }], timeBudget: state.latency === null ? [] : [{ ms: state.latency }] };
}
const paretoExtents = ({ points, memoryBudget, timeBudget }) =>
  extents([...points, ...memoryBudget].map((one) => one.memory), [...points, ...timeBudget].map((one) => one.ms));
function paretoSpec(data) {
  const x = logX("memory", "memory of one step", MEMORY_AXIS, 2);
  const y = logX("ms", "latency of one step, ms", MS_AXIS);
  x.scale = { ...x.scale, padding: 0, domain: [{ expr: "x0" }, { expr: "x1" }] };
  y.scale = { ...y.scale, padding: 0, domain: [{ expr: "y0" }, { expr: "y1" }] };
  return {
    params: asParams(paretoExtents(data)),
    layer: [
      { data: { name: "front" }, mark: { type: "line", interpolate: "step-after", strokeDash: [4, 3], color: INK() }, encoding: { x, y } },
      { data: { name: "points" }, mark: dots({ cursor: "pointer" }), encoding: { x, y, ...house(),
        fillOpacity: { ...raw("hollow", "quantitative") },
        tooltip: [tip("label", "configuration"), tip("time", "latency"), tip("bytes", "memory")] } },
      { data: { name: "labels" }, mark: { type: "text", align: "left", dx: 8, dy: -7, color: INK() }, encoding: { x, y, text: { field: "name" } } },
      { data: { name: "memoryBudget" }, mark: { type: "rule", strokeDash: [7, 4], strokeWidth: 2, color: LIMIT() }, encoding: { x } },
      { data: { name: "timeBudget" }, mark: { type: "rule", strokeDash: [7, 4], strokeWidth: 2, color: LIMIT() }, encoding: { y } },
    ],
  };
}
const tasks = () => [...new Set(DATA.capability.map((row) => row.task))];
function accuracyData(entries) {
  const task = tasks().includes(state.task) ? state.task : tasks()[0];
  const best = new Map();
  for (const entry of entries) if (entry.ms.value !== null && !best.has(entry.configuration.name)) best.set(entry.configuration.name, entry);
  const points = DATA.capability
    .filter((row) => row.task === task && best.has(row.attention))
    .map((row) => {
      const entry = best.get(row.attention);
      return { ...looks(entry.configuration, entry.place), accuracy: row.accuracy, ms: entry.ms.value,
        time: `${millis(entry.ms.value)}, ${entry.ms.source}` };
    });
  return { points };
}
function accuracySpec() {
  const y = { field: "accuracy", type: "quantitative", title: "accuracy", scale: { zero: false, padding: 10 } };
  const x = logX("ms", "latency of one step, ms", MS_AXIS);
  return { layer: [
    { data: { name: "points" }, mark: dots({ cursor: "pointer" }), encoding: { x, y, ...house(),
      tooltip: [tip("label", "configuration"), tip("accuracy", "accuracy"), tip("time", "latency")] } },
    { data: { name: "points" }, mark: { type: "text", align: "left", dx: 8, color: INK() }, encoding: { x, y, text: { field: "name" } } },
  ] };
}

// BRA's options, from the sweeps that vary one of them.
const ofSweep = (sweep, number = state.device) =>
  ROWS.filter((row) => row.sweep === sweep && row.device === number && row.mode === state.mode && row.status === "ok");
function optionRow(row, series, at) {
  const configuration = DATA.configurations[row.configuration];
  return { series, at, ms: row.ms, memory: row.peak, label: `${fullTitle(configuration)}, ${row.dtype}`,
    place: row.configuration, id: identity(configuration), time: millis(row.ms), bytes: bytes(row.peak), grid: grid(row) };
}
const plainOptions = (row) => {
  const names = DATA.configurations[row.configuration].options.map(([name]) => name);
  return !names.includes("coarse_gate") && !names.includes("per_token_routing");
};
function topkData() {
  const points = ofSweep("topk").filter((row) => plainOptions(row) && row.dtype === state.dtype).map((row) => {
    const { regions, topk, impl } = DATA.configurations[row.configuration];
    return optionRow(row, `n_win ${regions}${impl === "reference" ? "" : `, ${impl}`}`, Number(topk));
  });
  return { points };
}
function reductionData() {
  const points = ofSweep("kv_downsample").filter((row) => row.dtype === state.dtype).map((row) => {
    const { reduction, impl } = DATA.configurations[row.configuration];
    // A region of the sweep has 8 x 8 tokens.
    const factor = reduction === "identity" ? 1 : reduction.startsWith("ada_") ? 8 / row.perWindow : row.ratio;
    return optionRow(row, impl === "reference" ? reduction : `${reduction}, ${impl}`, factor);
  });
  return { points };
}
function optionSpec(quantity, axisTitle, { points }) {
  const y = quantity === "ms" ? logX("ms", "latency of one step, ms", MS_AXIS) : logX("memory", "memory of one step", MEMORY_AXIS, 2);
  const x = logX("at", axisTitle, { format: "~r", tickCount: 8 }, 2);
  // Legends of colour and shape become one only if both name their domain.
  const domain = seriesOf(points);
  const named = { field: "series", type: "nominal", title: null, legend: { orient: "bottom", columns: narrow() ? 2 : 4 } };
  const color = { ...named, scale: { domain, range: hues() } };
  const shape = { ...named, scale: { domain } };
  const tooltip = [tip("label", "configuration"), tip("grid", "grid"), tip("time", "latency"), tip("bytes", "memory")];
  return { layer: [
    { data: { name: "points" }, mark: { type: "line", strokeWidth: 1.4 }, encoding: { x, y, color } },
    { data: { name: "points" }, mark: dots({ size: 60, cursor: "pointer" }), encoding: { x, y, color, shape, tooltip } },
  ] };
}

const seriesOf = (points) =>
  [...new Set(points.map((point) => point.series))].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));

// BRA's speed by implementation.
const shapeOfCase = (row, { topk, regions }) =>
  `${grid(row)} x ${row.dim}, topk ${topk}, n_win ${regions}${row.batch > 1 ? `, batch ${row.batch}` : ""}`;
const shortShape = (row, { topk, regions }) =>
  `${row.height}x${row.width}x${row.dim} k${topk} n${regions}${row.batch > 1 ? ` b${row.batch}` : ""}`;
function speedData() {
  const points = [];
  for (const row of ofSweep("bra_speed")) {
    const configuration = DATA.configurations[row.configuration];
    if (row.dtype !== state.dtype || configuration.name !== "bra") continue;
    const ms = DATA.devices[state.device].kind === "cuda" && row.deviceMs !== null ? row.deviceMs : row.ms;
    const extras = [configuration.compiled ? "compiled" : "", configuration.cudaGraph ? "CUDA graph" : ""].filter(Boolean);
    points.push({ series: configuration.impl, how: extras.join(", ") || "eager", shape: shapeOfCase(row, configuration),
      short: narrow() ? shortShape(row, configuration) : shapeOfCase(row, configuration), ms,
      bytes: bytes(row.peak), time: millis(ms), label: fullTitle(configuration), id: identity(configuration),
      place: row.configuration, size: row.batch * row.height * row.width * row.dim, memory: row.peak });
  }
  return { points };
}
function speedSpec(quantity, { points }) {
  const kind = device().kind === "cuda" ? "device time of one step, ms" : "latency of one step, ms";
  const x = quantity === "ms" ? logX("ms", kind, { ...MS_AXIS, grid: true }) : logX("memory", "memory of one step", { ...MEMORY_AXIS, grid: true }, 2);
  const y = { field: "short", type: "nominal", title: null, sort: { field: "size", op: "max" }, axis: { labelLimit: 340, grid: true } };
  const legend = { orient: "bottom", columns: narrow() ? 2 : 4 };
  const domain = seriesOf(points);
  return { layer: [{ data: { name: "points" }, mark: dots({ cursor: "pointer" }), encoding: { x, y,
    color: { field: "series", type: "nominal", title: "implementation", scale: { domain, range: hues() }, legend },
    shape: { field: "how", type: "nominal", title: "run", legend: { orient: "top" }, scale: { domain: ["eager", "CUDA graph", "compiled"], range: ["circle", "triangle-up", "cross"] } },
    tooltip: [tip("label", "configuration"), tip("how", "run"), tip("shape", "shape"), tip("time", "time"), tip("bytes", "memory")] } }] };
}

// Two devices, or two runs of one: every case that both measured.
function compareData() {
  const off = hidden();
  const key = (row) => [row.configuration, row.mode, row.dtype, row.dim, row.heads, grid(row)].join("|");
  const bySide = [state.device, state.other].map((number) => {
    const cells = new Map();
    for (const [setting, groups] of CELLS) {
      if (Number(setting.split("|")[0]) !== number) continue;
      for (const grids of groups.values()) for (const cell of grids.values()) if (cell.ms !== null) cells.set(key(cell), cell);
    }
    return cells;
  });
  const points = [];
  for (const [name, a] of bySide[0]) {
    const b = bySide[1].get(name);
    const configuration = DATA.configurations[a.configuration];
    if (!b || BASELINES.includes(configuration.name) || a.mode !== state.mode || a.dtype !== state.dtype || off.has(DATA.marks[configuration.name].family)) continue;
    points.push({ ...looks(configuration, a.configuration), a: a.ms, b: b.ms, grid: `${grid(a)}, dim ${a.dim}`,
      ratio: digits(b.ms / a.ms), at: millis(a.ms), bt: millis(b.ms) });
  }
  const all = points.flatMap((point) => [point.a, point.b]);
  const ends = all.length ? [Math.min(...all), Math.max(...all)] : [];
  return { points, equal: ends.map((value) => ({ a: value, b: value })) };
}
function compareSpec() {
  const axis = { format: "~r", values: [-3, -2, -1, 0, 1, 2, 3, 4, 5].map((power) => 10 ** power) };
  const x = logX("a", `ms on ${DATA.devices[state.device].name}`, axis);
  const y = logX("b", `ms on ${DATA.devices[state.other].name}`, axis);
  return { layer: [
    { data: { name: "equal" }, mark: { type: "line", strokeDash: [4, 3], color: INK() }, encoding: { x, y } },
    { data: { name: "points" }, mark: dots({ size: 60, cursor: "pointer" }), encoding: { x, y, ...house(), tooltip: [
      tip("label", "configuration"), tip("grid", "grid"), tip("at", "first"), tip("bt", "second"), tip("ratio", "second / first")] } },
  ] };
}
