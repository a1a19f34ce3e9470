"use strict";
// Charts: rows of the page's data as plots. Every number is in the data; nothing is computed here but where it is drawn.

const MARKERS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down"];
const DASHES = ["solid", "dash", "dot", "dashdot"];
const COLOURS = 7;
const PARTS = ["backbone", "seg", "normal", "depth", "edge", "keypoint", "scene"];

/** Colour, marker and line of the i-th series; past the palette, another line and marker. */
function styleOf(i) {
  const turn = Math.floor(i / COLOURS);
  const shade = colour(`series-${i % COLOURS}`);
  return { shade, symbol: MARKERS[(i + turn) % MARKERS.length], dash: DASHES[turn % DASHES.length] };
}

const narrow = () => innerWidth < 640 && !printing.matches;

/** A name that leaves room for the plot; hovering shows all of it. */
function brief(name, most = 24) {
  return narrow() && name.length > most ? `${name.slice(0, most - 1)}…` : name;
}

/** The legend: beside the plot, on a narrow screen below it, where it scrolls if it is long. */
function legend() {
  if (narrow()) return { orientation: "h", yref: "container", y: 0.01, yanchor: "bottom", x: 0, font: { size: 10 }, maxheight: 0.4 };
  return { font: { size: printing.matches ? 9 : 12 }, tracegroupgap: 0, y: 0.98 };
}

