// The panel of filters: what the charts do by dragging, by keyboard; and chips that say what is on.

const parallelKeys = () => {
  const kinds = costKeys.filter((key) => !key.startsWith("cpu_time") && !key.startsWith("onnx_bytes"));
  return [...new Set([state.y, ...(quantity.get(state.x).kind === "metric" ? [state.x] : []), ...kinds, state.x])];
};

function buildGroups() {
  for (const [facet, title] of FACETS) {
    if (facetValues[facet].length < (facet === "data" ? 2 : 1)) continue;
    const list = el("div", { class: "options" });
    for (const value of facetValues[facet]) {
      const box = el("input", { type: "checkbox", "data-facet": facet, value });
      box.addEventListener("change", () => {
        state.off[facet][box.checked ? "delete" : "add"](value);
        update();
      });
      const count = runs.filter((run) => run[facet] === value).length;
      const only = el("button", { type: "button", class: "only", "aria-label": `only ${value || "unnamed"}` }, "only");
      only.addEventListener("click", () => {
        state.off[facet] = new Set(facetValues[facet].filter((other) => other !== value));
        update();
      });
      const label = el("label", {}, box, el("span", { class: "sample", "data-facet": facet, "data-value": value }), el("span", { class: "value" }, breakable(value || "unnamed")), el("span", { class: "tally" }, String(count)));
      list.append(el("div", { class: "option" }, label, only));
    }
    byId("groups").append(el("fieldset", {}, el("legend", {}, title), list));
  }
}

// The legend is in the filters: a colour for each method, a shape for each network.
function drawSamples() {
  for (const sample of document.querySelectorAll(".sample")) {
    const { facet, value } = sample.dataset;
    if (facet === "method") sample.replaceChildren(el("span", { class: "dot", style: `background:${colourOf({ method: value })}` }));
    if (facet === "arch") sample.replaceChildren(mark(shapeOf({ arch: value })));
  }
}

const rangeRows = new Map();

function buildRanges() {
  const keys = parallelKeys();
  if ([...rangeRows.keys()].join() === keys.join()) return;
  rangeRows.clear();
  const fields = keys.map((key) => {
    const { label } = quantity.get(key);
    const [low, high] = ["lowest", "highest"].map((which) =>
      el("input", { type: "number", step: "any", "aria-label": `${label}, ${which}`, placeholder: which === "lowest" ? "min" : "max" }));
    const changed = () => setRange(key, low.value === "" ? -Infinity : Number(low.value), high.value === "" ? Infinity : Number(high.value));
    [low, high].forEach((input) => input.addEventListener("change", changed));
    const name = el("span", { class: "range-name" });
    rangeRows.set(key, { low, high, name });
    return el("div", { class: "range" }, name, low, high);
  });
  byId("ranges").replaceChildren(el("legend", {}, "Ranges"), ...fields);
}

function showFilters() {
  buildRanges();
  if (byId("search").value !== state.text) byId("search").value = state.text;
  for (const box of document.querySelectorAll("input[data-facet]")) box.checked = !state.off[box.dataset.facet].has(box.value);
  for (const [key, { low, high, name }] of rangeRows) {
    name.textContent = axisTitle(key) + (quantity.get(key).kind === "bytes" && !state.relative ? " (bytes)" : "");
    const [from, to] = state.ranges.get(key) ?? [-Infinity, Infinity];
    low.value = from === -Infinity ? "" : Number(from.toPrecision(6));
    high.value = to === Infinity ? "" : Number(to.toPrecision(6));
  }
  byId("count").textContent = shown.length === runs.length
    ? `${plural(runs.length, "run")}, ${onFront.size} on the front`
    : `${shown.length.toLocaleString("en")} of ${plural(runs.length, "run")}, ${onFront.size} on the front`;
  showChips();
}

function showChips() {
  const chips = [];
  const add = (text, clear) => {
    const button = el("button", { type: "button", "aria-label": `remove filter: ${text}` }, text, el("span", { "aria-hidden": "true" }, " ×"));
    button.addEventListener("click", () => {
      clear();
      (byId("chips").querySelector("button") ?? byId("search")).focus(); // the chip that had the focus is gone
    });
    chips.push(el("li", {}, button));
  };
  if (state.text) add(`“${state.text}”`, () => update({ text: "" }));
  for (const [facet, title] of FACETS) {
    if (!state.off[facet].size) continue;
    const on = facetValues[facet].filter((value) => !state.off[facet].has(value));
    const text = on.length === 1 ? on[0] : `${on.length} of ${facetValues[facet].length}`;
    add(`${title}: ${text}`, () => { state.off[facet].clear(); update(); });
  }
  for (const [key, [low, high]] of state.ranges) {
    const from = low === -Infinity ? "≤ " : high === Infinity ? "≥ " : `${show(key, low)} to `;
    add(`${quantity.get(key).label} ${from}${show(key, high === Infinity ? low : high)}`, () => setRange(key, -Infinity, Infinity));
  }
  if (state.picked !== null) add(`${plural(state.picked.size, "run")} in the lasso`, () => update({ picked: null }));
  if (chips.length > 1) add("clear all", clearFilters);
  byId("chips").replaceChildren(...chips);
}

function startFilters() {
  buildGroups();
  drawSamples();
  byId("search").addEventListener("input", (event) => update({ text: event.target.value }));
  if (window.matchMedia("(max-width: 900px)").matches) byId("filters").open = false;
  listeners.push(showFilters);
}
