// The frame: tabs, the address, and the list of what there is.
import { get, say } from "./dom.js";
import { compare } from "./compare.js";
import { dial } from "./dial.js";
import { runs } from "./runs.js";
import { vote } from "./vote.js";

const VIEWS = { runs, compare, dial, vote };
const EVERY = 4000; // milliseconds between looks at what is new

// The token is in a cookie by now; it need not stand in the address, the history or a screenshot.
if (location.search) history.replaceState(null, "", location.pathname + location.hash);

let overview = { runs: [], sets: [], dials: [], problems: [] };
let shown = "";
let failed = false; // whether the line at the foot says why a view could not be shown
const tabs = [...document.querySelectorAll("[role=tab]")];

async function show(name, focus = false) {
  if (!(name in VIEWS)) name = "runs";
  shown = name;
  for (const tab of tabs) {
    const mine = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", mine);
    tab.tabIndex = mine ? 0 : -1;
    if (mine && focus) tab.focus();
    document.getElementById(tab.id.slice(4)).hidden = !mine;
  }
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  await update();
}

async function update() {
  try {
    await VIEWS[shown].show(document.getElementById(shown), overview);
    if (failed) say("");
    failed = false;
  } catch (error) {
    failed = true;
    say(error.message);
  }
}

async function poll() {
  if (!document.hidden) {
    try {
      overview = await get("/api/overview");
      if (document.getElementById("said").dataset.lost) say("");
      delete document.getElementById("said").dataset.lost;
      if (VIEWS[shown].live) await update();
    } catch (error) {
      document.getElementById("said").dataset.lost = "yes";
      say(error instanceof TypeError ? "the desk does not answer: is it still running?" : error.message);
    }
  }
  setTimeout(poll, EVERY);
}

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => show(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (move) show(tabs[(index + move + tabs.length) % tabs.length].id.slice(4), true);
  });
}
window.addEventListener("hashchange", () => show(location.hash.slice(1)));
document.addEventListener("keydown", (event) => {
  if (!event.target.closest("input, select, textarea, dialog")) VIEWS[shown].key?.(event);
});

overview = await get("/api/overview").catch((error) => {
  say(error.message);
  return overview;
});
await show(location.hash.slice(1));
setTimeout(poll, EVERY);
