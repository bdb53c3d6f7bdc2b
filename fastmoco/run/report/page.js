"use strict";
(() => {
  const root = document.documentElement;
  const faults = [];
  const fault = (what) => {
    faults.push(String(what));
    root.dataset.faults = faults.join("; ").slice(0, 500);
  };
  addEventListener("error", (event) => fault(event.message));
  addEventListener("unhandledrejection", (event) => fault(event.reason));
  document.addEventListener("securitypolicyviolation", (event) => fault(`${event.violatedDirective} ${event.blockedURI}`));

  const trouble = (text) => {
    const place = document.getElementById("trouble");
    place.textContent = text;
    place.hidden = false;
  };

  // A live page loads itself again; the browser keeps the place.
  const refresh = Number(root.dataset.refresh);
  if (refresh > 0) setTimeout(() => location.reload(), 1000 * refresh);

  // The theme: the system's, light or dark; a choice is kept where the browser allows it.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  let theme = "system";
  try { theme = localStorage.getItem("fastmoco-theme") || theme; } catch { /* not allowed here */ }
  if (!themes.includes(theme)) theme = "system";
  const applied = () => (theme === "system" ? (system.matches ? "dark" : "light") : theme);
  let printing = false;
  const PAPER = 650; // pixels of a chart on A4 or letter
  const LEAST = 150; // pixels of height of what is drawn

  const paint = () => {
    root.dataset.theme = printing ? "light" : applied();
    button.textContent = `Theme: ${theme}`;
  };
  button.hidden = false;
  paint();

  const unpacked = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };

  // Colors by name become those of the theme.
  const colored = (value, key, style) => {
    if (Array.isArray(value)) return key === "x" || key === "y" || key === "z" || key === "customdata" ? value : value.map((one) => colored(one, "", style));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, colored(one, name, style)]));
    if (typeof value === "string" && value[0] === "@" && /color$/i.test(key)) return style.getPropertyValue(value === "@bad" ? "--mark" : `--${value.slice(1)}`).trim() || value;
    return value;
  };

  let figures = {};
  const heights = {};
  const draw = async (place) => {
    const style = getComputedStyle(root);
    const narrow = place.clientWidth < 480;
    const figure = figures[place.id].figure;
    const layout = colored(figure.layout, "", style);
    layout.font.family = getComputedStyle(document.body).fontFamily;
    layout.width = printing ? PAPER : place.clientWidth;
    if (narrow) {
      layout.font.size = 11;
      layout.xaxis.nticks = 5;
      layout.margin = { ...layout.margin, l: 40, r: 8 };
    }
    // Dragging on a touch screen scrolls the page.
    if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
    const config = { displayModeBar: false };
    const data = colored(figure.data, "", style);
    // A legend of many lines takes its room from the curves: the chart becomes as much higher.
    layout.height = heights[place.id] ??= place.clientHeight;
    for (let tries = 0; tries < 4; tries += 1) {
      place.style.height = `${layout.height}px`;
      await Plotly.react(place, data, layout, config);
      const lacking = Math.ceil(LEAST - place._fullLayout._size.h);
      if (lacking <= 0) break;
      layout.height += lacking;
    }
    const shown = place._fullData || [];
    const count = (trace) => (trace.z ? trace.z.reduce((sum, row) => sum + row.length, 0) : (trace.x || []).length);
    place.dataset.points = shown.reduce((sum, trace) => sum + count(trace), 0);
  };
  // Plotly follows the window alone; a chart may change its width without it.
  const widths = new WeakMap();
  const watcher = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const before = widths.get(target);
      widths.set(target, contentRect.width);
      if (before && Math.abs(before - contentRect.width) > 1 && target.dataset.points) draw(target).catch(fault);
    }
  });
  const redraw = async () => {
    for (const place of document.querySelectorAll(".plot")) if (place.dataset.points) await draw(place);
  };
  const change = () => { paint(); redraw().catch(fault); };
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("fastmoco-theme", theme); } catch { /* not allowed here */ }
    change();
  });
  system.addEventListener("change", change);
  addEventListener("beforeprint", () => { printing = true; change(); });
  addEventListener("afterprint", () => { printing = false; change(); });

  const start = async () => {
    if (typeof DecompressionStream === "undefined") {
      trouble("The charts need a browser of 2023 or later. Headline, pictures and tables are complete.");
      return;
    }
    const [library, data] = await Promise.all([unpacked("library"), unpacked("figures")]);
    figures = JSON.parse(data);
    const script = document.createElement("script");
    script.nonce = nonce;
    script.textContent = library;
    document.head.append(script);
    for (const place of document.querySelectorAll(".plot")) {
      try { await draw(place); watcher.observe(place); } catch (error) { fault(error); }
    }
    if (faults.length) trouble(`Some charts could not be drawn: ${faults[0]}`);
    root.dataset.report = "ready";
  };
  const nonce = document.currentScript.nonce;
  start().catch((error) => { fault(error); trouble(`The charts could not be drawn: ${error}`); });
})();
