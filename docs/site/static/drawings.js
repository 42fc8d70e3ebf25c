// Draws the page's Mermaid texts in the reader's color scheme, and again when that changes.
const drawings = [...document.querySelectorAll("pre.mermaid")].map((element) => [element, element.textContent]);
const preference = matchMedia("(prefers-color-scheme: dark)");

async function draw() {
  const theme = document.body.dataset.theme;
  const dark = theme === "dark" || (theme !== "light" && preference.matches);
  mermaid.initialize({ startOnLoad: false, theme: dark ? "dark" : "neutral", fontFamily: "inherit", flowchart: { wrappingWidth: 400 } });
  for (const [element, text] of drawings) {
    element.removeAttribute("data-processed");
    element.textContent = text;
  }
  await mermaid.run({ nodes: drawings.map(([element]) => element) });
  for (const drawing of document.querySelectorAll("pre.mermaid svg")) {
    drawing.style.minWidth = `${Math.min(drawing.viewBox.baseVal.width, 600)}px`; // text stays legible on a phone, and the drawing scrolls
  }
}

draw();
preference.addEventListener("change", draw);
new MutationObserver(draw).observe(document.body, { attributeFilter: ["data-theme"] });
