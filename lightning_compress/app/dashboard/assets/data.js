// The runs, what is chosen of them, and who is told when that changes.

const { quantities, runs, others } = JSON.parse(byId("summary").textContent);
runs.forEach((run, index) => { run.index = index; });
const quantity = new Map(quantities.map((entry) => [entry.key, entry]));

const FACETS = [["method", "Method"], ["arch", "Architecture"], ["data", "Data"]];
const facetValues = Object.fromEntries(FACETS.map(([facet]) => [facet, [...new Set(runs.map((run) => run[facet]))].sort()]));

const metricKeys = quantities.filter((entry) => entry.kind === "metric").map((entry) => entry.key);
const costKeys = quantities.filter((entry) => entry.kind !== "metric").map((entry) => entry.key);

const state = {
  x: costKeys[0] ?? metricKeys[0],
  y: metricKeys[0] ?? costKeys[1] ?? costKeys[0],
  relative: false,
  logX: false,
  logY: false,
  text: "",
  off: { method: new Set(), arch: new Set(), data: new Set() },
  ranges: new Map(), // quantity -> [lowest, highest] as shown; infinite where there is no limit
  picked: null, // what the lasso holds; null: everything
  sort: { key: "label", down: false },
  chosen: new Set(), // to be compared
};

// Runs that came to nothing in a metric: so far from the others that a chart of all would show nothing else.
const failures = new Map(metricKeys.map((key) => {
  const { up } = quantity.get(key);
  const values = runs.map((run) => run.final[key]).filter((value) => value !== undefined).sort((a, b) => a - b);
  const at = (share) => values[Math.round(share * (values.length - 1))];
  const reach = Math.max(5 * (at(0.75) - at(0.25)), 0.1 * Math.abs(at(0.5)));
  const bad = (value) => (up ? value < at(0.25) - reach : value > at(0.75) + 10 * reach);
  return [key, new Set(runs.filter((run) => run.final[key] !== undefined && bad(run.final[key])).map((run) => run.index))];
}));

// What a run comes to in a quantity, as it is shown: relative costs are percentages, relative metrics differences.
function valueOf(run, key, side = "final") {
  const value = run[side][key];
  if (!state.relative || value === undefined) return value;
  const dense = run.dense[key];
  if (dense === undefined) return undefined;
  if (quantity.get(key).kind === "metric") return value - dense;
  return dense ? (100 * value) / dense : undefined;
}

const show = (key, value) => (state.relative ? relativeText : absolute)(quantity.get(key).kind, value);
const axisTitle = (key) => {
  const { label, kind } = quantity.get(key);
  if (!state.relative) return kind === "ms" ? `${label} (ms)` : label;
  return kind === "metric" ? `${label}, difference to dense` : `${label}, % of dense`;
};

function inRange(run, key, [low, high]) {
  const value = valueOf(run, key);
  return value !== undefined && value >= low && value <= high;
}

function matches(run) {
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
  const text = `${run.name} ${run.method} ${run.arch} ${run.data}`.toLowerCase();
  return words.every((word) => text.includes(word))
    && FACETS.every(([facet]) => !state.off[facet].has(run[facet]))
    && (state.picked === null || state.picked.has(run.index))
    && [...state.ranges].every(([key, range]) => inRange(run, key, range));
}

// The compressed runs that no other one of the same data beats in both quantities, by data, along x.
function frontOf(candidates) {
  const [xUp, yUp] = [quantity.get(state.x).up, quantity.get(state.y).up];
  const fronts = new Map();
  for (const data of facetValues.data) {
    const points = candidates
      .filter((run) => run.compressed && run.data === data)
      .map((run) => ({ run, x: valueOf(run, state.x), y: valueOf(run, state.y) }))
      .filter(({ x, y }) => x !== undefined && y !== undefined)
      .map((point) => ({ ...point, cost: xUp ? -point.x : point.x, gain: yUp ? point.y : -point.y }))
      .sort((a, b) => a.cost - b.cost || b.gain - a.gain);
    let best = -Infinity;
    const front = points.filter((point) => {
      const better = point.gain > best;
      best = Math.max(best, point.gain);
      return better;
    });
    if (front.length) fronts.set(data, front);
  }
  return fronts;
}

const median = (values) => {
  const sorted = values.filter((value) => value !== undefined).sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)];
};

// The dense networks: runs that began with the same one are one mark, at the median of what was measured each time.
function baselines() {
  const groups = new Map();
  for (const run of runs) {
    if (FACETS.some(([facet]) => facet !== "method" && state.off[facet].has(run[facet]))) continue;
    const key = JSON.stringify([run.arch, run.data, run.dense.params, run.dense.macs, ...metricKeys.map((name) => run.dense[name])]);
    groups.set(key, [...(groups.get(key) ?? []), run]);
  }
  return [...groups.values()].map((group) => ({
    arch: group[0].arch,
    data: group[0].data,
    x: median(group.map((run) => valueOf(run, state.x, "dense"))),
    y: median(group.map((run) => valueOf(run, state.y, "dense"))),
  })).filter(({ x, y }) => x !== undefined && y !== undefined);
}

let shown = runs;
let fronts = new Map();
let onFront = new Set();
const listeners = [];

// Tell all views; what only changes the order of the table leaves the charts alone.
function update(changes = {}) {
  Object.assign(state, changes);
  if (Object.keys(changes).join() === "sort") {
    listeners.filter((listener) => listener.ordered).forEach((listener) => listener());
    return;
  }
  shown = runs.filter(matches);
  fronts = frontOf(shown);
  onFront = new Set([...fronts.values()].flat().map(({ run }) => run.index));
  listeners.forEach((listener) => listener());
}

function setRange(key, low, high) {
  if (low === -Infinity && high === Infinity) state.ranges.delete(key);
  else state.ranges.set(key, [low, high]);
  update();
}

function clearFilters() {
  Object.values(state.off).forEach((set) => set.clear());
  state.ranges.clear();
  update({ text: "", picked: null });
}

// One run is pointed at in all views at once.
const pointers = [];
function pointAt(run) {
  pointers.forEach((pointer) => pointer(run));
}

const dark = window.matchMedia("(prefers-color-scheme: dark)");
// Told apart by people with any colour vision (after Okabe and Ito), and on either background.
const PALETTES = {
  light: ["#0072b2", "#d55e00", "#00875f", "#a8408f", "#c28a00", "#3a9bd8", "#5b5b5b", "#7b4b20", "#d4569b", "#2b3f8c", "#6b8e23", "#008b8b"],
  dark: ["#4aa8e8", "#ff8a3d", "#2fc797", "#d98acb", "#f0c040", "#9ad6fb", "#b4b4b4", "#c99a6b", "#f59ac4", "#93a4f2", "#b4d455", "#4fd6d6"],
};
const colourOf = (run) => {
  const palette = PALETTES[dark.matches ? "dark" : "light"];
  return palette[facetValues.method.indexOf(run.method) % palette.length];
};
const shapeOf = (run) => Object.keys(SHAPES)[facetValues.arch.indexOf(run.arch) % Object.keys(SHAPES).length];
const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
