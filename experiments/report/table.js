"use strict";
// Tables: rows of the page's data as a table that sorts; rows open to the runs behind them.

/** An element with properties, attributes (those with a dash) and children. */
function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.includes("-") || key === "role" || key === "scope") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children);
  return node;
}

/** Order of two cells: numbers by value, else words; empty ones go last whichever way. */
function compareCells(a, b, down) {
  const value = cell => (cell === undefined ? null : cell.v ?? (/^(|-|missing)$/.test(cell.t) ? null : cell.t));
  const [x, y] = [value(a), value(b)];
  if (x === null || y === null) return (x === null) - (y === null);
  const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
  return down ? -order : order;
}

/** A table in an element: draw(rows) shows rows, in the order that the reader asked for. */
class TableView {
  constructor(element, { opens = false, onSort = () => {} } = {}) {
    Object.assign(this, { element, opens, onSort, columns: [], rows: [], open: new Set(), sort: null });
    element.addEventListener("keydown", event => this.key(event));
  }

  setTable(table, columns = table.columns) {
    this.table = table;
    // Columns in which no row says anything are left out.
    this.columns = columns.filter(c => table.rows.some(r => !/^(|-)$/.test(r.cells[c.key]?.t ?? "")));
    this.open.clear();
    this.sort = null;
  }

  draw(rows) {
    this.rows = rows;
    const ordered = [...rows];
    if (this.sort) ordered.sort((a, b) => compareCells(a.cells[this.sort.key], b.cells[this.sort.key], this.sort.down));
    const head = make("thead", {}, make("tr", {}, ...this.columns.map(c => this.heading(c))));
    const body = make("tbody", {}, ...ordered.flatMap(row => this.lines(row)));
    if (!rows.length) body.append(make("tr", {}, make("td", { colSpan: this.columns.length, className: "words", textContent: "No row matches the filters." })));
    this.element.replaceChildren(head, body);
  }

  heading(column) {
    const button = make("button", { type: "button", textContent: column.label });
    const th = make("th", { scope: "col", className: column.text ? "words" : "" }, button);
    th.dataset.key = column.key;
    if (this.sort?.key === column.key) th.setAttribute("aria-sort", this.sort.down ? "descending" : "ascending");
    button.addEventListener("click", () => {
      const same = this.sort?.key === column.key;
      this.sort = { key: column.key, down: same ? !this.sort.down : false };
      this.draw(this.rows);
      this.element.querySelector(`th[data-key="${CSS.escape(column.key)}"] button`).focus();
      this.onSort(this.sort);
    });
    return th;
  }

  lines(row) {
    const index = this.table.rows.indexOf(row);
    const tr = make("tr", { className: `row ${row.state}${row.mine ? " mine" : ""}` });
    tr.dataset.row = index;
    this.columns.forEach((column, i) => tr.append(this.cell(row, column, i === 0, index)));
    return this.open.has(index) ? [tr, this.runs(row, index)] : [tr];
  }

  cell(row, column, first, index) {
    const found = row.cells[column.key] ?? { v: null, t: "" };
    if (first) {
      const th = make("th", { scope: "row" });
      if (!this.opens) th.textContent = found.t;
      else {
        const button = make("button", { type: "button", className: "expand", textContent: found.t, "aria-expanded": String(this.open.has(index)), "aria-label": `${found.t}: runs behind this row` });
        button.addEventListener("click", () => this.toggle(index));
        th.append(button);
      }
      return th;
    }
    const td = make("td", { className: `${column.text ? "words" : ""}${found.t === "missing" ? " gap" : ""}` });
    td.append(found.b ? make("b", { textContent: found.t }) : found.t);
    if (found.n) td.append(make("small", { textContent: found.n, className: found.tone ?? "" }));
    return td;
  }

  toggle(index, open = !this.open.has(index)) {
    if (open) this.open.add(index);
    else this.open.delete(index);
    const tr = this.element.querySelector(`tr.row[data-row="${index}"]`);
    if (!tr) return;
    const button = tr.querySelector(".expand");
    button.setAttribute("aria-expanded", String(open));
    if (tr.nextElementSibling?.classList.contains("runs")) tr.nextElementSibling.remove();
    if (open) tr.after(this.runs(this.table.rows[index], index));
    button.focus();
  }

  runs(row, index) {
    const id = `${this.element.id}-runs-${index}`;
    const inside = make("div", { className: "inside" });
    inside.append(make("p", { textContent: [...this.table.how, `Records in ${this.table.folder}.`].join(" ") }));
    for (const run of row.runs) inside.append(describeRun(run));
    return make("tr", { className: "runs", id }, make("td", { colSpan: this.columns.length }, inside));
  }

  /** Escape closes the row that the focus is in; up and down go to the row above and below. */
  key(event) {
    const tr = event.target.closest("tr");
    if (!tr || !this.opens) return;
    const main = tr.classList.contains("runs") ? tr.previousElementSibling : tr;
    if (event.key === "Escape" && main.dataset.row !== undefined && this.open.has(Number(main.dataset.row))) {
      this.toggle(Number(main.dataset.row), false);
      event.stopPropagation();
    }
    if (["ArrowDown", "ArrowUp"].includes(event.key) && event.target.classList.contains("expand")) {
      const buttons = [...this.element.querySelectorAll(".expand")];
      buttons[buttons.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)]?.focus();
      event.preventDefault();
    }
  }
}

/** One run: its number, the records that it comes from and the command that makes it again. */
function describeRun(run) {
  const title = make("h4", {}, run.seed === "" ? "Files" : `Seed ${run.seed}`);
  if (run.text) title.append(run.missing.length ? ": missing " : `: Δm ${run.text} % `);
  const box = make("div", { className: "run" }, title);
  for (const record of run.records) box.append(describeRecord(record));
  for (const id of run.missing) box.append(make("p", {}, "No record yet of ", make("code", { textContent: id })));
  for (const command of new Set(run.commands)) box.append(make("code", { className: "command", textContent: command, title: "The command that makes it again" }));
  return box;
}

function describeRecord(record) {
  const facts = [
    ["record", make("code", { textContent: record.id })],
    ["from", record.start && make("code", { textContent: record.start })],
    ["commit", [record.commit, record.ended].filter(Boolean).join(", ")],
    ["budget", record.budget],
    ["took", [record.score && `scoring ${record.score}`, record.train && `training ${record.train}`, record.memory && `peak ${record.memory}`].filter(Boolean).join(", ")],
    ["first weights", record.weights],
    ["machine", record.machine],
  ];
  return make("dl", {}, ...facts.filter(([, value]) => value).flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", {}, value)]));
}
