// A dial that was computed beforehand: the same slider, over pictures that lie on the disk.
import { chart } from "./chart.js";
import { colour, fill, get, h, labelled, say, select } from "./dom.js";

// Each reward along the strengths, `x` in words: `curves` maps a strength to its rewards' means and
// intervals, and `trainers`, where several runs are dialled, a reward to the names of those that
// trained on it.
export function rewards(curves, at, strongest, trainers = new Map(), x = "strength") {
  const names = [...new Set([...curves.values()].flatMap((scores) => Object.keys(scores)))];
  return h("div", { class: "cards" }, names.map((name, i) => {
    const points = [...curves].filter(([, scores]) => scores[name]).sort((a, b) => a[0] - b[0]);
    const { trained } = points[0][1][name];
    const by = trainers.has(name) ? `: ${trainers.get(name).join(", ")}` : "";
    return chart([{
      name, colour: colour(i), dashed: !trained, points: points.map(([strength, scores]) => [strength, scores[name].mean]),
      low: points.map(([, scores]) => scores[name].ci95[0]), high: points.map(([, scores]) => scores[name].ci95[1]),
    }], { title: `${name} (${trained ? `trained${by}` : "held out"})`, x, span: [0, strongest], at });
  }));
}

let chosen = ""; // the id in the list, which is drawn anew when there are more

// The bar that chooses a computed dial and opens it in the panel's desk.
export function computed(panel, dials) {
  if (!dials.some((each) => each.id === chosen)) chosen = dials[0].id;
  const open = async () => {
    const id = chosen;
    try {
      const about = await get(`/api/computed/${id}`);
      if (id !== chosen) return; // another was chosen meanwhile
      say("");
      draw(panel.querySelector(".desk"), id, about);
    } catch (error) {
      say(error.message);
    }
  };
  return h("div", { class: "toolbar" },
    labelled("Computed beforehand", select(dials.map((each) => [each.id, each.name]), chosen, (id) => { chosen = id; })),
    h("button", { class: "main", onclick: open }, "Show"));
}

function draw(place, id, about) {
  const trained = about.strengths.findIndex((strength) => strength >= 1);
  const at = { prompt: 0, seed: 0, strength: trained < 0 ? about.strengths.length - 1 : trained };
  const made = new Set(about.made.map((numbers) => numbers.join("/")));
  const curves = new Map(about.strengths.map((x, i) => [x, about.scores[i]]).filter(([, scores]) => scores));
  const image = h("img", { class: "made", alt: "", width: 320, height: 320 });
  const took = h("small", { class: "took" }, "");
  const said = h("output", {});
  const plots = h("div", { class: "plots" });
  const slider = h("input", {
    type: "range", id: "dial-0", min: "0", max: String(about.strengths.length - 1), step: "1", value: String(at.strength),
    oninput: (event) => { at.strength = Number(event.target.value); show(); },
  });
  const show = () => {
    const strength = about.strengths[at.strength];
    const key = `${at.prompt}/${at.seed}/${at.strength}`;
    said.textContent = strength.toFixed(2);
    slider.setAttribute("aria-valuetext", strength.toFixed(2));
    image.hidden = !made.has(key);
    if (made.has(key)) {
      image.src = `/api/computed/${id}/${key}`;
      image.alt = `${about.prompts[at.prompt]}, at ${strength.toFixed(2)}`;
    }
    took.textContent = made.has(key)
      ? `${about.side} × ${about.side} pixels, ${about.steps} steps, computed beforehand (${about.made.length} of ${about.of} pictures)`
      : `this picture is not computed yet (${about.made.length} of ${about.of} are)`;
    if (curves.size) fill(plots, rewards(curves, strength, about.strengths.at(-1)));
    else fill(plots, h("p", { class: "soft" }, "The rewards are not computed yet: they come after the pictures."));
  };
  const options = (values) => values.map((value, i) => [String(i), String(value)]);
  fill(place,
    h("div", { class: "easel" }, image, took),
    h("div", { class: "controls" },
      h("div", { class: "dial" }, h("label", { for: "dial-0" }, h("bdi", {}, about.tilt)), slider, said),
      labelled("Prompt", select(options(about.prompts), "0", (value) => { at.prompt = Number(value); show(); })),
      h("div", { class: "toolbar" },
        labelled("Seed", select(options(about.seeds), "0", (value) => { at.seed = Number(value); show(); }))),
      plots));
  show();
}
