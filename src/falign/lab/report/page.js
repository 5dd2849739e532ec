"use strict";
(() => {
  const root = document.documentElement;
  // Storage is denied to pages from files in some browsers: the choice then lasts as long as the page.
  const stored = {
    get: () => { try { return localStorage.getItem("falign-theme"); } catch { return null; } },
    set: (theme) => { try { localStorage.setItem("falign-theme", theme); } catch { /* it is only a convenience */ } },
  };
  const theme = stored.get();
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    button.hidden = false;
    button.addEventListener("click", () => {
      const dark = getComputedStyle(root).colorScheme.includes("dark");
      root.dataset.theme = dark ? "light" : "dark";
      stored.set(root.dataset.theme);
    });

    const filter = document.getElementById("filter");
    if (filter) filterClaims(filter);
    for (const each of document.querySelectorAll("button.png")) {
      each.hidden = false;
      each.addEventListener("click", () => savePicture(each.closest("figure").querySelector("svg"), each.dataset.name));
    }
    // A link into what is folded unfolds it.
    const unfold = () => {
      const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
      const folded = target && target.closest("details:not([open])");
      if (folded) { folded.open = true; target.scrollIntoView(); }
    };
    addEventListener("hashchange", unfold);
    unfold();

    // On paper nothing can be opened by a click.
    let opened = [];
    addEventListener("beforeprint", () => {
      opened = [...document.querySelectorAll("details:not([open])")];
      for (const each of opened) each.open = true;
    });
    addEventListener("afterprint", () => { for (const each of opened) each.open = false; });
  });

  // The drawing as a file, on white: the name of a variable is the colour that it has on a light page.
  async function savePicture(svg, name) {
    const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    const copy = svg.cloneNode(true), scale = 8 / 3;
    copy.setAttribute("width", width * scale);
    copy.setAttribute("height", height * scale);
    copy.setAttribute("style", "color: #1c1f23; font-family: " + getComputedStyle(svg.querySelector("text") || svg).fontFamily);
    const text = new XMLSerializer().serializeToString(copy).replace(/var\(--c([0-9a-f]{6})\)/g, "#$1");
    const image = new Image();
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d");
    pen.fillStyle = "white";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(image, 0, 0);
    const link = document.createElement("a");
    link.href = canvas.toDataURL("image/png");
    link.download = name;
    link.click();
  }

  function filterClaims(filter) {
    const buttons = [...filter.querySelectorAll("button")];
    const words = document.getElementById("words");
    const claims = [...document.querySelectorAll("article.claim")];
    const texts = new Map(claims.map((claim) => [claim, `${claim.dataset.name} ${claim.textContent}`.toLowerCase()]));
    let kind = "all";

    const show = () => {
      const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
      const everything = kind === "all" && wanted.length === 0;
      let count = 0;
      for (const claim of claims) {
        const kept = (kind === "all" || claim.dataset.verdict === kind)
          && wanted.every((word) => texts.get(claim).includes(word));
        claim.hidden = !kept;
        count += kept;
      }
      // What holds no claim that is left would only stand in the way of those that are.
      for (const section of document.querySelectorAll("section.experiment, .origin"))
        section.hidden = !everything && !section.querySelector("article.claim:not([hidden])");
      for (const section of document.querySelectorAll(".statements, section.aside, details.unfinished, .experiment > figure"))
        section.hidden = !everything;
      for (const each of document.querySelectorAll("details.origin")) {
        each.dataset.folded ??= String(!each.open);
        each.open = !everything || each.dataset.folded === "false";
      }
      for (const each of buttons) each.setAttribute("aria-pressed", String(each.dataset.kind === kind));
      const found = count ? `${count} of ${claims.length} claims` : "No claim matches.";
      document.getElementById("found").textContent = everything ? "" : found;
    };

    for (const each of buttons)
      each.addEventListener("click", () => { kind = each.dataset.kind; show(); });
    words.addEventListener("input", show);

    // A link to what the filter hides shows everything again.
    const reveal = (hash) => {
      const target = document.getElementById(decodeURIComponent(hash.slice(1)));
      if (target?.closest("[hidden]")) {
        kind = "all";
        words.value = "";
        show();
        target.scrollIntoView();
      }
    };
    document.addEventListener("click", (event) => {
      const link = event.target.closest('a[href^="#"]');
      if (link) reveal(link.getAttribute("href"));
    });
    addEventListener("hashchange", () => reveal(location.hash));

    filter.hidden = false;
    show();
  }
})();
