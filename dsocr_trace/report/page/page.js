// Everything together.
const STAGES = ["vision", "prefill", "decode", "other"];
const run = JSON.parse(document.getElementById("data").textContent);

function rowsOf(name) {
  const columns = Object.entries(run.tables[name]);
  return columns[0][1].map((_, place) => Object.fromEntries(columns.map(([column, values]) => [column, values[place]])));
}

function start() {
  startTheme();
  const rows = Object.fromEntries(Object.keys(run.tables).map((name) => [name, rowsOf(name)]));
  for (const row of [...rows.modules, ...rows.kinds]) row.ratio = divided(row.scaled_self_ns, row.predicted_self_ns);
  addStageChart(rows.stages, run.predicted);
  const icicle = new Icicle(rows.modules, rows.unclassified);
  if (document.getElementById("roof-chart")) {
    addRoofline(rows.kinds, run.roofs);
    openTable("kinds", rows.kinds);
  }
  if (document.getElementById("gap-chart")) {
    addGap(rows.gap);
    openTable("gap", rows.kinds);
  }
  const longest = [{ column: "scaled_self_ns", dir: "desc" }];
  addCount("modules", addTable("modules", rows.modules, { initialSort: longest }), run.left_out.modules);
  addTable("operators", rows.operators);
  addCount("kernels", addTable("kernels", rows.kernels), run.left_out.kernels);
  addTable("unclassified", rows.unclassified);
  addTable("calls", nested(rows.calls), { dataTree: true, dataTreeStartExpanded: true, dataTreeChildIndent: 18, dataTreeFilter: true, printRowRange: "active", renderVertical: "basic" });
  addMemory(rows.memory);
  addTable("memory", rows.memory);
  if (rows.experts.length) openTable("experts", rows.experts);
  addExperts(rows.experts);
  if (rows.stage2) addCount("stage2", addTable("stage2", rows.stage2, { initialSort: [{ column: "stage2_self_ns", dir: "desc" }, { column: "agrees", dir: "asc" }] }), 0);
  if (rows.counters) addCount("counters", addTable("counters", rows.counters), 0);
  root.dataset.ready = String(Math.round(performance.now()));
  return icicle;
}

// A table inside closed details has no size; it is made when they open.
function openTable(name, rows) {
  const details = document.getElementById(`table-${name}`).closest("details");
  details.addEventListener("toggle", () => addTable(name, rows), { once: true });
}

// For the browser's console.
window.dsocrTrace = { run, tables, icicle: start() };
