"use strict";
// Values under the pointer, tables that sort and filter. The page is whole without it.
for (const figure of document.querySelectorAll("figure.plot")) {
  const frame = figure.querySelector(".frame");
  const [xUnit, yUnit] = JSON.parse(figure.dataset.units);
  const words = JSON.parse(figure.dataset.words);
  const axis = (text) => {
    const [low, high, log] = text.split(" ").map(Number);
    const plain = (v) => (log ? Math.log10(v) : v);
    return (share) => {
      const at = plain(low) + share * (plain(high) - plain(low));
      return log ? 10 ** at : at;
    };
  };
  const x = axis(figure.dataset.x), y = axis(figure.dataset.y);
  let lines = null;
  const read = () => [...figure.querySelectorAll("path.line, path.dots")].map((path) => {
    const numbers = path.getAttribute("d").replaceAll("h0", " ").match(/-?[\d.]+/g).map(Number);
    const points = [];
    for (let i = 0; i + 1 < numbers.length; i += 2) points.push([numbers[i], numbers[i + 1]]);
    return { label: path.dataset.label, dots: path.classList.contains("dots"), points,
             names: path.dataset.names ? JSON.parse(path.dataset.names) : [] };
  });
  let box = null, rule = null;
  const leave = () => { box?.remove(); rule?.remove(); box = rule = null; };
  const nearest = (line, at, height, width, pointerY) => {
    let best = -1, least = Infinity;
    line.points.forEach(([px, py], i) => {
      const dx = (px - at) * width / 1000, dy = line.names.length ? (py - pointerY) * height / 1000 : 0;
      const distance = dx * dx + dy * dy;
      if (distance < least) { least = distance; best = i; }
    });
    return [best, least];
  };
  const show = (event) => {
    lines ??= read();
    const area = frame.getBoundingClientRect();
    const at = (event.clientX - area.left) / area.width * 1000, up = (event.clientY - area.top) / area.height * 1000;
    if (at < -20 || at > 1020 || up < -20 || up > 1020) return leave();
    let found = lines.map((line) => [line, ...nearest(line, at, area.height, area.width, up)]);
    found = found.filter(([line, i, far]) => i >= 0 && far < (line.names.length ? 400 : 1600));
    if (!found.length) return leave();
    if (found.some(([line]) => line.names.length)) found = found.sort((a, b) => a[2] - b[2]).slice(0, 1);
    if (!box) {
      box = frame.appendChild(document.createElement("div"));
      box.className = "hover";
      rule = frame.appendChild(document.createElement("div"));
      rule.className = "rule";
    }
    const seen = new Set();
    const first = found[0][0].points[found[0][1]];
    const head = document.createElement("b");
    const place = x(first[0] / 1000);
    head.textContent = words.length ? words[Math.round(place)] : `${figure.dataset.xname} ${written(place, xUnit)}`;
    box.replaceChildren(head);
    for (const [line, i] of found) {
      if (seen.has(line.label)) continue;
      seen.add(line.label);
      const row = box.appendChild(document.createElement("div"));
      row.textContent = `${line.names[i] ?? line.label}: ${written(y(1 - line.points[i][1] / 1000), yUnit)}`;
    }
    rule.style.left = `${first[0] / 10}%`;
    const right = first[0] > 500;
    box.style.left = right ? "auto" : `calc(${first[0] / 10}% + 8px)`;
    box.style.right = right ? `calc(${100 - first[0] / 10}% + 8px)` : "auto";
    box.style.top = "4px";
  };
  frame.addEventListener("pointermove", show);
  frame.addEventListener("pointerdown", show);
  frame.addEventListener("pointerleave", leave);
}

function written(value, unit) {
  const digits = (v) => String(Number(v.toPrecision(4)));
  if (unit.startsWith("bytes")) {
    let at = 0;
    while (Math.abs(value) >= 1024 && at < 5) { value /= 1024; at += 1; }
    return `${digits(value)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][at]}${unit.slice(5)}`;
  }
  if (unit === "s") {
    if (Math.abs(value) < 1) return `${digits(value * 1000)} ms`;
    if (Math.abs(value) < 60) return `${digits(value)} s`;
    const whole = Math.round(value), pad = (v) => String(v).padStart(2, "0");
    const clock = `${pad(Math.floor(whole / 60) % 60)}:${pad(whole % 60)}`;
    return whole < 3600 ? clock : `${Math.floor(whole / 3600)}:${clock}`;
  }
  if (unit === "step") return Math.round(value).toLocaleString("en");
  return digits(value) + (unit ? ` ${unit}` : "");
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const column = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
    const keyed = [...body.rows].map((row) => {
      const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent.trim();
      return [text === "" || text === "-" ? null : text, Number(text), row];
    });
    const numbers = keyed.every(([text, value]) => text === null || !Number.isNaN(value));
    keyed.sort(([a, x], [b, y]) => {
      if (a === null || b === null) return (a === null) - (b === null); // without a value: last, either way
      return down * (numbers ? x - y : a.localeCompare(b, "en", { numeric: true }));
    });
    body.append(...keyed.map(([, , row]) => row));
  });
}

for (const field of document.querySelectorAll("input[data-table]")) {
  const table = document.getElementById(field.dataset.table), said = document.getElementById(`${field.dataset.table}-count`);
  let texts = null;
  field.addEventListener("input", () => {
    const rows = [...table.tBodies[0].rows];
    texts ??= new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
    const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !wanted.every((word) => texts.get(row).includes(word));
      shown += !row.hidden;
    }
    if (said) said.textContent = `${shown} of ${rows.length}`;
  });
}
