// Stage bars, roofline and expert heat map.
function hasPrediction(stages) {
  return stages.some((row) => row.predicted_ns !== null);
}

// Parts of each stage's wall time: predicted on the device, beyond it, and without work on the device.
function addStageChart(stages) {
  const parts = [
    ["Predicted", "roof", (row) => Math.min(row.predicted_ns ?? 0, row.scaled_ns)],
    [hasPrediction(stages) ? "Device time beyond it" : "Device time", "above", (row) => Math.max(0, row.scaled_ns - (row.predicted_ns ?? 0))],
    ["No work on the device", "gap", (row) => Math.max(0, row.gap_ns)],
  ].slice(hasPrediction(stages) ? 0 : 1);
  const order = [...stages].reverse();
  addChart("stage-chart", "svg", (width) => ({
    ...basics(),
    grid: { left: 8, right: 90, top: width < 600 ? 64 : 40, bottom: 8, containLabel: true },
    legend: { left: 0, top: 0, itemWidth: 14, itemHeight: 10, itemGap: 24, textStyle: muted(), selectedMode: false },
    tooltip: {
      ...basics().tooltip, trigger: "axis", axisPointer: { type: "none" },
      formatter: ([{ dataIndex }]) => {
        const row = order[dataIndex];
        return tip(row.stage, `${count(row.forwards)} forwards, ${count(row.profiled_forwards)} profiled`, [
          ["Wall", duration(row.wall_ns)], ["Device", duration(row.scaled_ns)], ["Predicted", duration(row.predicted_ns)],
          ["Gap", row.gap_ns < 0 ? `−${duration(-row.gap_ns)}` : duration(row.gap_ns)],
        ]);
      },
    },
    xAxis: {
      type: "value", axisLabel: { ...muted(), formatter: duration, hideOverlap: true },
      splitLine: thinLine(), axisLine: { show: false },
    },
    yAxis: {
      type: "category", data: order.map((row) => row.stage), axisTick: { show: false }, axisLine: { show: false },
      axisLabel: { color: colour("ink"), fontFamily: FONT, fontSize: 13 },
    },
    series: [
      ...parts.map(([name, shade, value]) => ({
        name, type: "bar", stack: "wall", barWidth: 24, itemStyle: { color: colour(shade) }, data: order.map(value),
      })),
      {
        // A profiled stage can take longer than the same stage without the profiler: the mark says where the latter ended.
        name: "Wall", type: "scatter", symbol: "rect", symbolSize: [3, 34], itemStyle: { color: colour("ink") }, z: 5,
        data: order.map((row) => ({ value: [row.wall_ns, row.stage], label: { position: row.gap_ns < 0 ? "top" : "right" } })),
        label: {
          show: true, distance: 5, color: colour("ink"), fontFamily: FONT,
          textBorderColor: colour("paper"), textBorderWidth: 3, formatter: ({ dataIndex }) => duration(order[dataIndex].wall_ns),
        },
      },
    ],
  }));
}

// Highest rate at an intensity (FLOP per byte) under the roof.
const ceiling = (hardware, intensity) => Math.min(hardware.tensor_flops_per_s, intensity * hardware.memory_bytes_per_s);

function decadesAround(values) {
  const logs = values.map(Math.log10);
  return [10 ** Math.floor(Math.min(...logs)), 10 ** Math.ceil(Math.max(...logs))];
}

