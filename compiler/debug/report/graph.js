"use strict";
/* The graph around a layer as SVG, from the places that Python computed; moved and zoomed through its viewBox. */
const NODE = { width: 172, height: 40, across: 190, down: 74 };

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function graphView(graph, layer, side, word) {
  const view = graph.views[layer][side];
  const box = make("div", { class: "view" });
  if (view === null) {
    box.append(make("header", {}, make("b", {}, word)), make("p", { class: "was" }, "The layer has no node in this model."));
    return box;
  }
  const [drawing, nodes, out] = view;
  const picture = drawGraph(graph, graph.drawings[drawing], graph.sides[side], nodes, layer);
  picture.setAttribute("aria-label", `The graph around the layer ${word} compilation`);
  const move = navigate(picture);
  const press = (label, words, act) => {
    const button = make("button", { class: "quiet", "aria-label": `${words} (${word})` }, label);
    button.addEventListener("click", act);
    return button;
  };
  box.append(
    make("header", {}, make("b", {}, word + (out ? `, ${out} more nodes left out` : "")),
      press("−", "Zoom out", () => move.zoom(1.3)), press("+", "Zoom in", () => move.zoom(1 / 1.3)), press("fit", "Fit", () => move.fit())),
    picture,
  );
  return box;
}

function drawGraph(graph, drawing, side, nodes, layer) {
  const at = (x, y) => [(x + 0.5) * NODE.across, (y + 0.5) * NODE.down];
  const labels = new Map(side.edges.map(([from, to, label]) => [`${from},${to}`, graph.texts[label]]));
  const group = svg("g", {});
  for (const [from, to, ...bends] of drawing.edges) {
    const [x0, y0] = at(drawing.places[2 * from], drawing.places[2 * from + 1]);
    const [x1, y1] = at(drawing.places[2 * to], drawing.places[2 * to + 1]);
    const points = [[x0, y0 + NODE.height / 2]];
    for (let i = 0; i < bends.length; i += 2) points.push(at(bends[i], bends[i + 1]));
    points.push([x1, y1 - NODE.height / 2 - 3]);
    let path = `M${points[0]}`;
    for (let i = 1; i < points.length; i++) {
      const [[a, b], [c, d]] = [points[i - 1], points[i]];
      path += `C${a},${(b + d) / 2} ${c},${(b + d) / 2} ${c},${d}`;
    }
    group.append(svg("path", { class: "edge", d: path, "marker-end": "url(#arrow)" },
      svg("title", {}, labels.get(`${nodes[from]},${nodes[to]}`) ?? "")));
  }
  nodes.forEach((number, position) => {
    const [operator, detail, kernel, state, layers] = side.nodes[number];
    const [x, y] = at(drawing.places[2 * position], drawing.places[2 * position + 1]);
    const own = layers.includes(layer);
    const classes = ["node", own ? "own" : "beside", state ? "changed" : ""].join(" ");
    const name = layers.map((index) => report.layers[index].name).join(", ");
    const ran = graph.texts[kernel];
    const title = [graph.texts[operator], name, graph.texts[detail], ran && `runs as ${ran}`].filter(Boolean).join("\n");
    const words = graph.texts[detail];
    const node = svg("g", { class: classes, transform: `translate(${x},${y})`, "data-layer": layers.length ? layers[0] : "" },
      svg("title", {}, title),
      svg("rect", { x: -NODE.width / 2, y: -NODE.height / 2, width: NODE.width, height: NODE.height, rx: 6 }),
      svg("text", { y: words ? -3 : 4 }, graph.texts[operator]));
    if (words) node.append(svg("text", { class: "detail", y: 12 }, words));
    group.append(node);
  });
  const arrow = svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
    svg("path", { d: "M0,0L8,4L0,8z", fill: "var(--soft)" }));
  const picture = svg("svg", { tabindex: 0, role: "img" }, svg("defs", {}, arrow), group);
  picture.extent = { x: 0, y: 0, width: (drawing.width + 1) * NODE.across, height: drawing.rows * NODE.down };
  return picture;
}

/* Moving and zooming with mouse, fingers and keys. */
function navigate(picture) {
  let box = { ...picture.extent };
  const show = () => picture.setAttribute("viewBox", `${box.x} ${box.y} ${box.width} ${box.height}`);
  const scale = () => Math.max(box.width / picture.clientWidth, box.height / picture.clientHeight) || 1;
  const shift = (dx, dy) => { box.x -= dx * scale(); box.y -= dy * scale(); show(); };
  const zoom = (factor, fx = 0.5, fy = 0.5) => {
    if (box.width * factor > 6 * picture.extent.width + 2000 || box.width * factor < 60) return;
    box.x += box.width * (1 - factor) * fx;
    box.y += box.height * (1 - factor) * fy;
    box.width *= factor;
    box.height *= factor;
    show();
  };
  const fit = () => {
    const pad = 12;
    const { x, y, width, height } = picture.extent;
    const shape = picture.clientWidth / picture.clientHeight || 1;
    const tall = Math.max(height + 2 * pad, (width + 2 * pad) / shape, 260);
    box = { width: tall * shape, height: tall };
    box.x = x + width / 2 - box.width / 2;
    box.y = y + height / 2 - box.height / 2;
    show();
  };
  const held = new Map();
  let moved = 0;
  picture.addEventListener("fit", fit);
  picture.addEventListener("pointerdown", (event) => { held.set(event.pointerId, event); moved = 0; });
  picture.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) return;
    const others = [...held.values()].filter((other) => other.pointerId !== event.pointerId);
    if (others.length) {
      const far = (point) => Math.hypot(point.clientX - others[0].clientX, point.clientY - others[0].clientY) || 1;
      zoom(far(before) / far(event));
    } else {
      shift(event.clientX - before.clientX, event.clientY - before.clientY);
    }
    moved += Math.abs(event.clientX - before.clientX) + Math.abs(event.clientY - before.clientY);
    if (moved > 4) picture.setPointerCapture(event.pointerId);
    held.set(event.pointerId, event);
  });
  for (const name of ["pointerup", "pointercancel"]) picture.addEventListener(name, (event) => held.delete(event.pointerId));
  picture.addEventListener("click", (event) => { if (moved > 4) event.stopPropagation(); }, true);
  picture.addEventListener("wheel", (event) => {
    event.preventDefault();
    const area = picture.getBoundingClientRect();
    zoom(Math.exp(event.deltaY / 500), (event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height);
  }, { passive: false });
  const keys = { "+": () => zoom(1 / 1.3), "=": () => zoom(1 / 1.3), "-": () => zoom(1.3), 0: fit, ArrowLeft: () => shift(40, 0), ArrowRight: () => shift(-40, 0), ArrowUp: () => shift(0, 40), ArrowDown: () => shift(0, -40) };
  picture.addEventListener("keydown", (event) => {
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  show();
  return { zoom, fit };
}
