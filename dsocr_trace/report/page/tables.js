// Sortable and filterable tables; only the rows in view are in the page.
const MOST_HEIGHT = 560;
const PRINTED_ROWS = 25;

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
const text = (field, title, more) => () => ({ field, title, headerFilter: "input", headerFilterPlaceholder: "contains", minWidth: 92, ...more });
const path = (field, title, more) => text(field, title, { cssClass: "mono", minWidth: 220, formatter: (cell) => breakable(cell.getValue() || "(root)"), ...more });
const figure = (field, title, format, scale = 1) => ({
  field, title, hozAlign: "right", headerHozAlign: "right", sorter: "number", headerSortStartingDir: "desc", minWidth: 88,
  formatter: (cell) => format(cell.getValue(), scale),
  headerFilter: "input", headerFilterPlaceholder: "at least",
  headerFilterFunc: (least, value) => value !== null && value / scale >= Number(least),
});
const whole = (field, title, more) => () => ({ ...figure(field, title, count), ...more });
const quotient = (field, title) => () => figure(field, title, times);
// Columns whose names end alike, such as all times, share their unit.
const measure = (scales, unit, ending) => (field, title) => (rows) => {
  const alike = Object.keys(rows[0] ?? {}).filter((name) => (ending ? name.endsWith(ending) : name === field));
  const [scale, prefix] = commonUnit(alike.flatMap((name) => rows.map((row) => row[name])), scales);
  return figure(field, `${title} (${prefix}${unit})`, fixed, scale);
};
const time = measure(TIMES, "", "_ns");
const flop = measure(PREFIXES, "FLOP");
const byte = measure(PREFIXES, "B", "bytes");
const group = (title, ...columns) => (rows) => ({ title, columns: columns.map((column) => column(rows)) });

const MEASURED = "● measured";
const SCALED = "◐ scaled to the stage";
const MODELLED = "○ modelled";

const TABLES = {
  modules: [
    text("stage", "Stage"), path("module_path", "Module", { widthGrow: 3, minWidth: 300 }), text("module_class", "Class", { minWidth: 130 }),
    group(MEASURED, whole("calls", "Calls"), whole("event_count", "Events", { print: false })),
    group(SCALED, time("scaled_self_ns", "Own"), time("scaled_total_ns", "Total")),
    group(MODELLED, time("predicted_self_ns", "Own"), flop("flops", "Work"), byte("bytes", "Moved"), text("bound", "Bound")),
    quotient("ratio", "Own ÷ predicted"),
  ],
  kinds: [
    text("stage", "Stage"), path("kind", "Module", { widthGrow: 3 }), text("module_class", "Class", { minWidth: 130 }),
    group(SCALED, whole("modules", "Modules"), time("scaled_self_ns", "Device")),
    group(MODELLED, time("predicted_self_ns", "Predicted"), measure(PREFIXES, "FLOP/B")("intensity", "Intensity"), text("bound", "Bound")),
    quotient("ratio", "Device ÷ predicted"),
    group("modelled work over device time", measure(PREFIXES, "FLOP/s")("achieved_flops_per_s", "Rate"), measure(PREFIXES, "B/s")("achieved_bytes_per_s", "Traffic")),
  ],
  operators: [
    text("stage", "Stage"), text("operator_category", "Category"),
    group(MEASURED, whole("event_count", "Events")), group(SCALED, time("scaled_ns", "Device")),
    group(MODELLED, time("predicted_ns", "Predicted"), flop("flops", "Work"), byte("bytes", "Moved")),
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
  experts: [text("stage", "Stage"), path("layer", "Layer"), whole("expert", "Expert"), whole("calls", "Calls")],
  memory: [
    text("stage", "Stage"),
    group("Weights", byte("predicted_weight_bytes", "○ modelled"), byte("measured_weight_bytes", "● measured")),
    group("Largest activation", byte("predicted_activation_peak_bytes", "○ modelled"), byte("measured_activation_peak_bytes", "● measured")),
    group("Cache growth", byte("predicted_kv_cache_bytes", "○ modelled"), byte("measured_kv_cache_bytes", "● measured")),
  ],
};

const tables = {};

// What a cell is too narrow for, as text: names of kernels look like markup.
function fullText(_, cell) {
  const whole = document.createElement("span");
  whole.textContent = cell.getValue() ?? NONE;
  return whole;
}

function addTable(name, rows, more) {
  const table = new Tabulator(`#table-${name}`, {
    data: rows, columns: TABLES[name].map((column) => column(rows)), layout: innerWidth < 720 ? "fitData" : "fitColumns",
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
