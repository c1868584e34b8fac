// Training curves: a small chart for each metric, with a line for each split of the data.

const CURVES_AT_MOST = 12;

// "train/loss" and "val/loss" share a chart, "loss".
function curveGroups(sources) {
  const groups = new Map();
  sources.forEach(({ label, curves }, side) => {
    for (const [name, [x, y]] of Object.entries(curves)) {
      const [split, ...rest] = name.split("/");
      const [title, line] = rest.length ? [rest.join("/"), split] : [name, ""];
      groups.set(title, [...(groups.get(title) ?? []), { line, label, side, x, y }]);
    }
  });
  const rank = ([title]) => [/acc/.test(title), title === "loss"].reduce((sum, hit, index) => sum - (hit ? 2 - index : 0), 0);
  return [...groups].sort((a, b) => rank(a) - rank(b) || a[0].localeCompare(b[0]));
}

function drawCurves(box, sources) {
  const groups = curveGroups(sources);
  if (!groups.length) {
    box.append(el("p", { class: "hint" }, "Nothing was logged while it trained."));
    return;
  }
  const palette = PALETTES[dark.matches ? "dark" : "light"];
  const splits = [...new Set(groups.flatMap(([, lines]) => lines.map(({ line }) => line)))].sort();
  for (const [title, lines] of groups.slice(0, CURVES_AT_MOST)) {
    const chart = el("div", { class: "curve", role: "img", "aria-label": `${title} over steps` });
    box.append(el("figure", {}, el("figcaption", {}, `${title}, over steps`), chart));
    const traces = lines.map(({ line, label, side, x, y }) => ({
      type: "scatter", mode: x.length < 30 ? "lines+markers" : "lines", x, y,
      name: plotText([sources.length > 1 ? label : "", line].filter(Boolean).join(" · ") || title),
      line: { color: palette[splits.indexOf(line) % palette.length], width: 1.8, dash: side ? "dash" : "solid" },
      marker: { size: 4, symbol: side ? "circle-open" : "circle" },
    }));
    const layout = chartLayout({
      height: 190, margin: { l: 44, r: 8, t: 4, b: 28 }, showlegend: true, hovermode: "x unified",
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 }, itemclick: false, itemdoubleclick: false },
      xaxis: chartAxis(), yaxis: chartAxis(), dragmode: false,
    });
    Plotly.newPlot(chart, traces, layout, CHART);
  }
  if (groups.length > CURVES_AT_MOST) box.append(el("p", { class: "hint" }, `${groups.length - CURVES_AT_MOST} more are in the folder's metrics.csv.`));
}
