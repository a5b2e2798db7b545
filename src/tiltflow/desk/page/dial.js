// Dial: the strength of each tilt, live on a loaded student, with the rewards drawn below.
import { computed, rewards } from "./computed.js";
import { duration, fill, h, labelled, post, say } from "./dom.js";

const GRID = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5];
const picked = new Set();
let about = null; // the loaded student
let strengths = [];
let asked = { prompt: "", seed: 0, steps: 4 };
let curves = new Map(); // strength of the first moving dial -> scores, in the steps asked for
let moving = 0; // the dial that the curves are along
let making = null; // the request in flight, and whether another is wanted after it
let home = null;
let known = ""; // the runs and computed dials that one can choose from on the page
let easel = {}; // what is drawn into: `image`, `took` and `plots`, on the page or not any more

async function show(panel, overview) {
  home = panel;
  const able = overview.runs.filter((run) => run.tilt);
  const state = JSON.stringify([able.map((run) => [run.id, run.name]), overview.dials]);
  if (state === known) return;
  known = state;
  if (!panel.firstChild) fill(panel, h("div", { class: "choose" }), h("div", { class: "desk" }));
  const place = panel.querySelector(".choose"); // what is loaded stays
  if (!able.length && !overview.dials.length) {
    return fill(place, h("div", { class: "empty" }, h("h2", {}, "Nothing to dial yet"),
      h("p", {}, "A dial is the strength of a finished stage-2 run: one with ", h("code", {}, "export/tilt"), ". ",
        h("code", {}, "tiltflow dial RUN"), " computes one beforehand, for models whose pictures take long.")));
  }
  for (const id of picked) if (!able.some((run) => run.id === id)) picked.delete(id);
  if (able.length && !picked.size) picked.add(able.at(-1).id);
  const side = place.querySelector("#side")?.value ?? "";
  const boxes = able.map((run) => h("label", {}, h("input", {
    type: "checkbox", checked: picked.has(run.id),
    onchange: (event) => (event.target.checked ? picked.add(run.id) : picked.delete(run.id)),
  }), " ", h("bdi", {}, run.name)));
  fill(place,
    overview.dials.length ? computed(panel, overview.dials) : null,
    able.length ? h("div", { class: "toolbar" },
      h("fieldset", { class: "systems" }, h("legend", {}, "Tilts"), boxes),
      labelled("Size", h("input", { type: "number", id: "side", min: 8, max: 4096, step: 8, placeholder: "as trained", value: side })),
      h("button", { class: "main", onclick: load }, "Load the student")) : null);
}

async function load() {
  const side = document.getElementById("side").value;
  say("Loading the student…");
  try {
    about = await post("/api/dial/load", { runs: [...picked], side: side ? Number(side) : null });
  } catch (error) {
    return say(error.message);
  }
  say("");
  strengths = about.dials.map(() => 1);
  asked = { prompt: about.prompts[0], seed: 0, steps: about.steps };
  curves = new Map();
  moving = 0;
  draw();
  await make();
}

function draw() {
  const sliders = about.dials.map((name, i) => {
    const said = h("output", {}, strengths[i].toFixed(2));
    return h("div", { class: "dial" },
      h("label", { for: `dial-${i}` }, h("bdi", {}, name)),
      h("input", {
        type: "range", id: `dial-${i}`, min: 0, max: about.strongest, step: 0.05, value: String(strengths[i]),
        list: "strengths",
        oninput: (event) => {
          strengths[i] = Number(event.target.value);
          said.textContent = strengths[i].toFixed(2);
          if (moving !== i) { moving = i; curves = new Map(); }
          plots();
          make();
        },
      }), said);
  });
  const change = (name) => (event) => {
    const value = event.target.value;
    asked[name] = name === "prompt" ? value : Math.round(Number(value));
    if (name === "steps") { curves = new Map(); plots(); } // they are of the steps before
    if (value) make();
  };
  easel = {
    image: h("img", { class: "made", alt: "", width: 320, height: 320 }),
    took: h("small", { class: "took" }, ""),
    plots: h("div", { class: "plots" }),
  };
  fill(home.querySelector(".desk"),
    h("div", { class: "easel" }, easel.image, easel.took),
    h("div", { class: "controls" }, sliders,
      h("datalist", { id: "strengths" }, [0, 0.5, 1, 1.5].map((value) => h("option", { value: String(value) }))),
      labelled("Prompt", h("input", { type: "text", dir: "auto", list: "prompts", value: asked.prompt, oninput: change("prompt") })),
      h("datalist", { id: "prompts" }, about.prompts.map((value) => h("option", { value }))),
      h("div", { class: "toolbar" },
        labelled("Seed", h("input", { type: "number", min: 0, value: "0", oninput: change("seed") })),
        labelled("Steps", h("input", { type: "number", min: 1, max: 64, value: String(asked.steps), oninput: change("steps") })),
        h("button", { onclick: sweep }, "Score all strengths")),
      easel.plots));
  plots();
}

// Makes the image that is asked for now; of the student that was loaded last.
async function make() {
  if (making) { making.again = true; return; }
  making = { again: true };
  while (making.again) {
    making.again = false;
    const wanted = { ...asked, strengths: [...strengths], student: about.student };
    try {
      const made = await post("/api/dial/image", wanted);
      if (wanted.student !== about.student) continue; // the next one is of the student there now
      const { image, took } = easel;
      image.src = `/api/dial/picture/${made.picture}`;
      image.alt = `${wanted.prompt}, at ${wanted.strengths.map((x) => x.toFixed(2)).join(", ")}`;
      took.textContent = `${about.side} × ${about.side} pixels, ${wanted.steps} steps, ${duration(made.seconds)}`;
      say("");
    } catch (error) {
      if (wanted.student === about.student) say(error.message);
    }
  }
  making = null;
}

async function sweep() {
  const mine = new Map(); // in the place of `curves` until another dial, student, number of steps or sweep comes
  const [along, others, { student }, { steps }] = [moving, [...strengths], about, asked];
  curves = mine;
  for (const value of GRID) {
    const at = others.map((x, i) => (i === along ? value : x));
    try {
      const found = await post("/api/dial/scores", { strengths: at, steps, student });
      if (curves !== mine) return;
      mine.set(value, found.scores);
    } catch (error) {
      return curves === mine && say(error.message);
    }
    plots();
  }
}

function plots() {
  const place = easel.plots;
  const names = [...new Set([...curves.values()].flatMap((scores) => Object.keys(scores)))];
  if (!names.length) {
    return fill(place, h("p", { class: "soft" }, `“Score all strengths” draws the trained and the held-out rewards along ${about.dials[moving]}, on held-out prompts. Where the trained one still rises and a held-out one falls, the reward is being hacked.`));
  }
  const several = about.dials.length > 1; // of one run it is clear who trained
  const trainers = Object.entries(several ? about.trained : {}).map(([name, by]) => [name, by.map((i) => about.dials[i])]);
  const along = several ? `strength of ${about.dials[moving]}` : "strength";
  fill(place, rewards(curves, strengths[moving], about.strongest, new Map(trainers), along));
}

export const dial = { show, live: true };
