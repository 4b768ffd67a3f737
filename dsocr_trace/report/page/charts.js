// Stage bars, roofline and memory.
// Wall time of each stage with and without work on the device, measured and below it predicted.
function addStageChart(stages, predicted) {
  const bars = stages.flatMap((row) => [
    { row, origin: "measured", wall: row.wall_ns, device: row.scaled_ns },
    { row, origin: predicted, wall: row.predicted_ns, device: row.predicted_device_ns },
  ]).filter((bar) => bar.device !== null && bar.wall !== null).reverse();
  const isMeasured = (bar) => bar.origin === "measured";
  const style = (bar, shade) => (isMeasured(bar)
    ? { color: colour(shade) }
    : { color: colour(shade), opacity: 0.45, borderColor: colour("ink"), borderWidth: 1, borderType: "dashed" });
  const parts = [
    ["Device at work", "roof", (bar) => bar.device],
    ["No work on the device", "host", (bar) => Math.max(0, bar.wall - bar.device)],
  ];
  document.getElementById("stage-chart").style.height = `${70 + 38 * bars.length}px`;
  addChart("stage-chart", "svg", () => ({
    ...basics(),
    grid: { left: 8, right: 90, top: 40, bottom: 8, containLabel: true },
    legend: { left: 0, top: 0, itemWidth: 14, itemHeight: 10, itemGap: 24, textStyle: muted(), selectedMode: false, data: parts.map(([name]) => name) },
    tooltip: {
      ...basics().tooltip, trigger: "axis", axisPointer: { type: "none" },
      formatter: ([{ dataIndex }]) => {
        const { row } = bars[dataIndex];
        return tip(row.stage, `${count(row.forwards)} forwards, ${count(row.profiled_forwards)} profiled`, [
          ["Wall", duration(row.wall_ns)], ["Wall, predicted", duration(row.predicted_ns)],
          ["Device", duration(row.scaled_ns)], ["Device, predicted", duration(row.predicted_device_ns)],
          ["Device idle", row.idle_ns < 0 ? `−${duration(-row.idle_ns)}` : duration(row.idle_ns)],
        ]);
      },
    },
    xAxis: {
      type: "value", axisLabel: { ...muted(), formatter: duration, hideOverlap: true },
      splitLine: thinLine(), axisLine: { show: false },
    },
    yAxis: {
      type: "category", data: bars.map((bar) => `${bar.row.stage}  ${marked(bar.origin)}`), axisTick: { show: false }, axisLine: { show: false },
      axisLabel: { color: colour("ink"), fontFamily: FONT, fontSize: 12 },
    },
    series: [
      ...parts.map(([name, shade, value]) => ({
        name, type: "bar", stack: "wall", barWidth: 20, itemStyle: { color: colour(shade) },
        data: bars.map((bar) => ({ value: value(bar), itemStyle: style(bar, shade) })),
      })),
      {
        // A profiled stage can take longer than the same stage without the profiler: the mark says where the latter ended.
        name: "Wall", type: "scatter", symbol: "rect", symbolSize: [3, 28], itemStyle: { color: colour("ink") }, z: 5,
        data: bars.map((bar) => ({ value: [bar.wall, `${bar.row.stage}  ${marked(bar.origin)}`] })),
        label: {
          show: true, position: "right", distance: 6, color: colour("ink"), fontFamily: FONT,
          textBorderColor: colour("paper"), textBorderWidth: 3, formatter: ({ dataIndex }) => duration(bars[dataIndex].wall),
        },
      },
    ],
  }));
}

// Highest rate at an intensity (FLOP per byte) under a roof.
const ceiling = (roof, intensity) => Math.min(roof.tensor_flops_per_s, intensity * roof.memory_bytes_per_s);
const ridge = (roof) => roof.tensor_flops_per_s / roof.memory_bytes_per_s;

function decadesAround(values) {
  const logs = values.map(Math.log10);
  return [10 ** Math.floor(Math.min(...logs)), 10 ** Math.ceil(Math.max(...logs))];
}

const SOLID = "path://M0 4h20v3H0z";
const DASHED = "path://M0 4h5v3H0zM7.5 4h5v3h-5zM15 4h5v3h-5z";

