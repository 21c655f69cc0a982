"""What a reader does on the site, in a real browser: search, copy, follow a citation, filter, change colours, use a
phone or only a keyboard."""

import re

import pytest

from tests.site.browser import ROOT, Watch

ALGORITHMS = ["/rlhf/ppo/", "/rlhf/grpo/", "/preferences/dpo/", "/reasoning/mcts/"]
TOPICS = {path.stem for path in (ROOT / "docs/interview").glob("*.md")} - {"index", "pitfalls"}
INTERVIEWS = sorted(f"/interview/{topic}/" for topic in TOPICS)
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"
VISIBLE = "elements => elements.filter(e => e.checkVisibility()).length"


# --- home -----------------------------------------------------------------------------------------------------------


def test_home_shows_in_one_screen_what_this_is_and_what_is_proven(context):
    page = context(viewport={"width": 1440, "height": 900}).new_page()
    page.goto("/")
    for part in (".hero h1", ".cards:not(.four) > :last-child", "dl.proven", ".cards.four > :last-child"):
        assert page.locator(part).evaluate("e => e.getBoundingClientRect().bottom") <= 900, part
    counts = [int(text) for text in page.locator("dl.proven dd").all_inner_texts()]
    assert len(counts) == 5 and all(counts)
    assert all(re.search(r"\d", text) for text in page.locator(".cards.four .measured b").all_inner_texts())
    for card in page.locator(".cards > * a[href]").all():
        assert page.request.get(card.evaluate("a => a.href")).ok


# --- search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "leads_to"), [("grpo", "/rlhf/grpo/"), ("强化学习", "/library/")])
def test_search_finds_a_page_and_goes_there(page, site, words, leads_to):
    watch = Watch(page, site)
    page.goto("/")
    page.keyboard.press("s")
    page.keyboard.type(words)
    first = page.locator(f".md-search-result__link[href*='{leads_to}']").first
    first.wait_for()
    first.click()
    page.wait_for_url(f"**{leads_to}**")
    page.locator("#__article h1").wait_for()
    assert not watch.wrong


# --- code -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ALGORITHMS)
def test_the_copy_button_copies_exactly_the_tested_source(page, url):
    import embed

    markdown = (ROOT / "docs" / f"{url.strip('/')}.md").read_text(encoding="utf-8")
    wanted = [embed.extract(ROOT / path, names) for _, path, names in embed.embeds(markdown) if path]
    page.goto(url)
    page.evaluate("document.querySelectorAll('details').forEach(e => (e.open = true))")
    blocks = page.locator("#__article .highlight[id^='code-']")
    assert blocks.count() == len(wanted) > 0
    for index, source in enumerate(wanted):
        block = blocks.nth(index)
        block.hover()
        block.locator("button.md-clipboard, button[data-clipboard-target], .md-code__button").first.click()
        page.wait_for_function("text => navigator.clipboard.readText().then(t => t.trim() === text.trim())", arg=source)
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied.rstrip("\n") == source.rstrip("\n")
        compile(copied, "pasted", "exec")


def test_what_code_needs_is_folded_and_copied_along(page):
    page.goto(ALGORITHMS[0])
    block = page.locator("#__article .highlight:has(.embed-fold)").first
    needed, button = block.locator(".embed-needed").first, block.locator(".embed-fold")
    assert not needed.is_visible() and block.locator("code").is_visible()
    for press in (button.click, lambda: button.press("Enter"), lambda: button.press("Space")):
        before = needed.is_visible()
        press()
        assert needed.is_visible() is not before
        assert button.get_attribute("aria-expanded") == str(not before).lower()
    button.click()
    block.locator(".md-code__button").first.click()
    page.wait_for_function("navigator.clipboard.readText().then(t => t.startsWith('import') || t.startsWith('from'))")
    assert not needed.is_visible()  # copying leaves it as it was


def test_without_javascript_all_code_is_there(context):
    page = context(java_script_enabled=False).new_page()
    page.goto(ALGORITHMS[0])
    assert page.locator(".embed-needed").first.is_visible()


@pytest.mark.parametrize("url", ALGORITHMS)
def test_embedded_code_leads_to_its_file_and_its_download(page, url):
    page.goto(url)
    note = page.locator(".embed-note").first
    path = note.locator(".embed-file").inner_text()
    with page.expect_download() as download:
        note.locator(".embed-download").click()
    assert download.value.path().read_bytes() == (ROOT / path).read_bytes()
    note.locator(".embed-file").click()
    page.wait_for_url(f"**/{path.removesuffix('.py')}/**")
    assert page.locator("h1").inner_text().startswith(path)


