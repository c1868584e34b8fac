// Making elements. Names, errors and commands come from whoever ran the jobs: they become text, never markup.

const byId = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Long names break after the signs in them, so that columns can be narrow.
function breakable(text) {
  const parts = text.split(/(?<=[_/])/);
  return el("span", {}, ...parts.flatMap((part, index) => (index ? [el("wbr"), part] : [part])));
}

// Shapes of the networks, as paths in a box of 16: for legends and tables. Plotly knows them by the same names.
const SHAPES = {
  circle: "M8 3a5 5 0 1 0 0 10a5 5 0 1 0 0-10Z",
  square: "M3.5 3.5h9v9h-9Z",
  diamond: "M8 2l6 6l-6 6l-6-6Z",
  "triangle-up": "M8 2.5l6 10.5h-12Z",
  cross: "M6 2.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5Z",
  "triangle-down": "M8 13.5l6-10.5h-12Z",
  pentagon: "M8 2l6 4.4l-2.3 7.1h-7.4l-2.3-7.1Z",
  hexagram: "M8 1.5l2 3.5h4l-2 3l2 3h-4l-2 3.500l-2-3.500h-4l2-3l-2-3h4Z",
  "triangle-right": "M13.500 8l-10.500 6v-12Z",
  star: "M8 1.500l2 4.500l4.800.500l-3.600 3.200l1.100 4.800l-4.300-2.500l-4.300 2.500l1.100-4.800l-3.600-3.200l4.800-.500Z",
};

function mark(shape, colour) {
  const path = svg("path", { d: SHAPES[shape], fill: colour ?? "none", stroke: colour ?? "currentColor", "stroke-width": 1.4 });
  return svg("svg", { viewBox: "0 0 16 16", width: 14, height: 14, "aria-hidden": "true", class: "mark" }, path);
}

function copyButton(text) {
  const button = el("button", { type: "button", class: "copy" }, "Copy");
  button.addEventListener("click", async () => {
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // not offered to pages from the disk by every browser: the older way
      const area = el("textarea", { class: "unseen", "aria-hidden": "true", tabindex: -1 });
      area.value = text;
      button.after(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.textContent = done ? "Copied" : "Select it and copy by hand";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return button;
}

function commandLine(command) {
  if (!command) return el("p", { class: "hint" }, "The command was not recorded.");
  return el("div", { class: "command" }, el("pre", { tabindex: 0, "aria-label": "Command" }, command), copyButton(command));
}
