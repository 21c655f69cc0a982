/* What the pages do in the browser: render formulas, filter the library, sort tables, show a reference on hover.
   Each part only improves what already reads well without it, and each can run twice on a page without harm. */
(() => {
  "use strict";

  /* Formulas. Python leaves \( … \) and \[ … \] in .arithmatex; that text is what a reader without JavaScript sees. */
  function renderMaths() {
    if (!window.katex) return; // the template loads KaTeX only where a formula stands
    for (const node of document.querySelectorAll(".arithmatex:not([data-rendered])")) {
      node.dataset.rendered = ""; // set first: a formula that fails is shown in red once, and never tried again
      const source = node.textContent.trim();
      const displayMode = source.startsWith("\\[");
      katex.render(source.slice(2, -2), node, { displayMode, throwOnError: false, strict: "ignore" });
    }
  }

  /* Whatever scrolls sideways must be reachable by keyboard. */
  function focusableScrollers() {
    const wide = ".katex-display, .md-typeset__scrollwrap, .table-scroll, .evidence, table.sortable, table.lib-index";
    for (const node of document.querySelectorAll(wide)) {
      if (node.scrollWidth > node.clientWidth + 1) {
        node.tabIndex = 0;
        if (!node.matches("section, aside, table")) node.setAttribute("role", "group");
        if (!node.hasAttribute("aria-label")) node.setAttribute("aria-label", "Scrolls sideways");
      } else if (node.getAttribute("aria-label") === "Scrolls sideways") {
        for (const name of ["tabindex", "role", "aria-label"]) node.removeAttribute(name);
      }
    }
  }

  /* The library: show the entries whose language and type are chosen, and keep the choice in the address. */
  function libraryFilter() {
    const form = document.querySelector("form.lib-filter");
    if (!form || form.dataset.ready !== undefined) return;
    form.dataset.ready = "";
    form.hidden = false;
    const entries = [...document.querySelectorAll(".lib-entry")];
    const count = document.querySelector("output.lib-count");
    const inputs = [...form.querySelectorAll("input[name=lang], input[name=type]")];
    const chosen = (name) => inputs.filter((i) => i.name === name && i.checked).map((i) => i.value);

    /* All boxes are checked in the page, for readers whose browser restores forms; none checked means the same here, so
       that one click is enough to see one type. */
    const wanted = new URLSearchParams(location.search);
    for (const i of inputs) i.checked = (wanted.get(i.name) ?? "").split(",").includes(i.value);

    function apply() {
      const lang = chosen("lang"), type = chosen("type");
      let shown = 0;
      for (const entry of entries) {
        entry.hidden = (lang.length && !lang.includes(entry.dataset.lang)) || (type.length && !type.includes(entry.dataset.type));
        shown += !entry.hidden;
      }
      hideEmpty();
      if (count) count.textContent = `${shown} of ${entries.length} shown`;
      const query = new URLSearchParams(location.search);
      for (const [name, values] of [["lang", lang], ["type", type]]) {
        query.delete(name);
        if (values.length) query.set(name, values.join(","));
      }
      const text = query.toString().replaceAll("%2C", ",");
      history.replaceState(history.state, "", location.pathname + (text ? `?${text}` : "") + location.hash);
    }

    /* A section whose entries are all hidden goes with its heading, and so does its line in the table of contents. */
    function hideEmpty() {
      for (const section of document.querySelectorAll(".lib-group, .lib-language")) {
        section.hidden = !section.querySelector(".lib-entry:not([hidden])");
        for (const heading of section.querySelectorAll(":scope > :is(h2, h3)[id]")) {
          const line = document.querySelector(`.md-nav--secondary a[href$="#${CSS.escape(heading.id)}"]`);
          if (line) line.closest("li").hidden = section.hidden;
        }
      }
    }

    form.addEventListener("change", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    apply();
  }

  /* "≤ 0.01 nats" is 0.01; a date or a hash is no number. */
  function number(text) {
    const found = text.match(/^[≤≥<>≈\s]*([-+]?\d*\.?\d+(?:e[-+]?\d+)?)(?![\w.-])/i);
    return found ? Number(found[1]) : null;
  }

  /* Tables with class "sortable": a button in each head cell; numbers sort as numbers, data-sort wins over the text. */
  function sortableTables() {
    for (const table of document.querySelectorAll("table.sortable:not([data-ready])")) {
      table.dataset.ready = "";
      const heads = [...table.querySelectorAll("thead th")];
      heads.forEach((head, column) => {
        let button = head.querySelector("button");
        if (!button) {
          button = document.createElement("button");
          button.type = "button";
          button.append(...head.childNodes);
          head.append(button);
        }
        button.addEventListener("click", () => {
          const down = head.getAttribute("aria-sort") === "ascending";
          for (const other of heads) other.removeAttribute("aria-sort");
          head.setAttribute("aria-sort", down ? "descending" : "ascending");
          const key = (row) => row.cells[column]?.dataset.sort ?? row.cells[column]?.textContent.trim() ?? "";
          const compare = (a, b) => {
            const [x, y] = [number(a), number(b)];
            return x === null || y === null ? a.localeCompare(b, "en", { numeric: true }) : x - y;
          };
          const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b)));
          table.tBodies[0].append(...(down ? rows.reverse() : rows));
        });
      });
    }
  }

  /* A citation shows its reference on hover or focus; the link still goes there. */
  function citationCards() {
    const links = document.querySelectorAll(".cites a[href^='#']");
    if (!links.length || document.querySelector(".citation-card")) return;
    const card = document.createElement("div");
    card.className = "citation-card";
    card.setAttribute("role", "tooltip");
    card.id = "__citation-card";
    card.hidden = true;
    document.getElementById("__article").append(card);
    const hide = () => (card.hidden = true);
    for (const link of links) {
      const reference = document.getElementById(decodeURIComponent(link.hash.slice(1)));
      if (!reference) continue;
      const show = () => {
        const copy = reference.cloneNode(true);
        for (const extra of copy.querySelectorAll(".ref-back")) extra.remove();
        card.textContent = copy.textContent.replace(/\s+/g, " ").trim();
        card.hidden = false;
        const spot = link.getBoundingClientRect(), box = card.offsetParent.getBoundingClientRect();
        const left = Math.min(spot.left - box.left, box.width - card.offsetWidth);
        card.style.left = `${Math.max(0, left)}px`;
        card.style.top = `${spot.bottom - box.top + 6}px`;
      };
      link.removeAttribute("title"); // else the browser's own tooltip covers the card
      link.setAttribute("aria-describedby", card.id);
      link.addEventListener("mouseenter", show);
      link.addEventListener("focus", show);
      link.addEventListener("mouseleave", hide);
      link.addEventListener("blur", hide);
    }
    addEventListener("keydown", (event) => event.key === "Escape" && hide());
  }

  /* On phones Material opens the menu and the search by labels, which no keyboard reaches. */
  function headerButtons() {
    document.querySelector(".md-search[role=dialog]")?.setAttribute("aria-label", "Search");
    for (const [name, text] of [["__drawer", "Menu"], ["__search", "Search"]]) {
      const label = document.querySelector(`label.md-header__button[for=${name}]`);
      if (!label || label.tabIndex === 0) continue;
      label.tabIndex = 0;
      label.setAttribute("role", "button");
      label.setAttribute("aria-label", text);
      label.addEventListener("keydown", (event) => {
        if (event.key !== " ") return; // Material clicks a label on Enter itself
        event.preventDefault();
        label.click();
      });
    }
  }

  /* What code only needs is folded away; the copy button takes it along all the same. */
  addEventListener("click", (event) => {
    const button = event.target.closest?.(".embed-fold");
    if (button) button.setAttribute("aria-expanded", String(button.getAttribute("aria-expanded") === "false"));
  });

  /* A link to a question opens its answer. */
  function openTarget() {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    const closed = target.closest("details") || (target.nextElementSibling?.matches("details.question") && target.nextElementSibling);
    if (closed) closed.open = true;
  }

  function start() {
    renderMaths();
    libraryFilter();
    sortableTables();
    citationCards();
    headerButtons();
    openTarget();
    focusableScrollers();
  }

  start(); // the script stands at the end of the body, so the article is there: formulas appear with the first paint
  window.document$?.subscribe(start);
  addEventListener("hashchange", openTarget);
  addEventListener("resize", focusableScrollers);
  addEventListener("toggle", focusableScrollers, true);
})();
