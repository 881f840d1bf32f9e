"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");

// What is chosen: numbers into data.prompts, its samples, and data.tints.
const chosen = { prompt: 0, sample: 0, tint: 0 };

// Colours from small to large. Those with a sign have the ground in the middle.
const RAMPS = {
  light: ["#f4f4f0", "#c3d9e8", "#78adcf", "#2c7bb6", "#08306b"],
  dark: ["#24292f", "#1f4e6e", "#2f83b0", "#79bedd", "#e4f3f9"],
  lightSigned: ["#a6510a", "#eda552", "#f7f7f5", "#9c93c9", "#4d2583"],
  darkSigned: ["#ffb454", "#8f5413", "#24292f", "#5b4a9c", "#c0b4f2"],
};

// --- Small things -----------------------------------------------------------------------------------------

/** Makes an element; children are elements or texts, and a text is never read as HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Returns a number as it is read: 25,105 or 0.0031. */
function number(value, digits = 5) {
  if (Number.isNaN(value)) return "none";
  return value.toLocaleString("en", { maximumSignificantDigits: digits }).replace("-", "−");
}

/** Returns the numbers of a prompt's or an answer's tokens by the chosen tint; null where there are none. */
function numbers(owner, tint) {
  if (owner.values === null) return null;
  owner.read ??= {};
  if (!(tint in owner.read)) {
    const bytes = Uint8Array.from(atob(owner.values[tint]), (letter) => letter.charCodeAt(0));
    owner.read[tint] = new Float32Array(bytes.buffer);
  }
  return owner.read[tint];
}

/** Returns the value at a place, NaN where there is none. */
function valueAt(owner, tint, place) {
  const found = numbers(owner, tint);
  return found === null || place >= found.length ? NaN : found[place];
}

// --- Colours ----------------------------------------------------------------------------------------------

function ramp() {
  const signed = data.tints[chosen.tint].kind === "direction" ? "Signed" : "";
  const stops = RAMPS[(dark.matches ? "dark" : "light") + signed];
  // Unlikely tokens are the strong ones.
  return data.tints[chosen.tint].kind === "logprob" ? [...stops].reverse() : stops;
}

const channels = (colour) => [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));

/** Returns the colour at a share from 0 to 1 of a ramp, as [red, green, blue]. */
function mixed(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [channels(stops[below]), channels(stops[below + 1])];
  return from.map((value, i) => Math.round(value + (to[i] - value) * (place - below)));
}

/** Returns black or white, whichever is easier to read on a colour. */
function readableOn(colour) {
  const [red, green, blue] = colour.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  const light = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return (light + 0.05) / 0.05 > 1.05 / (light + 0.05) ? "#000000" : "#ffffff";
}

function paint() {
  const tint = data.tints[chosen.tint];
  const stops = ramp();
  const width = tint.high - tint.low || 1;
  for (const [list, owner] of shown()) {
    for (const cell of list.querySelectorAll(".tokens > span")) {
      const value = valueAt(owner, chosen.tint, Number(cell.dataset.place));
      const none = Number.isNaN(value);
      cell.classList.toggle("none", none);
      cell.classList.toggle("beyond", !none && (value > tint.high + 1e-6 * width || value < tint.low - 1e-6 * width));
      if (none) {
        cell.style.background = cell.style.color = "";
        continue;
      }
      const colour = mixed(stops, (value - tint.low) / width);
      cell.style.background = `rgb(${colour.join(",")})`;
      cell.style.color = readableOn(colour);
    }
  }
  at("low").textContent = number(tint.low);
  at("high").textContent = number(tint.high);
  at("ramp").style.background = `linear-gradient(to right, ${stops.join(",")})`;
  at("legend").setAttribute("aria-label", `${tint.label}: from ${number(tint.low)} to ${number(tint.high)}`);
  const beyond = [];
  if (tint.least < tint.low) beyond.push(`down to ${number(tint.least)}`);
  if (tint.most > tint.high) beyond.push(`up to ${number(tint.most)}`);
  at("beyond").textContent = beyond.length ? `dashed frame: beyond the scale, ${beyond.join(" and ")}` : "";
}

// --- Grids ------------------------------------------------------------------------------------------------

/** Draws a grid; cells that differ from `truth`, where it is given, are marked. */
function drawGrid(caption, rows, truth = null) {
  const sides = Math.max(rows.length, ...rows.map((row) => row.length));
  const grid = make("div", { class: "grid", role: "img" });
  grid.style.setProperty("--cell", `${Math.max(7, Math.min(20, Math.floor(210 / sides)))}px`);
  grid.style.gridTemplateColumns = `repeat(${rows[0].length}, auto)`;
  let wrong = 0;
  rows.forEach((row, y) => [...row].forEach((colour, x) => {
    const cell = make("i", {}, colour);
    cell.style.background = `var(--c${colour})`;
    cell.style.color = readableOn(channels(getComputedStyle(document.documentElement).getPropertyValue(`--c${colour}`).trim()));
    if (truth !== null && (truth[y] === undefined || truth[y][x] !== colour)) {
      cell.className = "wrong";
      wrong += 1;
    }
    grid.append(cell);
  }));
  const shape = `${rows.length}×${rows[0].length}`;
  let words = `${caption}, ${shape}`;
  if (truth !== null) {
    const other = `${truth.length}×${truth[0].length}`;
    if (wrong) words += `, ${wrong} of ${rows.length * rows[0].length} cells wrong`;
    if (other !== shape) words += `, should be ${other}`;
    if (!wrong && other === shape) words += ", right";
  }
  grid.setAttribute("aria-label", `${words}; rows: ${rows.join(", ")}`);
  return make("figure", {}, make("figcaption", {}, words), grid);
}

