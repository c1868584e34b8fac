// Two runs side by side: figures, layers, curves, and what their configurations differ in.

const COMPARED = "/compare"; // in the address, where the folder of a run would be

function comparedFigures(first, second) {
  const rows = keysOf(first, second).map((key) => {
    const { label, kind, up } = quantity.get(key);
    const [a, b] = [first.final[key], second.final[key]];
    const known = a !== undefined && b !== undefined;
    const verdict = !known ? "" : a === b ? "same" : kind === "metric" ? relativeText(kind, b - a) : factor(kind, a, b);
    const better = known && a !== b ? ((b > a) === up ? "B" : "A") : "";
    const cell = (value, side) => el("td", { class: better === side ? "number better" : "number" }, absolute(kind, value));
    return el("tr", {}, el("th", { scope: "row" }, label), cell(a, "A"), cell(b, "B"), el("td", { class: "number" }, verdict), el("td", {}, better));
  });
  return scrolling("Figures of both", el("table", {}, headRow(["Quantity"], ["A", true], ["B", true], ["B against A", true], ["better"]), el("tbody", {}, ...rows)));
}

function comparedLayers(first, second) {
  const sides = [first, second].map((list) => new Map(list.map((layer) => [layer.layer, layer])));
  const longerFirst = [...sides].sort((a, b) => b.size - a.size); // it is the likelier to have the network's order
  const names = [...new Set(longerFirst.flatMap((side) => [...side.keys()]))];
  if (!names.length) return el("p", { class: "hint" }, "No layer changed in either.");
  const unchanged = () => [el("td", {}, "unchanged"), el("td", { class: "number" }, "–"), el("td", { class: "number" }, "–"), el("td", {}, "–")];
  const rows = names.map((name) => {
    const [a, b] = sides.map((side) => side.get(name));
    const before = (a ?? b).before;
    return el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, el("span", { class: "shape" }, shapeText(before))),
      ...(a ? layerCells(a) : unchanged()), ...(b ? layerCells(b) : unchanged()));
  });
  const titles = ["now", "MACs", "stored", "how"];
  const numbers = ["MACs", "stored"];
  const each = ["A", "B"].flatMap((side) => titles.map((title) => [`${side}: ${title}`, numbers.includes(title)]));
  return scrolling("Layers of both", el("table", { class: "layers" }, headRow(["Layer"], ["before"], ...each), el("tbody", {}, ...rows)));
}

// Dotted name -> value. What only says a top-level node again (recipe.method is method) is left out, and so are places.
function flattened(config) {
  const tops = new Set(Object.values(config).filter((value) => value && typeof value === "object").map((value) => JSON.stringify(value)));
  const found = new Map();
  const walk = (data, prefix) => {
    for (const [key, value] of Object.entries(data)) {
      const name = prefix ? `${prefix}.${key}` : key;
      if (["logger", "output_dir", "cache_dir"].includes(name)) continue;
      const nested = value !== null && typeof value === "object" && !Array.isArray(value);
      if (nested && prefix && tops.has(JSON.stringify(value))) continue;
      if (nested) walk(value, name);
      else found.set(name, JSON.stringify(value));
    }
  };
  walk(config, "");
  return found;
}

function comparedConfigs(first, second) {
  const [a, b] = [first, second].map((config) => flattened(config ?? {}));
  const names = [...new Set([...a.keys(), ...b.keys()])].filter((name) => a.get(name) !== b.get(name));
  if (!names.length) return el("p", { class: "hint" }, "The configurations are the same, as far as they were recorded.");
  const rows = names.map((name) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, a.get(name) ?? "–"), el("td", {}, b.get(name) ?? "–")));
  return scrolling("Differences of the configurations", el("table", { class: "config" }, headRow(["Setting"], ["A"], ["B"]), el("tbody", {}, ...rows)));
}

function openComparison(first, second) {
  const dialog = byId("comparison");
  const [a, b] = [detailsOf(first), detailsOf(second)];
  const curves = el("div", { class: "curves" });
  const name = (letter, run) => el("p", { class: "side" }, el("strong", {}, letter), el("span", { class: "dot", style: `background:${colourOf(run)}` }), mark(shapeOf(run)), run.label);
  dialog.replaceChildren(
    dialogHead("comparison-title", "Two runs side by side", dialog),
    el("div", { class: "dialog-body" },
      el("div", { class: "sides" }, name("A", first), name("B", second)),
      part("Figures", comparedFigures(first, second)),
      part("Configuration, where it differs", comparedConfigs(a.config, b.config)),
      part("Training", el("p", { class: "hint" }, "A: solid, B: dashed."), curves),
      part("Layers", comparedLayers(a.layers, b.layers)),
    ),
  );
  showDialog(dialog, COMPARED);
  drawCurves(curves, [{ label: "A", curves: a.curves }, { label: "B", curves: b.curves }]);
}
