// Runs: curves as they grow, samples as they come, settings and what differs in them.
import { chart, swatch } from "./chart.js";
import { COLOURS, colour, duration, fill, get, h } from "./dom.js";

const picked = new Map(); // id -> index of its colour
const steps = new Map(); // id -> the step whose samples are looked at; none: the latest
let found = []; // the picked runs in full
let failed = []; // those that cannot be read, and why
let drawn = "";
const frames = new Map(); // metric -> the figure of its curves, which stays while these grow

const GROUPS = [
  ["Held-out rewards", (n) => n.startsWith("held_out/")],
  ["Trained rewards", (n) => n.startsWith("watch/trained/") || n.startsWith("reward/")],
  ["Watch", (n) => n.startsWith("watch/")],
  ["Losses", (n) => /\/(matching|ambient|consistency|reward_loss|loss)$/.test(n)],
  ["Everything else", () => true],
];

function pick(id, on) {
  if (!on) return picked.delete(id);
  const taken = new Set(picked.values());
  let index = 0;
  while (taken.has(index)) index++;
  picked.set(id, index);
}

// How a run is drawn: where colours come again, they are dashed.
function mark(run) {
  const index = picked.get(run.id);
  return { colour: colour(index), dashed: index >= COLOURS };
}

async function show(panel, overview) {
  if (!panel.firstChild) {
    panel.append(
      h("nav", { class: "list", "aria-label": "Runs" }),
      h("div", { class: "body" }, ...["notes", "curves", "samples", "settings"].map((c) => h("div", { class: c }))),
    );
    if (overview.runs.length) pick(overview.runs.at(-1).id, true);
  }
  const names = new Map(overview.runs.map((run) => [run.id, run.name]));
  for (const id of picked.keys()) if (!names.has(id)) pick(id, false); // removed meanwhile
  list(panel, overview);
  const read = (id) => get(`/api/run/${id}`).catch((error) => {
    if (error instanceof TypeError) throw error; // the desk does not answer: what is shown stays
    return { id, name: names.get(id), error: error.message };
  });
  const ids = [...picked.keys()];
  const views = await Promise.all(ids.map(read));
  if (ids.join() !== [...picked.keys()].join()) return; // others were ticked: their own answer follows
  failed = views.filter((run) => run.error);
  found = views.filter((run) => !run.error);
  const state = JSON.stringify([found, failed]);
  if (state === drawn) return; // nothing new: leave focus and scroll alone
  drawn = state;
  notes(panel.querySelector(".notes"));
  curves(panel.querySelector(".curves"));
  samples(panel.querySelector(".samples"));
  settings(panel.querySelector(".settings"));
}

function list(panel, overview) {
  const nav = panel.querySelector(".list");
  const key = JSON.stringify([overview.runs, overview.problems, [...picked]]);
  if (nav.dataset.key === key) return;
  nav.dataset.key = key;
  const focused = document.activeElement?.dataset?.run;
  fill(
    nav,
    h("h2", {}, overview.runs.length === 1 ? "1 run" : `${overview.runs.length} runs`),
    overview.runs.map((run) => {
      const box = h("input", {
        type: "checkbox", checked: picked.has(run.id), "data-run": run.id,
        onchange: async (event) => {
          pick(run.id, event.target.checked);
          await show(panel, overview);
        },
      });
      const shown = swatch(picked.has(run.id) ? mark(run) : { colour: "var(--line)" });
      return h(
        "label", { class: "run" }, box, shown, h("span", { class: "name", dir: "auto" }, run.name),
        h("small", {}, `step ${run.step}${run.running ? ", running" : ""}${run.alarms ? `, ⚠ ${run.alarms} ${run.alarms === 1 ? "alarm" : "alarms"}` : ""}`),
      );
    }),
    overview.problems.map((problem) => h("p", { class: "alarm", dir: "auto" }, problem)),
  );
  if (focused) nav.querySelector(`[data-run="${focused}"]`)?.focus();
}

