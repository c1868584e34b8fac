// One run in a drawer: figures, curves, layers, pictures, and how to get it again.

const parsed = new Map();

// The details of a run lie in a script element of their own, read when they are first looked at.
function detailsOf(run) {
  if (!parsed.has(run.index)) parsed.set(run.index, JSON.parse(byId(`run-${run.index}`).textContent));
  return parsed.get(run.index);
}

function dialogHead(id, title, dialog) {
  const close = el("button", { type: "button", class: "close", "aria-label": "Close" }, "×");
  close.addEventListener("click", () => dialog.close());
  return el("div", { class: "dialog-head" }, el("h2", { id, tabindex: -1 }, title), close);
}

function part(title, ...content) {
  return el("section", {}, el("h3", {}, title), ...content);
}

function scrolling(label, table) {
  return el("div", { class: "scroll-x", role: "region", tabindex: 0, "aria-label": label }, table);
}

function headRow(...titles) {
  return el("thead", {}, el("tr", {}, ...titles.map(([title, number]) => el("th", { scope: "col", class: number ? "number" : null }, title))));
}

const keysOf = (...list) => quantities.map(({ key }) => key).filter((key) => list.some((run) => run.final[key] !== undefined || run.dense[key] !== undefined));

function figures(run) {
  const rows = keysOf(run).map((key) => {
    const { label, kind } = quantity.get(key);
    const [dense, final] = [run.dense[key], run.final[key]];
    const known = dense !== undefined && final !== undefined;
    const verdict = !known ? "" : kind === "metric" ? relativeText(kind, final - dense) : factor(kind, dense, final);
    const better = known && Math.abs(final - dense) > 0.005 * Math.abs(dense) && (final > dense) === quantity.get(key).up;
    return el("tr", {}, el("th", { scope: "row" }, label), el("td", { class: "number" }, absolute(kind, dense)),
      el("td", { class: "number" }, absolute(kind, final)), el("td", { class: better ? "number better" : "number" }, verdict));
  });
  return scrolling("Figures", el("table", {}, headRow(["Quantity"], ["dense", true], [run.compressed ? "compressed" : "final", true], ["difference", true]), el("tbody", {}, ...rows)));
}

// Where a layer lost outputs, how much of it is left; where it became a chain, what it is now.
function layerCells(layer) {
  const [before, after] = layer.macs ?? [];
  const left = before ? Math.min(1, after / before) : null;
  const bar = left === null ? null : el("span", { class: "bar", "aria-hidden": "true" }, el("span", { class: "fill", style: `width:${100 * left}%` }));
  const now = layer.after.length ? layer.after.map(shapeText).join(" · ") : layer.before ? "same shape" : "–";
  return [
    el("td", {}, el("span", { class: "shape" }, now)),
    el("td", { class: "number" }, layer.macs ? `${absolute("count", before)} → ${absolute("count", after)}` : "–", bar),
    el("td", { class: "number" }, layer.stored ? absolute("bytes", layer.stored) : "–"),
    el("td", {}, layer.notes.join(", ") || "–"),
  ];
}

function layers(list) {
  if (!list.length) return el("p", { class: "hint" }, "No layer changed its shape.");
  const rows = list.map((layer) => el("tr", {}, el("th", { scope: "row" }, layer.layer), el("td", {}, el("span", { class: "shape" }, shapeText(layer.before))), ...layerCells(layer)));
  return scrolling("Layers", el("table", { class: "layers" }, headRow(["Layer"], ["before"], ["now"], ["MACs", true], ["stored", true], ["how"]), el("tbody", {}, ...rows)));
}

function disclosed(title, data) {
  const summary = el("summary", {}, title);
  const box = el("details", {}, summary);
  box.addEventListener("toggle", () => {
    if (box.open && box.children.length === 1) box.append(el("pre", { tabindex: 0, "aria-label": title }, plainText(data)));
  });
  return box;
}

// Nested data as indented lines, as YAML would have it.
function plainText(data, indent = "") {
  if (data === null || typeof data !== "object") return `${indent}${data === "" ? '""' : data}`;
  const entries = Array.isArray(data) ? data.map((value) => ["-", value]) : Object.entries(data).map(([key, value]) => [`${key}:`, value]);
  if (!entries.length) return `${indent}${Array.isArray(data) ? "[]" : "{}"}`;
  if (Array.isArray(data) && data.every((value) => value === null || typeof value !== "object")) return `${indent}[${data.join(", ")}]`;
  return entries.map(([key, value]) => {
    const flat = value === null || typeof value !== "object" || !Object.keys(value).length
      || (Array.isArray(value) && value.every((item) => item === null || typeof item !== "object"));
    return flat ? `${indent}${key} ${plainText(value)}` : `${indent}${key}\n${plainText(value, indent + "  ")}`;
  }).join("\n");
}

function pictures(list) {
  return el("div", { class: "pictures" }, ...list.map(({ name, source }) =>
    el("figure", {}, el("img", { src: source, alt: `${name}, dense and compressed`, loading: "lazy" }), el("figcaption", {}, name))));
}

function frozen(reasons) {
  return el("ul", {}, ...Object.entries(reasons).map(([reason, tensors]) =>
    el("li", {}, `${reason}: `, el("span", { class: "muted" }, tensors.slice(0, 6).join(", ") + (tensors.length > 6 ? ` and ${tensors.length - 6} more` : "")))));
}

// The details come last in the page: whoever is faster than it waits.
function whenRead(action) {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", action, { once: true });
  else action();
}

function openDetails(run) {
  const dialog = byId("details");
  const own = detailsOf(run);
  const curves = el("div", { class: "curves" });
  const edits = Object.entries(own.edits).map(([method, count]) => `${method}: ${plural(count, "edit")}`).join(", ");
  const tags = el("p", { class: "tags" }, el("span", {}, el("span", { class: "dot", style: `background:${colourOf(run)}` }), run.method), el("span", {}, mark(shapeOf(run)), run.arch),
    run.data ? el("span", {}, run.data) : null, onFront.has(run.index) ? el("span", { class: "badge" }, "front") : null);
  dialog.replaceChildren(
    dialogHead("details-title", run.label, dialog),
    el("div", { class: "dialog-body" },
      tags,
      part("Command", commandLine(own.command)),
      part("Figures", figures(run), own.note ? el("p", { class: "hint" }, own.note) : null),
      run.budgets.length ? part("Budget", ...run.budgets.map(budgetCell)) : null,
      part("Training", curves),
      part("Layers", edits ? el("p", { class: "hint" }, edits) : null, layers(own.layers)),
      Object.keys(own.frozen).length ? part("Never cut", frozen(own.frozen)) : null,
      own.pictures.length ? part("Pictures", pictures(own.pictures)) : null,
      part("Files", el("p", {}, own.artifact ? el("a", { href: own.link }, own.artifact) : `No artifact in ${run.folder}`), el("p", { class: "hint" }, run.folder)),
      part("Recipe and environment", disclosed("Configuration", own.config), disclosed("Environment", own.environment)),
    ),
  );
  showDialog(dialog, run.folder);
  drawCurves(curves, [{ label: run.label, curves: own.curves }]);
}

// The browser keeps the focus inside, closes on Escape and gives the focus back.
function showDialog(dialog, shows) {
  if (!dialog.open) dialog.showModal();
  dialog.dataset.shows = shows; // for the address
  dialog.querySelector("h2").focus();
  dialog.scrollTop = 0;
  writeHash();
}

function startDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("close", () => {
      delete dialog.dataset.shows;
      dialog.replaceChildren();
      writeHash();
    });
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  }
}
