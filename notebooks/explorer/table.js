"use strict";
// The ranked table, the summary and the pinned configuration.

const GLYPHS = { measured: "●", counted: "●", interpolated: "◐", predicted: "○", none: "" };
const MISSING = "not measured";

const swatch = (name) => {
  const mark = DATA.marks[name];
  const shapes = {
    circle: '<circle r="0.9"/>', square: '<rect x="-.8" y="-.8" width="1.6" height="1.6"/>',
    "triangle-up": '<path d="M0,-.9L.95,.75L-.95,.75Z"/>', "triangle-down": '<path d="M0,.9L.95,-.75L-.95,-.75Z"/>',
    "triangle-left": '<path d="M-.9,0L.75,-.95L.75,.95Z"/>', "triangle-right": '<path d="M.9,0L-.75,-.95L-.75,.95Z"/>',
    cross: '<path d="M-.3,-1H.3V-.3H1V.3H.3V1H-.3V.3H-1V-.3H-.3Z"/>', diamond: '<path d="M0,-1L.7,0L0,1L-.7,0Z"/>',
  };
  const body = shapes[mark.shape] || `<path d="${mark.shape}"/>`;
  return `<svg class="swatch" viewBox="-1.2 -1.2 2.4 2.4" aria-hidden="true" fill="${colour(name)}">${body}</svg>`;
};
const colour = (name) => DATA.marks[name][dark() ? "dark" : "light"];

function figureOf(cost, text) {
  if (cost.value === null) return `<span class="missing">${text ? "" : MISSING}</span>`;
  const note = cost.note ? `${cost.source}, ${cost.note}` : cost.source;
  return (
    `<span title="${escaped(note)}">${text}<span class="glyph ${cost.source}" aria-hidden="true">` +
    `${GLYPHS[cost.source]}</span><span class="unseen">, ${escaped(note)}</span></span>`
  );
}

function showTable(rows) {
  const body = document.querySelector("#ranked tbody");
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.pin : null;
  body.innerHTML = rows
    .map((row) => {
      const id = identity(row.configuration);
      const more = title(row.configuration);
      const pinned = id === state.pin;
      const fits = ["fits", "memory ?", row.why][row.group];
      return (
        `<tr class="group${row.group}${pinned ? " pinned" : ""}" data-place="${row.place}">` +
        `<td class="fits"><span>${escaped(fits)}</span></td>` +
        `<th scope="row"><button type="button" data-pin="${escaped(id)}" aria-pressed="${pinned}">` +
        `${swatch(row.configuration.name)}<span><b>${escaped(row.configuration.name).replaceAll("_", "_<wbr>")}</b>` +
        `${more ? ` <small>${escaped(more)}</small>` : ""}</span></button></th>` +
        `<td class="number">${figureOf(row.ms, millis(row.ms.value))}</td>` +
        `<td class="number">${figureOf(row.memory, bytes(row.memory.value))}</td>` +
        `<td class="number">${figureOf(row.macs, amount(row.macs.value))}</td></tr>`
      );
    })
    .join("");
  if (focused) {
    const again = [...body.querySelectorAll("button")].find((button) => button.dataset.pin === focused);
    if (again) again.focus({ preventScroll: true });
  }
  for (const header of document.querySelectorAll("#ranked thead th")) {
    const active = header.dataset.sort === state.sort;
    header.setAttribute("aria-sort", active ? (state.down ? "descending" : "ascending") : "none");
  }
  document.getElementById("empty").hidden = rows.length > 0;
}

const shapeWords = (at) =>
  `${at.height} x ${at.width} tokens, dim ${at.dim}, ${at.heads} head${at.heads === 1 ? "" : "s"}, ` +
  `${words[at.mode]}, ${at.dtype}`;

function summary({ entries, refused }) {
  const fits = entries.filter((entry) => entry.group === 0);
  const names = new Set(fits.map((entry) => entry.configuration.name));
  const timed = fits.filter((entry) => entry.ms.value !== null);
  const limit = `${bytes(state.memory * MIB)}${state.latency === null ? "" : ` and ${millis(state.latency)}`}`;
  const parts = [
    `${shapeWords(state)}: ${names.size} attentions, in ${fits.length} of ${entries.length} configurations, fit ` +
      `${limit} on ${device().name}.`,
  ];
  if (timed.length) {
    const best = timed[0];
    parts.push(
      `Fastest known: ${fullTitle(best.configuration)}, ${millis(best.ms.value)} (${best.ms.source}); the latency of ` +
        `${timed.length} that fit is known.`,
    );
  } else if (fits.length) {
    parts.push(`No latency is known for this shape on this device; fewest MACs: ${fullTitle(fits[0].configuration)}.`);
  }
  if (refused) parts.push(`${refused} configurations do not take this shape.`);
  return parts.join(" ");
}

function showPin() {
  const place = IDENTITIES.get(state.pin);
  const box = document.getElementById("pin");
  box.hidden = place === undefined;
  if (place === undefined) return;
  const configuration = DATA.configurations[place];
  const found = costs(place, state);
  const line = (name, cost, text) => {
    const note = [cost.source, cost.note].filter(Boolean).join(", ");
    const shown = cost.value === null ? "not known at this shape" : `${text} <small>${escaped(note)}</small>`;
    return `<dt>${name}</dt><dd>${shown}</dd>`;
  };
  document.getElementById("pin-name").innerHTML =
    `${swatch(configuration.name)} ${escaped(fullTitle(configuration))} <small>${escaped(shapeWords(state))}</small>`;
  const failed = found.cell && FAILED.includes(found.cell.status);
  document.getElementById("pin-numbers").innerHTML =
    line("Latency", found.ms, millis(found.ms.value)) + line("Memory", found.memory, bytes(found.memory.value)) +
    line("MACs", found.macs, amount(found.macs.value)) +
    (failed ? `<dt>Failed</dt><dd>${escaped(`${found.cell.status}: ${found.cell.reason}`)}</dd>` : "");
  const returned = Boolean(found.cell && found.cell.ms !== null && found.cell.returned);
  document.getElementById("command").textContent = command(configuration, state, returned);
}
