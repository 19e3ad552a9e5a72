"use strict";
// Curves against resolution: measured marks, predicted lines, failed cells as crosses, and the budget.

const SAMPLES = 34;
const CROSS = "M-.8,-.8L.8,.8M-.8,.8L.8,-.8";
const sideOf = (cell) => Math.sqrt(cell.height * cell.width);
const raw = (field, type = "nominal") => ({ field, type, scale: null, legend: null });
const ONE_TWO_FIVE = [-3, -2, -1, 0, 1, 2, 3, 4, 5].flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power));
const QUANTITIES = {
  memory: {
    name: "Memory of one step", of: (cell) => cell.peak ?? cell.predicted, text: bytes,
    measured: (cell) => cell.peak, source: (cell) => (cell.peak === null ? "predicted" : "measured"),
    limit: () => state.memory * MIB, axis: { labelExpr: bytesExpression(), tickCount: 8 }, base: 2,
  },
  macs: {
    name: "MACs of one step", of: (cell) => cell.macs, text: amount, measured: () => null, source: () => "counted",
    limit: () => null, axis: { labelExpr: "replace(format(datum.value, '~s'), /([kMGTP])$/, ' $1')", tickCount: 8 },
    base: 10,
  },
  latency: {
    name: "Latency of one step, ms", of: (cell) => cell.ms, text: millis, measured: (cell) => cell.ms,
    source: () => "measured", limit: () => state.latency, axis: { format: "~r", values: ONE_TWO_FIVE }, base: 10,
  },
};

function bytesExpression() {
  const unit = (name, power) => `format(datum.value / pow(2, ${power}), '~r') + ' ${name}'`;
  return `datum.value >= pow(2, 40) ? ${unit("TiB", 40)} : datum.value >= pow(2, 30) ? ${unit("GiB", 30)} : ` +
    `datum.value >= pow(2, 20) ? ${unit("MiB", 20)} : ${unit("KiB", 10)}`;
}

// Shapes of the asked aspect ratio, from the smallest to the largest whose sides are predicted.
function sampledShapes(at) {
  const [low, high] = ranges.side;
  const ratio = Math.sqrt(at.height / at.width);
  const longer = Math.max(ratio, 1 / ratio);
  const [first, last] = [low * longer, high / longer];
  const shapes = new Map();
  for (let number = 0; number < SAMPLES && first <= last; number += 1) {
    const side = first * (last / first) ** (number / (SAMPLES - 1));
    const step = side > 56 ? 28 : 4;
    const within = (value) => Math.min(Math.max(Math.round(value / step), Math.ceil(low / step)), Math.floor(high / step)) * step;
    const [height, width] = [within(side * ratio), within(side / ratio)];
    shapes.set(`${height}x${width}`, { ...at, height, width });
  }
  shapes.set(`${at.height}x${at.width}`, { ...at });
  return [...shapes.values()].sort((a, b) => sideOf(a) - sideOf(b));
}

// A line does not depend on the budget, nor on the size while its aspect ratio stays.
const lineCache = new Map();
function predictedLine(place, at, quantity) {
  const ratio = at.height / at.width;
  const key = [place, quantity, ratio, at.device, at.dim, at.heads, at.mode, at.dtype].join("|");
  if (lineCache.size > 4000) lineCache.clear();
  if (!lineCache.has(key)) {
    const points = [];
    for (const shape of sampledShapes(at)) {
      const value = predicted(DATA.configurations[place], shape, quantity);
      if (value !== null) points.push([sideOf(shape), value]);
    }
    lineCache.set(key, points);
  }
  return lineCache.get(key);
}

function curveData(rows, at, quantity) {
  const { of, measured, source, text } = QUANTITIES[quantity];
  const lines = [];
  const marks = [];
  const failed = [];
  for (const { place, configuration } of rows) {
    const look = looks(configuration, place);
    const grids = [...(cellsAt(at).get(place) || NO_CELLS).values()];
    const cells = grids
      .filter((cell) => cell.height * at.width === cell.width * at.height && sideOf(cell) <= ranges.side[1])
      .sort((a, b) => a.height - b.height);
    const points = quantity === "latency" ? [] : predictedLine(place, at, quantity);
    if (points.length) {
      for (const [side, value] of points) lines.push({ ...look, side, value, kind: "predicted", shown: text(value) });
    } else {
      const kind = quantity === "latency" ? "interpolated" : "predicted";
      for (const cell of cells.filter((c) => of(c) !== null)) {
        lines.push({ ...look, side: sideOf(cell), value: of(cell), kind, shown: text(of(cell)) });
      }
    }
    for (const cell of cells) {
      const common = { ...look, side: sideOf(cell), grid: grid(cell) };
      const exact = quantity === "macs" ? of(cell) : measured(cell);
      if (FAILED.includes(cell.status)) {
        failed.push({ ...common, value: of(cell), status: cell.status, reason: cell.reason });
      } else if (exact !== null && (quantity !== "macs" || !points.length || cell.status === "ok")) {
        const spread = quantity === "latency" ? { low: cell.low, high: cell.high } : {};
        marks.push({ ...common, value: exact, shown: text(exact), kind: source(cell), ...spread });
      }
    }
  }
  const limit = QUANTITIES[quantity].limit();
  return {
    lines, marks, failed,
    budget: limit === null ? [] : [{ value: limit, text: `budget ${text(limit)}` }],
    here: [{ side: sideOf(at), text: grid(at) }],
    labels: [],
  };
}

