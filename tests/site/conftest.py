"""The built site, a browser, and a page in it, for the browser tests; a small site for those of the hooks."""

import pytest

from tests.site import browser as shared
from tests.site.trial import Project


@pytest.fixture(scope="session")
def site(tmp_path_factory, request):
    """The site, built strictly once for all workers, and served."""
    base = tmp_path_factory.getbasetemp()
    folder, seconds = shared.build(base.parent if hasattr(request.config, "workerinput") else base)
    served = shared.Site(folder, seconds)
    yield served
    served.close()


@pytest.fixture(scope="session")
def chrome():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=shared.executable(), args=shared.FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def context(chrome, site):
    """Make a browser context: context(), or with Playwright's own settings."""
    made = []

    def make(**settings):
        settings = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | settings
        made.append(chrome.new_context(base_url=site.url, **settings))
        made[-1].set_default_timeout(10_000)
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def page(context):
    """A page on a desktop, in light colours."""
    return context(permissions=["clipboard-read", "clipboard-write"]).new_page()


@pytest.fixture
def project(tmp_path, caplog):
    """A site in a folder of its own, for trying the hooks on."""
    return Project(tmp_path, caplog)
