// Generates images in the browser: seed -> z -> mapping -> ws -> synthesis -> canvas.
import { normals } from './random.js';

const $ = (id) => document.getElementById(id);
const SECONDS_PER_SEED = 2;
const MAX_SEED = 2 ** 32 - 1;

let ort, model, mapping, synthesis, backend;

// ---- Networks

// WebGPU where there is a GPU, else WebAssembly; ?backend=wasm in the address chooses.
async function backends() {
  const chosen = new URLSearchParams(location.search).get('backend');
  if (chosen) return [chosen];
  const adapter = await navigator.gpu?.requestAdapter();
  return adapter && !adapter.info?.isFallbackAdapter ? ['webgpu', 'wasm'] : ['wasm'];
}

async function load() {
  model = await (await fetch('model.json')).json();
  const names = await backends();
  for (const name of names) {
    try {
      ort = await import(`./runtime/ort.${name}.min.mjs`);
      ort.env.wasm.wasmPaths = new URL('runtime/', location.href).href;
      ort.env.wasm.proxy = name === 'wasm'; // in a worker, so that the controls stay responsive
      const open = (file) => ort.InferenceSession.create(file, { executionProviders: [name], logSeverityLevel: 3 });
      mapping = await open('mapping.onnx');
      synthesis = await open('synthesis.onnx');
      backend = name === 'webgpu' ? 'WebGPU' : 'WebAssembly';
      return;
    } catch (error) {
      if (name === names.at(-1)) throw error;
      console.info(`WebGPU is not used: ${error.message}`);
    }
  }
}

const scalar = (value) => new ort.Tensor('float32', Float32Array.of(value), []);

// Intermediate latents of a seed, Float32Array [num_ws * w_dim].
async function latents(seed, { label, psi, alpha }) {
  const feeds = {
    z: new ort.Tensor('float32', normals(seed, model.z_dim), [1, model.z_dim]),
    truncation_psi: scalar(psi),
  };
  if (model.c_dim) {
    const c = new Float32Array(model.c_dim);
    c[label] = 1;
    feeds.c = new ort.Tensor('float32', c, [1, model.c_dim]);
  }
  if (model.original) feeds.alpha = scalar(alpha);
  return (await mapping.run(feeds)).ws.data;
}

// An image for the state of the controls: float32 [C, H, W] in -1 to 1.
async function generate(state) {
  let ws = Float32Array.from(await latents(state.seed, state));
  if (state.mix > 0) {
    const target = await latents(state.target, state);
    ws = ws.map((w, i) => w + state.mix * (target[i] - w));
  }
  model.directions.forEach((direction, i) => {
    const amount = state.edits[i];
    if (amount) ws = ws.map((w, j) => w + amount * direction[j % model.w_dim]);
  });
  const feeds = { ws: new ort.Tensor('float32', ws, [1, model.num_ws, model.w_dim]) };
  if (model.original) feeds.alpha = scalar(state.alpha);
  return (await synthesis.run(feeds)).img.data;
}

function draw(img) {
  const [channels, height, width] = model.img;
  const size = height * width;
  const pixels = new ImageData(width, height); // clamps, and rounds half to even as numpy does
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = img[(channels < 3 ? 0 : c) * size + i] * 127.5 + 127.5;
    pixels.data[4 * i + 3] = channels === 4 ? img[3 * size + i] * 127.5 + 127.5 : 255;
  }
  $('image').getContext('2d').putImageData(pixels, 0, 0);
}

// ---- Controls

const clampSeed = (value) => Math.min(Math.max(Math.trunc(Number(value)) || 0, 0), MAX_SEED);
const randomSeed = () => Math.floor(Math.random() * 1e6);

const state = () => ({
  seed: clampSeed($('seed').value),
  target: clampSeed($('target').value),
  label: Number($('class').value),
  psi: Number($('psi').value),
  alpha: Number($('alpha').value),
  mix: Number($('mix').value),
  edits: [...$('directions').querySelectorAll('input')].map((input) => Number(input.value)),
});

let wanted = false; // the controls have changed since the last image
let busy = false;
let done;

// Draw the state of the controls; while an image is computed, only the newest state waits.
function update() {
  for (const input of document.querySelectorAll('input[type=range]')) input.nextElementSibling.value = input.value;
  wanted = true;
  if (!busy) {
    busy = true;
    done = drawWanted();
  }
  return done;
}

async function drawWanted() {
  try {
    while (wanted) {
      wanted = false;
      const start = performance.now();
      draw(await generate(state()));
      $('status').textContent = `${backend}, ${Math.round(performance.now() - start)} ms per image`;
    }
  } catch (error) {
    fail(error);
  } finally {
    busy = false;
  }
}

let playing = false;

async function play() {
  playing = !playing;
  $('play').textContent = playing ? 'Stop' : 'Play';
  $('play').ariaPressed = playing;
  let before = performance.now();
  while (playing) {
    const now = await new Promise(requestAnimationFrame);
    let mix = Number($('mix').value) + (now - before) / 1000 / SECONDS_PER_SEED;
    before = now;
    if (mix >= 1) {
      $('seed').value = $('target').value;
      $('target').value = randomSeed();
      mix = 0;
    }
    $('mix').value = mix;
    await update();
  }
}

function save() {
  $('image').toBlob((blob) => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(blob);
    link.download = `seed${String(state().seed).padStart(4, '0')}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  });
}

function fail(error) {
  playing = false;
  $('status').className = 'error';
  $('status').role = 'alert';
  $('status').textContent = `This page does not work here: ${error.message ?? error}`;
  console.error(error);
}

function show() {
  const [, height, width] = model.img;
  Object.assign($('image'), { width, height });
  document.title = $('name').textContent = model.name;
  $('about').textContent = model.about;
  for (let i = 0; i < model.c_dim; i++) $('class').add(new Option(i));
  const hide = (id, hidden) => { // a control and its label
    const label = document.querySelector(`label[for=${id}]`);
    label.hidden = label.nextElementSibling.hidden = hidden;
  };
  hide('class', !model.c_dim);
  hide('alpha', !model.original);
  model.directions.forEach((_, i) => {
    $('directions').insertAdjacentHTML('beforeend', `<label for="pc${i + 1}">pc${i + 1}</label><span class="row">
      <input id="pc${i + 1}" type="range" min="-3" max="3" step="0.1" value="0"><output></output></span>`);
  });
  $('controls').addEventListener('input', update);
  $('controls').addEventListener('submit', (event) => event.preventDefault());
  $('random').addEventListener('click', () => { $('seed').value = randomSeed(); update(); });
  $('play').addEventListener('click', play);
  $('defaults').addEventListener('click', () => { $('controls').reset(); update(); });
  $('save').addEventListener('click', save);
  for (const fieldset of document.querySelectorAll('fieldset')) fieldset.disabled = false;
}

try {
  $('status').textContent = 'Loading the networks …';
  await load();
  show();
  await update();
} catch (error) {
  fail(error);
}