function drawGrids(prompt, sample) {
  const place = at("grids");
  place.replaceChildren();
  at("digits-line").hidden = prompt.puzzle === null;
  if (prompt.puzzle === null) {
    if (sample.text !== null) place.append(make("p", { class: "text" }, sample.text));
    return;
  }
  prompt.puzzle.train.forEach(([input, output], i) => {
    place.append(make("div", { class: "pair" }, drawGrid(`Example ${i + 1}`, input), drawGrid("becomes", output)));
  });
  const last = make("div", { class: "pair", id: "test" }, drawGrid("Test", prompt.puzzle.input));
  if (sample.grid !== null) last.append(drawGrid("Answer", sample.grid, prompt.puzzle.truth));
  else last.append(make("figure", {}, make("figcaption", {}, "Answer: there is no grid in it")));
  if (prompt.puzzle.truth !== null) last.append(drawGrid("Right answer", prompt.puzzle.truth));
  place.append(last);
}

// --- Tokens -----------------------------------------------------------------------------------------------

/** Returns the two lists of tokens with what each shows. */
function shown() {
  const prompt = data.prompts[chosen.prompt];
  return [[at("answer"), prompt.samples[chosen.sample]], [at("prompt"), prompt]];
}

function drawTokens(list, tokens) {
  list.replaceChildren();
  tokens.forEach((token, place) => {
    const text = data.vocabulary[token];
    const cell = make("span", { role: "option", tabindex: place ? -1 : 0, "data-place": place, "aria-selected": false });
    // Spaces and ends of lines are shown by marks, so that no token is empty.
    for (const piece of text.split(/(\n|\t| )/)) {
      const mark = { "\n": "↵", "\t": "⇥", " ": "·" }[piece];
      if (mark) cell.append(make("i", { class: "mark" }, mark));
      else if (piece) cell.append(piece);
    }
    cell.setAttribute("aria-label", `token ${JSON.stringify(text)}`);
    list.append(cell);
    if (text.includes("\n")) list.append(make("br", { "aria-hidden": true }));
  });
}

/** Shows the numbers of a token below. */
function tell(cell) {
  const list = cell.parentElement;
  const owner = shown().find(([one]) => one === list)[1];
  const prompt = data.prompts[chosen.prompt];
  const place = Number(cell.dataset.place);
  const answer = list.id === "answer";
  const token = owner.tokens[place];
  const tint = data.tints[chosen.tint];
  const logprob = answer ? valueAt(owner, 0, place) : NaN;
  const lines = [
    ["token", JSON.stringify(data.vocabulary[token])],
    ["id", token],
    ["position", (answer ? prompt.tokens.length : 0) + place],
    ["of the", answer ? "answer" : "prompt"],
  ];
  if (answer) lines.push(["log-probability", `${number(logprob)} (${number(100 * Math.exp(logprob), 3)} %)`]);
  const norm = data.tints.findIndex((one) => one.kind === "norm" && (tint.layer === null || one.layer === tint.layer));
  for (const i of new Set([norm, chosen.tint])) {
    if (i > 0) lines.push([data.tints[i].label, owner.values === null ? "no row is stored" : number(valueAt(owner, i, place))]);
  }
  at("details").replaceChildren(...lines.map(([name, value]) => make("span", {}, make("i", {}, `${name} `), make("b", {}, String(value)))));
  for (const [one] of shown()) {
    for (const marked of one.querySelectorAll('[aria-selected="true"]')) marked.setAttribute("aria-selected", "false");
  }
  cell.setAttribute("aria-selected", "true");
}

/** Returns the token that is nearest in the line above (-1) or below (+1). */
function inNextLine(cell, step) {
  const from = cell.getBoundingClientRect();
  const cells = [...cell.parentElement.querySelectorAll("span")];
  const middle = (box) => (box.left + box.right) / 2;
  let best = null;
  for (const one of cells) {
    const box = one.getBoundingClientRect();
    const rows = (box.top - from.top) * step;
    if (rows < from.height / 2) continue;
    const distance = [rows, Math.abs(middle(box) - middle(from))];
    if (best === null || distance[0] < best.distance[0] - 1 ||
        (Math.abs(distance[0] - best.distance[0]) <= 1 && distance[1] < best.distance[1])) best = { one, distance };
  }
  return best === null ? null : best.one;
}

