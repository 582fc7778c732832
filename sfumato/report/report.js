"use strict";
// Sorts tables by a click, slides over steps, saves figures. The page is complete without it.

const MISSING = new Set(["", "–", "not evaluated"]);
const NUMBER = /^[-+]?\d+(\.\d+)?$/;

function button(text, act) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = text;
  element.addEventListener("click", act);
  return element;
}

// The value of a cell without its note and its error: "22.40 ± 0.25" gives "22.40".
function value(row, column) {
  const first = row.cells[column].firstChild;
  const text = first ? first.textContent.trim() : "";
  return text.split(" ± ")[0].replace("−", "-");
}

function sort(table, head, column) {
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => [value(row, column), row]);
  const known = rows.filter(([text]) => !MISSING.has(text));
  const unknown = rows.filter(([text]) => MISSING.has(text));
  const numeric = known.every(([text]) => NUMBER.test(text));
  known.sort(([a], [b]) => (up ? 1 : -1) * (numeric ? a - b : a.localeCompare(b)));
  body.append(...[...known, ...unknown].map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sorts")) {
  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    const act = button("", () => sort(table, head, column));
    act.append(...head.childNodes);
    head.append(act);
  });
}

for (const group of document.querySelectorAll("[data-steps]")) {
  const steps = group.dataset.steps.split(" ");
  const label = document.createElement("label");
  const input = document.createElement("input");
  const output = document.createElement("output");
  input.type = "range";
  input.min = 0;
  input.max = steps.length - 1;
  input.value = steps.length - 1;
  const show = () => {
    const frame = Number(input.value);
    output.textContent = `step ${steps[frame]}`;
    input.setAttribute("aria-valuetext", output.textContent);
    for (const cell of group.querySelectorAll("[data-first]")) {
      cell.hidden = frame < Number(cell.dataset.first) || frame > Number(cell.dataset.last);
    }
  };
  input.addEventListener("input", show);
  label.className = "slider";
  label.append(input, " ", output);
  group.before(label);
  show();
}

for (const figure of document.querySelectorAll("figure")) {
  const drawing = figure.querySelector("svg");
  const save = () => {
    const text = new XMLSerializer().serializeToString(drawing);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    link.download = `${figure.dataset.name.replace(/[^\w.-]+/g, "_")}.svg`;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  figure.append(button("save as SVG", save));
}
