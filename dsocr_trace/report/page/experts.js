// Expert routing: how even it is, and which experts it reaches.
// Load of an expert over that of an even spread: upper ends of the bars, each below the next.
const LOADS = [[0, "none"], [0.5, "<½×"], [1, "½–1×"], [2, "1–2×"], [4, "2–4×"], [8, "4–8×"], [Infinity, "≥8×"]];

// What counts as load: tokens, or calls where no tokens are known; each beside the even share of its layer.
function withLoad(experts) {
  const unit = experts.some((row) => row.tokens !== null) ? "tokens" : "calls";
  const layers = new Map();
  for (const row of experts) layers.set(row.layer, [...(layers.get(row.layer) ?? []), row]);
  const rows = [...layers.values()].flatMap((mine) => {
    const even = mine.reduce((all, row) => all + row[unit], 0) / mine.length;
    return mine.map((row) => ({ ...row, value: row[unit], load: divided(row[unit], even) ?? 0 }));
  });
  return { unit, rows };
}

const layerName = (path) => `layer ${path.match(/\.(\d+)/)?.[1] ?? path}`;

function loadOption({ rows }, stage) {
  const bins = LOADS.map(([end], place) => rows.filter((row) => row.load <= 0 ? place === 0 : place > 0 && row.load < end && row.load >= LOADS[place - 1][0]).length);
  return {
    ...basics(),
    grid: { left: 8, right: 12, top: 24, bottom: 30, containLabel: true },
    tooltip: {
      ...basics().tooltip,
      formatter: ({ dataIndex }) => tip(`${LOADS[dataIndex][1]} an even share`, stage, [["Experts", count(bins[dataIndex])], ["Of all", percent(bins[dataIndex] / rows.length)]]),
    },
    xAxis: {
      type: "category", data: LOADS.map(([, label]) => label), name: "load, over an even share of the layer's tokens", nameLocation: "middle", nameGap: 30,
      nameTextStyle: muted(), axisLabel: { ...muted(), interval: 0 }, axisTick: { show: false }, axisLine: { lineStyle: { color: colour("line") } },
    },
    yAxis: { type: "value", name: "experts", nameTextStyle: muted(), axisLabel: muted(), splitLine: thinLine(), minInterval: 1 },
    series: {
      type: "bar", barCategoryGap: "12%", itemStyle: { color: colour("roof") }, data: bins,
      label: { show: true, position: "top", color: colour("ink"), fontFamily: FONT, formatter: ({ value }) => count(value) },
    },
  };
}

function heatOption({ rows, unit }, layers, most) {
  const highest = Math.max(1, ...rows.map((row) => row.value));
  const axis = { type: "category", axisLabel: muted(), axisLine: { show: false }, axisTick: { show: false }, nameTextStyle: muted() };
  return {
    ...basics(),
    tooltip: {
      ...basics().tooltip,
      formatter: ({ data: [, , , row] }) => tip(`Expert ${rows[row].expert}`, rows[row].layer, [
        ["Calls", count(rows[row].calls)], ["Tokens", count(rows[row].tokens)], ["Over an even share", times(rows[row].load)],
      ]),
    },
    grid: { left: 8, right: 12, top: 8, bottom: 76, containLabel: true },
    xAxis: { ...axis, data: Array.from({ length: most }, (_, number) => number), name: "expert", nameLocation: "middle", nameGap: 26 },
    yAxis: { ...axis, data: layers, inverse: true, axisLabel: { ...muted(), formatter: layerName } },
    visualMap: {
      min: 0, max: highest, dimension: 2, calculable: false, orient: "horizontal", left: 0, bottom: 0, itemWidth: 12, itemHeight: 160,
      text: [`${count(highest)} ${unit}`, "0"], textStyle: muted(), inRange: { color: [colour("raised"), colour("roof"), colour("ink")] },
    },
    series: {
      type: "heatmap", itemStyle: { borderColor: colour("paper"), borderWidth: 1 }, encode: { value: 2 },
      data: rows.map((row, place) => [row.expert, layers.indexOf(row.layer), row.value, place]),
    },
  };
}

function loadNote({ rows, unit }) {
  const [busiest] = [...rows].sort((one, other) => other.load - one.load);
  const idle = rows.filter((row) => !row.value).length;
  return `${count(rows.length)} experts. Expert ${busiest.expert} of ${layerName(busiest.layer)} took most: ${count(busiest.value)} ${unit}, ` +
    `${times(busiest.load)} an even share. ${count(idle)} (${percent(idle / rows.length)}) took none.`;
}

// One stage at a time.
function addExperts(experts) {
  if (!experts.length) {
    document.getElementById("experts-section").remove();
    document.querySelector("nav a[href='#experts']").remove();
    return;
  }
  const layers = [...new Set(experts.map((row) => row.layer))];
  const most = 1 + Math.max(...experts.map((row) => row.expert));
  const stages = STAGES.filter((name) => experts.some((row) => row.stage === name));
  let stage = stages.at(-1);
  const shown = () => withLoad(experts.filter((row) => row.stage === stage));
  document.getElementById("expert-chart").style.height = `${110 + 20 * layers.length}px`;
  // Elements print well, and become slow when there are many.
  const renderer = layers.length * most > 2000 ? "canvas" : "svg";
  const charts = [addChart("load-chart", "svg", () => loadOption(shown(), stage)), addChart("expert-chart", renderer, () => heatOption(shown(), layers, most))];
  const show = (name) => {
    stage = name;
    document.getElementById("expert-note").textContent = loadNote(shown());
    for (const { redraw } of charts) redraw();
  };
  addSwitch("expert-stage", stages.map((name) => [name, name]), stage, show);
  show(stage);
}
