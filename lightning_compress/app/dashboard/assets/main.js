// Beginning, and the address: a link to the page holds what is chosen in it.

function writeHash() {
  if (location.protocol === "about:") return; // a page without an address of its own, as in a notebook's frame
  const hash = new URLSearchParams({ x: state.x, y: state.y });
  const flags = { rel: state.relative, lx: state.logX, ly: state.logY };
  for (const [name, on] of Object.entries(flags)) if (on) hash.set(name, "1");
  if (state.text) hash.set("q", state.text);
  for (const [facet] of FACETS) for (const value of state.off[facet]) hash.append(`no-${facet}`, value);
  for (const [key, [low, high]] of state.ranges) hash.append("range", [key, ...[low, high].map((end) => (Number.isFinite(end) ? end : ""))].join("~"));
  if (state.sort.key !== "label" || state.sort.down) hash.set("sort", (state.sort.down ? "-" : "") + state.sort.key);
  for (const index of state.chosen) hash.append("chosen", runs[index].folder);
  for (const dialog of document.querySelectorAll("dialog[data-shows]")) hash.set("open", dialog.dataset.shows);
  history.replaceState(null, "", `#${hash}`);
}

// By their folders: the page may have been written anew since, with more runs in it.
const runsIn = (folders) => runs.filter((run) => folders.includes(run.folder));

function readHash() {
  const hash = new URLSearchParams(location.hash.slice(1));
  for (const axis of ["x", "y"]) if (quantity.has(hash.get(axis))) state[axis] = hash.get(axis);
  state.relative = hash.has("rel");
  state.logX = hash.has("lx");
  state.logY = hash.has("ly");
  state.text = hash.get("q") ?? "";
  for (const [facet] of FACETS) state.off[facet] = new Set(hash.getAll(`no-${facet}`).filter((value) => facetValues[facet].includes(value)));
  for (const [key, low, high] of hash.getAll("range").map((text) => text.split("~"))) {
    if (quantity.has(key)) state.ranges.set(key, [low === "" ? -Infinity : Number(low), high === "" ? Infinity : Number(high)]);
  }
  const sort = hash.get("sort");
  if (sort) state.sort = { key: sort.replace(/^-/, ""), down: sort.startsWith("-") };
  state.chosen = new Set(runsIn(hash.getAll("chosen")).map((run) => run.index));
  return hash.get("open");
}

function openLinked(link) {
  const [run] = runsIn([link]);
  if (link === COMPARED && state.chosen.size === 2) openComparison(...[...state.chosen].map((index) => runs[index]));
  else if (run) openDetails(run);
}

function redraw() {
  drawSamples();
  update();
}

function start() {
  showTotals();
  showOthers();
  startDialogs();
  if (!runs.length) { // nothing to draw or to filter
    byId("layout").hidden = true;
    byId("compare").closest(".controls").hidden = true;
    byId("table").tBodies[0].append(el("tr", {}, el("td", { class: "empty" }, "No run has finished yet.")));
    return;
  }
  const link = readHash();
  startFilters();
  startTable();
  startParallel();
  startScatter();
  writeHash.ordered = true;
  listeners.push(writeHash);
  const chosen = () => [...state.chosen].map((index) => runs[index]);
  byId("compare").addEventListener("click", () => whenRead(() => openComparison(...chosen())));
  update();
  window.addEventListener("plotly-ready", () => {
    plotlyReady();
    whenRead(() => openLinked(link));
  });
  dark.addEventListener("change", redraw);
  let resizing = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(resizing);
    resizing = requestAnimationFrame(() => {
      drawParallel();
      if (scatter.ready) Plotly.Plots.resize("scatter");
    });
  });
}

start();