/** Moves the focus in a list by arrow keys; `moved` is called with the element that has it now. */
function moveByKeys(list, lines, moved) {
  list.addEventListener("keydown", (event) => {
    const cells = [...list.querySelectorAll('[role="option"]')];
    const here = cells.indexOf(event.target);
    if (here < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    const next = {
      ArrowRight: cells[here + 1], ArrowLeft: cells[here - 1], Home: cells[0], End: cells[cells.length - 1],
      ArrowDown: lines ? inNextLine(event.target, 1) : cells[here + 1],
      ArrowUp: lines ? inNextLine(event.target, -1) : cells[here - 1],
    };
    if (!(event.key in next)) return;
    event.preventDefault();
    const to = next[event.key];
    if (!to) return;
    event.target.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
    moved(to);
  });
}

// --- Choosing ---------------------------------------------------------------------------------------------

function drawTasks() {
  at("tasks-title").textContent = data.prompts.some((prompt) => prompt.puzzle !== null) ? "Tasks" : "Prompts";
  data.prompts.forEach((prompt, i) => {
    const known = prompt.samples.filter((sample) => sample.solved !== null);
    const solved = known.filter((sample) => sample.solved).length;
    const words = known.length ? `${solved ? "✓" : "✗"} ${solved} of ${known.length} right` : `${prompt.samples.length} stored`;
    const parts = [prompt.puzzle || prompt.test ? `test ${prompt.test}` : "", prompt.augmentation === "identity" ? "" : prompt.augmentation, words];
    at("tasks").append(make("div", { role: "option", tabindex: i ? -1 : 0, "data-number": i }, prompt.task, make("small", {}, parts.filter(Boolean).join(" · "))));
  });
}

function chooseTask(i) {
  chosen.prompt = i;
  chosen.sample = 0;
  const prompt = data.prompts[i];
  [...at("tasks").children].forEach((one, number) => {
    one.setAttribute("aria-selected", number === i);
    one.tabIndex = number === i ? 0 : -1;
  });
  at("title").textContent = prompt.task;
  at("sample").replaceChildren(...prompt.samples.map((sample, number) =>
    make("option", { value: number }, `${sample.sample}${sample.solved === null ? "" : sample.solved ? " ✓" : " ✗"}`)));
  at("samples").hidden = prompt.samples.length < 2;
  drawTokens(at("prompt"), prompt.tokens);
  chooseSample(0);
}

function chooseSample(i) {
  chosen.sample = i;
  const prompt = data.prompts[chosen.prompt];
  const sample = prompt.samples[i];
  at("sample").value = i;
  const verdict = at("verdict");
  verdict.className = sample.solved === null ? "" : sample.solved ? "right" : "wrong-word";
  const ending = { stop: "ended by itself", length: "cut at the longest length", imported: "imported" }[sample.finish] ?? sample.finish;
  verdict.textContent = `${sample.solved === null ? "" : sample.solved ? "✓ solved · " : "✗ not solved · "}${sample.tokens.length} tokens, ${ending}`;
  drawGrids(prompt, sample);
  drawTokens(at("answer"), sample.tokens);
  at("prompt-title").textContent = `Prompt (${prompt.tokens.length} tokens${prompt.values === null && data.tints.length > 1 ? ", without rows" : ""})`;
  at("answer-title").textContent = `Answer (${sample.tokens.length} tokens)`;
  at("details").textContent = "Point at a token, or move to one with Tab and the arrow keys, to see its numbers.";
  paint();
}

function chooseTint(i) {
  chosen.tint = i;
  paint();
  const marked = document.querySelector('.tokens [aria-selected="true"]');
  if (marked) tell(marked);
}

function start() {
  at("name").textContent = data.name;
  at("about").textContent = data.about;
  at("notes").append(...data.notes.map((note) => make("li", {}, note)));
  const groups = { logprob: "Model", norm: "Norms", direction: "Directions", feature: "SAE features" };
  for (const [kind, label] of Object.entries(groups)) {
    const options = data.tints.map((tint, i) => [tint, i]).filter(([tint]) => tint.kind === kind);
    if (options.length) at("tint").append(make("optgroup", { label }, ...options.map(([tint, i]) => make("option", { value: i }, tint.label))));
  }
  at("tint").addEventListener("change", (event) => chooseTint(Number(event.target.value)));
  at("sample").addEventListener("change", (event) => chooseSample(Number(event.target.value)));
  at("digits").addEventListener("change", (event) => document.body.classList.toggle("digits", event.target.checked));
  dark.addEventListener("change", paint);
  drawTasks();
  at("tasks").addEventListener("click", (event) => {
    const one = event.target.closest("[data-number]");
    if (one) chooseTask(Number(one.dataset.number));
  });
  moveByKeys(at("tasks"), false, (one) => chooseTask(Number(one.dataset.number)));
  for (const id of ["answer", "prompt"]) {
    const list = at(id);
    const touched = (event) => {
      const cell = event.target.closest(".tokens > span");
      if (cell) tell(cell);
    };
    list.addEventListener("pointerover", touched);
    list.addEventListener("focusin", touched);
    list.addEventListener("click", (event) => event.target.closest(".tokens > span")?.focus());
    moveByKeys(list, true, () => {});
  }
  chooseTask(0);
}

start();