const looks = (configuration, place) => ({
  place, name: configuration.name, label: fullTitle(configuration), colour: colour(configuration.name),
  shape: DATA.marks[configuration.name].shape, size: identity(configuration) === state.pin ? 3.2 : 1.4,
  id: identity(configuration),
});

const tip = (field, name) => ({ field, title: name });
function curveSpec(quantity, data) {
  const { name, axis, base } = QUANTITIES[quantity];
  const x = {
    field: "side", type: "quantitative", title: "tokens per side, square root of height x width",
    scale: { type: "log", base: 2, nice: false, domain: [{ expr: "x0" }, { expr: "x1" }] }, axis: { format: "~r", tickCount: 7, grid: false },
  };
  const y = { field: "value", type: "quantitative", title: name, scale: { type: "log", base, nice: false, domain: [{ expr: "y0" }, { expr: "y1" }] }, axis };
  const shared = [tip("label", "configuration")];
  const layers = [
    {
      data: { name: "lines" },
      mark: { type: "line", ...(quantity === "latency" ? { strokeDash: [4, 3] } : {}) },
      encoding: { x, y, color: raw("colour"), detail: { field: "place" }, strokeWidth: { ...raw("size", "quantitative") },
        tooltip: [...shared, tip("shown", name), tip("kind", "source")] },
    },
    ...(quantity === "latency" ? [{
      data: { name: "marks" }, mark: { type: "rule", strokeWidth: 1.2 },
      encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color: raw("colour") },
    }] : []),
    {
      data: { name: "marks" }, mark: { type: "point", filled: true, size: 62, opacity: 1, strokeWidth: 0.6, cursor: "pointer" },
      encoding: { x, y, fill: raw("colour"), stroke: { value: INK() }, shape: raw("shape"),
        tooltip: [...shared, tip("grid", "grid"), tip("shown", name), tip("kind", "source")] },
    },
    {
      data: { name: "failed" }, mark: { type: "point", shape: CROSS, size: 80, strokeWidth: 2, cursor: "pointer" },
      encoding: { x, y: quantity === "latency" ? { value: 6 } : y, stroke: raw("colour"),
        tooltip: [...shared, tip("grid", "grid"), tip("status", "failed"), tip("reason", "reason")] },
    },
    {
      data: { name: "budget" }, mark: { type: "rule", strokeDash: [7, 4], strokeWidth: 2, color: LIMIT() },
      encoding: { y },
    },
    {
      data: { name: "budget" },
      mark: { type: "text", align: "left", dx: 6, dy: -7, color: LIMIT(), fontWeight: 600 },
      encoding: { x: { value: 0 }, y, text: { field: "text" } },
    },
    { data: { name: "here" }, mark: { type: "rule", strokeWidth: 1.2, color: INK() }, encoding: { x } },
    {
      data: { name: "here" }, mark: { type: "text", align: "left", dx: 5, baseline: "bottom", color: INK() },
      encoding: { x, y: { value: "height" }, text: { field: "text" } },
    },
    {
      data: { name: "labels" }, mark: { type: "text", align: "left", dx: 16, fontSize: 10.5, color: INK() },
      encoding: { x: { value: "width" }, y: { ...raw("pixel", "quantitative") }, text: { field: "name" } },
    },
    {
      data: { name: "labels" }, mark: { type: "point", filled: true, size: 34, xOffset: 9, opacity: 1, strokeWidth: 0.5 },
      encoding: { x: { value: "width" }, y: { ...raw("pixel", "quantitative") }, fill: raw("colour"), stroke: { value: INK() }, shape: raw("shape") },
    },
  ];
  return { params: asParams(curveExtents(data)), layer: layers };
}

// Ends of both axes, which a chart without data could not find itself.
const asParams = (found) => Object.entries(found).map(([name, value]) => ({ name, value }));
function extents(xs, ys) {
  const result = {};
  for (const [name, values] of [["x", xs], ["y", ys]]) {
    const known = values.filter((value) => value > 0);
    const [low, high] = known.length ? [Math.min(...known), Math.max(...known)] : [1, 2];
    const margin = (high / low) ** 0.04 * 1.02;
    Object.assign(result, { [`${name}0`]: low / margin, [`${name}1`]: high * margin });
  }
  return result;
}
const curveExtents = (data) => {
  const points = [...data.lines, ...data.marks, ...data.failed];
  return extents(
    [...points, ...data.here].map((point) => point.side),
    [...points.flatMap((point) => [point.value, point.low, point.high]), ...data.budget.map((one) => one.value)],
  );
};

// Names beside the lines that reach the right edge, moved apart so that none covers another.
function endLabels(lines, scale, height) {
  const ends = new Map();
  const last = Math.max(...lines.map((point) => point.side));
  for (const point of lines) {
    const known = ends.get(point.name);
    if (!known || point.side > known.side) ends.set(point.name, point);
  }
  const step = 11.5;
  const placed = [...ends.values()]
    .filter((point) => point.side > 0.97 * last)
    .map((point) => ({ name: point.name, colour: point.colour, shape: point.shape, pixel: scale(point.value) }))
    .sort((a, b) => a.pixel - b.pixel);
  placed.forEach((label, number) => {
    if (number) label.pixel = Math.max(label.pixel, placed[number - 1].pixel + step);
  });
  for (let number = placed.length - 1; number >= 0; number -= 1) {
    const below = number === placed.length - 1 ? height : placed[number + 1].pixel - step;
    placed[number].pixel = Math.min(placed[number].pixel, below);
  }
  return placed;
}
