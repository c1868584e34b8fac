// The table of runs. A thousand rows are sorted as data; only so many are made as are looked at.

const PAGE = 100;
let everything = false;

function columns() {
  const costs = costKeys.filter((key) => !key.startsWith("cpu_time") && key !== "onnx_bytes");
  const keys = [...new Set([state.y, ...(quantity.get(state.x).kind === "metric" ? [state.x] : []), ...costs, state.x])];
  return [
    { key: "label", title: "Run", sort: (run) => run.label },
    { key: "method", title: "Method", sort: (run) => run.method },
    { key: "arch", title: "Arch", sort: (run) => run.arch },
    ...(facetValues.data.length > 1 ? [{ key: "data", title: "Data", sort: (run) => run.data }] : []),
    { key: "budget", title: "Budget", sort: (run) => run.budgets[0]?.requested },
    ...keys.map((key) => ({ key, title: quantity.get(key).short, label: quantity.get(key).label, sort: (run) => valueOf(run, key), number: true })),
    { key: "seconds", title: "Time", label: "Time of the job", sort: (run) => run.seconds ?? undefined, number: true },
  ];
}

// Numbers in names by their size, decimals too: resnet20 before resnet110, macs=0.25 before macs=0.5.
function compareNames(first, second) {
  const [a, b] = [first, second].map((name) => name.split(/(\d+(?:\.\d+)?)/));
  for (let part = 0; part < Math.min(a.length, b.length); part++) {
    const difference = part % 2 ? a[part] - b[part] : a[part].localeCompare(b[part], "en");
    if (difference) return difference;
  }
  return a.length - b.length;
}

function sorted(layout) {
  const { key, down } = state.sort;
  const column = layout.find((candidate) => candidate.key === key) ?? layout[0];
  const order = shown.map((run) => [column.sort(run), run]);
  order.sort(([a, first], [b, second]) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined) || first.index - second.index;
    const difference = typeof a === "number" ? a - b : compareNames(a, b);
    return (down ? -difference : difference) || first.index - second.index;
  });
  return order.map(([, run]) => run);
}

// Asked for, as a line, and reached, as a bar; the words say the same.
function budgetCell({ unit, requested, reached, callback }) {
  const met = reached !== null && reached <= requested * (1 + 1e-6);
  const verdict = reached === null ? "not measured" : met ? "met" : "missed";
  const whole = Math.max(requested, reached ?? 0, requested <= 1 ? 1 : 0) || 1;
  const bar = el("span", { class: "bar", "aria-hidden": "true" },
    el("span", { class: met ? "fill" : "fill missed", style: `width:${(100 * (reached ?? 0)) / whole}%` }),
    el("span", { class: "tick", style: `left:${(100 * requested) / whole}%` }));
  const words = `${unit} ${reached === null ? "" : share(reached)} of ${share(requested)} `;
  const badge = el("span", { class: `verdict ${met ? "met" : "missed"}` }, met ? "✓ met" : verdict);
  return el("div", { class: "budget", title: callback }, el("span", {}, words, badge), bar);
}

function row(run, layout) {
  const box = el("input", { type: "checkbox", "aria-label": `compare ${run.label}` });
  box.checked = state.chosen.has(run.index);
  box.addEventListener("change", () => choose(run, box.checked));
  const name = el("button", { type: "button", class: "link" }, breakable(run.label));
  name.addEventListener("click", () => whenRead(() => openDetails(run)));
  const cells = layout.slice(1).map((column) => {
    if (column.key === "method") return el("td", { class: "wrapped" }, el("span", { class: "dot", style: `background:${colourOf(run)}` }), breakable(run.method));
    if (column.key === "arch") return el("td", {}, mark(shapeOf(run)), run.arch);
    if (column.key === "budget") return el("td", {}, ...(run.budgets.length ? run.budgets.map(budgetCell) : [run.compressed ? "–" : "not compressed"]));
    if (column.key === "seconds") return el("td", { class: "number" }, duration(run.seconds));
    if (column.number) return el("td", { class: "number" }, show(column.key, valueOf(run, column.key)));
    return el("td", {}, run[column.key]);
  });
  const badge = onFront.has(run.index) ? el("span", { class: "badge" }, "front") : null;
  const line = el("tr", { "data-run": run.index }, el("td", { class: "select" }, box), el("th", { scope: "row" }, name, badge), ...cells);
  line.addEventListener("mouseenter", () => pointAt(run));
  line.addEventListener("mouseleave", () => pointAt(null));
  name.addEventListener("focus", () => pointAt(run));
  name.addEventListener("blur", () => pointAt(null));
  return line;
}

function showHead(layout) {
  const head = layout.map((column) => {
    const { key, down } = state.sort;
    const order = column.key === key ? (down ? "descending" : "ascending") : null;
    const button = el("button", { type: "button", title: column.label, "data-sort": column.key }, column.title,
      el("span", { class: "arrow", "aria-hidden": "true" }, order ? (down ? "▼" : "▲") : ""));
    button.addEventListener("click", () => {
      const again = state.sort.key === column.key;
      const best = quantity.get(column.key)?.up ?? false; // what is better comes first
      update({ sort: { key: column.key, down: again ? !state.sort.down : best } });
      document.querySelector(`#table [data-sort="${CSS.escape(column.key)}"]`).focus();
    });
    return el("th", { scope: "col", class: column.number ? "number" : null, "aria-sort": order }, button);
  });
  byId("table").tHead.replaceChildren(el("tr", {}, el("td", { class: "select" }, el("span", { class: "unseen" }, "Compare")), ...head));
}

function showTable() {
  const layout = columns();
  const order = sorted(layout);
  const visible = everything ? order : order.slice(0, PAGE);
  showHead(layout);
  const none = el("tr", {}, el("td", { colspan: layout.length + 1, class: "empty" }, runs.length ? "No run passes the filters." : "No run has finished yet."));
  byId("table").tBodies[0].replaceChildren(...(visible.length ? visible.map((run) => row(run, layout)) : [none]));
  byId("more").hidden = order.length <= PAGE;
  byId("more").textContent = everything ? `Show the first ${PAGE}` : `Show all ${order.length.toLocaleString("en")} (${(order.length - PAGE).toLocaleString("en")} more)`;
}

function choose(run, chosen) {
  state.chosen[chosen ? "add" : "delete"](run.index);
  showChosen();
  writeHash();
}

function showChosen() {
  const count = state.chosen.size;
  byId("compare").disabled = count !== 2;
  byId("compare-hint").textContent = ["choose two runs", "choose one more", ""][count] ?? `${count} chosen: leave two`;
}

function startTable() {
  byId("more").addEventListener("click", () => { everything = !everything; showTable(); });
  showTable.ordered = true;
  listeners.push(showTable, showChosen);
  pointers.push((run) => {
    document.querySelector("tr.pointed")?.classList.remove("pointed");
    if (run) document.querySelector(`tr[data-run="${run.index}"]`)?.classList.add("pointed");
  });
}
