"""The home hook: numbers that are counted in the files, and measured values in the page's words."""

import json

import pytest

import home

CHECK = {"check": "KL to it", "value": 0.00412, "bar": 0.01, "better": "<=", "unit": "nats", "seeds": [0, 1, 2]}


def test_what_there_is_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(home.BIB, "entries", {})
    for path, text in {
        "docs/evidence/rlhf/a.json": json.dumps({"checks": [CHECK, CHECK | {"bar": None}, CHECK | {"value": 1.0}]}),
        "docs/interview/a.md": "# Why?\n\n## Why? { #why }\n\n### How so?\n\n## No question\n",
        "docs/interview/a.zh.md": "## 为什么？\n",
        "snippets/rlhf/__init__.py": "",
        "snippets/rlhf/a.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    assert home.counts(tmp_path) == {"checks": 1, "snippets": 1, "questions": 2, "papers": 0, "links": 0}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "<b>0.00412 nats</b> from it (bar ≤ 0.01 nats, 3 seeds)"),
        ({"bar": None, "seeds": [0]}, "<b>0.00412 nats</b> from it"),
        ({"value": 0.654, "bar": None, "unit": "share"}, "<b>65%</b> from it (3 seeds)"),
    ],
)
def test_a_measured_value_comes_with_its_bar_and_its_seeds(change, text):
    assert home.line(CHECK | change, "from it") == text
