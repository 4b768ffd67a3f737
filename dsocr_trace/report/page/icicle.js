// The module tree as an icicle: layout, drawing by ECharts, zoom, search and keys.
const ROW_HEIGHT = 26;
const WIDTHS = {
  scaled: { label: "Measured time", column: "scaled_total_ns", format: duration },
  predicted: { label: "Predicted time", column: "predicted_total_ns", format: duration },
  wall: { label: "Host time", column: "wall_with_children", format: duration },
  flops: { label: "FLOPs", column: "flops_with_children", format: (value) => quantity(value, "FLOP") },
  bytes: { label: "Bytes", column: "bytes_with_children", format: (value) => quantity(value, "B") },
};
// Measured over predicted time: colours from 1/16 to 16 times, one step per doubling.
const REACH = 4;

// The whole tree: the run, its stages, their modules; unclassified time by reason beside the modules of its stage.
function buildTree(modules, unclassified) {
  const node = (name, kind, stage, row, parent) => {
    const made = { name, kind, stage, row, parent, children: [], search: `${name} ${kind}`.toLowerCase() };
    parent?.children.push(made);
    return made;
  };
  const run = node("all stages", "run", null, null, null);
  for (const stage of STAGES) {
    const mine = modules.filter((row) => row.stage === stage);
    const rest = unclassified.filter((row) => row.stage === stage);
    if (!mine.length && !rest.length) continue;
    const top = node(stage, "stage", stage, null, run);
    const byPath = new Map();
    for (const row of mine) {
      byPath.set(row.module_path, node(row.module_path || "(root)", row.module_class, stage, row, byPath.get(row.parent_path) ?? top));
    }
    if (rest.length) {
      const bucket = node("unclassified", "no module", stage, null, top);
      for (const row of rest) node(row.unclassified_reason, row.meaning, stage, row, bucket).reason = true;
    }
  }
  addTotals(run);
  return run;
}

// Measured and predicted time of every node with all below it; what has no figures of its own adds up its children.
function addTotals(node) {
  node.children.forEach(addTotals);
  const sum = (name) => node.children.reduce((all, child) => all + (child[name] ?? 0), 0);
  node.isRest = Boolean(node.reason) || node.name === "unclassified";
  node.measured = node.reason ? node.row.scaled_self_ns : node.row ? node.row.scaled_total_ns : sum("measured");
  node.predicted = node.isRest ? null : node.row ? node.row.predicted_total_ns : sum("predicted");
}

// Give every node its value, its place from `start` to `end` and its level. Groups without figures of their own add up.
function layOut(node, width, start, level) {
  Object.assign(node, { start, level });
  let end = start;
  for (const child of node.children) end = layOut(child, width, end, level + 1);
  const own = node.reason ? (width === "scaled" ? node.row.scaled_self_ns : 0) : node.row?.[WIDTHS[width].column];
  node.value = node.row ? own ?? 0 : end - start;
  node.end = start + node.value;
  return node.end;
}

const rampColours = () => [1, 2, 3, 4, 5].map((step) => colour(`ramp-${step}`));

function ratioColour(ratio, stops) {
  if (!ratio) return stops.none;
  const place = (Math.min(REACH, Math.max(-REACH, Math.log2(ratio))) + REACH) / (2 * REACH);
  return echarts.color.lerp(place, stops.ramp);
}

function hatch() {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const pen = tile.getContext("2d");
  pen.fillStyle = colour("none");
  pen.fillRect(0, 0, 8, 8);
  pen.strokeStyle = colour("hatch");
  pen.lineWidth = 1.5;
  for (const shift of [-8, 0, 8]) { pen.moveTo(shift, 8); pen.lineTo(shift + 8, 0); }
  pen.stroke();
  return { image: tile, repeat: "repeat" };
}

class Icicle {
  constructor(modules, unclassified) {
    this.tree = buildTree(modules, unclassified);
    this.width = "scaled";
    this.query = "";
    this.zoomed = this.current = this.tree;
    layOut(this.tree, this.width, 0, 0);
    this.element = document.getElementById("tree-chart");
    this.depth = this.deepest(this.tree);
    this.element.style.height = `${(this.depth + 1) * ROW_HEIGHT}px`;
    const { chart, redraw } = addChart("tree-chart", "canvas", (pixels) => this.option(pixels));
    Object.assign(this, { chart, redraw });
    chart.on("click", ({ data }) => this.zoom(this.shown[data[3]]));
    this.addControls();
    this.zoom(this.tree);
  }

