// The gap as a waterfall: from the datasheet to the clock.
const BAR_WIDTH = 20;
const GAP = [
  ["Datasheet", "datasheet_ns", "total"],
  ["Ceilings", "ceilings_ns", "ceilings"],
  ["Launches", "launch_ns", "launch"],
  ["Shapes", "shape_ns", "shape"],
  ["Predicted", "predicted_device_ns", "total"],
  ["Unexplained", "unexplained_ns", "unexplained"],
  ["Device", "measured_ns", "total"],
  ["Host gap", "host_gap_ns", "host"],
  ["Wall", "wall_self_ns", "total"],
];

// The bars of a waterfall, top down. A total starts at nothing, a part where the bar before it ended.
function waterfall(rows) {
  let reached = 0;
  const bars = [];
  for (const [name, column, shade] of GAP) {
    const values = rows.map((row) => row[column]).filter((value) => value !== null);
    if (!values.length) continue;
    const value = values.reduce((all, one) => all + one, 0);
    const start = shade === "total" ? 0 : reached;
    reached = start + value;
    bars.push({ name, shade, value, start, end: reached });
  }
  return bars;
}

function addGap(rows) {
  const gap = STAGES.flatMap((name) => rows.filter((row) => row.stage === name));
  let stage = "all";
  const { redraw } = addChart("gap-chart", "svg", () => {
    const bars = waterfall(gap.filter((row) => stage === "all" || row.stage === stage)).reverse();
    const wall = bars[0].value;
    const label = (bar) => `${bar.shade === "total" ? duration(bar.value) : signed(bar.value)}  ${percent(divided(bar.value, wall))}`;
    return {
      ...basics(),
      grid: { left: 8, right: 110, top: 8, bottom: 8, containLabel: true },
      tooltip: {
        ...basics().tooltip, trigger: "axis", axisPointer: { type: "none" },
        formatter: ([{ dataIndex }]) => tip(bars[dataIndex].name, stage === "all" ? "all stages" : stage, [
          [bars[dataIndex].shade === "total" ? "In all" : "Adds", bars[dataIndex].shade === "total" ? duration(bars[dataIndex].value) : signed(bars[dataIndex].value)],
          ["Of wall time", percent(divided(bars[dataIndex].value, wall))],
        ]),
      },
      xAxis: { type: "value", min: 0, axisLabel: { ...muted(), formatter: duration, hideOverlap: true }, splitLine: thinLine(), axisLine: { show: false } },
      yAxis: {
        type: "category", data: bars.map((bar) => bar.name), axisTick: { show: false }, axisLine: { show: false },
        axisLabel: { color: colour("ink"), fontFamily: FONT, fontSize: 13 },
      },
      series: [
        { type: "bar", stack: "gap", silent: true, itemStyle: { color: "transparent" }, data: bars.map((bar) => Math.min(bar.start, bar.end)) },
        {
          type: "bar", stack: "gap", barWidth: BAR_WIDTH,
          data: bars.map((bar) => ({ value: Math.abs(bar.value), itemStyle: { color: colour(bar.shade) } })),
          label: {
            show: true, position: "right", distance: 8, color: colour("ink"), fontFamily: FONT, textBorderColor: colour("paper"), textBorderWidth: 3,
            formatter: ({ dataIndex }) => label(bars[dataIndex]),
          },
        },
        {
          // From the end of each bar down to the next.
          type: "custom", silent: true, z: 1, data: bars.slice(1).map((bar, place) => [bar.end, place, place + 1]),
          renderItem: (_, api) => {
            const [x, bottom] = api.coord([api.value(0), api.value(1)]);
            const [, top] = api.coord([api.value(0), api.value(2)]);
            const half = BAR_WIDTH / 2;
            return { type: "line", shape: { x1: x, y1: top + half, x2: x, y2: bottom - half }, style: { stroke: colour("muted"), lineWidth: 1 } };
          },
        },
      ],
    };
  });
  addSwitch("gap-stage", [["all", "all stages"], ...gap.map((row) => [row.stage, row.stage])], stage, (name) => { stage = name; redraw(); });
}
