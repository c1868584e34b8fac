// The scatter with its Pareto front, by Plotly. Boxes become ranges of the two axes, which every other view knows too.

const MANY = 300; // runs, from which on marks are smaller
const scatter = { drag: "select", ready: false, revision: 0, everything: false };

// The font and the lines of a chart in the page's colours, light or dark.
function chartLayout(extra = {}) {
  return {
    font: { family: token("font"), size: 12, color: token("ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: token("card"), bordercolor: token("line"), font: { color: token("ink"), family: token("font"), size: 12 }, align: "left" },
    margin: { l: 64, r: 16, t: 8, b: 48 },
    showlegend: false,
    ...extra,
  };
}

function chartAxis(extra = {}) {
  return {
    gridcolor: token("grid"), linecolor: token("line"), zeroline: false, automargin: true, ticks: "outside",
    tickcolor: token("line"), ticklen: 4, exponentformat: "SI", ...extra,
  };
}

const CHART = { displayModeBar: false, responsive: false, doubleClick: false, scrollZoom: false };

function hoverText(run) {
  const lines = [`<b>${plotText(run.label)}</b>`, `${plotText(run.method)} · ${plotText(run.arch)}`];
  for (const key of [state.y, state.x]) {
    const { kind, label } = quantity.get(key);
    const [dense, final] = [run.dense[key], run.final[key]];
    lines.push(`${plotText(label)}: ${absolute(kind, final)} (dense ${absolute(kind, dense)})`);
  }
  for (const { unit, requested, reached } of run.budgets) {
    lines.push(`budget: ${plotText(unit)} ${reached === null ? "not measured" : share(reached)} of ${share(requested)}`);
  }
  return lines.join("<br>");
}

function runTrace(list, look) {
  return {
    type: "scatter", mode: "markers",
    x: list.map((run) => valueOf(run, state.x)),
    y: list.map((run) => valueOf(run, state.y)),
    customdata: list.map((run) => run.index),
    ...look,
  };
}

function scatterTraces() {
  const kept = new Set(shown);
  const faded = runs.filter((run) => !kept.has(run));
  const many = runs.length > MANY;
  const size = many ? 7 : 10;
  const ink = token("ink");
  const lines = [...fronts.values()].map((front) => ({
    type: "scatter", name: "front", mode: "lines", hoverinfo: "skip",
    x: front.map(({ x }) => x), y: front.map(({ y }) => y),
    line: { color: ink, width: 1.5, shape: quantity.get(state.x).up ? "vh" : "hv" },
  }));
  const dense = baselines();
  const right = Math.max(...runs.map((run) => valueOf(run, state.x) ?? -Infinity), ...dense.map(({ x }) => x));
  const denseTrace = {
    type: "scatter", name: "dense", mode: dense.length > 6 ? "markers" : "markers+text",
    x: dense.map(({ x }) => x), y: dense.map(({ y }) => y),
    text: dense.map((one) => (state.relative ? "dense" : `${plotText(one.arch)} dense`)),
    textposition: dense.map(({ x }, index) => `${index % 2 ? "top" : "bottom"} ${x > 0.8 * right ? "left" : "center"}`), textfont: { color: token("muted"), size: 11 }, cliponaxis: false,
    hoverinfo: "text",
    hovertext: dense.map((one) => `<b>${plotText(one.arch)}, dense</b><br>${plotText(one.data)}<br>${show(state.y, one.y)}<br>${show(state.x, one.x)}`),
    marker: { symbol: dense.map((one) => `${shapeOf(one)}-open`), size: 16, color: ink, line: { width: 2, color: ink } },
  };
  return [
    runTrace(faded, { name: "faded", hoverinfo: "skip", marker: { color: token("faint"), size: size - 2, symbol: faded.map(shapeOf), opacity: 0.45 } }),
    ...lines,
    runTrace(shown, {
      name: "runs",
      hoverinfo: "text",
      hovertext: shown.map(hoverText),
      marker: {
        color: shown.map(colourOf), size, opacity: many ? 0.75 : 0.95,
        symbol: shown.map((run) => shapeOf(run) + (run.compressed ? "" : "-open")),
        line: { width: shown.map((run) => (onFront.has(run.index) ? 2 : many ? 0 : 1)), color: shown.map((run) => (onFront.has(run.index) ? ink : token("card"))) },
      },
    }),
    denseTrace,
  ];
}

// Where an axis begins and ends so that runs that came to nothing are out of sight; nothing where Plotly decides.
function focus(key, log) {
  const lost = failures.get(key);
  if (scatter.everything || !lost?.size) return {};
  const inside = runs.filter((run) => !lost.has(run.index));
  const values = [...inside.map((run) => valueOf(run, key)), ...baselines().map((one) => (key === state.x ? one.x : one.y))]
    .filter((value) => value !== undefined && (!log || value > 0)).map((value) => (log ? Math.log10(value) : value));
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = 0.08 * (high - low || Math.abs(high) || 1);
  return { range: [low - margin, high + margin] };
}

function showOutside() {
  const lost = new Set([state.x, state.y].flatMap((key) => [...(failures.get(key) ?? [])]));
  const outside = shown.filter((run) => lost.has(run.index)).length;
  byId("outside").hidden = !outside;
  byId("outside").setAttribute("aria-pressed", String(scatter.everything));
  byId("outside").textContent = `Show ${outside} far off`;
}

// What the ranges of the two axes leave, as a rectangle; open sides reach the edge of the chart.
function rangeShape() {
  const [x, y] = [state.ranges.get(state.x), state.ranges.get(state.y)];
  if (!x && !y) return [];
  const side = (range, low, log) => {
    const value = range?.[low ? 0 : 1];
    const open = value === undefined || !Number.isFinite(value) || (log && value <= 0);
    return { open, value: open ? (low ? 0 : 1) : value };
  };
  const lines = [];
  for (const [axis, range, log] of [["x", x, state.logX], ["y", y, state.logY]]) {
    for (const low of [true, false]) {
      const { open, value } = side(range, low, log);
      if (!range || open) continue;
      const across = axis === "x" ? { xref: "x", yref: "paper", x0: value, x1: value, y0: 0, y1: 1 } : { xref: "paper", yref: "y", x0: 0, x1: 1, y0: value, y1: value };
      lines.push({ type: "line", ...across, line: { color: token("accent"), width: 1, dash: "dash" } });
    }
  }
  return lines;
}

function drawScatter() {
  if (!scatter.ready || !runs.length) return;
  const axis = (key, log) => {
    const { kind } = quantity.get(key);
    const suffix = state.relative && kind !== "metric" ? { ticksuffix: " %" } : {};
    return chartAxis({ title: { text: plotText(axisTitle(key)), standoff: 10 }, type: log ? "log" : "linear", ...focus(key, log), ...(log ? { dtick: 1, minor: { ticks: "outside", ticklen: 2 } } : {}), ...suffix });
  };
  const layout = chartLayout({
    height: byId("scatter").clientHeight || 420,
    hovermode: "closest",
    dragmode: scatter.drag,
    xaxis: axis(state.x, state.logX),
    yaxis: axis(state.y, state.logY),
    shapes: rangeShape(),
    selections: [],
    newselection: { line: { color: token("accent"), width: 1 } },
    uirevision: [state.x, state.y, state.relative, state.logX, state.logY, scatter.everything, scatter.revision].join(), // a zoom outlives a filter
  });
  Plotly.react("scatter", scatterTraces(), layout, CHART);
  showOutside();
  const best = [...fronts.values()].flat().length;
  byId("scatter").setAttribute("aria-label",
    `Scatter of ${plural(shown.length, "run")}, ${axisTitle(state.y)} over ${axisTitle(state.x)}; ${best} on the Pareto front. The table below has the same runs.`);
}

// A ring above the chart: to have Plotly draw it would be to draw all points again.
function pointInScatter(run) {
  const { xaxis, yaxis } = byId("scatter")._fullLayout;
  const [x, y] = run ? [valueOf(run, state.x), valueOf(run, state.y)] : [];
  const [left, top] = [xaxis.d2p(x), yaxis.d2p(y)];
  const inside = x !== undefined && y !== undefined && left >= 0 && left <= xaxis._length && top >= 0 && top <= yaxis._length;
  byId("ring").hidden = !inside;
  if (inside) byId("ring").style.transform = `translate(${xaxis._offset + left}px, ${yaxis._offset + top}px)`;
}

function selectInScatter(event) {
  if (!event) return; // Plotly says so when a selection is dropped
  if (event.range) {
    state.ranges.set(state.x, [...event.range.x].sort((a, b) => a - b));
    state.ranges.set(state.y, [...event.range.y].sort((a, b) => a - b));
    update();
  } else if (event.lassoPoints) {
    const inside = event.points.map((point) => point.customdata).filter((index) => index !== undefined);
    update({ picked: new Set(inside) });
  }
}

function setDrag(mode) {
  scatter.drag = mode || false;
  for (const button of document.querySelectorAll("[data-drag]")) button.setAttribute("aria-pressed", String(button.dataset.drag === mode));
  if (scatter.ready) drawScatter();
}

function startScatter() {
  for (const axis of ["x", "y"]) {
    const groups = [["Metrics", metricKeys], ["Costs", costKeys]].filter(([, keys]) => keys.length).map(([label, keys]) =>
      el("optgroup", { label }, ...keys.map((key) => el("option", { value: key }, quantity.get(key).label))));
    byId(`axis-${axis}`).append(...groups);
    byId(`axis-${axis}`).addEventListener("change", (event) => update({ [axis]: event.target.value }));
  }
  byId("relative").addEventListener("change", (event) => {
    state.ranges.clear(); // they were in other units
    update({ relative: event.target.checked });
  });
  byId("log-x").addEventListener("change", (event) => update({ logX: event.target.checked }));
  byId("log-y").addEventListener("change", (event) => update({ logY: event.target.checked }));
  for (const button of document.querySelectorAll("[data-drag]")) button.addEventListener("click", () => setDrag(button.dataset.drag));
  byId("reset-view").addEventListener("click", () => { scatter.revision += 1; drawScatter(); });
  byId("outside").addEventListener("click", () => { scatter.everything = !scatter.everything; drawScatter(); });
  // On a touch screen dragging scrolls the page, until another tool is asked for.
  if (window.matchMedia("(pointer: coarse)").matches) setDrag("");
  listeners.push(() => {
    for (const axis of ["x", "y"]) byId(`axis-${axis}`).value = state[axis];
    byId("relative").checked = state.relative;
    byId("log-x").checked = state.logX;
    byId("log-y").checked = state.logY;
    byId("ring").hidden = true;
    // Many points take a while: while one types, only the last word is drawn.
    clearTimeout(scatter.due);
    if (runs.length > MANY) scatter.due = setTimeout(drawScatter, 120);
    else drawScatter();
  });
  byId("key").textContent = "Line: Pareto front. Large hollow marks: dense networks. Colour: method, shape: architecture. Click a run to open it.";
}

function plotlyReady() {
  if (!runs.length) return;
  scatter.ready = true;
  drawScatter();
  const chart = byId("scatter");
  chart.on("plotly_selected", selectInScatter);
  chart.on("plotly_click", ({ points }) => points[0].customdata !== undefined && whenRead(() => openDetails(runs[points[0].customdata])));
  chart.on("plotly_hover", ({ points }) => points[0].customdata !== undefined && pointAt(runs[points[0].customdata]));
  chart.on("plotly_unhover", () => pointAt(null));
  pointers.push(pointInScatter);
}