# --- citations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ALGORITHMS)
def test_a_citation_shows_its_reference_and_leads_there_and_back(page, url):
    page.goto(url)
    cite = page.locator(".cites a").first
    target, back = cite.get_attribute("href"), cite.get_attribute("id")
    reference = page.locator(f"[id='{target[1:]}']")
    title = reference.locator("a").first.inner_text()
    card = page.locator(".citation-card")
    assert card.is_hidden()
    cite.hover()
    assert title in card.inner_text()
    page.mouse.move(0, 0)
    assert card.is_hidden()
    cite.focus()
    assert title in card.inner_text()
    page.keyboard.press("Escape")
    assert card.is_hidden()
    cite.click()
    assert page.url.endswith(target)
    reference.evaluate("e => new Promise(requestAnimationFrame)")
    in_view = "e => { const box = e.getBoundingClientRect(); return box.top >= 0 && box.bottom <= innerHeight }"
    assert reference.evaluate(in_view)
    reference.locator(f".ref-back[href='#{back}']").click()
    assert page.url.endswith(f"#{back}")
    assert cite.evaluate(in_view)


# --- library --------------------------------------------------------------------------------------------------------


def test_the_library_filters_by_language_and_type_without_a_reload(page):
    page.goto("/library/rlhf/")
    page.evaluate("window.same = true")
    entries, count = page.locator(".lib-entry"), page.locator("output.lib-count")
    total = entries.count()

    def shown(**wanted) -> int:
        seen = entries.evaluate_all("all => all.filter(e => e.checkVisibility()).map(e => ({...e.dataset}))")
        assert all(entry[name] == value for entry in seen for name, value in wanted.items())
        assert count.inner_text() == f"{len(seen)} of {total} shown"
        return len(seen)

    assert shown() == total > 10
    page.get_by_label("Papers").check()
    papers = shown(type="paper")
    assert 0 < papers < total and page.url.endswith("?type=paper")
    assert page.locator(".lib-group:not([data-type=paper]) h3").evaluate_all(VISIBLE) == 0
    page.locator("input[name=lang][value=en]").check()
    assert shown(type="paper", lang="en") <= papers
    page.reload()
    assert page.evaluate("window.same") is None
    assert 0 < shown(type="paper", lang="en") <= papers
    page.evaluate("window.same = true")
    page.get_by_label("Papers").uncheck()
    page.locator("input[name=lang][value=en]").uncheck()
    page.locator("input[name=lang][value=zh]").check()
    assert 0 < shown(lang="zh") < total and page.url.endswith("?lang=zh")
    assert page.evaluate("window.same")


# --- evidence -------------------------------------------------------------------------------------------------------


def test_the_evidence_table_sorts_by_each_column(page):
    page.goto("/evidence/")
    table = page.locator("table.sortable")
    heads = table.locator("thead th")
    assert table.locator("tbody tr").count() > 1
    for column in range(heads.count()):
        order = []
        for direction in ("ascending", "descending"):
            heads.nth(column).locator("button").click()
            assert heads.nth(column).get_attribute("aria-sort") == direction
            cells = table.locator(f"tbody tr td:nth-child({column + 1})")
            keys = cells.evaluate_all("all => all.map(e => e.dataset.sort ?? e.textContent.trim())")
            order.append([float(key) for key in keys if re.fullmatch(NUMBER, key)])
        assert order[0] == sorted(order[0]) and order[1] == sorted(order[1], reverse=True)
    assert table.locator("[aria-sort]").count() == 1


# --- faces, colours, phone, keyboard --------------------------------------------------------------------------------


def test_the_text_is_set_in_the_faces_of_the_site(page):
    """A style sheet can name a face that the browser does not use: ask what it drew the glyphs with."""
    page.goto("/rlhf/grpo/")
    page.evaluate("document.fonts.ready")
    session = page.context.new_cdp_session(page)
    session.send("DOM.enable")
    session.send("CSS.enable")
    root = session.send("DOM.getDocument")["root"]["nodeId"]
    wanted = {
        "h1": "Source Serif",
        "#__article p": "Source Serif",
        ".md-tabs__link": "Inter",
        "pre code": "JetBrains Mono",
    }
    for selector, face in wanted.items():
        node = session.send("DOM.querySelector", {"nodeId": root, "selector": selector})["nodeId"]
        fonts = session.send("CSS.getPlatformFontsForNode", {"nodeId": node})["fonts"]
        most = max(fonts, key=lambda font: font["glyphCount"])
        assert most["isCustomFont"] and most["familyName"].startswith(face), (selector, fonts)


def test_the_choice_of_dark_colours_lasts(page):
    scheme = "document.body.dataset.mdColorScheme"
    page.goto("/")
    assert page.evaluate(scheme) == "default"
    seen = []
    for _ in range(3):
        page.locator("form[data-md-component=palette] label:visible").click()
        seen.append(page.evaluate(scheme))
        if seen[-1] == "slate":
            break
    assert seen[-1] == "slate"
    page.reload()
    assert page.evaluate(scheme) == "slate"
    page.goto("/library/")
    assert page.evaluate(scheme) == "slate"


def test_dark_colours_follow_the_system(context):
    page = context(color_scheme="dark").new_page()
    page.goto("/")
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"