function addRoofline(kinds, hardware) {
  const points = kinds.filter((row) => row.intensity > 0 && row.achieved_flops_per_s > 0);
  const largest = Math.max(...kinds.map((row) => row.scaled_self_ns));
  const size = (row) => 7 + 45 * Math.sqrt(row.scaled_self_ns / largest);
  const ridge = hardware.tensor_flops_per_s / hardware.memory_bytes_per_s;
  const [low, high] = decadesAround([...points.map((row) => row.intensity), ridge / 3, ridge * 10]);
  const corner = (intensity, label, position) => ({
    value: [intensity, ceiling(hardware, intensity)],
    label: { show: true, formatter: label, position, color: colour("muted"), fontFamily: FONT, fontSize: 12 },
  });
  const roof = () => [
    corner(low, "", "right"),
    corner(Math.sqrt(low * ridge), `${quantity(hardware.memory_bytes_per_s, "B/s")}, ${hardware.provenance}`, "left"),
    corner(ridge, "", "top"),
    corner(Math.sqrt(ridge * high), `${quantity(hardware.tensor_flops_per_s, "FLOP/s")}, ${hardware.provenance}`, "top"),
    corner(high, "", "left"),
  ];
  const rates = decadesAround([...points.map((row) => row.achieved_flops_per_s), hardware.tensor_flops_per_s]);
  const named = new Set([...points].sort((one, other) => other.scaled_self_ns - one.scaled_self_ns).slice(0, 8));
  const axis = (name, [min, max], unit) => ({
    type: "log", name, min, max, nameLocation: "middle", nameTextStyle: muted(), splitLine: thinLine(),
    axisLabel: { ...muted(), formatter: (value) => (unit ? quantity(value, unit) : String(value)), hideOverlap: true },
    axisLine: { show: false }, axisTick: { show: false },
  });
  document.getElementById("roof-note").textContent =
    `Roof of ${hardware.name} (${hardware.provenance}): ${quantity(hardware.tensor_flops_per_s, "FLOP/s")} and ` +
    `${quantity(hardware.memory_bytes_per_s, "B/s")}. ` +
    `${kinds.length - points.length} kinds without FLOPs are in the table only, such as copies and embeddings.`;
  addChart("roof-chart", "svg", (width) => ({
    ...basics(),
    grid: { left: 8, right: 24, top: 74, bottom: 30, containLabel: true },
    legend: { left: 0, top: 0, itemGap: 24, textStyle: muted(), itemWidth: 14, itemHeight: 12, data: [...STAGES.filter((stage) => points.some((row) => row.stage === stage)), { name: "roof", icon: "path://M0 4h20v3H0z" }] },
    xAxis: { ...axis("Arithmetic intensity (FLOP per byte)", [low, high]), nameGap: 30 },
    yAxis: { ...axis("Achieved", rates, "FLOP/s"), nameLocation: "end", nameGap: 14 },
    series: [
      ...STAGES.filter((stage) => points.some((row) => row.stage === stage)).map((stage) => ({
        name: stage, type: "scatter", symbol: STAGE_SYMBOLS[stage],
        itemStyle: { color: colour(stage), opacity: 0.72, borderColor: colour("paper"), borderWidth: 1 },
        emphasis: { itemStyle: { opacity: 1, borderColor: colour("ink") } },
        data: points.filter((row) => row.stage === stage).map((row) => ({
          value: [row.intensity, row.achieved_flops_per_s], row, symbolSize: size(row),
          label: {
            show: named.has(row) && width > 600, formatter: row.kind.split(".").filter((part) => part !== "*").slice(-2).join(".") || "(root)",
            position: "right", color: colour("ink"), fontSize: 11, textBorderColor: colour("paper"), textBorderWidth: 3,
          },
        })),
        labelLayout: { hideOverlap: true, moveOverlap: "shiftY" },
        tooltip: { formatter: ({ data }) => rooflineTip(data.row, hardware) },
      })),
      {
        name: "roof", type: "line", data: roof(), symbolSize: 0, silent: true, z: 1,
        lineStyle: { color: colour("ink"), width: 2 }, itemStyle: { color: colour("ink") },
      },
    ],
  }));
}

function rooflineTip(row, hardware) {
  const reachable = ceiling(hardware, row.intensity);
  return tip(row.kind || "(root)", `${count(row.modules)} × ${row.module_class}, ${row.stage}`, [
    ["Intensity", `${Number(row.intensity.toPrecision(3))} FLOP/B`],
    ["Achieved", quantity(row.achieved_flops_per_s, "FLOP/s")],
    ["Roof there", quantity(reachable, "FLOP/s")],
    ["Share of the roof", percent(row.achieved_flops_per_s / reachable)],
    ["Memory traffic", quantity(row.achieved_bytes_per_s, "B/s")],
    ["Device time", duration(row.scaled_self_ns)],
    ["Predicted", duration(row.predicted_self_ns)],
    ["Bound by", row.bound ?? NONE],
  ]);
}