  deepest(node) {
    return Math.max(node.level, ...node.children.map((child) => this.deepest(child)));
  }

  addControls() {
    const stages = this.tree.children.map((node) => [node.name, node.name]);
    this.press = addSwitch("tree-stage", [["all stages", "all"], ...stages], "all stages", (name) =>
      this.zoom(name === "all stages" ? this.tree : this.tree.children.find((node) => node.name === name)));
    const isKnown = ({ column }) => this.tree.children.some((stage) => stage.children.some((node) => node.row?.[column]));
    const widths = Object.entries(WIDTHS).filter(([, width]) => isKnown(width)).map(([name, { label }]) => [name, label]);
    addSwitch("tree-width", widths, this.width, (name) => this.setWidth(name));
    document.getElementById("tree-search").addEventListener("input", (event) => this.search(event.target.value));
    this.element.addEventListener("keydown", (event) => this.key(event));
  }

  setWidth(name) {
    this.width = name;
    layOut(this.tree, name, 0, 0);
    this.zoom(this.zoomed.value ? this.zoomed : this.tree);
  }

  zoom(node) {
    this.zoomed = this.current = node;
    this.press(node.stage ?? "all stages");
    this.showCrumbs();
    this.redraw();
    this.tell();
  }

  search(query) {
    this.query = query.trim().toLowerCase();
    const found = [];
    const visit = (node) => {
      if (node.search.includes(this.query)) found.push(node);
      // What lies below a match is part of it.
      else node.children.forEach(visit);
    };
    if (this.query) this.tree.children.forEach((stage) => stage.children.forEach(visit));
    const sum = found.reduce((all, node) => all + node.value, 0);
    const share = percent(divided(sum, this.tree.value));
    const many = found.length === 1 ? "1 block" : `${count(found.length)} blocks`;
    document.getElementById("tree-found").textContent = this.query ? `${many}, ${WIDTHS[this.width].format(sum)} (${share} of all)` : "";
    this.redraw();
  }

  matches(node) {
    return !this.query || node.search.includes(this.query);
  }

  key(event) {
    const siblings = (this.current.parent?.children ?? [this.current]).filter((node) => node.value > 0);
    const place = siblings.indexOf(this.current);
    const children = this.current.children.filter((node) => node.value > 0);
    const moves = {
      ArrowRight: () => siblings[place + 1],
      ArrowLeft: () => siblings[place - 1],
      ArrowUp: () => this.current.parent,
      ArrowDown: () => children.reduce((best, node) => (best && best.value >= node.value ? best : node), undefined),
    };
    if (event.key in moves) {
      event.preventDefault();
      this.current = moves[event.key]() ?? this.current;
      if (this.current.level < this.zoomed.level) this.zoom(this.current);
      this.redraw();
      this.tell();
    } else if (event.key === "Enter") {
      this.zoom(this.current);
    } else if (event.key === "Escape") {
      this.zoom(this.zoomed.parent ?? this.tree);
    }
  }

  tell() {
    const { measured, predicted } = this.current;
    const parts = [this.current.name, this.current.kind, `${duration(measured)} measured`];
    if (predicted) parts.push(`${duration(predicted)} predicted`, `${times(measured / predicted)} the predicted`);
    document.getElementById("tree-now").textContent = parts.join(" · ");
  }

