"""The numbers of the README are those that benchmarks have written."""

from __future__ import annotations

from benchmarks.readme import README, TABLES, replace_tables


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    """Each table stands between its markers as it is made from `benchmarks/results`."""
    text = README.read_text("utf-8")
    assert all(f"<!-- {name}-table -->" in text for name in TABLES)
    assert replace_tables(text) == text
