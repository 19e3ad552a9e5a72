"use strict";
// Charts of each view: drawn once per view and theme, then only their data change.

const INK = () => (dark() ? "#e6e9ed" : "#1f2328");
const FAINT = () => (dark() ? "#9aa4af" : "#59636e");
const LIMIT = () => (dark() ? "#ff9d5c" : "#b23c00");
const source = { lines: "lines: predicted", marks: "marks: measured" };
const numbers = (fields) => ({ source: "points", fields });
const CURVE_FIELDS = { label: "configuration", grid: "grid", shown: "value", kind: "source" };
const OPTION_FIELDS = { label: "configuration", grid: "grid", time: "latency", bytes: "memory" };

// Per view its charts: a title, a specification, its data, and the columns of its table.
function chartsOf(view, rows, entries) {
  if (view in QUANTITIES) {
    const title = `${QUANTITIES[view].name.replace(", ms", "")} against resolution`;
    const how = view === "latency" ? "dashed lines: interpolated between measured grids" : source.lines;
    const marks = view === "macs" ? "marks: counted" : source.marks;
    return [{ id: view, title: `${title}; ${how}, ${marks}, crosses: failed`, spec: (data) => curveSpec(view, data),
      data: () => curveData(rows, state, view), extents: curveExtents, labels: true, table: { source: "marks", fields: CURVE_FIELDS } }];
  }
  if (view === "pareto") {
    const fields = { label: "configuration", time: "latency", bytes: "memory" };
    const charts = [{ id: "pareto", title: "Latency against memory at this shape; full marks: measured, faint: interpolated, dashed: the Pareto front",
      spec: paretoSpec, data: () => paretoData(state.all ? entries : rows), extents: paretoExtents, table: numbers(fields) }];
    if (DATA.capability.length) {
      charts.push({ id: "accuracy", title: `Accuracy (${state.task || tasks()[0]}) against latency at this shape`, spec: accuracySpec,
        data: () => accuracyData(entries), table: numbers({ label: "configuration", accuracy: "accuracy", time: "latency" }) });
    }
    return charts;
  }
  if (view === "bra") {
    const parts = [["topk", "topk", topkData, "regions each region is routed to (topk)"],
      ["kv", "kv_downsample", reductionData, "reduction of keys and values per side"]];
    return parts.flatMap(([id, name, data, axis]) => [["ms", "latency"], ["memory", "memory"]].map(([quantity, words]) => ({
      id: `${id}-${quantity}`, title: `BRA: measured ${words} against ${name}`, spec: (data) => optionSpec(quantity, axis, data), data, table: numbers(OPTION_FIELDS) })));
  }
  if (view === "speed") {
    const fields = { series: "implementation", how: "run", shape: "shape", time: "time", bytes: "memory" };
    return [["ms", "time"], ["memory", "memory"]].map(([quantity, words]) => ({
      id: `speed-${quantity}`, title: `BRA: measured ${words} by implementation; height x width x dim, topk, n_win`, spec: (data) => speedSpec(quantity, data), data: speedData, table: numbers(fields), tall: true }));
  }
  return [{ id: "compare", title: "Latency of the same case on two devices; below the dashed line the second is faster", spec: compareSpec,
    data: compareData, table: numbers({ label: "configuration", grid: "grid", at: "first", bt: "second", ratio: "second / first" }) }];
}

const configOf = () => ({
  background: null, font: "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
  view: { stroke: null },
  axis: { labelColor: INK(), titleColor: INK(), gridColor: dark() ? "#2b323a" : "#e6e9ed", domainColor: FAINT(), tickColor: FAINT(),
    labelFontSize: 11.5, titleFontSize: 12, titleFontWeight: 500 },
  legend: { labelColor: INK(), titleColor: INK(), labelFontSize: 11.5, labelLimit: 240, symbolBaseFillColor: INK(), symbolBaseStrokeColor: INK() },
  text: { fontSize: 11.5 },
});

let drawn = { key: "", charts: [] };

// What a chart's axes and colours depend on; all else are data.
const keyOf = (view) =>
  [view, dark(), narrow(), view === "speed" || view === "compare" ? `${state.device} ${state.other}` : "", view === "pareto" ? state.task : ""].join();