def test_the_menu_opens_on_a_phone(context):
    page = context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).new_page()
    page.goto("/rlhf/grpo/")
    menu = page.locator(".md-sidebar--primary")
    outside = "menu => menu.getBoundingClientRect().right <= 0"
    assert menu.evaluate(outside)
    page.locator("label.md-header__button[for=__drawer]").tap()
    assert not menu.evaluate(outside)
    back = menu.locator(".md-nav__item--active > nav > label[for^=__nav]")
    for level in reversed(range(back.count())):  # from this section, and those around it, back to all of them
        back.nth(level).tap()
    menu.locator("label.md-nav__link:has-text('Preferences')").tap()
    menu.locator("a[href$='preferences/dpo/']").tap()
    page.wait_for_url("**/preferences/dpo/")


def test_the_header_of_a_phone_works_by_keyboard(context):
    page = context(viewport={"width": 390, "height": 844}).new_page()
    page.goto("/rlhf/grpo/")
    page.get_by_role("button", name="Menu").press("Enter")
    assert page.locator("#__drawer").is_checked()
    page.keyboard.press("Escape")
    page.goto("/rlhf/grpo/")
    page.get_by_role("button", name="Search").press("Enter")
    page.wait_for_function("document.activeElement.matches('.md-search__input')")


def test_the_skip_link_comes_first_and_leads_into_the_article(page):
    page.goto("/rlhf/grpo/")
    page.keyboard.press("Tab")
    link = page.locator(".skip-link")
    assert link.evaluate("e => e === document.activeElement && e.getBoundingClientRect().top >= 0")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#__article') !== null")


@pytest.mark.parametrize("url", ["/", "/rlhf/grpo/", "/library/rlhf/", "/interview/grpo/"])
def test_what_has_the_focus_can_be_seen(page, url):
    page.goto(url)
    unseen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        state = page.evaluate(
            """() => {
                const e = document.activeElement, at = e.matches("input.md-option") ? e.nextElementSibling : e;
                if (e === document.body) return null;
                const box = at.getBoundingClientRect(), style = getComputedStyle(at);
                const pill = at.closest("label") ? getComputedStyle(at.closest("label")) : style;
                const ring = [style, pill].some(s => s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 1);
                const edge = e.matches(".md-search__input");  // its whole form changes colour and opens
                return {name: at.outerHTML.slice(0, 120), ok: (ring || edge) && box.width > 0 && box.bottom > 0};
            }"""
        )
        if state and not state["ok"]:
            unseen.append(state["name"])
    assert not unseen


# --- interview ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", INTERVIEWS)
def test_answers_are_closed_and_open_by_click_key_and_link(page, url):
    page.goto(url)
    answers = page.locator("details.question")
    total = answers.count()
    assert total > 0 and page.locator("details.question[open]").count() == 0
    assert page.locator(".md-content :is(h2, h3):has(+ details.question)").count() == total
    assert page.locator("details.question > :not(summary)").evaluate_all(VISIBLE) == 0
    answers.first.locator("summary").click()
    assert answers.first.locator("p").first.is_visible()
    answers.nth(1).locator("summary").focus()
    page.keyboard.press("Enter")
    assert answers.nth(1).locator("p").first.is_visible()
    anchor = page.locator(".md-content :is(h2, h3):has(+ details.question)").last.get_attribute("id")
    page.goto("/")
    page.goto(f"{url}#{anchor}")
    assert answers.last.locator("p").first.is_visible()
    assert page.locator("details.question[open]").count() == 1


# --- without JavaScript, and nowhere --------------------------------------------------------------------------------


def test_everything_reads_without_javascript(context):
    page = context(java_script_enabled=False).new_page()
    page.goto("/rlhf/grpo/")
    assert page.locator("h1").is_visible()
    assert page.locator(".highlight pre").first.is_visible()
    formula = page.locator(".arithmatex").first
    assert formula.is_visible() and formula.inner_text().startswith("\\")
    assert page.locator(".references li").first.is_visible()
    assert page.locator(".cites a").first.get_attribute("title")
    page.goto("/library/rlhf/")
    assert page.locator("form.lib-filter").is_hidden()
    entries = page.locator(".lib-entry")
    assert entries.count() > 10 and all(entry.is_visible() for entry in entries.all())
    page.goto(INTERVIEWS[0])
    answer = page.locator("details.question").first
    answer.locator("summary").click()
    assert answer.locator("p").first.is_visible()


@pytest.mark.parametrize("url", ["/nowhere/", "/rlhf/nowhere/at/all"])
def test_a_wrong_address_gets_a_page_that_asks_for_nothing_that_is_not_there(page, site, url):
    watch = Watch(page, site)
    assert page.goto(url).status == 404
    assert page.locator("h1").inner_text() == "This page is not here"
    page.wait_for_load_state("networkidle")
    mine = [f"404 for {site.url}{url}"]  # Chrome also says this in its console, about the page itself
    rest = [line for line in watch.wrong if "Failed to load resource" not in line]
    assert rest == mine and len(watch.wrong) - len(rest) <= 1
    page.locator("#__article a", has_text="Library").click()
    page.wait_for_url("**/library/")
