// The runs without results: what went wrong, and what to type.

const OTHERS = [
  ["failed", "Failed", "They ended with an error. The same command runs them again."],
  ["unfinished", "Not finished", "Still running, or interrupted. The same command goes on from where they were."],
  ["unreadable", "Unreadable", "Something in these folders is damaged. Remove the file, and run the job again."],
];

function showOthers() {
  for (const [status, title, hint] of OTHERS) {
    const found = others.filter((run) => run.status === status);
    if (!found.length) continue;
    const list = found.map((run) => el("li", {},
      el("h3", {}, run.label),
      run.error ? el("pre", { class: "error", tabindex: 0, "aria-label": "Error" }, run.error) : null,
      run.command ? commandLine(run.command) : el("p", { class: "hint" }, run.folder)));
    byId("others").append(el("section", { class: `card ${status}`, id: status, "aria-labelledby": `${status}-title` },
      el("div", { class: "card-head" }, el("h2", { id: `${status}-title` }, `${title} (${found.length})`)),
      el("p", { class: "hint" }, hint),
      el("ul", { class: "others" }, ...list)));
  }
}

function showTotals() {
  const counts = OTHERS.map(([status, title]) => [others.filter((run) => run.status === status).length, status, title.toLowerCase()]);
  const parts = [el("span", {}, `${runs.length.toLocaleString("en")} finished`)];
  for (const [count, status, title] of counts) if (count) parts.push(el("a", { href: `#${status}`, class: status }, `${count} ${title}`));
  byId("totals").replaceChildren(...parts);
}
