// Shows the values of the nearest point under a pointer or finger.
for (const plot of document.querySelectorAll('.plot')) {
  const data = JSON.parse(plot.dataset.points), hair = plot.querySelector('.hair'), box = plot.querySelector('.read');
  const show = event => {
    const area = plot.getBoundingClientRect(), at = (event.clientX - area.left) / area.width;
    const x = data.from + at * (data.to - data.from);
    let near = null;
    const lines = data.series.map(one => {
      let best = 0;
      one.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(one.x[best] - x)) best = i; });
      if (near === null || Math.abs(one.x[best] - x) < Math.abs(near - x)) near = one.x[best];
      return [one, best];
    });
    if (near === null) return;
    const words = lines.filter(([one, i]) => Math.abs(one.x[i] - near) <= data.slack)
      .map(([one, i]) => one.name + ' ' + Number(one.y[i].toPrecision(4)));
    box.textContent = 'step ' + near.toLocaleString('en') + ': ' + words.join(', ');
    const left = (near - data.from) / (data.to - data.from || 1);
    hair.style.left = left * 100 + '%';
    box.style.left = left < .5 ? 'auto' : '.2rem'; box.style.right = left < .5 ? '.2rem' : 'auto';
    hair.style.display = box.style.display = 'block';
  };
  plot.addEventListener('pointermove', show); plot.addEventListener('pointerdown', show);
  plot.addEventListener('pointerleave', () => { hair.style.display = box.style.display = 'none'; });
}
