// Compare: systems as columns, prompts as rows, from the same noise.
import { fill, get, h, labelled, number, s, say, select, signed } from "./dom.js";

let about = null; // what the chosen set holds
let look = null; // the page of rows on show, with what it was asked for
let sets = []; // that there are
let known = ""; // what of them the page was drawn for
let asked = 0; // questions so far: answers to all but the latest are dropped
const chosen = { set: "", reward: "", baseline: "", category: "", order: "", page: 0, off: new Set() };

async function show(panel, overview) {
  sets = overview.sets;
  const state = JSON.stringify(sets);
  if (state === known) return; // nothing new: leave focus and scroll alone
  if (!sets.length) {
    known = state;
    return fill(panel, h("div", { class: "empty" }, h("h2", {}, "Nothing to compare yet"),
      h("p", {}, "Run ", h("code", {}, "tiltflow evaluate … --keep-images --json RUN/evaluation.json"), " and it appears here.")));
  }
  if (!(await load(sets.find((each) => each.id === chosen.set) ?? sets[0]))) return;
  known = state;
  draw(panel);
}

// The rows that are chosen, first of another set if one is given; whether nothing else was asked
// for meanwhile.
async function load(set = null) {
  const mine = ++asked;
  if (set) {
    const found = await get(`/api/set/${set.id}`);
    if (mine !== asked) return false;
    about = { ...set, ...found };
    if (set.id !== chosen.set) Object.assign(chosen, { set: set.id, page: 0, category: "", baseline: "", off: new Set() });
    if (!about.categories.includes(chosen.category)) chosen.category = "";
    if (!about.rewards.includes(chosen.reward)) chosen.reward = about.rewards[0];
    if (!about.systems.includes(chosen.baseline)) {
      chosen.baseline = about.systems.find((name) => name.startsWith("ac_dmd")) ?? about.systems[0];
      chosen.off.delete(chosen.baseline);
    }
  }
  const systems = about.systems.filter((name) => !chosen.off.has(name));
  const query = { reward: chosen.reward, baseline: chosen.baseline, page: chosen.page, systems: JSON.stringify(systems) };
  if (chosen.category) query.category = chosen.category;
  if (chosen.order) query.order = chosen.order;
  const found = await get(`/api/set/${about.id}/rows`, query);
  if (mine !== asked) return false;
  look = { ...found, set: about.id, reward: query.reward, baseline: query.baseline };
  return true;
}

function draw(panel) {
  const again = async (name, value) => {
    const focused = document.activeElement?.closest("[data-control]")?.dataset.control;
    if (name !== "set") chosen[name] = value;
    if (name === "baseline") chosen.off.delete(value); // it is among the columns, and its box is fixed
    if (name !== "page") chosen.page = 0;
    try {
      if (!(await load(name === "set" ? sets.find((set) => set.id === value) : null))) return;
    } catch (error) {
      return say(error.message);
    }
    draw(panel);
    if (focused) panel.querySelector(`[data-control="${focused}"] select, [data-control="${focused}"] button:not(:disabled)`)?.focus();
  };
  const control = (name, text, options) => {
    const field = labelled(text, select(options, chosen[name], (value) => again(name, value)));
    field.dataset.control = name;
    return field;
  };
  const bar = h(
    "div", { class: "toolbar" },
    sets.length > 1 ? control("set", "Evaluation", sets.map((set) => [set.id, set.name])) : null,
    control("reward", "Reward", about.rewards),
    control("baseline", "Compared with", about.systems),
    about.categories.length ? control("category", "Category", [["", "all"], ...about.categories]) : null,
    control("order", "Order", [["", "as evaluated"], ["differ", "where systems differ most"]]),
    systems(again),
  );
  fill(panel, bar, table(), pager(again));
}

function systems(again) {
  const boxes = about.systems.map((name) =>
    h("label", {}, h("input", {
      type: "checkbox", checked: !chosen.off.has(name), disabled: name === chosen.baseline,
      onchange: (event) => {
        const off = new Set(chosen.off);
        if (event.target.checked) off.delete(name);
        else off.add(name);
        again("off", off);
      },
    }), " ", h("bdi", {}, name)));
  return h("fieldset", { class: "systems" }, h("legend", {}, "Systems"), boxes);
}

function table() {
  const columns = look.columns;
  const widest = Math.max(1e-9, ...columns.flatMap((c) => (c.difference ? c.difference.ci95.map(Math.abs) : [])));
  const head = h("tr", {}, columns.map((column) =>
    h("th", { scope: "col" }, h("bdi", { class: "name" }, column.name), h("small", {}, `${column.nfe} evaluations`),
      figures(column, widest))));
  const bodies = look.rows.map((row) =>
    h("tbody", {},
      h("tr", { class: "prompt" }, h("th", { scope: "rowgroup", colspan: String(columns.length) },
        h("span", { dir: "auto" }, row.prompt), row.category ? h("small", { class: "chip" }, row.category) : null)),
      h("tr", {}, columns.map((column) => cell(row, column)))));
  const made = h("table", { class: "compare" },
      h("caption", {}, `${look.reward}, ${look.count} of ${about.prompts} prompts. Below each system: its mean and 95% interval, then the paired difference to ${look.baseline}. Intervals are of one difference each; p-values are corrected (Holm) for the columns shown, and they alone decide what is called higher or lower.`),
      h("thead", {}, head), bodies);
  made.style.setProperty("--columns", columns.length);
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "systems by prompt" }, made);
}