/** What all plots share: fonts, colours, margins. */
function frame(more = {}) {
  const [ink, soft, line, card] = ["ink", "soft", "line", "card"].map(colour);
  const axis = { gridcolor: line, zerolinecolor: soft, linecolor: line, tickcolor: line, automargin: true, fixedrange: narrow() };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  if (xaxis.title) xaxis.title.standoff = 10;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    font: { family: getComputedStyle(document.body).fontFamily, size: printing.matches ? 10 : narrow() ? 11 : 13, color: ink },
    margin: { l: narrow() ? 46 : 60, r: 18, t: narrow() || printing.matches ? 16 : 34, b: 52 },
    hoverlabel: { bgcolor: card, bordercolor: soft, font: { color: ink, size: 12 }, align: "left" },
    hovermode: "closest", dragmode: narrow() ? false : "zoom",
    legend: legend(),
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

// No button of the library's may leave the page: it also offers to send charts to its maker.
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendChartToCloud"] };

/** Draw a plot; one of another kind (a string) is drawn anew, as the library would keep the room of the old legend. */
function paint(id, traces, layout, kind = "") {
  const element = document.getElementById(id);
  const drawn = `${kind} ${narrow()} ${printing.matches}`;
  if (element.dataset.kind !== undefined && element.dataset.kind !== drawn) Plotly.purge(element);
  element.dataset.kind = drawn;
  const config = { ...CONFIG, displayModeBar: narrow() ? false : "hover", toImageButtonOptions: { filename: id, scale: 2 } };
  return Plotly.react(element, traces, layout, config);
}

const signed = (value, digits = 2) => (value === null ? "?" : `${value > 0 ? "+" : ""}${value.toFixed(digits)}`);
const escaped = text => String(text).replace(/[&<>]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

/** What hovering over a row's point says. */
function rowHover(row) {
  const costs = ["sparsity", "nonzero", "params", "bytes", "macs", "latency_ms"];
  const shown = costs.filter(k => row.cells[k]?.v != null).map(k => `${row.cells[k].t} ${{ sparsity: "% sparsity", nonzero: "M non-zero", params: "M parameters", bytes: "MB", macs: "MMACs", latency_ms: "ms" }[k]}`);
  const runs = row.runs.flatMap(r => r.records.map(x => escaped(x.id))).slice(0, 4);
  return [`<b>${escaped(row.label)}</b>, ${escaped(row.tasks)}`, `Δm ${signed(row.y)}${row.std == null ? "" : ` ± ${row.std.toFixed(2)}`} %, seeds: ${row.seeds}`, shown.join(", "), ...runs].join("<br>");
}

const runHover = (row, run) => [`<b>${escaped(row.label)}</b>, seed ${run.seed}`, `Δm ${signed(run.y)} %`, ...run.records.flatMap(r => [escaped(r.id), `commit ${escaped(r.commit)}`])].join("<br>");

/** Rows by label, with tasks and backbone where they differ, in the order of the table. */
function series(rows) {
  const differ = key => new Set(rows.filter(r => r.level).map(r => r[key])).size > 1;
  const [tasks, backbone] = [differ("tasks"), differ("backbone")];
  const found = new Map();
  for (const row of rows) {
    const name = [row.label, tasks && row.tasks, backbone && row.backbone].filter(Boolean).join(", ");
    if (!found.has(name)) found.set(name, []);
    found.get(name).push(row);
  }
  return found;
}

function range(values, bottom, whole) {
  const shown = values.filter(v => whole || bottom === null || v >= bottom);
  if (!shown.length) return undefined;
  const [low, high] = [Math.min(...shown), Math.max(...shown, 0)];
  const pad = 0.06 * Math.max(high - low, 1);
  return [low - pad, high + pad];
}

/** What is said of the rows that lie outside the frame. */
function outside(table, rows, whole) {
  const count = whole || table.bottom === null ? 0 : rows.filter(r => r.y < table.bottom).length;
  return count ? ` ${count} ${count > 1 ? "rows lie" : "row lies"} outside the frame: “Show all values”.` : "";
}

/** Delta_m against one of the table's axes, a line per method; or rows below each other where there is no axis. */
function drawAgainst(table, rows, axis, { whole, seeds }) {
  const known = rows.filter(r => r.y !== null);
  if (axis.key === "rank") return drawRanks(table, known, whole);
  const placed = known.filter(r => r.x[axis.key] !== null);
  const lines = [];
  const points = [];
  const ours = ([, group]) => Number(Boolean(group[0].mine));
  for (const [name, group] of [...series(placed)].sort((a, b) => ours(a) - ours(b))) { // ours are drawn on top
    const { shade, symbol, dash } = styleOf(group[0].style);
    const ordered = [...group].sort((a, b) => a.x[axis.key] - b.x[axis.key]);
    lines.push({
      type: "scatter", mode: ordered.length > 1 ? "lines+markers" : "markers", name: escaped(brief(name, 40)), legendgroup: name,
      x: ordered.map(r => r.x[axis.key]), y: ordered.map(r => r.y), line: { color: shade, dash, width: group[0].mine ? 3 : 1.6 },
      marker: { color: shade, symbol, size: group[0].mine ? 11 : 8 }, text: ordered.map(rowHover), hovertemplate: "%{text}<extra></extra>",
      error_y: { type: "data", array: ordered.map(r => r.std ?? 0), color: shade, thickness: 1.2, width: 3, visible: ordered.some(r => r.std) },
    });
    const single = ordered.filter(r => r.runs.filter(run => run.y !== null).length > 1).flatMap(r => r.runs.filter(run => run.y !== null && run.x[axis.key] !== null).map(run => [r, run]));
    if (seeds && single.length)
      points.push({
        type: "scatter", mode: "markers", name: escaped(name), legendgroup: name, showlegend: false, x: single.map(([, run]) => run.x[axis.key]),
        y: single.map(([, run]) => run.y), marker: { color: shade, size: 5, opacity: 0.55, symbol: "circle-open" },
        text: single.map(([row, run]) => runHover(row, run)), hovertemplate: "%{text}<extra></extra>",
      });
  }
  const ticks = axis.ticks ? { tickvals: axis.ticks, ticktext: axis.names } : axis.log ? { dtick: "D2", minor: { showgrid: false } } : {};
  const xaxis = { title: { text: axis.label }, type: axis.log ? "log" : "linear", autorange: "reversed", ...ticks };
  const yaxis = { title: { text: "Δm in %" }, range: range(placed.map(r => r.y), table.bottom, whole), autorange: false };
  if (!yaxis.range) yaxis.autorange = true;
  const empty = placed.length ? "" : " No row that is shown has a number for this.";
  document.getElementById("plot-caption").textContent = `${table.title}: Δm against ${axis.label}, ${lines.length} lines, ${placed.length} rows.${outside(table, placed, whole)}${empty}`;
  document.getElementById("plot").style.height = "";
  return paint("plot", [...points, ...lines], frame({ xaxis, yaxis }), table.id);
}

/** Rows below each other, best on top. */
function drawRanks(table, rows, whole) {
  const several = new Set(rows.map(r => r.heading)).size > 1;
  const tasks = new Set(rows.map(r => r.tasks)).size > 1;
  const ordered = [...rows].sort((a, b) => a.y - b.y);
  const names = ordered.map((r, i) => `${escaped(brief([r.label, several && r.level && r.heading, tasks && r.tasks].filter(Boolean).join(", ")))}${"\u200b".repeat(i)}`);
  const shades = ordered.map(r => styleOf(several ? r.style : 0).shade);
  const trace = {
    type: "scatter", mode: "markers", orientation: "h", y: names, x: ordered.map(r => r.y), marker: { color: shades, size: 9 }, text: ordered.map(rowHover),
    hovertemplate: "%{text}<extra></extra>", error_x: { type: "data", array: ordered.map(r => r.std ?? 0), thickness: 1.2, width: 3, color: colour("soft"), visible: ordered.some(r => r.std) },
  };
  document.getElementById("plot").style.height = `${Math.max(14, 5 + 1.35 * ordered.length)}rem`;
  document.getElementById("plot-caption").textContent = `${table.title}: Δm of ${ordered.length} rows, the best on top.${outside(table, rows, whole)}`;
  const xaxis = { title: { text: "Δm in %" }, range: range(ordered.map(r => r.y), table.bottom, whole) };
  const yaxis = { tickfont: { size: 11 }, type: "category", range: [-0.7, ordered.length - 0.3], tickmode: "linear", dtick: 1 };
  return paint("plot", [trace], frame({ xaxis, yaxis, showlegend: false }), `${table.id} rank`);
}

/** Delta_m over the steps of fine-tuning. */
function drawRecovery(panel, whole) {
  const traces = panel.lines.map(line => {
    const { shade, symbol, dash } = styleOf(line.style);
    const size = line.mine ? 3 : 1.6;
    const text = line.steps.map((s, i) => `<b>${escaped(line.label)}</b>, ${s} steps<br>Δm ${signed(line.delta_m[i])}${line.std[i] === null ? "" : ` ± ${line.std[i].toFixed(2)}`} %`);
    return {
      type: "scatter", mode: "lines+markers", name: escaped(brief(line.label, 40)), x: line.steps, y: line.delta_m, line: { color: shade, dash, width: size }, marker: { color: shade, symbol, size: 6 + size },
      text, hovertemplate: "%{text}<extra></extra>", error_y: { type: "data", array: line.std.map(v => v ?? 0), color: shade, thickness: 1.2, width: 3, visible: line.std.some(v => v) },
    };
  });
  const values = panel.lines.flatMap(line => line.delta_m).filter(v => v !== null);
  document.getElementById("recovery-caption").textContent = `${panel.title}: Δm on test over the steps after the cut, ${traces.length} lines, means over the seeds that have a record.`;
  const yaxis = { title: { text: "Δm in %" }, range: range(values, panel.bottom, whole) };
  return paint("recovery", traces, frame({ xaxis: { title: { text: "fine-tuning steps" } }, yaxis }), `${panel.title} ${panel.lines.length}`);
}

/** Sparsity of every layer of one row, coloured by component, another row's as a line. */
function drawLayers(table, entry, other) {
  const network = table.networks[entry.network];
  const at = network.names.map((_, i) => i + 1);
  const traces = [...new Set(network.parts)].map(part => {
    const mine = at.filter(i => network.parts[i - 1] === part);
    return {
      type: "bar", name: part, x: mine, y: mine.map(i => entry.values[i - 1] === null ? null : 100 * entry.values[i - 1]), marker: { color: styleOf(Math.max(PARTS.indexOf(part), 0)).shade },
      text: mine.map(i => escaped(network.names[i - 1])), textposition: "none", hovertemplate: `<b>%{text}</b><br>${part}: %{y:.1f} % cut<extra></extra>`,
    };
  });
  if (other)
    traces.push({
      type: "scatter", mode: "lines+markers", name: escaped(table.rows[other.row].label), x: at, y: other.values.map(v => v === null ? null : 100 * v), line: { color: colour("ink"), width: 1.3, shape: "hvh" },
      marker: { size: 4 }, text: table.networks[other.network].names.map(escaped), hovertemplate: "<b>%{text}</b><br>%{y:.1f} % cut<extra></extra>",
    });
  const row = table.rows[entry.row];
  const parts = Object.entries(entry.parts).map(([part, value]) => `${part} ${(100 * value).toFixed(1)} %`);
  document.getElementById("layers-caption").textContent = `${row.label}, ${row.heading}: ${parts.join(" · ")}. Mean over ${entry.runs.length} run${entry.runs.length > 1 ? "s" : ""}: ${entry.runs.join(", ")}.`;
  return paint("layers", traces, frame({ xaxis: { title: { text: "layer, first to last" } }, yaxis: { title: { text: "sparsity in %" }, range: [0, 102] }, bargap: 0.15, barmode: "overlay" }), table.id);
}

/** Overlap of the tasks' masks by layer. */
function drawOverlap(table, entry) {
  const pairs = Object.keys(entry.values).reverse();
  const trace = {
    type: "heatmap", z: pairs.map(p => entry.values[p]), x: entry.names.map((_, i) => i + 1), y: pairs.map(p => p === "all" ? "all tasks" : p), zmin: 0, zmax: 1,
    colorscale: "Cividis", colorbar: { title: { text: "IoU" }, thickness: 12, outlinewidth: 0 }, xgap: narrow() ? 0 : 1, ygap: 2,
    text: pairs.map(() => entry.names.map(escaped)), hovertemplate: "<b>%{text}</b><br>%{y}: IoU %{z:.3f}<extra></extra>",
  };
  const row = table.rows[entry.row];
  document.getElementById("overlap-caption").textContent = `${row.label}, ${row.heading}: IoU of the tasks' own masks in the layers that they share. Mean over ${entry.runs.length} run${entry.runs.length > 1 ? "s" : ""}.`;
  return paint("overlap", [trace], frame({ xaxis: { title: { text: "layer, first to last" }, showgrid: false }, yaxis: { showgrid: false } }));
}

/** Latency of a comparison's models, with whiskers to the 95th percentile. */
function drawLatency(table) {
  const rows = table.rows.filter(r => r.x.latency_ms !== null).reverse();
  const trace = {
    type: "bar", orientation: "h", y: rows.map(r => escaped(brief(r.label))), x: rows.map(r => r.cells.latency_ms.v), marker: { color: rows.map(r => styleOf(r.style).shade) },
    text: rows.map(r => `${r.cells.latency_ms.t} ms`), textposition: "inside", insidetextanchor: "start", insidetextfont: { color: colour("card") },
    hovertext: rows.map(rowHover), hovertemplate: "%{hovertext}<extra></extra>",
    error_x: { type: "data", symmetric: false, array: rows.map(r => r.cells.latency_p95_ms.v - r.cells.latency_ms.v), arrayminus: rows.map(() => 0), color: colour("soft"), thickness: 1.4 },
  };
  return paint("latency", [trace], frame({ xaxis: { title: { text: "ms for one picture" }, rangemode: "tozero" }, showlegend: false }));
}
