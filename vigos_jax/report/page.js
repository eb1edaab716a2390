// The numbers of charts, and the browser of snapshots, which reads the JSON beside it. Writes texts as texts only.
"use strict";
const FILTERS = ["all", "invalid", "wrong", "leaky"];

function make(tag, parent, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function drawShot(parent, name, shot, roles) {
  const box = make("div", parent);
  const head = make("div", box, "when", name + " ");
  if (!shot) {
    head.append("no snapshot");
    return;
  }
  for (const tag of shot.tags) make("span", head, "tag " + tag, tag);
  head.append(shot.note);
  const tokens = make("div", box, "tokens");
  shot.tokens.forEach((text, i) => {
    const span = make("span", tokens, "", text);
    const role = roles[shot.roles[i]];
    span.title = role ? role.name + ": " + shot.hovers[i] : "not scored";
    if (!role) return;
    const [r, g, b] = role.color;
    span.style.borderBottomColor = `rgb(${r},${g},${b})`;
    span.style.background = `rgba(${r},${g},${b},${shot.strengths[i]})`;
  });
}

function browse(root, data) {
  const last = data.steps.length - 1;
  let filter = "all";
  const controls = make("div", root, "controls");
  const group = make("div", controls);
  const buttons = FILTERS.map((name) => {
    const button = make("button", group, "", name);
    button.type = "button";
    button.dataset.filter = name;
    button.onclick = () => { filter = name; draw(); };
    return button;
  });
  const label = make("label", controls, "step");
  const said = make("span", label);
  const slider = make("input", label);
  Object.assign(slider, { type: "range", min: 0, max: last, step: 1, value: last, disabled: last < 1 });
  slider.oninput = () => draw();
  const probes = data.probes.map((probe) => {
    const row = make("div", root, "probe");
    const side = make("div", row);
    if (probe.picture) Object.assign(make("img", side), { src: probe.picture, alt: "image of the question" });
    const body = make("div", row);
    make("div", body, "title", probe.title);
    make("div", body, "question", probe.question);
    return { row, shots: probe.shots, pair: make("div", body, "pair") };
  });
  const nothing = make("p", root, "note", "No rollout of this step is like that.");

  function draw() {
    const at = Number(slider.value);
    said.textContent = "step " + data.steps[at];
    const has = (shot, name) => name === "all" || (shot !== null && shot.tags.includes(name));
    for (const button of buttons) {
      const name = button.dataset.filter;
      const count = probes.filter((p) => has(p.shots[at], name)).length;
      button.textContent = name + " " + count;
      button.setAttribute("aria-pressed", String(name === filter));
    }
    let shown = 0;
    for (const { row, shots, pair } of probes) {
      row.hidden = !has(shots[at], filter);
      if (row.hidden) continue;
      shown += 1;
      pair.replaceChildren();
      drawShot(pair, data.first, shots[0], data.roles);
      if (at > 0) drawShot(pair, "step " + data.steps[at], shots[at], data.roles);
    }
    nothing.hidden = shown > 0;
  }
  draw();
}

document.querySelectorAll("script.browser-data").forEach((script) => {
  const root = script.previousElementSibling;
  root.replaceChildren();
  browse(root, JSON.parse(script.textContent));
});

// A chart's numbers at a step: under the pointer, or by the arrow keys where the chart has the focus.
document.querySelectorAll(".chart > svg").forEach((svg) => {
  const said = svg.parentElement.querySelector(".at");
  const columns = [...svg.querySelectorAll(".column")];
  let at = columns.length;
  function choose(i) {
    columns[at]?.classList.remove("chosen");
    at = i;
    columns[at]?.classList.add("chosen");
    said.textContent = columns[at] ? columns[at].textContent.replaceAll("\n", " · ") : "";
  }
  columns.forEach((column, i) => { column.onpointerenter = () => choose(i); });
  svg.onpointerleave = () => choose(columns.length);
  svg.onblur = () => choose(columns.length);
  svg.onkeydown = (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;  // the browser's own
    const ends = { Home: 0, End: columns.length - 1, ArrowLeft: at - 1, ArrowRight: at >= columns.length ? 0 : at + 1 };
    if (!(event.key in ends)) return;
    event.preventDefault();
    choose(Math.min(Math.max(ends[event.key], 0), columns.length - 1));
  };
});
