// Parallel coordinates: a line for each run on a canvas, axes and brushes above it.

const parallel = { keys: [], scales: new Map(), pointed: null, width: 0, due: false };
const PARALLEL = { height: 260, top: 44, bottom: 24, side: 54, least: 96 };

// From the values of all runs to pixels and back. Costs that span more than a factor of twenty are logarithmic.
function scaleOf(key) {
  const lost = failures.get(key) ?? new Set();
  const values = runs.filter((run) => !lost.has(run.index)).map((run) => valueOf(run, key)).filter((value) => value !== undefined);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (!values.length) return null;
  const log = low > 0 && high / low > 20;
  if (low === high) [low, high] = [low - Math.abs(low || 1) * 0.1, high + Math.abs(high || 1) * 0.1];
  const [bottom, top] = [PARALLEL.height - PARALLEL.bottom, PARALLEL.top];
  const plain = (value) => (log ? Math.log10(value) : value);
  const [from, to] = [plain(low), plain(high)];
  return {
    low,
    high,
    beyond: lost.size ? (quantity.get(key).up ? "low" : "high") : "", // lines from there end at the axis' end
    to: (value) => Math.min(bottom, Math.max(top, bottom - ((plain(value) - from) / (to - from)) * (bottom - top))),
    from: (y) => {
      const at = from + ((bottom - Math.min(bottom, Math.max(top, y))) / (bottom - top)) * (to - from);
      return log ? 10 ** at : at;
    },
  };
}

const parallelX = (index) => PARALLEL.side + (index * (parallel.width - 2 * PARALLEL.side)) / Math.max(1, parallel.keys.length - 1);

function drawParallelLines() {
  parallel.due = false;
  const canvas = byId("parallel").querySelector("canvas");
  const ratio = window.devicePixelRatio || 1;
  canvas.width = parallel.width * ratio;
  canvas.height = PARALLEL.height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const line = (run) => {
    pen.beginPath();
    let begun = false;
    parallel.keys.forEach((key, index) => {
      const value = valueOf(run, key);
      if (value === undefined) { begun = false; return; } // a gap where there is no value
      pen[begun ? "lineTo" : "moveTo"](parallelX(index), parallel.scales.get(key).to(value));
      begun = true;
    });
    pen.stroke();
  };
  const kept = new Set(shown);
  pen.lineWidth = 1;
  pen.strokeStyle = token("faint");
  pen.globalAlpha = runs.length > 200 ? 0.25 : 0.6;
  runs.filter((run) => !kept.has(run)).forEach(line);
  pen.globalAlpha = shown.length > 300 ? 0.3 : shown.length > 60 ? 0.55 : 0.85;
  pen.lineWidth = 1.5;
  for (const run of shown) {
    pen.strokeStyle = colourOf(run);
    line(run);
  }
  if (parallel.pointed) {
    pen.globalAlpha = 1;
    for (const [width, colour] of [[6, token("card")], [3, colourOf(parallel.pointed)]]) {
      pen.lineWidth = width;
      pen.strokeStyle = colour;
      line(parallel.pointed);
    }
  }
}

function drawParallelAxes() {
  const layer = byId("parallel").querySelector("svg");
  layer.setAttribute("width", parallel.width);
  layer.setAttribute("height", PARALLEL.height);
  const [top, bottom] = [PARALLEL.top, PARALLEL.height - PARALLEL.bottom];
  const axes = parallel.keys.map((key, index) => {
    const scale = parallel.scales.get(key);
    const group = svg("g", { transform: `translate(${parallelX(index)},0)`, "data-key": key });
    const text = (y, content, kind) => group.append(svg("text", { y, "text-anchor": "middle", class: kind }, content));
    text(16, quantity.get(key).short, "name");
    text(top - 9, (scale.beyond === "high" ? "≥ " : "") + show(key, scale.high), "end");
    text(bottom + 16, (scale.beyond === "low" ? "≤ " : "") + show(key, scale.low), "end");
    group.append(svg("line", { y1: top, y2: bottom, class: "axis" }));
    const range = state.ranges.get(key);
    if (range) {
      const [y1, y2] = [scale.to(Math.min(range[1], scale.high)), scale.to(Math.max(range[0], scale.low))];
      group.append(svg("rect", { x: -7, y: y1, width: 14, height: Math.max(3, y2 - y1), rx: 3, class: "brush" }));
    }
    group.append(svg("rect", { x: -16, y: top - 6, width: 32, height: bottom - top + 12, class: "grip" }));
    return group;
  });
  layer.replaceChildren(...axes);
}

function drawParallel() {
  const box = byId("parallel");
  parallel.keys = parallelKeys().filter((key) => scaleOf(key) !== null);
  parallel.scales = new Map(parallel.keys.map((key) => [key, scaleOf(key)]));
  parallel.width = Math.max(byId("parallel-scroll").clientWidth, (parallel.keys.length - 1) * PARALLEL.least + 2 * PARALLEL.side);
  box.style.width = `${parallel.width}px`;
  byId("parallel").querySelector("canvas").setAttribute("aria-label",
    `Parallel coordinates of ${plural(shown.length, "run")}: ${parallel.keys.map((key) => quantity.get(key).label).join(", ")}`);
  drawParallelAxes();
  drawParallelLines();
}

function brushParallel(event) {
  const key = event.target.closest("[data-key]")?.dataset.key;
  if (!key || !event.target.classList.contains("grip")) return;
  event.preventDefault();
  const layer = byId("parallel").querySelector("svg");
  const place = (moved) => moved.clientY - layer.getBoundingClientRect().top;
  const [start, scale] = [place(event), parallel.scales.get(key)];
  let end = start;
  layer.setPointerCapture(event.pointerId);
  const move = (moved) => {
    end = place(moved);
    if (Math.abs(end - start) < 4) return;
    state.ranges.set(key, [scale.from(Math.max(start, end)), scale.from(Math.min(start, end))]);
    drawParallelAxes(); // the rest follows when the button is let go
  };
  const stop = () => {
    layer.removeEventListener("pointermove", move);
    const clicked = Math.abs(end - start) < 4;
    const [low, high] = clicked ? [-Infinity, Infinity] : [scale.from(Math.max(start, end)), scale.from(Math.min(start, end))];
    // at the end of an axis there is no limit: what lies there by rounding is to stay
    setRange(key, low <= scale.low ? -Infinity : low, high >= scale.high ? Infinity : high);
  };
  layer.addEventListener("pointermove", move);
  layer.addEventListener("pointerup", stop, { once: true });
}

function startParallel() {
  byId("parallel").append(el("canvas", { role: "img" }), svg("svg", { "aria-hidden": "true" }));
  byId("parallel").querySelector("svg").addEventListener("pointerdown", brushParallel);
  listeners.push(drawParallel);
  pointers.push((run) => {
    parallel.pointed = run;
    if (!parallel.due) requestAnimationFrame(drawParallelLines);
    parallel.due = true;
  });
}
