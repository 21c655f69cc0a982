"""references.bib: whole entries, no doubles, and all that the library promises to hold."""

import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

import bibliography  # hooks/, on the path by conftest.py

ROOT = Path(__file__).resolve().parents[2]
LINKS = (Path(__file__).parent / "links.txt").read_text(encoding="utf-8").split()


@pytest.fixture(scope="module")
def bib():
    return bibliography.read(ROOT / "references.bib")


def doubles(values):
    return sorted(value for value, count in Counter(values).items() if value and count > 1)


def test_every_entry_is_sound(bib):
    """Fields, keywords, keys, addresses, glosses: the same check that stops a build."""
    entries, problems = bib
    assert not problems
    assert entries


def test_every_link_of_the_sources_has_an_entry(bib):
    text = (ROOT / "references.bib").read_text(encoding="utf-8")
    have = {bibliography.canonical(url) for url in re.findall(r'https?://[^\s},"]+', text)}
    have |= {f"arxiv:{entry.get('eprint')}" for entry in bib[0].values()}
    assert len(LINKS) == len(set(LINKS)) == 86
    missing = [url for url in LINKS if bibliography.canonical(url.replace("\\", "")) not in have]
    assert not missing


def test_at_least_85_papers(bib):
    papers = [key for key, entry in bib[0].items() if entry.type == "paper"]
    assert len(papers) >= 85


def test_no_work_has_two_entries(bib):
    """Not two keys for one address, arXiv number, DOI or title: the versions of a paper are one entry."""
    entries = bib[0].values()

    def plain(title):
        return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", title).casefold())

    assert not doubles(bibliography.canonical(entry.url) for entry in entries)
    assert not doubles(entry.get("eprint") for entry in entries)
    assert not doubles(entry.get("doi").lower() for entry in entries)
    assert not doubles(plain(entry.get("title")) for entry in entries if entry.type == "paper")


def test_arxiv_numbers_name_the_work_not_a_version(bib):
    for key, entry in bib[0].items():
        number = entry.get("eprint")
        assert not number or re.fullmatch(r"\d{4}\.\d{4,5}", number), f"{key}: eprint {number}"
        assert not re.search(r"arxiv\.org/\S*\d{4}\.\d{4,5}v\d", entry.get("url")), f"{key}: {entry.get('url')}"


def test_keys_carry_the_year_of_the_first_arxiv_version(bib):
    wrong = [
        key
        for key, entry in bib[0].items()
        if entry.type == "paper" and entry.get("eprint") and f"20{entry.get('eprint')[:2]}" not in key
    ]
    assert not wrong


def test_annotations_say_something_in_one_or_two_sentences(bib):
    for key, entry in bib[0].items():
        words = entry.get("annotation").split()
        assert 5 <= len(words) <= 70, f"{key}: {len(words)} words"


def test_chinese_titles_are_glossed_in_english(bib):
    for key, entry in bib[0].items():
        if re.search(r"[\u4e00-\u9fff]", entry.get("title")):
            assert entry.lang == "zh", f"{key}: a Chinese title, but langid {entry.get('langid')}"
            assert entry.gloss and not re.search(r"[\u4e00-\u9fff]", entry.gloss), f"{key}: no English gloss"