function notes(place) {
  fill(
    place,
    failed.map((run) => h("div", { class: "state" }, h("h2", {}, h("bdi", {}, run.name)), h("p", { class: "alarm" }, run.error))),
    found.map((run) => {
      const share = run.steps ? Math.min(1, run.step / run.steps) : 0;
      const state = run.running ? `${duration(run.seconds_left)} left` : run.steps && run.step >= run.steps ? "done" : "stopped";
      const bar = h("progress", { max: 1, value: share, "aria-label": `progress of ${run.name}` });
      bar.style.accentColor = colour(picked.get(run.id));
      return h(
        "div", { class: "state" },
        h("h2", {}, swatch(mark(run)), " ", h("bdi", {}, run.name)),
        bar,
        h("p", {}, `${run.stage}: step ${run.step} of ${run.steps ?? "?"}, ${duration(run.seconds_per_step)} a step, ${state}`),
        run.notes.slice(-4).map(([step, name, text]) =>
          h("p", { class: name.startsWith("alarm") || name === "watch/ended" ? "alarm" : "note" }, `Step ${step}: ${text}`)),
      );
    }),
  );
}

function curves(place) {
  const names = [...new Set(found.flatMap((run) => Object.keys(run.curves)))];
  const left = new Set(names);
  const plan = GROUPS.map(([title, belongs]) => {
    const mine = [...left].filter(belongs).sort();
    mine.forEach((name) => left.delete(name));
    return [title, mine];
  });
  for (const name of names) frames.set(name, curve(name, frames.get(name)));
  // What is there already has grown in its place: a focus, or a pointer, stays where it is.
  if (unchanged(place, plan)) return;
  const open = new Map([...place.querySelectorAll("details")].map((d) => [d.dataset.group, d.open]));
  fill(
    place,
    plan.map(([title, mine], index) => {
      if (!mine.length) return null;
      const charts = mine.map((name) => frames.get(name));
      return h(
        "details", { open: open.get(title) ?? index < 4, "data-group": title },
        h("summary", {}, h("h2", {}, title)), h("div", { class: "cards" }, charts),
      );
    }).filter(Boolean),
  );
}

function curve(name, figure) {
  return chart(
    found.filter((run) => run.curves[name]).map((run) => ({ ...mark(run), name: run.name, points: run.curves[name] })),
    { title: name.replace("held_out/", "").replace("watch/trained/", "watched: ").replace("reward/", "batches: ").replace("watch/", "") },
    figure,
  );
}

// Whether what a part of the page is drawn from is what it was drawn from before.
function unchanged(place, ...values) {
  const key = JSON.stringify(values);
  if (place.dataset.key === key) return true;
  place.dataset.key = key;
  return false;
}

function samples(place) {
  if (unchanged(place, found.map((run) => [run.id, run.name, mark(run), run.samples, run.drawn, run.prompts, run.captions]))) return;
  const focused = place.contains(document.activeElement) && document.activeElement.dataset.slider;
  const with_any = found.filter((run) => run.samples.length);
  fill(
    place,
    with_any.length ? h("h2", {}, "Samples") : null,
    h("div", { class: "sheets" }, with_any.map((run) => sheet(run))),
  );
  if (focused) place.querySelector(`[data-slider="${focused}"]`)?.focus({ preventScroll: true });
}

