// Shows the rows that fit a text and a kind, in the order of a metric.
const find = selector => document.querySelector(selector), list = find('#list');
const rows = [...list.querySelectorAll('.row')].map(part => (
  {part, ...JSON.parse(part.dataset.row), text: part.textContent.toLowerCase(), badge: part.querySelector('.badge')}));
const search = find('.filters input'), buttons = [...document.querySelectorAll('.filters button')];
const [metric, model, order, marks] = ['#metric', '#model', '#order', '#marks'].map(find);
const several = buttons.some(button => button.dataset.kind === 'changed');
let kind = 'all';

const show = () => {
  const place = model ? Number(model.value) : 1, higher = metric?.selectedOptions[0].dataset.higher === '1';
  for (const row of rows) {
    const scores = row.scores[metric?.value] ?? [], sign = higher ? 1 : -1, known = value => typeof value === 'number';
    row.good = known(scores[place]) ? scores[place] * sign : null;
    row.change = several && known(row.good) && known(scores[0]) ? row.good - scores[0] * sign : 0;
    const either = flags => Boolean(flags[place] || (several && flags[0]));
    row.kinds = {all: true, changed: row.changed[place], better: row.change > 0, worse: row.change < 0,
      cut: either(row.cut), empty: either(row.empty)};
    row.badge.textContent = row.change > 0 ? 'better' : row.change < 0 ? 'worse' : '';
    row.badge.className = 'badge ' + (row.change > 0 ? 'good' : 'bad');
  }
  const last = Infinity, goodness = row => row.good ?? last;
  const orders = {
    change: (a, b) => Math.abs(b.change) - Math.abs(a.change) || goodness(a) - goodness(b),
    worst: (a, b) => goodness(a) - goodness(b),
    best: (a, b) => (b.good ?? -last) - (a.good ?? -last),
    place: () => 0,
  };
  rows.sort((a, b) => orders[order.value](a, b) || a.place - b.place);
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = row => words.every(word => row.text.includes(word));
  let shown = 0;
  for (const row of rows) {
    row.part.hidden = !(row.kinds[kind] && fits(row));
    shown += !row.part.hidden;
  }
  list.append(...rows.map(row => row.part));
  for (const button of buttons) {
    const count = rows.filter(row => row.kinds[button.dataset.kind] && fits(row)).length;
    button.querySelector('span').textContent = count.toLocaleString('en');
    button.setAttribute('aria-pressed', button.dataset.kind === kind);
  }
  find('#count').textContent = shown ? shown.toLocaleString('en') + (shown === 1 ? ' row' : ' rows') : 'No row fits.';
};

for (const button of buttons) button.addEventListener('click', () => { kind = button.dataset.kind; show(); });
for (const choice of [search, metric, model, order]) choice?.addEventListener('input', show);
marks.addEventListener('input', () => { list.dataset.marks = marks.value; });
list.dataset.marks = marks.value; // a browser keeps choices when it loads a page again
find('.filters').hidden = false;
show();