// Calls per expert and layer of one stage at a time.
function addExperts(experts) {
  const section = document.getElementById("experts-section");
  if (!experts.length) { section.remove(); return; }
  const layers = [...new Set(experts.map((row) => row.layer))];
  const most = 1 + Math.max(...experts.map((row) => row.expert));
  const stages = STAGES.filter((stage) => experts.some((row) => row.stage === stage));
  let stage = stages.at(-1);
  document.getElementById("expert-chart").style.height = `${110 + 20 * layers.length}px`;
  // Elements print well, and become slow when there are many.
  const renderer = layers.length * most > 2000 ? "canvas" : "svg";
  const { redraw } = addChart("expert-chart", renderer, () => {
    const mine = experts.filter((row) => row.stage === stage);
    const highest = Math.max(1, ...mine.map((row) => row.calls));
    const axis = { type: "category", axisLabel: muted(), axisLine: { show: false }, axisTick: { show: false }, nameTextStyle: muted() };
    return {
      ...basics(),
      tooltip: {
        ...basics().tooltip,
        formatter: ({ data }) => tip(`Expert ${data[0]}`, layers[data[1]], [["Calls", count(data[2])]]),
      },
      grid: { left: 8, right: 12, top: 8, bottom: 76, containLabel: true },
      xAxis: { ...axis, data: Array.from({ length: most }, (_, number) => number), name: `expert (${stage})`, nameLocation: "middle", nameGap: 26 },
      yAxis: { ...axis, data: layers, inverse: true, axisLabel: { ...muted(), formatter: (name) => `layer ${name.match(/\.(\d+)/)?.[1] ?? name}` } },
      visualMap: {
        min: 0, max: highest, calculable: false, orient: "horizontal", left: 0, bottom: 0, itemWidth: 12, itemHeight: 160,
        text: [`${count(highest)} calls`, "0"], textStyle: muted(), inRange: { color: [colour("raised"), colour("roof"), colour("ink")] },
      },
      series: {
        type: "heatmap", itemStyle: { borderColor: colour("paper"), borderWidth: 1 },
        data: mine.map((row) => [row.expert, layers.indexOf(row.layer), row.calls]),
      },
    };
  });
  addSwitch("expert-stage", stages.map((name) => [name, name]), stage, (name) => { stage = name; redraw(); });
}

// Memory of each stage, modelled and measured; what was not measured has no part.
function addMemory(memory) {
  const parts = [["Weights", "weights", "weight"], ["Largest activation", "activations", "activation_peak"], ["Cache growth", "cache", "kv_cache"]];
  const bars = [...memory].reverse().flatMap((row) => [["measured", row], ["predicted", row]]);
  const names = { measured: "● measured", predicted: "○ modelled" };
  const value = ([origin, row], part) => row[`${origin}_${part}_bytes`];
  document.getElementById("memory-chart").style.height = `${70 + 30 * bars.length}px`;
  addChart("memory-chart", "svg", () => ({
    ...basics(),
    grid: { left: 8, right: 40, top: 36, bottom: 4, containLabel: true },
    legend: { left: 0, top: 0, itemWidth: 14, itemHeight: 10, itemGap: 24, textStyle: muted(), selectedMode: false },
    tooltip: {
      ...basics().tooltip, trigger: "axis", axisPointer: { type: "none" },
      formatter: ([{ dataIndex }]) => tip(bars[dataIndex][1].stage, names[bars[dataIndex][0]],
        parts.map(([name, , part]) => [name, quantity(value(bars[dataIndex], part), "B")])),
    },
    xAxis: { type: "value", axisLabel: { ...muted(), formatter: (bytes) => quantity(bytes, "B"), hideOverlap: true }, splitLine: thinLine() },
    yAxis: {
      type: "category", data: bars.map(([origin, row]) => `${row.stage}  ${names[origin]}`),
      axisTick: { show: false }, axisLine: { show: false }, axisLabel: { color: colour("ink"), fontFamily: FONT, fontSize: 12 },
    },
    series: parts.map(([name, shade, part]) => ({
      name, type: "bar", stack: "memory", barWidth: 14, itemStyle: { color: colour(shade) }, data: bars.map((bar) => value(bar, part)),
    })),
  }));
}
