"use strict";
// Sorts and saves tables, slides over steps, saves figures. The page is complete without it.

const MISSING = new Set(["", "–", "not evaluated", "not recorded"]);

function button(text, act) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = text;
  element.addEventListener("click", act);
  return element;
}

function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name.replace(/[^\w.-]+/g, "_");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// The numbers of a cell, unrounded; "" is the value itself.
function numbers(cell) {
  return JSON.parse(cell.dataset.values ?? "{}");
}

// The value of a cell: a number, a text, or null where there is none.
function value(cell) {
  const text = cell.textContent.trim();
  return numbers(cell)[""] ?? (MISSING.has(text) ? null : text);
}

function sort(table, head, column) {
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = Array.from(table.tBodies[0].rows, (row) => [value(row.cells[column]), row]);
  const known = rows.filter(([one]) => one !== null);
  const unknown = rows.filter(([one]) => one === null);
  const numeric = known.every(([one]) => typeof one === "number");
  const order = numeric ? (a, b) => a - b : (a, b) => String(a).localeCompare(String(b));
  known.sort(([a], [b]) => (up ? order(a, b) : order(b, a)));
  table.tBodies[0].append(...[...known, ...unknown].map(([, row]) => row));
}

// A text that a spreadsheet would take for a formula begins with an apostrophe.
function plain(one) {
  return typeof one === "string" && /^[=+@\t\r-]/.test(one) ? `'${one}` : one;
}

// The rows of a table as objects; a cell with several numbers has several columns.
function records(table, names) {
  const rows = Array.from(table.tBodies[0].rows, (row) => Array.from(row.cells));
  const kinds = names.map((_, i) => [...new Set(["", ...rows.flatMap((row) => Object.keys(numbers(row[i])))])]);
  return rows.map((row) => {
    const pairs = row.flatMap((cell, i) =>
      kinds[i].map((kind) => {
        const one = kind === "" ? value(cell) : numbers(cell)[kind] ?? null;
        return [`${names[i]} ${kind}`.trim(), one];
      }),
    );
    return Object.fromEntries(pairs);
  });
}

function csv(rows) {
  const quoted = (one) => {
    const text = String(plain(one) ?? "");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = [Object.keys(rows[0]), ...rows.map(Object.values)];
  return lines.map((line) => `${line.map(quoted).join(",")}\n`).join("");
}

for (const table of document.querySelectorAll("table[data-name]")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  const names = heads.map((head) => head.textContent.trim());
  const { name } = table.dataset;
  const saves = document.createElement("div");
  saves.className = "saves";
  saves.append(
    button("save as CSV", () => save(`${name}.csv`, "text/csv", csv(records(table, names)))),
    button("save as JSON", () =>
      save(`${name}.json`, "application/json", `${JSON.stringify(records(table, names), null, 1)}\n`),
    ),
  );
  table.after(saves);
  if (!table.classList.contains("sorts")) continue;
  heads.forEach((head, column) => {
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
  const drawing = () => new XMLSerializer().serializeToString(figure.querySelector("svg"));
  figure.append(
    button("save as SVG", () => save(`${figure.dataset.name}.svg`, "image/svg+xml", drawing())),
  );
}
