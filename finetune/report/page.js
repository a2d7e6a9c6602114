"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// State that survives the reloads of a run in progress.
const key = "finetune-report:" + location.pathname;
const stored = (() => { try { return JSON.parse(sessionStorage.getItem(key)) || {}; } catch { return {}; } })();
const store = (changes) => {
  Object.assign(stored, changes);
  try { sessionStorage.setItem(key, JSON.stringify(stored)); } catch { /* storage is off: nothing is kept */ }
};

// The two sliders. All runs show the same time: each its last frame up to it.
const frames = JSON.parse($("#frames").textContent);
const times = [...new Set(frames.flat().map((frame) => frame.kimg))].sort((a, b) => a - b);
const time = $("#time"), split = $("#split"), play = $("#play");

function showTime() {
  const kimg = times[Number(time.value)];
  for (const viewer of all(".viewer")) {
    const own = frames[viewer.dataset.run];
    if (!own.length) continue;
    const frame = own.filter((each) => each.kimg <= kimg).pop() || own[0];
    $(".chosen", viewer).src = frame.samples;
    $(".when", viewer).textContent = `${frame.kimg} kimg`;
    const strip = $(".chosen-strip", viewer);
    if (strip) strip.src = frame.strip;
  }
  const text = `${kimg} kimg, image ${Number(time.value) + 1} of ${times.length}`;
  time.setAttribute("aria-valuetext", text);
  $("#now").textContent = text;
  store({ time: Number(time.value) === times.length - 1 ? null : kimg });  // null: follow the newest
}

function showSplit() {
  for (const each of all(".compare")) each.style.setProperty("--split", split.value + "%");
  split.setAttribute("aria-valuetext", `${split.value} % start`);
  store({ split: split.value });
}

let timer = 0;
function setPlaying(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => { time.value = (Number(time.value) + 1) % times.length; showTime(); }, 400) : 0;
  play.textContent = on ? "Stop" : "Play";
  play.setAttribute("aria-pressed", String(on));
}

if (times.length > 1) {
  $("#controls").hidden = false;
  time.max = times.length - 1;
  const chosen = stored.time == null ? -1 : times.indexOf(stored.time);
  time.value = chosen < 0 ? times.length - 1 : chosen;
  if (stored.split != null) split.value = stored.split;
  time.addEventListener("input", () => { setPlaying(false); showTime(); });
  split.addEventListener("input", showSplit);
  play.addEventListener("click", () => setPlaying(!timer));
  for (const each of all(".compare")) {  // the divider follows a pressed pointer
    const move = (event) => {
      const box = each.getBoundingClientRect();
      if (event.buttons) { split.value = 100 * (event.clientX - box.left) / box.width; showSplit(); }
    };
    each.addEventListener("pointerdown", move);
    each.addEventListener("pointermove", move);
  }
  showTime();
  showSplit();
}

// Values under the pointer, shown in the legend of a chart.
for (const chart of all(".chart")) {
  const svg = $("svg", chart), lines = all(".line", svg), shown = all(".legend output", chart);
  const [left, right, low, high] = svg.dataset.range.split(" ").map(Number);
  const [boxLeft, boxRight, boxBottom, boxTop, width] = svg.dataset.box.split(" ").map(Number);
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cross.setAttribute("class", "cross");
  svg.append(cross);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    cross.setAttribute("d", `M${x} ${boxTop}V${boxBottom}`);
    lines.forEach((line, index) => {
      const points = line.getAttribute("d").split(/[ML]/).slice(1).map((pair) => pair.split(",").map(Number));
      const [px, py] = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      const kimg = left + (px - boxLeft) / (boxRight - boxLeft) * (right - left);
      let value = high - (py - boxTop) / (boxBottom - boxTop) * (high - low);
      if (svg.dataset.log === "1") value = 10 ** value;
      shown[index].textContent = `${value.toPrecision(3)} at ${Number(kimg.toPrecision(3))}`;
    });
  });
  svg.addEventListener("pointerleave", () => {
    cross.removeAttribute("d");
    for (const each of shown) each.textContent = "";
  });
}

// Reload while the run is active, unless the page was used recently.
const { written, reload } = document.body.dataset;
let lastInput = 0;
for (const kind of ["pointerdown", "keydown", "wheel", "touchmove"]) {
  addEventListener(kind, () => { lastInput = Date.now(); }, { passive: true });
}
const showAge = () => {
  const minutes = Math.floor((Date.now() / 1000 - written) / 60);
  $("#age").textContent = Number(reload) && minutes >= 2 ? `, ${minutes} minutes ago` : "";
};
showAge();
if (Number(reload)) {
  setInterval(() => {
    showAge();
    const isIdle = Date.now() - lastInput > 1000 * reload && !timer && !$("details[open]");
    if (isIdle && !document.hidden) location.reload();
  }, Number(reload) * 1000);
}