  showCrumbs() {
    const path = [];
    for (let node = this.zoomed; node; node = node.parent) path.unshift(node);
    document.getElementById("tree-crumbs").replaceChildren(...path.map((node) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = shortName(node);
      if (node === this.zoomed) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => this.zoom(node));
      return button;
    }));
  }

  // Nodes wide enough to be seen, clipped to the zoom.
  visible() {
    const { start, end } = this.zoomed;
    const least = (end - start) / (2 * this.pixels);
    const found = [];
    const visit = (node) => {
      if (node.end <= start || node.start >= end || node.value < least) return;
      found.push(node);
      node.children.forEach(visit);
    };
    visit(this.tree);
    return found;
  }

  option(pixels) {
    drawRamp();
    this.pixels = pixels;
    const { start, end } = this.zoomed;
    const look = {
      ramp: rampColours(), none: colour("none"), hatch: hatch(), paper: colour("paper"), ink: colour("ink"),
    };
    this.shown = this.visible();
    return {
      ...basics(),
      tooltip: { ...basics().tooltip, formatter: ({ data }) => this.tip(this.shown[data[3]]) },
      grid: { left: 0, right: 0, top: 0, bottom: 0 },
      xAxis: { type: "value", show: false, min: start, max: end },
      yAxis: { type: "value", show: false, inverse: true, min: 0, max: this.depth + 1 },
      series: {
        type: "custom", clip: true, progressive: 0, cursor: "pointer",
        encode: { x: [0, 1], y: 2 },
        data: this.shown.map((node, place) => [Math.max(node.start, start), Math.min(node.end, end), node.level, place]),
        renderItem: (_, api) => this.block(api, look),
      },
    };
  }

  block(api, look) {
    const node = this.shown[api.value(3)];
    const [left, top] = api.coord([api.value(0), node.level]);
    const [right] = api.coord([api.value(1), node.level]);
    const shape = { x: left, y: top, width: Math.max(0.5, right - left), height: ROW_HEIGHT };
    const fill = ratioColour(divided(node.measured, node.predicted), look);
    const isCurrent = node === this.current;
    return {
      type: "rect", shape, z2: isCurrent ? 2 : 1,
      style: {
        fill: node.isRest ? look.hatch : fill, opacity: this.matches(node) ? 1 : 0.18,
        stroke: isCurrent ? look.ink : look.paper, lineWidth: isCurrent ? 2 : shape.width > 3 ? 1 : 0,
      },
      textConfig: { position: "insideLeft", distance: 6 },
      textContent: shape.width < 28 ? undefined : {
        style: {
          text: shortName(node), width: shape.width - 10, overflow: "truncate", fontSize: 12, fontFamily: FONT,
          fill: node.isRest ? look.ink : echarts.color.lum(fill, 1) > 0.45 ? "#16191d" : "#ffffff",
          opacity: this.matches(node) ? 1 : 0.3,
        },
      },
    };
  }

  tip(node) {
    const { measured, predicted } = node;
    const pairs = [["Measured, with children", duration(measured)]];
    if (node.row && !node.reason) {
      const row = node.row;
      pairs.push(
        ["Predicted, with children", duration(predicted)], ["Measured ÷ predicted", times(divided(measured, predicted))],
        ["Own measured", duration(row.scaled_self_ns)], ["Own predicted", `${duration(row.predicted_self_ns)}${row.source ? `, ${row.source}` : ""}`],
        ["Host time, with children", duration(row.wall_with_children)],
        ["FLOPs, with children", quantity(row.flops_with_children, "FLOP")], ["Bytes, with children", quantity(row.bytes_with_children, "B")],
        ["Calls", count(row.calls)], ["Waits for", row.bound ?? NONE],
      );
    }
    const stage = this.tree.children.find((child) => child.name === node.stage);
    if (stage) pairs.push([`Share of ${stage.name} (${WIDTHS[this.width].label.toLowerCase()})`, percent(divided(node.value, stage.value))]);
    return tip(node.name, node.kind, pairs);
  }
}

function shortName(node) {
  if (node.row?.module_path === "") return node.kind;
  return node.row && !node.reason ? node.name.slice((node.row.parent_path ?? "").length).replace(/^\./, "") : node.name;
}

function drawRamp() {
  const ramp = document.getElementById("tree-ramp");
  const stops = { ramp: rampColours() };
  ramp.replaceChildren(...["1/16", "1/4", "1", "4", "16"].map((label, place) => {
    const step = document.createElement("span");
    const fill = ratioColour(4 ** (place - 2), stops);
    step.textContent = `${label}×`;
    step.style.cssText = `background:${fill};color:${echarts.color.lum(fill, 1) > 0.45 ? "#16191d" : "#ffffff"}`;
    return step;
  }));
}
