"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const byId = (id) => document.getElementById(id);

/* A node of the page; texts are never read as HTML. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

/* Theme: the system's until the button is pressed. */
const wish = matchMedia("(prefers-color-scheme: dark)");
function setTheme(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  for (const id of drawn) draw(id);
}
const drawn = new Set();
let pressed = false;
byId("theme").addEventListener("click", () => { pressed = true; setTheme(root.dataset.theme !== "dark"); });
wish.addEventListener("change", () => { if (!pressed) setTheme(wish.matches); });
setTheme(wish.matches);

/* Pictures: the library is unpacked once, a picture is drawn when it comes near the window. */
const coarse = matchMedia("(pointer: coarse)").matches;
let library = null;
function unpack() {
  library ??= (async () => {
    const text = atob(byId("plotly").textContent.trim());
    const packed = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = make("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  })();
  return library;
}

/* Put the theme's colours in place of the names of CSS variables. */
function coloured(value, style) {
  if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  if (Array.isArray(value)) return value.map((item) => coloured(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, style)]));
}

function draw(id) {
  const style = getComputedStyle(root);
  const colour = (name) => style.getPropertyValue(name).trim();
  const figure = coloured(report.figures[id], style);
  const axis = { gridcolor: colour("--rule"), linecolor: colour("--rule"), zerolinecolor: colour("--rule"), automargin: true, fixedrange: coarse };
  const layout = {
    ...figure.layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 12, color: colour("--text") },
    hoverlabel: { bgcolor: colour("--page"), bordercolor: colour("--soft"), font: { color: colour("--text") }, align: "left" },
    xaxis: { ...axis, ...figure.layout.xaxis }, yaxis: { ...axis, ...figure.layout.yaxis },
  };
  const target = byId(id);
  Plotly.react(target, figure.data, layout, { displayModeBar: false, responsive: true });
  if (drawn.has(id)) return;
  drawn.add(id);
  const open = (event) => { const number = event.points[0].customdata?.[0]; if (number >= 0) { openLayer(number); return false; } };
  target.on("plotly_click", open);
  target.on("plotly_treemapclick", open);
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    watcher.unobserve(entry.target);
    unpack().then(() => draw(entry.target.id)).catch((error) => {
      entry.target.textContent = `This picture cannot be drawn in this browser (${error.message}).`;
    });
  }
}, { rootMargin: "250px" });
for (const id of Object.keys(report.figures)) if (byId(id)) watcher.observe(byId(id));

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  if (window.Plotly) for (const id of Object.keys(report.figures)) if (!drawn.has(id) && byId(id)) draw(id);
});

for (const button of document.querySelectorAll("[data-map]")) {
  button.addEventListener("click", () => {
    for (const other of document.querySelectorAll("[data-map]")) {
      other.setAttribute("aria-pressed", other === button);
      byId(`map-${other.dataset.map}`).hidden = other !== button;
    }
  });
}

/* Details of a layer. */
const dialog = byId("details");
byId("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-layer]");
  if (button && button.dataset.layer !== "") openLayer(Number(button.dataset.layer));
});

function fact(name, ...values) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, ...values));
}

/* A long name that may be broken before a hump or after a dot. */
function breakable(text) {
  return text.split(/(?<=[a-z0-9])(?=[A-Z])|(?<=[./_])(?=.)/).flatMap((part) => [part, make("wbr")]);
}

function openLayer(number) {
  const layer = report.layers[number];
  byId("details-title").replaceChildren(...breakable(layer.name));
  const body = byId("details-body");
  const facts = make("dl", { class: "facts" }, ...layer.facts.map(([name, value]) => fact(name, ...breakable(value))));
  const story = layer.story.map(([step, kind, what]) =>
    make("li", {}, make("code", {}, step), make("span", {}, make("b", { class: kind }, kind), ` ${what}`)));
  body.replaceChildren(
    facts,
    layer.blame ? make("p", { class: "blame" }, layer.blame) : "",
    make("h3", {}, "What each pass did to it"),
    story.length ? make("ul", { class: "story" }, ...story) : make("p", { class: "was" }, "No pass changed or considered it."),
    make("h3", {}, "Its neighbourhood in the graph"),
    make("div", { class: "views" }, ...["before", "after"].map((word, side) => graphView(report.graph, number, side, word))),
    make("p", { class: "key" }, "Blue frame: nodes of this layer. Dashed: not in the other model. Drag to move, scroll or pinch to zoom; click a node for its layer."),
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  for (const svg of body.querySelectorAll("svg")) svg.dispatchEvent(new Event("fit"));
}

/* The table of all layers. */
const rows = [...document.querySelectorAll("#table tbody tr")];
function filter() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const bare = !byId("weighted").checked;
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    const on = (bare || !row.classList.contains("bare")) && words.every((word) => text.includes(word));
    row.classList.toggle("off", !on);
    shown += on;
  }
  byId("shown").textContent = `${shown} of ${rows.length} shown`;
}
byId("filter").addEventListener("input", filter);
byId("weighted").addEventListener("change", filter);
if (rows.every((row) => row.classList.contains("bare"))) byId("weighted").checked = false;
filter();

for (const button of document.querySelectorAll("#table th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, column = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of document.querySelectorAll("#table th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return (down ? -1 : 1) * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    document.querySelector("#table tbody").append(...rows.sort(compare));
  });
}

byId("copy").addEventListener("click", async (event) => {
  const text = byId(event.target.dataset.copy);
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    getSelection().selectAllChildren(text);
    document.execCommand("copy");
  }
  event.target.textContent = "copied";
  setTimeout(() => { event.target.textContent = "copy"; }, 1500);
});
