"""What must hold on every page of the site: nothing goes wrong on it, it asks no other host, it fits a phone, its
formulas are rendered, axe finds nothing in light or dark, and it is light enough. `make evidence SNIPPET=site/site`
looks at all of this on all pages; `make test` leaves out most pages of source, and axe on two pages of three."""

import re
from collections import Counter

import pytest

from tests.site.browser import Watch, axe, thin

SHARDS = 4  # so that the two test processes share the work
HOME_KB, PAGE_KB, BUILD_S = 350, 500, 30  # kilobytes as a server sends them, compressed; seconds

INSPECT = """() => {
    const text = document.querySelector("#__article").cloneNode(true);
    text.querySelectorAll("pre, code, .arithmatex, annotation").forEach(e => e.remove());
    const nameless = [...document.querySelectorAll("#__article :is(img, figure svg, svg[role=img])")].filter(e => {
        const label = e.getAttribute("aria-labelledby");
        const name = e.alt || e.getAttribute("aria-label") || (label && document.getElementById(label)?.textContent);
        return !name?.trim() && !e.closest("[aria-hidden=true]");
    });
    return {
        title: document.title,
        description: document.querySelector("meta[name=description]")?.content ?? "",
        h1: document.querySelectorAll("h1").length,
        nameless: nameless.map(e => e.outerHTML.slice(0, 80)),
        raw: (text.textContent.match(/\\$\\$|\\\\\\(|\\\\\\[|<!-- |--8<--|\\[@\\w+/g) || []),
        broken: [...document.querySelectorAll(".katex-error")].map(e => e.title || e.textContent),
        unrendered: [...document.querySelectorAll(".arithmatex")].filter(e => !e.querySelector(".katex")).length,
    };
}"""


def inspect(page, site, url: str, full: bool, axed: bool) -> list[str]:
    """All that is wrong with one page, one line each; what axe finds only where it is asked."""
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")
    watch = Watch(page, site)
    page.goto(url)
    told = page.evaluate(INSPECT)
    wrong = [f"{told['h1']} level 1 headings"] if told["h1"] != 1 else []
    wrong += ["no description"] if len(told["description"]) < 20 else []
    wrong += [f"no text alternative: {html}" for html in told["nameless"]]
    wrong += [f"raw text: {text}" for text in told["raw"]]
    wrong += [f"formula: {text}" for text in told["broken"]]
    wrong += [f"{told['unrendered']} formulas are not rendered"] if told["unrendered"] else []
    page.evaluate("document.querySelectorAll('details').forEach(e => (e.open = true))")
    page.set_viewport_size({"width": 390, "height": 844})
    if (over := page.evaluate("document.documentElement.scrollWidth - innerWidth")) > 0:
        wrong.append(f"{over} px wider than a phone")
    page.set_viewport_size({"width": 1280, "height": 900})
    if axed:
        if not full:
            thin(page)
        wrong += [f"light: {line}" for line in axe(page)]
        page.emulate_media(color_scheme="dark")
        page.wait_for_function("document.body.dataset.mdColorScheme === 'slate'")
        wrong += [f"dark: {line}" for line in axe(page, only_colours=True)]
    most = HOME_KB if url == "/" else PAGE_KB
    if watch.weight > most * 1000:
        wrong.append(f"{watch.weight / 1000:.0f} KB, {most} at most")
    return [f"{url}: {line}" for line in wrong + watch.wrong]


@pytest.mark.evidence("site/site")
@pytest.mark.parametrize("shard", range(SHARDS))
def test_nothing_is_wrong_on_any_page(context, site, evidence, shard):
    if evidence.full and shard:
        pytest.skip("the first part looks at all pages when evidence is written")
    sources = sorted(set(site.pages) - set(site.written))  # all drawn alike: a sample will do between two measurements
    pages = site.pages if evidence.full else [*site.written, *sources[::8]][shard::SHARDS]
    assert len(site.written) > 20 and len(sources) > 20
    wrong, browser = [], context()
    for index, url in enumerate(pages):
        page = browser.new_page()
        axed = evidence.full or index % 3 == 0  # axe takes more than half of the time
        wrong += inspect(page, site, url, evidence.full, axed)
        page.close()
    assert not wrong, "\n".join(["", *wrong])
    if evidence.full:
        about = f"{len(pages)} pages: requests, console, formulas, phone width, axe (WCAG 2 A and AA) in light and dark"
        evidence("site/site", "problems on any page", value=len(wrong), bar=0, better="==", note=about)


def test_every_page_has_a_title_and_a_description_of_its_own(site):
    told = {url: site.file(url).read_text(encoding="utf-8") for url in site.pages}
    for pattern in (r"<title>(.*?)</title>", r'<meta name="description" content="(.*?)">'):
        found = {url: re.search(pattern, html, re.S) for url, html in told.items()}
        assert not [url for url, match in found.items() if not match]
        shared = [text for text, count in Counter(match[1] for match in found.values()).items() if count > 1]
        assert not shared


@pytest.mark.evidence("site/site")
def test_pages_are_light(context, site, evidence):
    weights, browser = {}, context()
    for url in site.written if evidence.full else ["/", "/rlhf/grpo/", "/interview/ppo-rlhf/", "/library/rlhf/"]:
        page = browser.new_page()
        watch = Watch(page, site)
        page.goto(url)
        page.wait_for_load_state("networkidle")
        weights[url] = watch.weight / 1000
        page.close()
    heaviest = max(weights, key=weights.get)
    evidence("site/site", "home, compressed", value=round(weights["/"]), bar=HOME_KB, unit="KB")
    name, note = "heaviest page, compressed", f"the heaviest is {heaviest}"
    evidence("site/site", name, value=round(weights[heaviest]), bar=PAGE_KB, unit="KB", note=note)


@pytest.mark.evidence("site/site")
def test_the_strict_build_is_quick(site, evidence):
    if not evidence.full or not site.seconds:
        pytest.skip("a time is measured under --evidence only, and where the site was not built before")
    evidence("site/site", "strict build", value=round(site.seconds, 1), bar=BUILD_S, unit="s")
