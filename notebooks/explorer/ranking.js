"use strict";
// Which configurations fit the budget, in order; and the command that measures one.

const title = (configuration) => {
  const extras = [
    configuration.label, configuration.impl === "reference" ? "" : configuration.impl,
    configuration.compiled ? "compiled" : "", configuration.cudaGraph ? "CUDA graph" : "",
    configuration.deterministic ? "deterministic" : "",
  ].filter(Boolean);
  return extras.join(", ");
};
const fullTitle = (configuration) => [configuration.name, title(configuration)].filter(Boolean).join(", ");

// The identity of a configuration in the hash.
const identity = (configuration) =>
  [
    configuration.name, configuration.options.map(([name, value]) => `${name}=${value}`).join(","), configuration.impl,
    [configuration.compiled && "compiled", configuration.cudaGraph && "graph", configuration.deterministic && "det"]
      .filter(Boolean).join(","),
  ].join("|");
const IDENTITIES = new Map(DATA.configurations.map((configuration, place) => [identity(configuration), place]));

const attentionPlaces = DATA.configurations
  .map((_, place) => place)
  .filter((place) => !BASELINES.includes(DATA.configurations[place].name));

// All configurations about which anything is known at the shape, best first.
function ranking(at) {
  const off = hidden();
  const entries = [];
  let refused = 0;
  for (const place of attentionPlaces) {
    const configuration = DATA.configurations[place];
    if (off.has(DATA.marks[configuration.name].family)) continue;
    const found = costs(place, at);
    if (found.memory.value === null && found.macs.value === null && found.ms.value === null) {
      if (configuration.prediction !== null) refused += 1;
      continue;
    }
    entries.push({ place, configuration, ...found, ...verdict(found) });
  }
  entries.sort(
    (a, b) =>
      a.group - b.group || rank(a.ms.value, b.ms.value) || rank(a.macs.value, b.macs.value) ||
      rank(a.memory.value, b.memory.value) || a.place - b.place,
  );
  entries.forEach((entry, number) => (entry.rank = number + 1));
  return { entries, refused };
}

const rank = (a, b) => (a === b ? 0 : a === null ? 1 : b === null ? -1 : a - b);

// 0: fits; 1: nothing says that it does not, but its memory is not known; 2: does not.
function verdict({ memory, ms, cell }) {
  if (cell && FAILED.includes(cell.status) && cell.status !== "oom" && ms.value === null) {
    return { group: 2, why: cell.status };
  }
  if (memory.value !== null && memory.value > state.memory * MIB) return { group: 2, why: "memory" };
  if (state.latency !== null && ms.value !== null && ms.value > state.latency) return { group: 2, why: "latency" };
  if (memory.value === null) return { group: 1, why: "unknown" };
  return { group: 0, why: "" };
}

// The first of each attention, or all of them; in the order asked for.
function listed(entries) {
  const seen = new Set();
  let rows = entries.filter(({ place, configuration }) => {
    const keep = state.all || identity(DATA.configurations[place]) === state.pin || !seen.has(configuration.name);
    seen.add(configuration.name);
    return keep;
  });
  if (state.sort !== "rank") {
    const key = state.sort === "name" ? (row) => fullTitle(row.configuration) : (row) => row[state.sort].value;
    const sign = state.down ? -1 : 1;
    rows = rows.slice().sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return rank(x, y);
      return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
    });
  } else if (state.down) rows.reverse();
  return rows;
}

// The words that measure a configuration at a shape; flags at their defaults are left out.
function command(configuration, at, returned) {
  const parts = ["python -m profiling", `--attention ${configuration.name}`];
  parts.push(`--height ${at.height}`, `--width ${at.width}`, `--dim ${at.dim}`, `--num-heads ${at.heads}`);
  if (at.mode !== "forward") parts.push(`--mode ${at.mode}`);
  if (at.dtype !== "fp32") parts.push(`--dtype ${at.dtype}`);
  if (DATA.devices[at.device].kind !== "cpu") parts.push(`--device ${DATA.devices[at.device].kind}`);
  for (const [name, value] of configuration.options) parts.push(`--${name.replaceAll("_", "-")} ${quoted(value)}`);
  if (configuration.padded) parts.push("--auto-pad true");
  parts.push(`--impl ${configuration.impl}`);
  if (configuration.compiled) parts.push("--compiled");
  if (configuration.cudaGraph) parts.push("--cuda-graph");
  if (configuration.deterministic) parts.push("--deterministic");
  if (returned) parts.push("--freed-memory returned");
  return parts.join(" ");
}
const quoted = (value) => (/^[\w.,=+-]+$/.test(value) ? value : `'${value.replaceAll("'", "'\\''")}'`);