function sheet(run) {
  const link = h("a", { target: "_blank", rel: "noopener" });
  const said = h("output", {});
  const place = h("div", { class: "tiles" });
  let draw = null;
  let drawn = -1; // the list of prompts that `draw` is of: sheets of one run may be of several
  const set = (index) => {
    const step = run.samples[index];
    // Of this very sheet: a run that went on from an earlier step draws another one of this step.
    const address = `/api/run/${run.id}/sample/${step}?drawn=${run.drawn[index]}`;
    if (drawn !== run.captions[index]) {
      drawn = run.captions[index];
      const prompts = run.prompts[drawn];
      fill(link);
      draw = prompts.length ? tiles(run, prompts, link, place) : whole(run, link);
      place.hidden = !prompts.length;
    }
    draw(`${address}&side=1280`, step);
    link.href = address;
    said.textContent = `step ${step}`;
  };
  const wanted = steps.has(run.id) ? run.samples.indexOf(steps.get(run.id)) : -1;
  const start = wanted < 0 ? run.samples.length - 1 : wanted;
  const slider = h("input", {
    type: "range", min: 0, max: run.samples.length - 1, "data-slider": run.id, "aria-label": `step of the samples of ${run.name}`,
    oninput: (event) => {
      const index = Number(event.target.value);
      if (index === run.samples.length - 1) steps.delete(run.id);
      else steps.set(run.id, run.samples[index]);
      set(index);
    },
  });
  slider.value = String(start);
  set(start);
  return h(
    "figure", { class: "card" },
    h("figcaption", {}, swatch(mark(run)), " ", h("bdi", {}, run.name)),
    place, link, h("div", { class: "slide" }, slider, said),
  );
}

// A sheet in one piece.
function whole(run, link) {
  const picture = h("img", { class: "sheet", decoding: "async" });
  link.append(picture);
  return (address, step) => {
    picture.src = address;
    picture.alt = `samples of ${run.name} after step ${step}`;
  };
}

// A sheet cut into its images, each above its prompt: one picture, shown through as many windows.
function tiles(run, prompts, link, place) {
  const rows = Math.ceil(prompts.length / run.columns);
  const at = (place, count) => `${count > 1 ? (100 * place) / (count - 1) : 0}%`;
  const windows = prompts.map((prompt, i) => {
    const pane = h("div", { class: "pane", role: "img", "aria-label": `sample ${i + 1}` });
    pane.style.backgroundSize = `${100 * run.columns}% ${100 * rows}%`;
    pane.style.backgroundPosition = `${at(i % run.columns, run.columns)} ${at(Math.floor(i / run.columns), rows)}`;
    return pane;
  });
  link.textContent = "the whole sheet";
  fill(place, windows.map((pane, i) => {
    const prompt = prompts[i];
    return h("figure", { class: "tile" }, pane, h("figcaption", { dir: "auto", title: prompt }, prompt));
  }));
  let latest = "";
  return (address) => {
    latest = address;
    const picture = new Image();
    picture.onload = () => {
      if (!picture.src.endsWith(latest)) return; // another step was asked for meanwhile
      for (const pane of windows) {
        pane.style.aspectRatio = `${picture.naturalWidth / run.columns} / ${picture.naturalHeight / rows}`;
        pane.style.backgroundImage = `url("${latest}")`;
      }
    };
    picture.src = latest;
  };
}

function settings(place) {
  if (unchanged(place, found.map((run) => [run.id, run.name, run.settings]))) return;
  if (!found.length) return fill(place);
  const keys = [...new Set(found.flatMap((run) => Object.keys(run.settings)))];
  const differ = keys.filter((key) => new Set(found.map((run) => run.settings[key])).size > 1);
  const open = place.querySelector("details")?.open ?? false;
  fill(
    place,
    found.length > 1 ? [h("h2", {}, "What differs"), differ.length ? grid(differ) : h("p", {}, "Their settings are the same.")] : null,
    h("details", { open }, h("summary", {}, h("h2", {}, "All settings")), grid(keys)),
  );
}

function grid(keys) {
  return h(
    "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "settings" },
    h(
      "table", { class: "plain" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "setting"), found.map((run) => h("th", { scope: "col" }, h("bdi", {}, run.name))))),
      h("tbody", {}, keys.map((key) =>
        h("tr", {}, h("th", { scope: "row" }, key), found.map((run) => h("td", { dir: "auto" }, run.settings[key] ?? "–"))))),
    ),
  );
}

export const runs = { show, live: true };
