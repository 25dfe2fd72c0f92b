// Gradio leaves the list of a field open after Tab, where it covers the buttons below: the list does not see the key.
document.addEventListener("keydown", event => {
  if (event.key === "Tab" && event.target.matches && event.target.matches("[role=combobox]")) event.stopPropagation();
}, true);

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
