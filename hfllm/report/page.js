// Under the pointer, or a finger, each chart shows its values at the nearest step.
for (const figure of document.querySelectorAll(".chart")) {
  const plot = figure.querySelector(".plot"), cursor = figure.querySelector(".cursor"), tip = figure.querySelector(".tip");
  const scale = JSON.parse(figure.dataset.scale), lines = JSON.parse(figure.dataset.lines);
  const show = (event) => {
    const box = plot.getBoundingClientRect(), share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const wanted = scale.first + share * (scale.last - scale.first);
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
    const step = nearest(lines.flatMap((line) => (line.points.length ? [nearest(line.points)] : [])))[0];
    tip.replaceChildren(document.createTextNode(`step ${step.toLocaleString("en")}`));
    for (const line of lines) {
      const point = line.points.find((candidate) => candidate[0] === step);
      if (!point) continue;
      const row = document.createElement("div"), key = document.createElement("i");
      row.className = `s${line.color}`;
      row.append(key, `${line.label} ${point[1].toLocaleString("en", { maximumSignificantDigits: 5 })}`);
      tip.append(row);
    }
    const left = (100 * (step - scale.first)) / (scale.last - scale.first || 1);
    cursor.hidden = tip.hidden = false;
    cursor.style.left = `${left}%`;
    tip.style.left = left < 55 ? `calc(${left}% + 10px)` : "auto";
    tip.style.right = left < 55 ? "auto" : `calc(${100 - left}% + 10px)`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });
}
