// Light and dark, and the charts that must be drawn anew when it changes.
const root = document.documentElement;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const drawn = [];
// A4 upright without its margins, in CSS pixels.
const PAPER_WIDTH = 680;
let isPrinting = false;

function colour(name) {
  return getComputedStyle(root).getPropertyValue(`--${name}`).trim();
}

const STAGE_SYMBOLS = { vision: "circle", prefill: "diamond", decode: "triangle", other: "rect" };
const FONT = getComputedStyle(document.body).fontFamily;

// What all charts share; names of theme colours are those of the style sheet.
function basics() {
  return {
    animation: false,
    textStyle: { fontFamily: FONT, color: colour("ink") },
    tooltip: {
      backgroundColor: colour("paper"), borderColor: colour("line"), confine: true, transitionDuration: 0,
      textStyle: { color: colour("ink"), fontFamily: FONT },
    },
    aria: { enabled: false },
  };
}

const muted = () => ({ color: colour("muted"), fontFamily: FONT, fontSize: 12 });
const thinLine = () => ({ lineStyle: { color: colour("line") } });

// Draw a chart into an element, again on every change of size or theme; `option` gives all settings for a width.
function addChart(id, renderer, option) {
  const element = document.getElementById(id);
  const chart = echarts.init(element, null, { renderer });
  const redraw = () => {
    // Blocks of a custom series keep the labels of those before them otherwise.
    chart.clear();
    chart.setOption(option(chart.getWidth()));
  };
  new ResizeObserver(() => {
    if (!isPrinting && (element.clientWidth !== chart.getWidth() || element.clientHeight !== chart.getHeight())) {
      chart.resize();
      redraw();
    }
  }).observe(element);
  drawn.push({ chart, redraw });
  redraw();
  return { chart, redraw };
}

function setTheme(name) {
  root.dataset.theme = name;
  document.getElementById("theme").textContent = name === "dark" ? "Light" : "Dark";
  for (const { redraw } of drawn) redraw();
}

function startTheme() {
  setTheme(prefersDark.matches ? "dark" : "light");
  prefersDark.addEventListener("change", () => setTheme(prefersDark.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  // Paper is white, and narrower than a screen; its width is not known before it is printed.
  let before = root.dataset.theme;
  const print = (theme, width) => {
    isPrinting = width === PAPER_WIDTH;
    before = root.dataset.theme;
    for (const { chart } of drawn) chart.resize({ width });
    setTheme(theme);
    for (const { chart } of drawn) chart.getZr().flush();
  };
  addEventListener("beforeprint", () => print("light", PAPER_WIDTH));
  addEventListener("afterprint", () => print(before, "auto"));
}

// A row of buttons of which one is pressed.
function addSwitch(id, choices, chosen, onChange) {
  const group = document.getElementById(id);
  const press = (name) => {
    for (const button of group.children) button.setAttribute("aria-pressed", String(button.value === name));
  };
  for (const [name, label] of choices) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", value: name, textContent: label });
    button.addEventListener("click", () => { press(name); onChange(name); });
    group.append(button);
  }
  press(chosen);
  return press;
}
