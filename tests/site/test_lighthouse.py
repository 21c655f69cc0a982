"""Lighthouse on a page of each kind. It takes minutes and npm: only `make evidence SNIPPET=site/lighthouse` runs it."""

import shutil

import pytest

from tests.site import browser

PAGES = ["/", "/rlhf/grpo/", "/library/rlhf/", "/interview/grpo/"]
RUNS = 3  # the score of performance moves with the machine: the median counts


@pytest.mark.evidence("site/lighthouse")
def test_lighthouse_gives_at_least_95_of_100(site, evidence, tmp_path_factory):
    if not evidence.full:
        pytest.skip("runs under make evidence SNIPPET=site/lighthouse")
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    from benchmarks.lighthouse import CATEGORIES, install, scores

    programs = install(tmp_path_factory.mktemp("lighthouse"))
    found = {page: [scores(site.url + page, programs, browser.executable()) for _ in range(RUNS)] for page in PAGES}
    for name in CATEGORIES:
        medians = {page: sorted(run[name] for run in runs)[RUNS // 2] for page, runs in found.items()}
        note = f"the lowest of {len(PAGES)} pages, each the median of {RUNS} runs: " + ", ".join(
            f"{page} {score}" for page, score in medians.items()
        )
        check = f"Lighthouse 13.5.0, desktop: {name}"
        evidence("site/lighthouse", check, value=min(medians.values()), bar=95, better=">=", unit="of 100", note=note)
