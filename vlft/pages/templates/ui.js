// Gradio leaves the list of a field open after Tab, where it covers the buttons below: the list does not see the key.
document.addEventListener("keydown", event => {
  const list = event.target;
  if (!list.matches || !list.matches("[role=combobox]")) return;
  if (event.key === "Tab") event.stopPropagation();
  // Enter takes the text as it was typed. Gradio would take the first entry that contains it.
  if (event.key === "ArrowDown" || event.key === "ArrowUp") moved = true;
  if (event.key !== "Enter" || moved || !list.closest(".typed")) return;
  event.stopPropagation();
  list.blur();
}, true);
let moved = false; // with the arrow keys, since the last letter
for (const name of ["input", "focusin"]) document.addEventListener(name, () => { moved = false; }, true);

// A message is about what was done last.
const hide = () => document.querySelectorAll(".message[data-now]").forEach(one => { one.hidden = true; });
document.addEventListener("input", hide, true);
document.addEventListener("click", event => {
  if (event.target.closest && event.target.closest(".screen button, [role=option]")) hide();
}, true);

// The form: each tab keeps its own over a reload, and a new tab begins with the last one of this browser.
const KEY = "vlft-ui-form";
let kept = {}, loaded = false; // Gradio reports changes of fields before they have the kept values
try { kept = JSON.parse(sessionStorage[KEY] || localStorage[KEY] || "{}"); } catch {}
window.vlftForm = {
  loaded() { loaded = true; },
  keep(names, values) {
    if (!loaded) return;
    const form = JSON.stringify(Object.fromEntries(names.map((name, i) => [name, values[i]]).filter(one => one[0])));
    try { sessionStorage[KEY] = localStorage[KEY] = form; } catch {}
  },
  kept(names, values) {
    return values.map((value, i) => names[i] && Object.hasOwn(kept, names[i]) ? kept[names[i]] : value);
  },
  step(now, titles) {
    const title = titles[Number(location.hash.slice(1)) - 1] || (titles.includes(kept.step) ? kept.step : now);
    if (title !== titles[0]) history.replaceState(null, "", "#" + parseInt(title));
    return title;
  },
  // The address names the step, so the browser's Back leads to the step before.
  show(title) {
    const hash = "#" + parseInt(title);
    if (location.hash === hash) return;
    if (location.hash || hash !== "#1") location.hash = hash;
  },
};
addEventListener("hashchange", () => {
  const chosen = document.querySelectorAll("#steps input")[Math.max(0, Number(location.hash.slice(1)) - 1)];
  if (chosen && !chosen.checked) chosen.click();
});

// The server ended, or another one took its place: it does not know this tab, and what the tab shows is of the past.
let missed = 0;
setInterval(async () => {
  let there = false;
  try {
    const answer = await fetch("/alive", {cache: "no-store"});
    there = answer.ok && await answer.text() === start;
  } catch {}
  missed = there ? 0 : missed + 1;
  const shown = document.getElementById("ended");
  if (there && shown) shown.remove();
  if (missed < 2 || shown) return;
  const line = document.createElement("p");
  line.id = "ended";
  line.setAttribute("role", "alert");
  line.textContent = "vlft ui has ended or was started again. Open its new address.";
  document.body.prepend(line);
}, 3000);
