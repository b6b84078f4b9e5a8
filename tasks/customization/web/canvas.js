// Strokes are kept as points, in units of 1/SIDE of the canvas, so that Python prepares them as it does training data.
const SIDE = 280, PEN = 12, STEP = 10;
const pad = element.querySelector('canvas');
const context = pad.getContext('2d');
let strokes = [], pointer = null, cursor = null, penDown = false;

function fit() {
  const pixels = Math.round(pad.clientWidth * (window.devicePixelRatio || 1));
  if (pixels && pad.width !== pixels) pad.width = pad.height = pixels;
  draw();
}

function draw() {
  const scale = pad.width / SIDE;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, SIDE, SIDE);
  context.lineCap = context.lineJoin = 'round';
  context.lineWidth = PEN;
  context.strokeStyle = '#111827';
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(...stroke[0]);
    for (const point of stroke) context.lineTo(...point);
    context.stroke();
  }
  if (cursor) {
    context.lineWidth = 2;
    context.strokeStyle = penDown ? '#b91c1c' : '#1d4ed8';
    context.beginPath();
    context.arc(...cursor, 9, 0, 7);
    context.stroke();
  }
}

function changed() {
  props.value = strokes.map(stroke => stroke.map(point => [...point]));
  trigger('input');
}

function place(event) {
  const box = pad.getBoundingClientRect();
  const clamp = value => Math.round(100 * Math.min(Math.max(value, 0), SIDE)) / 100;
  return [clamp((event.clientX - box.left) / box.width * SIDE), clamp((event.clientY - box.top) / box.height * SIDE)];
}

function clear() {
  strokes = [];
  pointer = null;
  penDown = false;
  draw();
}

function back() {
  if (strokes.pop()) changed();
  penDown = false;
  draw();
}

pad.addEventListener('pointerdown', event => {
  if (pointer !== null || event.button !== 0) return;
  event.preventDefault();
  pad.setPointerCapture(event.pointerId);
  pointer = event.pointerId;
  cursor = null;
  penDown = false;
  strokes.push([place(event)]);
  draw();
});

pad.addEventListener('pointermove', event => {
  if (event.pointerId !== pointer) return;
  const events = event.getCoalescedEvents?.() ?? [];
  strokes.at(-1).push(...(events.length ? events : [event]).map(place));
  draw();
});

for (const name of ['pointerup', 'pointercancel']) {
  pad.addEventListener(name, event => {
    if (event.pointerId !== pointer) return;
    pointer = null;
    changed();
    // On a touch screen the focus would open the keyboard over the canvas.
    if (event.pointerType !== 'touch') document.querySelector('#mz-label input, #mz-label textarea')?.focus();
  });
}

const MOVES = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};

pad.addEventListener('keydown', event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in MOVES) {
    const step = event.shiftKey ? STEP / 4 : STEP;
    cursor = (cursor ?? [SIDE / 2, SIDE / 2]).map((at, axis) =>
      Math.min(Math.max(at + step * MOVES[event.key][axis], 0), SIDE));
    if (penDown) strokes.at(-1).push([...cursor]);
  } else if (event.key === ' ') {
    cursor ??= [SIDE / 2, SIDE / 2];
    penDown = !penDown;
    if (penDown) strokes.push([[...cursor]]);
    else changed();
  } else if (event.key === 'Backspace') back();
  else if (event.key === 'Escape') {
    clear();
    changed();
  } else return;
  event.preventDefault();
  draw();
});

pad.addEventListener('blur', () => {
  if (penDown) changed();
  penDown = false;
  cursor = null;
  draw();
});

element.addEventListener('click', event => {
  const action = event.target.closest('[data-do]')?.dataset.do;
  if (action === 'back') back();
  if (action === 'clear') {
    clear();
    changed();
  }
});

// Python sends no strokes, but what to do with them; the answer is always that of `changed`.
watch('value', () => {
  const wish = props.value ?? {};
  if (wish.clear) clear();
  if (wish.clear || wish.again) changed();
});
new ResizeObserver(fit).observe(pad);
fit();
