{% include "charts.js" %}

// Keeps the place on the page and the open parts when the page is loaded again.
const key = 'vlft ' + location.pathname;
const parts = () => [...document.querySelectorAll('details')].map(part => [part.querySelector('summary').textContent, part]);
addEventListener('pagehide', () => {
  const open = Object.fromEntries(parts().map(([name, part]) => [name, part.open]));
  try { sessionStorage.setItem(key, JSON.stringify({open, top: scrollY})); } catch { /* the browser keeps nothing */ }
});
try {
  const kept = JSON.parse(sessionStorage.getItem(key));
  if (kept && performance.getEntriesByType('navigation')[0].type === 'reload') {
    for (const [name, part] of parts()) if (name in kept.open) part.open = kept.open[name];
    history.scrollRestoration = 'manual';
    scrollTo(0, kept.top);
  }
} catch { /* nothing was kept */ }

// Reloads the page of a run that continues, but not while somebody selects text, or while the page is hidden.
const live = document.getElementById('live');
if (live) {
  const loaded = Date.now(), {written, patience} = live.dataset;
  const look = setInterval(() => {
    const age = Math.max(0, Date.now() - written) / 1000, minutes = Math.floor(age / 60);
    const text = minutes + (minutes === 1 ? ' minute' : ' minutes');
    document.getElementById('age').textContent = minutes ? ', ' + text + ' ago' : '';
    if (age > patience) {
      live.className = 'warn';
      live.textContent = 'This page has not been written for ' + text
        + ': the run has ended or hangs, or this is a copy. Reload it to look again.';
    } else if (Date.now() - loaded > 30000 && !document.hidden && !String(getSelection())) {
      clearInterval(look);
      location.reload();
    }
  }, 1000);
}
