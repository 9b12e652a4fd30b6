# SPDX-License-Identifier: Apache-2.0
"""Reports say what holds, what does not, and never more."""

from __future__ import annotations

import json

import pytest

from depriv.report import SHOWN, AuditReport, Check, Grant, printable

GOOD = Check(id="ids.uid", want="400007", have="400007", holds=True)
BAD = Check(id="root.readonly", want="read-only", have="writable: /", holds=False)


def test_a_report_holds_when_every_check_does() -> None:
    assert AuditReport(domain="web1", pid=7, checks=(GOOD, GOOD)).holds


def test_one_check_that_fails_fails_the_report() -> None:
    assert not AuditReport(domain="web1", pid=7, checks=(GOOD, BAD, GOOD)).holds


def test_a_report_without_a_check_does_not_hold() -> None:
    assert not AuditReport(domain="web1", pid=7, checks=()).holds


def test_the_text_marks_what_fails_and_counts_what_holds() -> None:
    assert AuditReport(domain="web1", pid=7, checks=(GOOD, BAD)).to_text().split("\n") == [
        "ok    ids.uid        400007",
        "FAIL  root.readonly  writable: / (want read-only)",
        "1 of 2 hold",
    ]


def test_the_text_of_an_empty_report_is_its_count() -> None:
    assert AuditReport(domain="", pid=7, checks=()).to_text() == "0 of 0 hold"


def test_the_json_holds_all_there_is() -> None:
    report = AuditReport(domain="web1", pid=7, checks=(BAD,))
    assert json.loads(json.dumps(report.to_json())) == {
        "domain": "web1",
        "pid": 7,
        "holds": False,
        "checks": [{"id": "root.readonly", "want": "read-only", "have": "writable: /", "holds": False}],
    }


@pytest.mark.parametrize(("kind", "access"), [("directory", "ro"), ("file", "path"), ("file", ""), ("", "rw")])
def test_a_grant_of_what_is_never_granted_is_refused(kind: str, access: str) -> None:
    with pytest.raises(ValueError, match="grant disk0"):
        Grant(role="disk0", kind=kind, dev=1, ino=2, access=access)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/vm/größe.img", "/srv/vm/größe.img"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nok    ids.uid", "a\\nok    ids.uid"),
        ("a\u202eb", "a\\u202eb"),
        ("\udcff", "\\udcff"),
        ("\x9b", "\\x9b"),
    ],
)
def test_foreign_text_is_shown_without_anything_a_terminal_would_obey(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_foreign_text_is_cut() -> None:
    assert printable("x" * 5000) == "x" * SHOWN + "..."