// One roof as a line, named where no point can be: along its slope and at its end.
function roofSeries(roof, place, [low, high], isWide) {
  const label = (text, position) => ({ show: true, formatter: text, position, distance: 6, color: colour("muted"), fontFamily: FONT, fontSize: 12 });
  const at = (intensity, text, position) => ({ value: [intensity, ceiling(roof, intensity)], label: text && isWide ? label(text, position) : { show: false } });
  const edge = ridge(roof);
  const below = place > 0;
  return {
    name: `${roof.source} roof`, type: "line", symbolSize: 0, silent: true, z: 1,
    lineStyle: { color: colour("ink"), width: 2, type: below ? "dashed" : "solid" }, itemStyle: { color: colour("ink") },
    data: [
      at(low),
      at(low * (edge / low) ** 0.3, quantity(roof.memory_bytes_per_s, "B/s"), below ? "bottom" : "top"),
      at(edge),
      at(edge * (high / edge) ** 0.12, quantity(roof.tensor_flops_per_s, "FLOP/s"), below ? "bottom" : "top"),
      at(high),
    ],
  };
}

function addRoofline(kinds, roofs) {
  const points = kinds.filter((row) => row.intensity > 0 && row.achieved_flops_per_s > 0);
  const largest = Math.max(...kinds.map((row) => row.scaled_self_ns));
  const size = (row) => 7 + 45 * Math.sqrt(row.scaled_self_ns / largest);
  const range = decadesAround([...points.map((row) => row.intensity), ...roofs.flatMap((roof) => [ridge(roof) / 3, ridge(roof) * 10])]);
  const rates = decadesAround([...points.map((row) => row.achieved_flops_per_s), ...roofs.map((roof) => 1.2 * roof.tensor_flops_per_s)]);
  const named = new Set([...points].sort((one, other) => other.scaled_self_ns - one.scaled_self_ns).slice(0, 8));
  const stages = STAGES.filter((stage) => points.some((row) => row.stage === stage));
  const axis = (name, [min, max], unit) => ({
    type: "log", name, min, max, nameLocation: "middle", nameTextStyle: muted(), splitLine: thinLine(),
    axisLabel: { ...muted(), formatter: (value) => (unit ? quantity(value, unit) : String(value)), hideOverlap: true },
    axisLine: { show: false }, axisTick: { show: false },
  });
  document.getElementById("roof-note").textContent =
    `${roofs.map((roof) => `${marked(roof.source)} roof of ${roof.name}: ${quantity(roof.tensor_flops_per_s, "FLOP/s")} and ${quantity(roof.memory_bytes_per_s, "B/s")}`).join("; ")}. ` +
    `${kinds.length - points.length} kinds without FLOPs are in the table only, such as copies and embeddings.`;
  addChart("roof-chart", "svg", (width) => ({
    ...basics(),
    grid: { left: 8, right: 24, top: width > 600 ? 74 : 104, bottom: 30, containLabel: true },
    legend: {
      left: 0, top: 0, itemGap: width > 600 ? 24 : 14, textStyle: muted(), itemWidth: 14, itemHeight: 12,
      data: [...stages, ...roofs.map((roof, place) => ({ name: `${roof.source} roof`, icon: place ? DASHED : SOLID }))],
    },
    xAxis: { ...axis("Arithmetic intensity (FLOP per byte)", range), nameGap: 30 },
    yAxis: { ...axis("Achieved", rates, "FLOP/s"), nameLocation: "end", nameGap: 14 },
    series: [
      ...stages.map((stage) => ({
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
        tooltip: { formatter: ({ data }) => rooflineTip(data.row, roofs) },
      })),
      ...roofs.map((roof, place) => roofSeries(roof, place, range, width > 600)),
    ],
  }));
}

function rooflineTip(row, roofs) {
  return tip(row.kind || "(root)", `${count(row.modules)} × ${row.module_class}, ${row.stage}`, [
    ["Intensity", `${Number(row.intensity.toPrecision(3))} FLOP/B`],
    ["Achieved", quantity(row.achieved_flops_per_s, "FLOP/s")],
    ...roofs.flatMap((roof) => {
      const reachable = ceiling(roof, row.intensity);
      return [[`Roof there, ${roof.source}`, quantity(reachable, "FLOP/s")], ["Share of it", percent(row.achieved_flops_per_s / reachable)]];
    }),
    ["Memory traffic", quantity(row.achieved_bytes_per_s, "B/s")],
    ["Device time", duration(row.scaled_self_ns)],
    ["Predicted", duration(row.predicted_self_ns)],
    ["Waits for", row.bound ?? NONE],
  ]);
}

// Memory of each stage, modelled and measured; what was not measured has no part.
function addMemory(memory) {
  const parts = [["Weights", "weights", "weight"], ["Largest activation", "activations", "activation_peak"], ["Cache growth", "cache", "kv_cache"]];
  const bars = [...memory].reverse().flatMap((row) => [["measured", row], ["predicted", row]]);
  const names = { measured: marked("measured"), predicted: marked("modelled") };
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
