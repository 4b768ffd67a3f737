// Sortable and filterable tables; only the rows in view are in the page.
const MOST_HEIGHT = 560;
const PRINTED_ROWS = 20;

// A fixed unit keeps numbers comparable. All values that it is for set it, so that the largest has up to five digits.
function commonUnit(values, scales) {
  const largest = values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0);
  return scales.find(([size]) => largest >= size * 100) ?? scales.at(-1);
}

function fixed(value, scale) {
  if (value === null || value === undefined) return NONE;
  const number = value / scale;
  if (number > 0 && number < 0.005) return "<0.01";
  return number.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
}

// Long names may break after punctuation, on paper; on the screen they are cut.
const breakable = (name) => escaped(name).replace(/[.:,]+(?=[^.:,])/g, "$&<wbr>");

// The kinds of columns. Each takes the table's rows, its field and its title.
const text = (field, title, more) => () => ({ field, title, headerFilter: "input", headerFilterPlaceholder: "contains", minWidth: 80, ...more });
const path = (field, title, more) => text(field, title, { cssClass: "mono", minWidth: 200, formatter: (cell) => breakable(cell.getValue() || "(root)"), ...more });
const figure = (field, title, format, scale = 1) => ({
  field, title, cssClass: "number", hozAlign: "right", headerHozAlign: "right", sorter: "number", headerSortStartingDir: "desc", minWidth: 80,
  formatter: (cell) => format(cell.getValue(), scale),
  headerFilter: "input", headerFilterPlaceholder: "at least",
  headerFilterFunc: (least, value) => value !== null && value / scale >= Number(least),
});
const whole = (field, title, more) => () => ({ ...figure(field, title, count), ...more });
const quotient = (field, title) => () => figure(field, title, times);
// Columns whose names end alike, such as all times, share their unit.
const measure = (scales, unit, ending) => (field, title, more) => (rows) => {
  const alike = Object.keys(rows[0] ?? {}).filter((name) => (ending ? name.endsWith(ending) : name === field));
  const [scale, prefix] = commonUnit(alike.flatMap((name) => rows.map((row) => row[name])), scales);
  return { ...figure(field, `${title} (${prefix}${unit})`, fixed, scale), ...more };
};
const time = measure(TIMES, "", "_ns");
const flop = measure(PREFIXES, "FLOP");
const byte = measure(PREFIXES, "B", "bytes");
const group = (title, ...columns) => (rows) => ({ title, columns: columns.map((column) => column(rows)) });

const MEASURED = marked("measured");
const SCALED = `${marked("scaled")} to the stage`;
const MODELLED = marked("modelled");
const STAGE2 = "● measured in stage 2";
const share = (field, title) => () => figure(field, title, percent, 0.01);

