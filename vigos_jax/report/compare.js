// Curves and configs of the chosen runs: reads the JSON beside it, and writes texts as texts only.
"use strict";
const SVG = "http://www.w3.org/2000/svg";

function make(tag, parent, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function shape(tag, parent, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// About five round numbers that hold low and high.
function ticks(low, high) {
  const rough = (high - low) / 4;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = size * [1, 2, 2.5, 5, 10].find((m) => size * m >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

const said = (y) => String(Number(y.toPrecision(3)));

// One chart of the same curve of all chosen runs: [{name, color, points: [[step, number, mean], ...]}, ...].
function draw(parent, title, unit, lines, s) {
  const box = make("div", parent, "chart");
  make("h3", box, "", title);
  const ends = lines.map((l) => [l.name, l.points.findLast((p) => p[2] !== null)]).filter(([, end]) => end);
  const words = ends.map(([name, end]) => `${name} ${said(end[2])} at step ${end[0]}`);
  const label = `${title}, ${unit}: ${words.join("; ")}`;
  const svg = shape("svg", box, { viewBox: `0 0 ${s.width} ${s.height}`, role: "img", "aria-label": label });
  const xs = lines.flatMap((l) => l.points.map((p) => p[0]));
  const ys = lines.flatMap((l) => l.points.flatMap((p) => [p[2]])).filter((y) => y !== null);
  const left = Math.min(...xs), right = Math.max(...xs, left + 1);
  let low = Math.min(0, ...ys), high = Math.max(...ys);
  const marks = ticks(low, high > low ? high : low + 1);
  low = marks[0];
  high = marks[marks.length - 1];
  const across = (x) => s.left + ((x - left) / (right - left)) * (s.width - s.left - s.right);
  const up = (y) => s.height - s.bottom - ((Math.min(y, 2 * high - low) - low) / (high - low)) * (s.height - s.top - s.bottom);
  shape("text", svg, { x: 2, y: 11 }, unit);
  shape("text", svg, { x: s.width - s.right, y: s.height - 4, "text-anchor": "end" }, "optimizer step");
  for (const y of marks) {
    shape("line", svg, { class: "grid", x1: s.left, x2: s.width - s.right, y1: up(y), y2: up(y) });
    shape("text", svg, { x: s.left - 5, y: up(y) + 3, "text-anchor": "end" }, said(y));
  }
  for (const x of ticks(left, right).filter((x) => x >= left && x <= right && Number.isInteger(x))) {
    shape("text", svg, { x: across(x), y: s.height - s.bottom + 15, "text-anchor": "middle" }, String(x));
  }
  // What lies above the top tick is cut off.
  const frame = { x: s.left, y: s.top - 2, width: s.width - s.left - s.right, height: s.height - s.top - s.bottom + 4 };
  const inner = shape("svg", svg, { ...frame, viewBox: `${frame.x} ${frame.y} ${frame.width} ${frame.height}` });
  for (const [column, className] of [[1, "line pale"], [2, "line"]]) {
    for (const line of lines) {
      let path = "", pen = "M";
      line.points.forEach((point, i) => {
        const y = point[column];
        if (y !== null) path += `${pen}${across(point[0]).toFixed(1)},${up(y).toFixed(1)}`;
        // A point without neighbors is a dash: a line of one point is not seen.
        if (y !== null && pen === "M" && (line.points[i + 1]?.[column] ?? null) === null) path += "h3";
        pen = y === null ? "M" : "L";
      });
      shape("path", inner, { class: className, stroke: line.color, d: path });
    }
  }
  const key = make("div", box, "key");
  for (const [name, end] of ends) make("div", key, "", `${name}: ${said(end[2])} at step ${end[0]}`);
}

function compare(root, boxes, data) {
  const chosen = [];
  const colors = new Map();  // run -> its color, for as long as it is chosen

  function update() {
    root.replaceChildren();
    boxes.forEach((box, i) => {
      box.checked = colors.has(i);
      box.disabled = !colors.has(i) && chosen.length >= data.colors.length;
      box.nextElementSibling.style.background = colors.get(i) ?? "";
    });
    if (!chosen.length) return;
    const runs = chosen.map((i) => ({ ...data.runs[i], color: colors.get(i) }));
    const titles = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))];
    make("h2", root, "", "Curves");
    const charts = make("div", root, "charts");
    for (const title of titles) {
      const those = runs.filter((run) => title in run.curves);
      const lines = those.map((run) => ({ name: run.name, color: run.color, points: run.curves[title] }));
      draw(charts, title, those[0].units[title], lines, data.sizes);
    }
    make("h2", root, "", "Configs");
    const fields = [...new Set(runs.flatMap((run) => Object.keys(run.fields)))];
    const differ = fields.filter((field) => new Set(runs.map((run) => run.fields[field])).size > 1);
    if (!differ.length) {
      make("p", root, "note", runs.length > 1 ? "Their configs are the same." : "Choose a second run to compare configs.");
      return;
    }
    const table = make("table", make("div", root, "wide"));
    const head = make("tr", make("thead", table));
    for (const text of ["what differs", ...runs.map((run) => run.name)]) make("th", head, "", text);
    const body = make("tbody", table);
    for (const field of differ) {
      const row = make("tr", body);
      for (const text of [field, ...runs.map((run) => run.fields[field] ?? "-")]) make("td", row, "", text);
    }
  }

  function choose(i) {
    const taken = [...colors.values()];
    colors.set(i, data.colors.map((c) => `rgb(${c.join(",")})`).find((color) => !taken.includes(color)));
    chosen.push(i);
  }

  boxes.forEach((box, i) => {
    box.onchange = () => {
      if (box.checked) choose(i);
      else chosen.splice(chosen.indexOf(i), 1) && colors.delete(i);
      update();
    };
    if (i < 2) choose(i);
  });
  update();
}

document.querySelectorAll("script.comparison-data").forEach((script) => {
  const boxes = [...document.querySelectorAll(".runs input[type=checkbox]")];
  compare(script.previousElementSibling, boxes, JSON.parse(script.textContent));
});
