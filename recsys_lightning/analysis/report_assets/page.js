"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colours = JSON.parse(document.getElementById("colours").textContent);
  const stored = { get() { try { return localStorage.getItem("report-theme"); } catch { return null; } },
                   set(value) { try { localStorage.setItem("report-theme", value); } catch { /* not kept */ } } };

  // ------------------------------------------------------------------------------------------------------- theme
  const isDark = () => root.dataset.theme === "dark" || (root.dataset.theme !== "light" && dark.matches);
  const buttons = [...document.querySelectorAll("[data-set-theme]")];
  function setTheme(theme) {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.setTheme === theme));
    redraw();
  }
  for (const button of buttons) {
    button.addEventListener("click", () => { stored.set(button.dataset.setTheme); setTheme(button.dataset.setTheme); });
  }

  // ------------------------------------------------------------------------------------------------------- plots
  const figures = [...document.querySelectorAll(".plot")].map((plot) => ({
    canvas: plot.querySelector(".canvas"), text: plot.querySelector(".figure").textContent, drawn: false,
  }));
  const settings = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };

  function dressed(text) {
    const night = isDark();
    if (night) for (const [day, other] of Object.entries(colours)) text = text.replaceAll(day, other);
    const figure = JSON.parse(text);
    const css = getComputedStyle(root);
    const colour = (name) => css.getPropertyValue(name).trim();
    const layout = figure.layout;
    layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
    layout.font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--ink") };
    layout.hoverlabel = { ...layout.hoverlabel, bgcolor: colour("--panel"), bordercolor: colour("--line"),
                          font: { color: colour("--ink") } };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
      Object.assign(layout[name], { gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--line") });
    }
    if (innerWidth < 600 || matchMedia("(pointer: coarse)").matches) {
      layout.dragmode = false;  // a finger on a plot scrolls the page
      layout.margin = { ...layout.margin, l: 44, r: 6 };
    }
    return figure;
  }
  function draw(entry) {
    const { data, layout } = dressed(entry.text);
    entry.drawn = true;
    entry.canvas.dataset.drawn = "true";
    return Plotly.react(entry.canvas, data, layout, settings);
  }
  function redraw() { for (const entry of figures) if (entry.drawn) draw(entry); }
  function drawAll() { for (const entry of figures) if (!entry.drawn) draw(entry); }

  // Plots are drawn as they come near: a long report opens at once.
  const near = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) {
      const entry = figures.find((each) => each.canvas === target);
      if (isIntersecting && !entry.drawn) { near.unobserve(target); draw(entry); }
    }
  }, { rootMargin: "600px" });
  for (const entry of figures) near.observe(entry.canvas);

  // Paper is white.
  let before = null;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme ?? "auto";
    root.dataset.theme = "light";
    drawAll();
    redraw();
  });
  addEventListener("afterprint", () => setTheme(before ?? "auto"));

  // ------------------------------------------------------------------------------------------------------- cards
  const fold = (text) => text.toLowerCase().normalize("NFKD").replace(/\p{M}/gu, "");
  const shelves = [...document.querySelectorAll(".shelf")].map((shelf) => {
    const cards = [...shelf.querySelectorAll(".card")].map((card) => ({ card, text: fold(card.textContent) }));
    const [input, level, count, none] = ["input", "select", ".count", ".none"].map((name) => shelf.querySelector(name));
    function filter() {
      const words = fold(input.value).split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const { card, text } of cards) {
        const fits = (level.value === "all" || card.dataset.level === level.value) && words.every((word) => text.includes(word));
        card.hidden = !fits;
        shown += fits;
      }
      count.textContent = `${shown} of ${cards.length} codes`;
      none.hidden = shown > 0;
    }
    input.addEventListener("input", filter);
    level.addEventListener("change", filter);
    filter();
    return { shelf, reveal(card) { input.value = ""; level.value = card.dataset.level; filter(); } };
  });
  // A link to a card that the filter hides shows it.
  function follow() {
    const card = location.hash.length > 1 ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
    if (!card?.classList.contains("card")) return;
    shelves.find(({ shelf }) => shelf.contains(card))?.reveal(card);
    card.scrollIntoView({ block: "center" });
  }
  addEventListener("hashchange", follow);

  // ---------------------------------------------------------------------------------------------------- contents
  const links = new Map([...document.querySelectorAll(".toc a")].map((link) => [link.hash.slice(1), link]));
  const reading = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) links.get(target.id)?.classList.toggle("current", isIntersecting);
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const section of document.querySelectorAll("main > section")) reading.observe(section);

  dark.addEventListener("change", () => { if (!root.dataset.theme) redraw(); });
  setTheme(stored.get() ?? "auto");
  follow();
})();
