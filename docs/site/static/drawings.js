// Draws the page's Mermaid texts in the reader's color scheme, and again when that changes.
const drawings = [...document.querySelectorAll("pre.mermaid")].map((element) => [element, element.textContent]);
const preference = matchMedia("(prefers-color-scheme: dark)");

async function draw() {
  const theme = document.body.dataset.theme;
  const dark = theme === "dark" || (theme !== "light" && preference.matches);
  mermaid.initialize({ startOnLoad: false, theme: dark ? "dark" : "neutral", fontFamily: "inherit" });
  for (const [element, text] of drawings) {
    element.removeAttribute("data-processed");
    element.textContent = text;
  }
  await mermaid.run({ nodes: drawings.map(([element]) => element) });
}

draw();
preference.addEventListener("change", draw);
new MutationObserver(draw).observe(document.body, { attributeFilter: ["data-theme"] });