// What each table shows; `predicted` says where predicted times are from.
const tableColumns = (predicted) => ({
  modules: [
    text("stage", "Stage"), path("module_path", "Module", { widthGrow: 3, minWidth: 250 }), text("module_class", "Class", { minWidth: 120 }),
    group(MEASURED, whole("calls", "Calls"), whole("event_count", "Events", { print: false })),
    group(SCALED, time("scaled_self_ns", "Own"), time("scaled_total_ns", "Total")),
    group("time model", time("predicted_self_ns", "Own"), text("bound", "Waits for"), text("source", "From", { print: false, minWidth: 120, formatter: (cell) => (cell.getValue() ? marked(cell.getValue()) : NONE) })),
    group(MODELLED, flop("flops", "Work", { print: false }), byte("bytes", "Moved", { print: false })),
    quotient("ratio", "Own ÷ predicted"),
  ],
  kinds: [
    text("stage", "Stage"), path("kind", "Module", { widthGrow: 3 }), text("module_class", "Class", { minWidth: 130 }),
    group(SCALED, whole("modules", "Modules"), time("scaled_self_ns", "Device")),
    group(predicted, time("predicted_self_ns", "Predicted"), text("bound", "Waits for")),
    quotient("ratio", "Device ÷ predicted"),
    group(MODELLED, measure(PREFIXES, "FLOP/B")("intensity", "Intensity")),
    group("modelled work over device time", measure(PREFIXES, "FLOP/s")("achieved_flops_per_s", "Rate"), measure(PREFIXES, "B/s")("achieved_bytes_per_s", "Traffic")),
  ],
  gap: [
    text("stage", "Stage"), path("kind", "Module", { widthGrow: 3 }), text("module_class", "Class", { minWidth: 130 }),
    group(predicted, time("datasheet_ns", "Datasheet"), time("ceilings_ns", "Ceilings"), time("launch_ns", "Launches"), time("shape_ns", "Shapes")),
    time("unexplained_ns", "Unexplained"),
    group(SCALED, time("scaled_self_ns", "Device")), time("host_gap_ns", "Host gap"), group(MEASURED, time("wall_self_ns", "Wall")),
  ],
  operators: [
    text("stage", "Stage"), text("operator_category", "Category"),
    group(MEASURED, whole("event_count", "Events")), group(SCALED, time("scaled_ns", "Device")),
    group(predicted, time("predicted_ns", "Device")), group(MODELLED, flop("flops", "Work"), byte("bytes", "Moved")),
  ],
  kernels: [
    text("stage", "Stage"), path("name", "Name", { widthGrow: 3 }), text("kind", "Kind"), text("operator_category", "Category"), text("kernel_family", "Family"),
    group(MEASURED, whole("event_count", "Events"), time("measured_ns", "Total"), measure(TIMES, "")("mean_ns", "Mean")),
    group(SCALED, time("scaled_ns", "Total")),
  ],
  unclassified: [
    text("stage", "Stage"), path("unclassified_reason", "Reason"), text("meaning", "Meaning", { widthGrow: 3, minWidth: 220 }),
    group(MEASURED, whole("event_count", "Events"), time("measured_self_ns", "Total")),
    group(SCALED, time("scaled_self_ns", "Total")),
  ],
  calls: [
    text("module_class", "Class", { minWidth: 300, widthGrow: 2 }), text("stage", "Stage"), whole("modules", "Modules"), whole("call_count", "Calls"),
    () => ({
      title: "Share of the stage's calls", field: "share", formatter: "progress", headerSort: false, minWidth: 160,
      formatterParams: { min: 0, max: 1, color: () => colour("roof"), legend: percent, legendColor: () => colour("ink"), legendAlign: "right" },
    }),
  ],
  experts: [text("stage", "Stage"), path("layer", "Layer"), whole("expert", "Expert"), group(MEASURED, whole("calls", "Calls")), group(MODELLED, whole("tokens", "Tokens"))],
  memory: [
    text("stage", "Stage"),
    group("Weights", byte("predicted_weight_bytes", MODELLED), byte("measured_weight_bytes", MEASURED)),
    group("Largest activation", byte("predicted_activation_peak_bytes", MODELLED), byte("measured_activation_peak_bytes", MEASURED)),
    group("Cache growth", byte("predicted_kv_cache_bytes", MODELLED), byte("measured_kv_cache_bytes", MEASURED)),
  ],
  stage2: [
    text("stage", "Stage"), path("module_path", "Module", { widthGrow: 3, minWidth: 300 }), text("agrees", "Agrees", { formatter: (cell) => (cell.getValue() ? "yes" : "no"), sorter: "boolean" }),
    group(MEASURED, whole("calls", "Calls"), whole("stage1_event_count", "Events"), time("stage1_self_ns", "Device")),
    group(STAGE2, whole("ranges", "Ranges"), whole("stage2_event_count", "Events"), time("stage2_self_ns", "Device")),
  ],
  counters: [
    path("name", "Kernel", { widthGrow: 3 }), whole("launch", "Launch"), path("module_path", "Module", { widthGrow: 2 }),
    group(STAGE2, time("traced_ns", "Traced"), time("duration_ns", "Alone"), byte("dram_read_bytes", "Read"), byte("dram_written_bytes", "Written")),
    group("● share of the device's peak", share("dram_share_of_peak", "Memory (%)"), share("sm_share_of_peak", "SM (%)"), share("tensor_pipe_share_of_peak", "Tensor (%)"), share("occupancy", "Occupancy (%)")),
  ],
});

const tables = {};

// What a cell is too narrow for, as text: names of kernels look like markup.
function fullText(_, cell) {
  const whole = document.createElement("span");
  whole.textContent = cell.getValue() ?? NONE;
  return whole;
}

function addTable(name, rows, more) {
  const table = new Tabulator(`#table-${name}`, {
    data: rows, columns: tableColumns(run.predicted ? marked(run.predicted) : MODELLED)[name].map((column) => column(rows)), layout: innerWidth < 720 ? "fitData" : "fitColumns",
    maxHeight: MOST_HEIGHT, columnDefaults: { tooltip: fullText, headerWordWrap: true }, placeholder: rows.length ? "No row matches the filters" : "Nothing here",
    printAsHtml: true, printStyled: false, printConfig: { dataTree: true }, printRowRange: () => tables[name].getRows("active").slice(0, PRINTED_ROWS), ...more,
  });
  table.on("tableBuilt", () => makeHeadersReachable(table));
  tables[name] = table;
  return table;
}

// Headings sort on click; let the keyboard do the same.
function makeHeadersReachable(table) {
  for (const heading of table.element.querySelectorAll(".tabulator-col-sorter-element")) {
    heading.tabIndex = 0;
    heading.addEventListener("keydown", (event) => {
      if (event.target === heading && (event.key === "Enter" || event.key === " ")) {
        event.preventDefault();
        heading.click();
      }
    });
  }
  for (const input of table.element.querySelectorAll(".tabulator-header-filter input")) {
    const title = input.closest(".tabulator-col").querySelector(".tabulator-col-title").textContent;
    input.setAttribute("aria-label", `Filter ${title}`);
  }
}

// Say how many rows a table shows of how many there are.
function addCount(name, table, leftOut) {
  const line = document.getElementById(`count-${name}`);
  const say = (shown) => {
    const all = table.getDataCount();
    line.textContent = `${count(shown)} of ${count(all)} rows` +
      (leftOut ? `; ${count(leftOut)} smaller ones are in the run's Parquet files only` : "");
  };
  table.on("tableBuilt", () => say(table.getDataCount("active")));
  table.on("dataFiltered", (_, shown) => say(shown.length));
}

// The folded call graph as rows within rows, with each one's share of its stage's calls.
function nested(calls) {
  const totals = {};
  for (const row of calls) totals[row.stage] = (totals[row.stage] ?? 0) + row.call_count;
  const rows = calls.map((row) => ({ ...row, share: row.call_count / totals[row.stage] }));
  for (const row of rows.filter((one) => one.parent_id !== null)) (rows[row.parent_id]._children ??= []).push(row);
  return rows.filter((row) => row.parent_id === null);
}
