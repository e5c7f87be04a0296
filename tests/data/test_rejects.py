import json

import pytest

from recsys_lightning.data.rejects import RejectLog
from recsys_lightning.errors import InputError


def log_of(kept: int, rejected: int) -> RejectLog:
    log = RejectLog()
    log.read("a.json", kept + rejected)
    log.keep("a.json", kept)
    for line in range(1, rejected + 1):
        log.reject("a.json", line, "no asin" if line % 3 else "blank line", f"line {line}")
    return log


def test_every_row_is_kept_or_rejected_by_a_reason() -> None:
    log = log_of(kept=90, rejected=10)
    assert log.rows_read("a.json") == log.rows_kept("a.json") + sum(log.reasons("a.json").values()) == 100
    assert log.reasons("a.json") == {"no asin": 7, "blank line": 3}


def test_a_lost_row_is_found() -> None:
    log = log_of(kept=9, rejected=0)
    log.read("a.json")
    with pytest.raises(RuntimeError, match="10 rows read, but 9 kept and 0 rejected"):
        log.check(1.0)


def test_only_the_first_five_examples_are_remembered() -> None:
    log = log_of(kept=0, rejected=10)
    assert log.examples("a.json") == [
        "a.json:1: no asin line 1",
        "a.json:2: no asin line 2",
        "a.json:3: blank line line 3",
        "a.json:4: no asin line 4",
        "a.json:5: no asin line 5",
    ]


def test_the_limit_itself_is_allowed_and_one_row_more_is_not() -> None:
    log_of(kept=999, rejected=1).check(0.001)
    with pytest.raises(InputError, match="2 of 1,000 rows"):
        log_of(kept=998, rejected=2).check(0.001)


def test_a_good_file_does_not_excuse_a_bad_one() -> None:
    log = log_of(kept=1, rejected=1)
    log.read("b.json", 1_000_000)
    log.keep("b.json", 1_000_000)
    with pytest.raises(InputError, match=r"^a\.json"):
        log.check(0.001)


def test_the_refusal_says_what_where_and_the_cure_in_one_line() -> None:
    with pytest.raises(InputError) as refusal:
        log_of(kept=7, rejected=3).check(0.001)
    assert str(refusal.value) == (
        "a.json: 3 of 10 rows (30.0000%) cannot be used, the limit is 0.1000% (no asin: 2, blank line: 1); first: "
        "a.json:1: no asin line 1; a.json:2: no asin line 2; a.json:3: blank line line 3; "
        "mend the file, or raise max_rejected of the source to at least 0.3"
    )


def test_the_limit_that_the_refusal_proposes_is_high_enough() -> None:
    for rejected in range(1, 60):
        log = log_of(kept=100_000, rejected=rejected)
        with pytest.raises(InputError) as refusal:
            log.check(0.0)
        log.check(float(str(refusal.value).rsplit(" ", 1)[1]))


def test_an_empty_log_passes() -> None:
    RejectLog().check(0.0)


def test_the_account_survives_json() -> None:
    log = log_of(kept=90, rejected=10)
    log.read("clean.json", 3)
    log.keep("clean.json", 3)
    again = RejectLog.from_dict(json.loads(json.dumps(log.to_dict())))
    assert again == log
    assert again.examples("a.json") == log.examples("a.json")
    assert again.rows_rejected() == 10
    assert again.files == ["a.json", "clean.json"]
