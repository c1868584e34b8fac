// Numbers for people.

const THIN = "\u202f"; // between a number and its unit

const written = new Intl.NumberFormat("en", { maximumFractionDigits: 6 });

function digits(value, precision = 3) {
  return written.format(Number(value.toPrecision(precision)));
}

function scaled(value, units) {
  const [size, suffix] = units.find(([size]) => Math.abs(value) >= size) ?? units.at(-1);
  return digits(value / size) + (suffix ? THIN + suffix : "");
}

const COUNTS = [[1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];
const BYTES = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]];

// A value in the unit that its quantity has by itself.
function absolute(kind, value) {
  if (value === undefined || value === null) return "–";
  if (kind === "count") return scaled(value, COUNTS);
  if (kind === "bytes") return scaled(value, BYTES);
  if (kind === "ms") return digits(value) + THIN + "ms";
  return Math.abs(value) < 100 ? value.toFixed(4) : digits(value, 5);
}

// A value relative to the dense network: costs in percent of it, metrics as what they differ by.
function relativeText(kind, value) {
  if (value === undefined || value === null) return "–";
  if (kind === "metric") return signed(value, (size) => size.toFixed(4));
  return digits(value) + THIN + "%";
}

function signed(value, show) {
  return (value < 0 ? "−" : "+") + show(Math.abs(value));
}

// How a cost compares to another one.
function factor(kind, before, after) {
  if (!before || !after) return "";
  const ratio = after / before;
  if (Math.abs(ratio - 1) < 0.005) return "same";
  const [less, more] = kind === "ms" ? ["faster", "slower"] : ["less", "more"];
  return ratio < 1 ? `${digits(1 / ratio)}× ${less}` : `${digits(ratio)}× ${more}`;
}

function share(value) {
  return value <= 1 ? digits(100 * value) + THIN + "%" : scaled(value, COUNTS);
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return digits(seconds, 2) + THIN + "s";
  return seconds < 5400 ? Math.round(seconds / 60) + THIN + "min" : digits(seconds / 3600, 2) + THIN + "h";
}

const shapeText = (shape) => (shape ? shape.join(" × ") : "–");
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

// Plotly reads a little HTML in its texts.
const plotText = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
