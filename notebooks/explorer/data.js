"use strict";
// Rows as cells, and the cost of a configuration at a shape with the source of each number.

const word = (column, row) => {
  const code = DATA.rows[column].codes[row];
  return code < 0 ? null : DATA.rows[column].values[code];
};
const rowCount = DATA.rows.device.length;
const BASELINES = ["bra_pregathered"]; // No attention of its own: keys that are gathered before the clock starts.
const FAILED = ["oom", "timeout", "crash", "incorrect", "unsupported", "error"];

function rowAt(row) {
  const at = (name) => DATA.rows[name][row];
  const macs = at("macs");
  const mode = word("mode", row);
  return {
    row, device: at("device"), configuration: at("configuration"), sweep: word("sweep", row), mode,
    dtype: word("dtype", row), status: word("status", row), reason: word("reason", row),
    returned: word("freed_memory", row) === "returned", batch: at("batch"), height: at("height"), width: at("width"),
    dim: at("dim"), heads: at("num_heads"), predicted: at("predicted"), peak: at("peak"),
    macs: macs === null || mode === "forward" ? macs : at("backward") === null ? null : macs + at("backward"),
    ms: at("ms"), low: at("low"), high: at("high"), deviceMs: at("deviceMs"),
    ratio: at("ratio"), perWindow: at("perWindow"),
  };
}
const ROWS = Array.from({ length: rowCount }, (_, row) => rowAt(row));

const first = (values) => values.find((value) => value !== null && value !== undefined) ?? null;

// One cell per case: the fastest of the sweeps that measured it, since other programs can only lengthen a latency; of
// those that kept freed memory if any did.
function merged(rows) {
  const ok = rows.filter((row) => row.status === "ok");
  const kept = ok.filter((row) => !row.returned);
  const timed = kept.length ? kept : ok;
  const [fastest] = timed.slice().sort((a, b) => a.ms - b.ms);
  const source = fastest || rows.find((row) => FAILED.includes(row.status)) || rows[0];
  return {
    ...source, low: fastest ? fastest.low ?? fastest.ms : null, high: fastest ? fastest.high ?? fastest.ms : null,
    peak: first(ok.map((row) => row.peak)), predicted: first(rows.map((row) => row.predicted)),
    macs: first(rows.map((row) => row.macs)),
  };
}

const settingOf = (at) => [at.device, at.mode, at.dtype, at.dim, at.heads].join("|");
const CELLS = (() => {
  const groups = new Map();
  for (const row of ROWS) {
    if (row.batch !== 1) continue;
    const setting = settingOf(row);
    if (!groups.has(setting)) groups.set(setting, new Map());
    const bySetting = groups.get(setting);
    if (!bySetting.has(row.configuration)) bySetting.set(row.configuration, new Map());
    const grids = bySetting.get(row.configuration);
    const grid = `${row.height}x${row.width}`;
    if (!grids.has(grid)) grids.set(grid, []);
    grids.get(grid).push(row);
  }
  for (const bySetting of groups.values()) {
    for (const grids of bySetting.values()) for (const [grid, rows] of grids) grids.set(grid, merged(rows));
  }
  return groups;
})();
const NO_CELLS = new Map();
const cellsAt = (at) => CELLS.get(settingOf(at)) || NO_CELLS;

function predicted(configuration, at, quantity) {
  const place = configuration.prediction;
  if (place === null || typeof evaluateForm !== "function") return null;
  const candidate = DATA.predictions.candidates[place];
  const kind = DATA.devices[at.device].kind;
  const form = quantity === "macs" ? candidate.macs[at.mode] : candidate.memory[`${kind} ${at.dtype} ${at.mode}`];
  const value = form === undefined || form === null ? null : evaluateForm(form, at);
  return value === undefined || !(value > 0) ? null : value;
}

// Between the nearest two grids of the same aspect ratio, by a power law of the side; never beyond them.
function interpolated(grids, at, value) {
  let below = null;
  let above = null;
  for (const cell of grids.values()) {
    if (cell.height * at.width !== cell.width * at.height || value(cell) === null) continue;
    if (cell.height < at.height && (!below || cell.height > below.height)) below = cell;
    if (cell.height > at.height && (!above || cell.height < above.height)) above = cell;
  }
  if (!below || !above) return null;
  const share = Math.log(at.height / below.height) / Math.log(above.height / below.height);
  return { value: value(below) ** (1 - share) * value(above) ** share, grids: [below, above] };
}

const grid = (cell) => `${cell.height} x ${cell.width}`;
const nothing = { value: null, source: "none", note: "" };
const between = (found) => ({
  value: found.value, source: "interpolated", note: `between ${grid(found.grids[0])} and ${grid(found.grids[1])}`,
});

// Memory, MACs and latency of a configuration at a shape, each with its source.
function costs(place, at) {
  const configuration = DATA.configurations[place];
  const grids = cellsAt(at).get(place) || NO_CELLS;
  const cell = grids.get(`${at.height}x${at.width}`) || null;
  const result = { memory: nothing, macs: nothing, ms: nothing, cell };
  if (cell && cell.ms !== null) {
    result.ms = { value: cell.ms, source: "measured", note: `${millis(cell.low)} to ${millis(cell.high)}` };
  } else {
    const found = interpolated(grids, at, (other) => other.ms);
    if (found) result.ms = between(found);
  }
  if (cell && cell.peak !== null) result.memory = { value: cell.peak, source: "measured", note: "" };
  else result.memory = known("memory", configuration, at, cell && cell.predicted, grids, (c) => c.peak ?? c.predicted);
  result.macs = known("macs", configuration, at, cell && cell.macs, grids, (c) => c.macs);
  return result;
}

function known(quantity, configuration, at, exact, grids, value) {
  if (exact !== null && exact !== undefined) {
    return { value: exact, source: quantity === "macs" ? "counted" : "predicted", note: "for this shape" };
  }
  const form = predicted(configuration, at, quantity);
  if (form !== null) return { value: form, source: "predicted", note: "" };
  if (configuration.prediction !== null && formExists(configuration, at, quantity)) return nothing;
  const found = interpolated(grids, at, value);
  return found ? between(found) : nothing;
}

// A form that gives nothing says that the shape is not valid.
function formExists(configuration, at, quantity) {
  const candidate = DATA.predictions.candidates[configuration.prediction];
  const kind = DATA.devices[at.device].kind;
  return Boolean(quantity === "macs" ? candidate.macs[at.mode] : candidate.memory[`${kind} ${at.dtype} ${at.mode}`]);
}
