// Elements, requests and numbers. Text reaches the page as text nodes alone, never as markup.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function s(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function answer(response) {
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(found.error ?? `the desk answered ${response.status}`);
  return found;
}

export async function get(path, query = {}) {
  const text = new URLSearchParams(query).toString();
  return answer(await fetch(text ? `${path}?${text}` : path));
}

export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return answer(await fetch(path, { method: "POST", headers, body: JSON.stringify(body) }));
}

// A line at the foot of the page, which screen readers speak; `seconds` later it is gone.
let said = 0;
export function say(text, seconds = Infinity) {
  const place = document.getElementById("said");
  place.textContent = text;
  clearTimeout(said);
  if (Number.isFinite(seconds)) said = setTimeout(() => (place.textContent = ""), seconds * 1000);
}

// A control with its label above it.
export function labelled(text, control) {
  return h("label", { class: "field" }, h("span", {}, text), control);
}

export function select(options, chosen, onchange) {
  const list = options.map((option) => {
    const [value, text] = Array.isArray(option) ? option : [option, option];
    return h("option", { value, selected: value === chosen }, text);
  });
  return h("select", { onchange: (event) => onchange(event.target.value) }, list);
}

// Changes what is in an element only when it would look otherwise, so that focus stays.
export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null));
}

export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const large = Math.abs(value) >= 10 ** Math.max(5, digits);
  if (value !== 0 && (Math.abs(value) < 1e-3 || large)) return value.toExponential(digits > 4 && !large ? digits - 1 : 2).replaceAll("-", "−");
  return Number(value.toPrecision(digits)).toString().replace("-", "−");
}

export function signed(value) {
  return (value > 0 ? "+" : "") + number(value, 3);
}

/** A picture's size, height first: of a square one side, or both. */
export function pixels(side) {
  return (Array.isArray(side) ? side : [side, side]).join(" × ");
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${(seconds * 1000).toFixed(0)} ms`;
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export const COLOURS = 8;

// Colours by the order of runs or rewards; their contrast holds on both backgrounds (style.css).
export function colour(index) {
  return `var(--series-${index % COLOURS})`;
}