function figures(column, widest) {
  if (!column.mean) return h("div", { class: "figures" }, "not measured here");
  const [low, high] = column.mean.ci95;
  const some = column.mean.n < look.count ? `, of ${column.mean.n} prompts` : "";
  const half = (high - low) / 2;
  const centred = Math.abs(low + high - 2 * column.mean.value) <= 0.2 * half;  // no share near 0 or 1
  const around = centred ? `± ${number(half, 2)}` : `[${number(low)}, ${number(high)}]`;
  const mean = h("span", {}, `${number(column.mean.value)} ${around}${some}`);
  if (!column.difference) {
    return h("div", { class: "figures" }, mean, h("span", {}, column.name === look.baseline ? "baseline" : "not compared"));
  }
  const { difference: value, ci95, p_holm: p, win_rate: wins, verdict } = column.difference;
  const sure = ["higher", "lower"].includes(verdict) ? verdict : "unclear";
  const x = (v) => 60 + (v / widest) * 54;
  const bar = s("svg", { viewBox: "0 0 120 14", class: `interval ${sure}`, "aria-hidden": "true" },
    s("line", { x1: 60, x2: 60, y1: 0, y2: 14, class: "zero" }),
    s("line", { x1: x(ci95[0]), x2: x(ci95[1]), y1: 7, y2: 7, class: "bar" }),
    s("circle", { cx: x(value), cy: 7, r: 3.4 }));
  return h("div", { class: "figures" }, mean, bar,
    h("span", { class: sure }, `${signed(value)} [${signed(ci95[0])}, ${signed(ci95[1])}]`),
    h("small", {}, `${verdict}; wins ${Math.round(wins * 100)}%, p = ${number(p, 2)}`));
}

function address(set, row, column, side) {
  const path = `/api/set/${set}/image/${encodeURIComponent(column.name)}/${row.row}`;
  return side ? `${path}?side=${side}` : path;
}

function cell(row, column) {
  const score = row.scores[column.name];
  const others = Object.values(row.scores).filter((value) => value !== null);
  const best = others.length > 1 && score === Math.max(...others) && Math.min(...others) < score;
  const picture = row.images.includes(column.name)
    ? h("button", { class: "picture", "aria-label": `${column.name}, full size: ${row.prompt}`, onclick: (event) => enlarge(row, column, event.currentTarget) },
        h("img", { src: address(look.set, row, column, 192), alt: "", loading: "lazy", decoding: "async", width: 192, height: 192 }))
    : h("div", { class: "picture none" }, "no image kept");
  return h("td", {}, picture, h("span", { class: best ? "score best" : "score" }, number(score)));
}

function enlarge(row, column, opener) {
  const { reward, set } = look;
  const columns = look.columns.filter((each) => row.images.includes(each.name));
  let at = columns.indexOf(column);
  const picture = h("img", { class: "full" });
  const name = h("h2", {});
  const said = h("p", { class: "score" });
  const turn = (index) => {
    at = (index + columns.length) % columns.length;
    const shown = columns[at];
    picture.src = address(set, row, shown);
    picture.alt = `${shown.name}: ${row.prompt}`;
    name.textContent = shown.name;
    said.textContent = Object.keys(row.scores).includes(shown.name) ? `${reward} ${number(row.scores[shown.name])}` : "";
  };
  const dialog = h("dialog", {
    "aria-label": "image in full size",
    onclose: () => { dialog.remove(); opener.focus(); },
    onclick: (event) => { if (event.target === dialog) dialog.close(); },
    onkeydown: (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move) turn(at + move);
    },
  },
  h("div", { class: "lightbox" }, name, picture, h("p", { dir: "auto" }, row.prompt), said,
    h("div", { class: "buttons" },
      h("button", { onclick: () => turn(at - 1) }, "← previous system"),
      h("button", { onclick: () => turn(at + 1) }, "next system →"),
      h("button", { onclick: () => dialog.close() }, "close"))));
  turn(at);
  document.body.append(dialog);
  dialog.showModal();
}

function pager(again) {
  if (look.pages < 2) return null;
  const nav = h("nav", { class: "pager", "aria-label": "pages of prompts" },
    h("button", { disabled: chosen.page === 0, onclick: () => again("page", chosen.page - 1) }, "← earlier"),
    h("span", {}, `page ${chosen.page + 1} of ${look.pages}`),
    h("button", { disabled: chosen.page + 1 >= look.pages, onclick: () => again("page", chosen.page + 1) }, "later →"));
  nav.dataset.control = "page";
  return nav;
}

export const compare = { show, live: true };
