// Vote: two images of one prompt from the same noise, without their names.
import { fill, get, h, labelled, post, s, say, select } from "./dom.js";

const match = { set: "", a: "", b: "" };
let systems = [];
let sets = []; // that there are, as far as is known
let known = ""; // what of them the page was drawn for
let pair = null; // the pair on show
let of = {}; // the match that it is of
let busy = false;
let home = null; // the panel

async function show(panel, overview) {
  home = panel;
  sets = overview.sets;
  const state = JSON.stringify(sets);
  if (state === known) return; // a pair is on show: it stays
  if (!sets.length) {
    known = state;
    return fill(panel, h("div", { class: "empty" }, h("h2", {}, "Nothing to vote on yet"),
      h("p", {}, "Votes need the images of an evaluation: ", h("code", {}, "tiltflow evaluate … --keep-images"), ".")));
  }
  const before = { ...match };
  await open((sets.find((set) => set.id === match.set) ?? sets[0]).id);
  known = state;
  if (panel.querySelector(".ballot")) {
    panel.querySelector(".toolbar").replaceWith(toolbar());
    if (pair && same(before)) return; // and of the same systems
  } else {
    fill(panel, toolbar(), h("div", { class: "ballot", tabindex: "-1" }), h("div", { class: "tally" }));
  }
  await next();
}

// Takes a set: its systems, and of these the two that are chosen, where it still has them.
async function open(id) {
  const about = await get(`/api/set/${id}`);
  systems = about.systems.filter((name, i) => about.images[i]);
  if (match.set === id && systems.includes(match.a) && systems.includes(match.b)) return;
  const [b, a] = systems.slice(-2);
  Object.assign(match, { set: id, a: a ?? "", b: b ?? "" });
}

function toolbar() {
  const change = async (name, value) => {
    let failed = "";
    try {
      if (name === "set") await open(value);
      else match[name] = value;
    } catch (error) { // the pair stays, and the list goes back to the evaluation that it is of
      failed = error instanceof TypeError ? "the desk does not answer: choose again when it does" : error.message;
    }
    home.querySelector(".toolbar").replaceWith(toolbar());
    home.querySelector(`[data-control="${name}"] select`)?.focus();
    if (failed) return say(failed);
    await next();
  };
  const control = (name, text, options) => {
    const field = labelled(text, select(options, match[name], (value) => change(name, value)));
    field.dataset.control = name;
    return field;
  };
  return h("div", { class: "toolbar" },
    sets.length > 1 ? control("set", "Evaluation", sets.map((set) => [set.id, set.name])) : null,
    control("a", "Is this system", systems), control("b", "better than this one?", systems));
}

const same = (one) => ["set", "a", "b"].every((name) => one[name] === match[name]);

// A pair of the match; an answer that comes after another match was chosen is dropped.
async function next(told = "") {
  const wanted = { ...match };
  try {
    const found = await post("/api/pair", wanted);
    if (!same(wanted)) return;
    [pair, of] = [found, wanted];
    say(told);
    draw();
  } catch (error) {
    if (!same(wanted)) return;
    pair = null;
    fill(home.querySelector(".ballot"));
    fill(home.querySelector(".tally"));
    say(error.message);
  }
}

async function choose(choice) {
  if (busy || !pair) return;
  // Nobody has seen a pair before its images are there: that key was for the one before. One that
  // did not come is complete as well, and has no width.
  const images = [...home.querySelectorAll(".sides img")];
  if (!images.every((image) => image.complete)) return say("Not noted: both images have to be there first.", 2);
  const lost = images.filter((image) => !image.naturalWidth);
  if (lost.length) {
    for (const image of lost) image.src = image.src;
    return say("Not noted: an image did not come. It is asked for again.", 4);
  }
  busy = true;
  const wanted = of;
  try {
    const found = await post("/api/vote", { pair: pair.pair, choice });
    if (!same(wanted)) return; // of another match there will be a pair of its own
    pair = found;
    say(`Noted: ${choice === "tie" ? "no preference" : choice}.`, 2);
    draw();
    home.querySelector(".ballot").focus({ preventScroll: true });
  } catch (error) {
    if (error instanceof TypeError) say("the desk does not answer: press again when it does"); // the pair stays
    else if (same(wanted)) await next(error.message);
  } finally {
    busy = false;
  }
}

function draw() {
  const side = (name, key) => h("figure", { class: "side" },
    h("img", { src: `/api/pair/${pair.pair}/${name}`, alt: `${name} image` }),
    h("button", { onclick: () => choose(name) }, h("kbd", {}, key), ` ${name} is better`));
  fill(home.querySelector(".ballot"),
    h("p", { class: "ask", dir: "auto" }, pair.prompt),
    h("div", { class: "sides" }, side("left", "1"), side("right", "2")),
    h("button", { class: "tie", onclick: () => choose("tie") }, h("kbd", {}, "space"), " no preference"));
  tally();
}

// What the votes say is folded away, and again with every vote: which count has gone up tells whose
// image was on which side, and whoever has seen that a few times votes no more without names.
function tally() {
  const { wins, losses, ties, rate, interval, other } = pair.tally;
  const votes = wins + losses + ties;
  const percent = (x) => `${Math.round(100 * x)}%`;
  const x = (v) => 4 + v * 292;
  const sure = interval[0] > 0.5 ? "higher" : interval[1] < 0.5 ? "lower" : "unclear";
  const bar = s("svg", { viewBox: "0 0 300 26", class: `interval wide ${sure}`, "aria-hidden": "true" },
    s("line", { x1: 4, x2: 296, y1: 13, y2: 13, class: "zero" }),
    s("line", { x1: x(0.5), x2: x(0.5), y1: 3, y2: 23, class: "zero" }),
    s("line", { x1: x(interval[0]), x2: x(interval[1]), y1: 13, y2: 13, class: "bar" }));
  if (rate !== null) bar.append(s("circle", { cx: x(rate), cy: 13, r: 5 }));
  const verdict = { higher: "is preferred", lower: "is liked less", unclear: "no difference is shown yet" }[sure];
  fill(home.querySelector(".tally"),
    h("h2", {}, h("bdi", {}, of.a), " against ", h("bdi", {}, of.b)),
    h("p", { class: "result" }, votes ? `${votes} ${votes === 1 ? "vote" : "votes"}.` : "No votes yet."),
    votes ? h("details", {}, h("summary", {}, "What they say"), bar,
      h("p", {}, `Wins ${percent(rate)} of ${votes} ${votes === 1 ? "vote" : "votes"}, 95% interval ${percent(interval[0])} to ${percent(interval[1])}: ${verdict}.`),
      h("p", { class: "soft" }, `${wins} won, ${losses} lost, ${ties} without preference (half a win each). The interval holds however often you look and whenever you stop. But to look after each vote is to learn whose image was where: then the test is not blind any more.`)) : null,
    other ? h("p", { class: "soft" }, `${other} more ${other === 1 ? "vote was" : "votes were"} on images that these systems do not have any more, and not counted.`) : null);
}

function key(event) {
  const choice = { 1: "left", 2: "right", " ": "tie" }[event.key];
  if (!choice || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && event.target.closest("button, summary")) return; // presses that
  event.preventDefault();
  choose(choice);
}

export const vote = { show, key, live: true };
