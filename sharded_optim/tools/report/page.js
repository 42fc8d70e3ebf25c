// Shows the values of a figure at one step: under the pointer, or at a slider that the keyboard moves. Values are in the JSON of the figure.
"use strict";
for (const figure of document.querySelectorAll("figure")) {
  const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  const title = figure.querySelector("h3").textContent;
  const holder = figure.querySelector(".values");
  const last = data.steps.length - 1;
  if (last < 0) continue;

  const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: last, value: last, step: 1 });
  slider.setAttribute("aria-label", `Step in ${title}`);
  const label = document.createElement("label");
  label.append("step", slider);
  holder.append(label);
  let chooser = null;
  if (data.rows) {
    chooser = document.createElement("select");
    data.series.forEach((each, index) => chooser.append(new Option(`${index + 1}  ${each.name}`, index)));
    chooser.setAttribute("aria-label", `Tensor in ${title}`);
    holder.append(chooser);
  }
  const output = document.createElement("output");
  holder.append(output);

  const plots = [...figure.querySelectorAll(".plot")].map((element) => {
    const box = Object.fromEntries(Object.entries(element.dataset).map(([name, value]) => [name, Number(value)]));
    const cursor = document.createElement("div");
    cursor.className = "cursor";
    cursor.style.top = data.rows ? "0" : `${box.top * 100}%`;
    cursor.style.height = `${(box.bottom - (data.rows ? 0 : box.top)) * 100}%`;
    cursor.hidden = true;
    const line = document.createElement("div");
    line.className = "cursor row";
    line.style.left = `${box.left * 100}%`;
    line.style.right = `${(1 - box.right) * 100}%`;
    line.hidden = true;
    element.append(cursor, line);
    element.addEventListener("pointermove", (event) => point(element, box, event));
    element.addEventListener("pointerdown", (event) => point(element, box, event));
    return { box, cursor, line };
  });

  function point(element, box, event) {
    const area = element.getBoundingClientRect();
    const across = ((event.clientX - area.left) / area.width - box.left) / (box.right - box.left);
    const step = box.first + across * (box.last - box.first);
    slider.value = nearest(step);
    const down = ((event.clientY - area.top) / area.height - box.top) / (box.bottom - box.top);
    if (chooser && down >= 0 && down < 1) chooser.selectedIndex = Math.floor(down * data.series.length);
    show();
  }

  function nearest(step) {
    let low = 0, high = last;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (data.steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - data.steps[low - 1] < data.steps[low] - step ? low - 1 : low;
  }

  // The value at a step, or the last one before it: validation is not in every record.
  function described(series, index) {
    let place = index;
    while (place > 0 && series.values[place] === null && !data.rows) place -= 1;
    const value = series.values[place];
    if (value === null) return `${series.name}: none`;
    const at = place === index ? "" : ` (step ${data.steps[place]})`;
    return `${series.name}: ${typeof value === "number" ? Number(value.toPrecision(5)) : value}${at}`;
  }

  function show() {
    const index = Number(slider.value), step = data.steps[index];
    const shown = chooser ? [data.series[chooser.selectedIndex]] : data.series;
    const text = `step ${step} \u00b7 ${shown.map((each) => described(each, index)).join(" \u00b7 ")}`;
    output.textContent = text;
    slider.setAttribute("aria-valuetext", text);
    for (const { box, cursor, line } of plots) {
      const share = (step - box.first) / (box.last - box.first || 1);
      cursor.style.left = `${(box.left + share * (box.right - box.left)) * 100}%`;
      cursor.hidden = share < 0 || share > 1;
      if (chooser) {
        const row = (chooser.selectedIndex + 0.5) / data.series.length;
        line.style.top = `${(box.top + row * (box.bottom - box.top)) * 100}%`;
        line.hidden = false;
      }
    }
  }

  slider.addEventListener("input", show);
  if (chooser) chooser.addEventListener("change", show);
  show();
}
