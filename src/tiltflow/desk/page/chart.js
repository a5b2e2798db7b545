// A small line chart: series over a common x, drawn as SVG, read off by pointer or arrow keys.
import { h, number, s } from "./dom.js";

const W = 360, H = 170, LEFT = 48, RIGHT = 10, TOP = 10, BOTTOM = 24;

// At most five round numbers that span [low, high].
export function ticks(low, high, most = 4) {
  if (!(high > low)) return [low];
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((m) => m >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

// The digits by which numbers at equal distances differ.
function apart(found) {
  const largest = Math.max(...found.map(Math.abs)), step = found.length > 1 ? found[1] - found[0] : largest;
  return largest > 0 && step > 0 ? Math.min(7, Math.max(3, 2 + Math.floor(Math.log10(largest)) - Math.floor(Math.log10(step)))) : 3;
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (!Number.isFinite(low)) return [0, 1];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

// series: [{name, colour, points: [[x, y], ...], low?, high?, dashed?}] with bands where low and
// high (arrays of y) are given; options: {title, x, at?, span?}. `at` marks a place on the x axis.
// Given the `figure` of an earlier call, it is drawn anew in its place: whoever reads values off it
// goes on, with the focus and at the x where they were.
export function chart(series, options, figure = frame()) {
  const shown = series.filter((each) => each.points.length);
  const xs = shown.flatMap((each) => each.points.map((p) => p[0]));
  const ys = shown.flatMap((each) => [...each.points.map((p) => p[1]), ...(each.low ?? []), ...(each.high ?? [])]);
  const [x0, x1] = options.span ?? (xs.length ? [Math.min(...xs), Math.max(...xs, Math.min(...xs) + 1e-9)] : [0, 1]);
  const [y0, y1] = range(ys);
  const sx = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (W - LEFT - RIGHT);
  const sy = (y) => H - BOTTOM - ((y - y0) / (y1 - y0 || 1)) * (H - TOP - BOTTOM);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", "aria-hidden": "true" });
  const levels = ticks(y0, y1);
  const digits = apart(levels);
  for (const y of levels) {
    svg.append(
      s("line", { x1: LEFT, x2: W - RIGHT, y1: sy(y), y2: sy(y), class: "grid" }),
      s("text", { x: LEFT - 6, y: sy(y) + 3.5, class: "tick", "text-anchor": "end" }, number(y, digits)),
    );
  }
  for (const x of ticks(x0, x1, 5)) {
    svg.append(s("text", { x: sx(x), y: H - 7, class: "tick", "text-anchor": "middle" }, number(x, 6)));
  }
  svg.append(s("line", { x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM, class: "axis" }));
  for (const each of shown) draw(svg, each, sx, sy);
  if (options.at !== undefined) {
    svg.append(s("line", { x1: sx(options.at), x2: sx(options.at), y1: TOP, y2: H - BOTTOM, class: "at" }));
  }
  const cursor = s("line", { y1: TOP, y2: H - BOTTOM, class: "cursor", visibility: "hidden" });
  svg.append(cursor);
  return framed(figure, svg, cursor, shown, options, { x0, x1, sx });
}

function draw(svg, each, sx, sy) {
  const path = each.points.map(([x, y], i) => `${i ? "L" : "M"}${sx(x).toFixed(1)} ${sy(y).toFixed(1)}`);
  if (each.low) {
    const up = each.points.map(([x], i) => `${sx(x).toFixed(1)} ${sy(each.high[i]).toFixed(1)}`);
    const down = each.points.map(([x], i) => `${sx(x).toFixed(1)} ${sy(each.low[i]).toFixed(1)}`).reverse();
    const band = s("polygon", { points: [...up, ...down].join(" "), class: "band" });
    band.style.fill = each.colour;
    svg.append(band);
  }
  const line = s("path", { d: path.join(""), class: each.dashed ? "line dashed" : "line" });
  line.style.stroke = each.colour;
  svg.append(line);
  if (each.points.length <= 16) {
    for (const [x, y] of each.points) {
      const dot = s("circle", { cx: sx(x), cy: sy(y), r: 2.4 });
      dot.style.fill = each.colour;
      svg.append(dot);
    }
  }
}

// An empty figure: caption, plot and readout, which ask what is drawn in it now.
function frame() {
  const figure = h(
    "figure",
    { class: "card", onpointermove: (event) => figure.drawn.point(event), onpointerleave: () => figure.drawn.rest() },
    h("figcaption"),
    h("div", { class: "plot", tabindex: "0", role: "img", onkeydown: (event) => figure.drawn.key(event), onblur: () => figure.drawn.rest() }),
    h("div", { class: "readout" }),
  );
  return figure;
}

function framed(figure, svg, cursor, shown, options, { x0, x1, sx }) {
  const [caption, plot, read] = figure.children;
  const reading = figure.drawn?.reading(); // the x that was read off before
  const places = [...new Set(shown.flatMap((each) => each.points.map((p) => p[0])))].sort((a, b) => a - b);
  const nearest = (x) => places.reduce((best, p, i) => (Math.abs(p - x) < Math.abs(places[best] - x) ? i : best), 0);
  const home = options.at === undefined ? places.length - 1 : nearest(options.at); // what nobody's pointer asks for
  let at = home;
  const show = (index) => {
    at = Math.max(0, Math.min(places.length - 1, index));
    const x = places[at];
    if (x === undefined) return;
    cursor.setAttribute("x1", sx(x));
    cursor.setAttribute("x2", sx(x));
    const parts = shown.map((each) => {
      const near = each.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      const where = near[0] === x ? "" : ` (at ${number(near[0], 6)})`; // it has no value at x itself
      return h("span", {}, swatch(each), ` ${shown.length > 1 ? each.name + " " : ""}${number(near[1])}${where}`);
    });
    read.replaceChildren(h("span", {}, `${options.x ?? "step"} ${number(x, 6)}`), ...parts);
  };
  const to = (x) => {
    cursor.setAttribute("visibility", "visible");
    show(nearest(x));
  };
  const rest = () => {
    cursor.setAttribute("visibility", "hidden");
    show(home);
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    to(x0 + (((event.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT - RIGHT) * (x1 - x0));
  };
  const key = (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    cursor.setAttribute("visibility", "visible");
    show(Number.isFinite(move) ? at + move : move < 0 ? 0 : places.length - 1);
  };
  if (reading === undefined) show(at);
  else to(reading);
  const latest = shown.map((each) => `${each.name} ${number(each.points.at(-1)[1])}`).join(", ");
  caption.textContent = options.title;
  plot.setAttribute("aria-label", `${options.title}: ${latest || "nothing yet"}. Arrow keys read values off.`);
  plot.replaceChildren(svg);
  figure.drawn = { point, rest, key, reading: () => (cursor.getAttribute("visibility") === "visible" ? places[at] : undefined) };
  return figure;
}

export function swatch(each) {
  const mark = h("i", { class: each.dashed ? "swatch dashed" : "swatch" });
  mark.style.color = each.colour;
  return mark;
}
