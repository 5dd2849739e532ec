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

    // On paper nothing can be opened by a click.
    let opened = [];
    addEventListener("beforeprint", () => {
      opened = [...document.querySelectorAll("details:not([open])")];
      for (const each of opened) each.open = true;
    });
    addEventListener("afterprint", () => { for (const each of opened) each.open = false; });
  });

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
      for (const section of document.querySelectorAll("section.experiment, section.paper"))
        section.hidden = !everything && !section.querySelector("article.claim:not([hidden])");
      for (const section of document.querySelectorAll("section.statements, section.interpretations, section.provenance, details.unfinished"))
        section.hidden = !everything;
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
