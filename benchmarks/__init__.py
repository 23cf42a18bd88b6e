"""Scripts behind the tables of the README. Each prints a table and writes JSON."""