async function draw(rows, entries) {
  const view = state.view;
  const charts = chartsOf(view, rows, entries);
  for (const chart of charts) chart.shown = chart.data();
  // Legends and heights follow the series and shapes that there are.
  const filled = charts.map(({ shown }) => [contentOf(shown).length > 0, ...distinct(shown, "series"), ...(view === "speed" ? distinct(shown, "short") : [])]);
  const key = [keyOf(view), ...filled].join();
  if (drawn.key === key && drawn.ready) {
    drawn.charts.forEach((chart, number) => refresh(chart, charts[number]));
    return;
  }
  drawn.charts.forEach((chart) => chart.result && chart.result.finalize());
  const mine = (drawn = { key, charts: [], ready: false });
  const place = document.getElementById("charts");
  place.classList.toggle("two", charts.length > 1);
  place.innerHTML = charts
    .map((chart) => `<figure id="figure-${chart.id}"><figcaption>${escaped(chart.title)}</figcaption>` +
      `<div class="chart" role="img" aria-label="${escaped(chart.title)}"></div><p class="none" hidden></p>` +
      "<details><summary>These numbers as a table</summary><div class=\"scroll\"></div></details></figure>")
    .join("");
  for (const chart of charts) {
    const figure = document.getElementById(`figure-${chart.id}`);
    const entry = { ...chart, figure };
    mine.charts.push(entry);
    figure.querySelector("details").addEventListener("toggle", () => fill(entry));
    if (!contentOf(chart.shown).length) {
      showEmpty(entry);
      continue;
    }
    const labels = chart.labels && !narrow();
    const height = chart.tall ? 24 * distinct(chart.shown, "short").length : narrow() ? 300 : charts.length > 1 ? 260 : 430;
    const spec = {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", height, config: configOf(),
      autosize: { type: "fit-x", contains: "padding" }, padding: { left: 4, top: 8, bottom: 4, right: labels ? 122 : 10 },
      datasets: {}, ...chart.spec(chart.shown),
    };
    for (const [name, values] of Object.entries(chart.shown)) spec.datasets[name] = values;
    // The interpreter: the page's policy forbids code that is made from text.
    const result = await vegaEmbed(figure.querySelector(".chart"), spec, { actions: false, renderer: "svg", ast: true, tooltip: { theme: dark() ? "dark" : "light" } });
    if (mine !== drawn) return result.finalize();
    result.view.addEventListener("click", (_, item) => item && item.datum && item.datum.id && pin(item.datum.id));
    Object.assign(entry, { result, labelled: labels });
    await refresh(entry, chart);
  }
  mine.ready = true;
}

async function refresh(entry, chart) {
  const data = (entry.shown = chart.shown);
  fill(entry);
  if (!entry.result) return showEmpty(entry);
  const view = entry.result.view;
  if (entry.extents) for (const [name, value] of Object.entries(entry.extents(data))) view.signal(name, value);
  for (const [name, values] of Object.entries(data)) view.data(name, values);
  if (entry.labelled) {
    view.run();
    view.data("labels", endLabels(data.lines, view.scale("y"), view.signal("height")));
  }
  await view.runAsync();
}

const distinct = (data, field) => [...new Set((data.points || []).map((point) => point[field]))];
const contentOf = (data) => data.points || [...data.lines, ...data.marks, ...data.failed];
function showEmpty(entry) {
  const none = entry.figure.querySelector(".none");
  none.hidden = false;
  none.textContent = emptyWords(entry.id);
  entry.figure.querySelector(".chart").hidden = true;
  entry.figure.querySelector("details").hidden = true;
}

function emptyWords(id) {
  const sweep = { topk: "topk", kv: "kv_downsample", speed: "bra_speed" }[id.split("-")[0]];
  if (sweep) return `No rows of the ${sweep} sweep in ${words[state.mode]}, ${state.dtype}, on ${device().name}: python run_all.py --only ${sweep} measures them.`;
  if (id === "compare") return "These two devices measured no case in common in this mode and dtype.";
  return `Nothing is known for dim ${state.dim}, ${state.heads} heads, ${words[state.mode]}, ${state.dtype} on ${device().name}: move the sliders, or pin a configuration and measure it.`;
}

// The numbers of a chart as a table, filled while it is open.
function fill(entry) {
  if (!entry.figure.querySelector("details").open) return;
  const { source: name, fields } = entry.table;
  const head = Object.values(fields).map((text) => `<th scope="col">${text}</th>`).join("");
  const body = entry.shown[name].map((row) => `<tr>${Object.keys(fields).map((field) => `<td>${escaped(row[field] ?? "")}</td>`).join("")}</tr>`).join("");
  entry.figure.querySelector(".scroll").innerHTML = `<table><thead><tr>${head}</tr></thead><tbody>${body}</tbody></table>`;
}

// Failed cells of the listed configurations, for those who do not hover.
function showFailures(rows) {
  const cells = rows.flatMap(({ place }) => [...(cellsAt(state).get(place) || NO_CELLS).values()].filter((cell) => FAILED.includes(cell.status)));
  document.getElementById("failures").hidden = cells.length === 0 || !(state.view in QUANTITIES);
  document.getElementById("failed-count").textContent = cells.length;
  document.querySelector("#failures tbody").innerHTML = cells
    .map((cell) => `<tr><th scope="row">${escaped(fullTitle(DATA.configurations[cell.configuration]))}</th><td>${grid(cell)}</td><td>${cell.status}</td><td>${escaped(cell.reason)}</td></tr>`)
    .join("");
}
