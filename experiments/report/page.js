"use strict";
// The page: one table is chosen; filters, plots and the view inside the network follow it.

const page = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const ALL = "all";
const RANK = { key: "rank", label: "rows, the best on top", short: "rows" };
const state = { table: page.tables[0], axis: null, whole: false, seeds: true, hideMissing: false };
const results = new TableView($("results-table"), { opens: true });

const option = (value, text) => make("option", { value, textContent: text });
const unique = values => [...new Set(values)];

function fillTables() {
  for (const group of unique(page.tables.map(t => t.group))) {
    const items = page.tables.filter(t => t.group === group).map(t => {
      const have = t.rows.filter(r => r.state !== "missing").length;
      return option(t.id, `${t.title} (${have} of ${t.rows.length} rows)`);
    });
    $("table").append(make("optgroup", { label: group }, ...items));
  }
  $("table").closest(".chooser").hidden = page.tables.length < 2;
}

function fillFilters(table) {
  const fill = (id, values, text = v => v) => {
    $(id).replaceChildren(option(ALL, "all"), ...values.map(v => option(v, text(v))));
    $(id).closest("label").hidden = values.length < 2;
  };
  fill("method", unique(table.rows.map(r => r.method)));
  fill("sparsity", unique([...table.rows].sort((a, b) => (a.level ?? 2) - (b.level ?? 2)).map(r => r.heading)));
  fill("tasks", unique(table.rows.map(r => r.tasks)));
  $("text").value = "";
  $("hide-missing").hidden = table.rows.every(r => r.state !== "missing");
  state.hideMissing = false;
  $("hide-missing").setAttribute("aria-pressed", "false");
}

/** The rows that the filters leave: every word must be somewhere in the row or in its runs' ids. */
function visible() {
  const words = $("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = ["method", "tasks"].map(k => [k, $(k).value]).filter(([, v]) => v !== ALL);
  return state.table.rows.filter(row => {
    if (state.hideMissing && row.state === "missing") return false;
    if (chosen.some(([key, value]) => row[key] !== value)) return false;
    if ($("sparsity").value !== ALL && row.heading !== $("sparsity").value) return false;
    const text = [row.label, row.tasks, row.backbone, row.heading, ...Object.values(row.cells).map(c => c.t), ...row.runs.flatMap(r => [...r.records.map(x => `${x.id} ${x.commit}`), ...r.missing])].join(" ").toLowerCase();
    return words.every(w => text.includes(w));
  });
}

function showRows() {
  const rows = visible();
  results.draw(rows);
  const missing = rows.filter(r => r.state === "missing").length;
  $("count").textContent = `${rows.length} of ${state.table.rows.length} rows${missing ? `, ${missing} missing` : ""}`;
  plotRows(rows);
}

const plotRows = (rows = visible()) => drawAgainst(state.table, rows, state.axis, state);

function fillAxes(table) {
  const axes = [...table.axes, RANK];
  // Where all rows have the same sparsity, an axis tells little: the rows themselves are compared.
  const levels = unique(table.rows.filter(r => r.y !== null && r.level).map(r => r.level)).length;
  state.axis = levels > 1 && table.axes.length ? axes[0] : RANK;
  $("axes").replaceChildren(make("legend", { textContent: "Against" }), ...axes.map(axis => {
    const input = make("input", { type: "radio", name: "axis", value: axis.key, checked: axis === state.axis });
    input.addEventListener("change", () => { state.axis = axis; plotRows(); });
    return make("label", {}, input, make("span", { textContent: axis.short }));
  }));
}

const rowName = (table, entry) => {
  const row = table.rows[entry.row];
  return [row.label, row.heading, unique(table.rows.map(r => r.tasks)).length > 1 && row.tasks].filter(Boolean).join(", ");
};

function fillInside(table) {
  const fill = (id, entries, first = []) => $(id).replaceChildren(...first, ...entries.map((e, i) => option(i, rowName(table, e))));
  const preferred = entries => Math.max(0, entries.findIndex(e => table.rows[e.row].method === "cut" && table.rows[e.row].level >= 0.9));
  fill("layers-row", table.layers);
  fill("layers-other", table.layers, [option("", "nothing")]);
  fill("overlap-row", table.overlaps);
  $("recovery-panel").replaceChildren(...table.recovery.map((p, i) => option(i, p.title)));
  if (table.layers.length) $("layers-row").value = preferred(table.layers);
  if (table.overlaps.length) $("overlap-row").value = preferred(table.overlaps);
  if (table.recovery.length) $("recovery-panel").value = Math.max(0, table.recovery.findIndex(p => p.title.startsWith("90 %")));
  for (const [part, entries] of [["layers-part", table.layers], ["overlap-part", table.overlaps], ["recovery-part", table.recovery]]) $(part).hidden = !entries.length;
  $("inside-none").hidden = Boolean(table.layers.length || table.overlaps.length);
}

function drawInside() {
  const { table } = state;
  if (table.recovery.length) drawRecovery(table.recovery[$("recovery-panel").value], state.whole);
  if (table.layers.length) {
    const entry = table.layers[$("layers-row").value];
    const other = $("layers-other").value === "" ? null : table.layers[$("layers-other").value];
    drawLayers(table, entry, other && other.network === entry.network ? other : null);
  }
  if (table.overlaps.length) drawOverlap(table, table.overlaps[$("overlap-row").value]);
}

function choose(id) {
  state.table = page.tables.find(t => t.id === id);
  $("table-title").textContent = state.table.title;
  $("caption").textContent = state.table.caption;
  results.setTable(state.table);
  fillFilters(state.table);
  fillAxes(state.table);
  fillInside(state.table);
  showRows();
  drawInside();
}

function startFilters() {
  $("table").addEventListener("change", () => choose($("table").value));
  for (const id of ["method", "sparsity", "tasks"]) $(id).addEventListener("change", showRows);
  $("text").addEventListener("input", showRows);
  $("text").addEventListener("keydown", event => {
    if (event.key === "Escape") { $("text").value = ""; showRows(); }
  });
  $("filters").addEventListener("submit", event => event.preventDefault());
  $("filters").addEventListener("reset", event => {
    event.preventDefault();
    fillFilters(state.table);
    showRows();
  });
  pressable("hide-missing", on => { state.hideMissing = on; showRows(); });
  pressable("whole", on => { state.whole = on; plotRows(); drawInside(); });
  pressable("seeds", on => { state.seeds = on; plotRows(); });
  for (const id of ["recovery-panel", "layers-row", "layers-other", "overlap-row"]) $(id).addEventListener("change", drawInside);
}

/** A button that is on or off. */
function pressable(id, act) {
  $(id).addEventListener("click", () => {
    const on = $(id).getAttribute("aria-pressed") !== "true";
    $(id).setAttribute("aria-pressed", String(on));
    act(on);
  });
}

/** The gallery's buttons: one is pressed; left and right go from one to the next. */
function startGallery() {
  const buttons = [...document.querySelectorAll(".toggles button")];
  if (!buttons.length) return;
  const show = who => {
    for (const b of buttons) b.setAttribute("aria-pressed", String(b.dataset.who === who));
    for (const f of document.querySelectorAll(".room figure[data-who]")) f.hidden = f.dataset.who !== who;
  };
  buttons.forEach((b, i) => {
    b.addEventListener("click", () => show(b.dataset.who));
    b.addEventListener("keydown", event => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = buttons[(i + step + buttons.length) % buttons.length];
      next.focus();
      show(next.dataset.who);
      event.preventDefault();
    });
  });
  show((buttons.find(b => b.dataset.who.startsWith("cut")) ?? buttons[0]).dataset.who);
}

