"use strict";
// Draws the figures that stand as JSON in the page, in the colours of the style sheet.
const root = document.documentElement;
const figures = [...document.querySelectorAll("script[data-figure]")].map((script) => ({
  place: document.getElementById(script.dataset.figure),
  ...JSON.parse(script.textContent),
}));

// Replaces every "var(--name)" by its present value: plotly knows no CSS variables.
function painted(value, style) {
  if (typeof value === "string" && value.startsWith("var(")) {
    return style.getPropertyValue(value.slice(4, -1)).trim();
  }
  if (Array.isArray(value)) return value.map((item) => painted(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, style)]));
}

// Names beside points have no room on a phone; the table below the figure has them.
function fitting(data) {
  if (root.clientWidth >= 600) return data;
  return data.map((trace) => (trace.mode === "markers+text" ? { ...trace, mode: "markers" } : trace));
}

function draw(some) {
  const style = getComputedStyle(root);
  for (const figure of some) {
    figure.drawn = true;
    Plotly.react(figure.place, painted(fitting(figure.data), style), painted(figure.layout, style), {
      responsive: true,
      displayModeBar: false,
    });
  }
}

// A figure is drawn when it is about to come into view: the page is there at once.
const watch = new IntersectionObserver((entries) => {
  const near = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target);
  draw(figures.filter((figure) => near.includes(figure.place) && !figure.drawn));
}, { rootMargin: "800px" });
for (const figure of figures) watch.observe(figure.place);

const slider = document.getElementById("epoch");
if (slider) {
  const epochs = slider.dataset.steps.split(",");
  slider.addEventListener("input", () => {
    const at = Number(slider.value);
    slider.nextElementSibling.value = epochs[at];
    slider.setAttribute("aria-valuetext", `epoch ${epochs[at]}`);
    for (const figure of figures.filter((f) => f.frames.length)) {
      figure.data[0].z = figure.frames[at];
      if (figure.drawn) Plotly.restyle(figure.place, { z: [figure.frames[at]] }, [0]);
    }
  });
}

// The arrow keys walk over the points of the figure that has the focus: left and right along a
// series, up and down to the next one. What a pointer would see is also said aloud.
const spoken = document.getElementById("spoken");
const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };

function points(figure) {
  return figure.data.flatMap((trace, curve) => (trace.hoverinfo === "skip" ? [] : [{
    curve, at: trace.type === "heatmap"
      ? trace.z.flatMap((line, y) => line.map((z, x) => [y, x]))
      : trace.x.map((x, i) => i),
  }]));
}

function walk(event, figure) {
  const series = points(figure);
  if (event.key === "Escape") Plotly.Fx.unhover(figure.place);
  if (!(event.key in steps) || !series.length) return;
  event.preventDefault();
  const [down, along] = steps[event.key];
  const from = figure.here ?? { series: 0, point: along > 0 ? -1 : 0 };
  const now = (from.series + down + series.length) % series.length;
  const count = series[now].at.length;
  const point = (Math.min(from.point, count - 1) + along + count) % count;
  figure.here = { series: now, point };
  Plotly.Fx.hover(figure.place, [{ curveNumber: series[now].curve, pointNumber: series[now].at[point] }]);
  const texts = figure.place.querySelectorAll(".hoverlayer text");
  spoken.textContent = [...texts].map((text) => text.textContent).join(", ");
}

for (const figure of figures) {
  figure.place.addEventListener("keydown", (event) => walk(event, figure));
}

// Paper is white: print in light colours, whatever the screen shows.
addEventListener("beforeprint", () => { root.classList.add("paper"); draw(figures); });
addEventListener("afterprint", () => { root.classList.remove("paper"); draw(figures); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  draw(figures.filter((figure) => figure.drawn));
});