function startCost() {
  const drawn = [...document.querySelectorAll("table.delivered")].map(element => [element, element.dataset.table, null]);
  const keys = ["method", "what", "params", "nonzero", "bytes", "macs", "latency_ms", "latency_p95_ms", "delta_m"];
  if ($("cost-table")) drawn.push([$("cost-table"), page.cost.table, keys]);
  for (const [element, id, wanted] of drawn) {
    const table = page.tables.find(t => t.id === id);
    const view = new TableView(element);
    view.setTable(table, wanted ? wanted.map(k => table.columns.find(c => c.key === k)) : table.columns);
    view.draw(table.rows);
  }
}

function drawAll() {
  plotRows();
  drawInside();
  if ($("latency")) drawLatency(page.tables.find(t => t.id === page.cost.table));
}

/** Plots are drawn again for paper: light, and as wide as the sheet. */
function startPrinting() {
  const onPaper = on => {
    drawAll();
    for (const plot of document.querySelectorAll(".plot.js-plotly-plot"))
      Plotly.relayout(plot, on ? { autosize: false, width: 1030, height: plot.classList.contains("short") ? 189 : 430 } : { autosize: true, width: null, height: null });
  };
  printing.addEventListener("change", event => onPaper(event.matches));
}

/** The open rows' runs are as wide as what is seen of the table. */
function startWidths() {
  const box = results.element.closest(".wide");
  new ResizeObserver(() => box.style.setProperty("--shown", `${box.clientWidth}px`)).observe(box);
}

startTheme();
startGallery();
if (page.tables.length) {
  fillTables();
  startFilters();
  startCost();
  startWidths();
  choose(state.table.id);
  drawAll();
  startPrinting();
  document.addEventListener("themechange", drawAll);
}
document.documentElement.dataset.ready = "yes";
