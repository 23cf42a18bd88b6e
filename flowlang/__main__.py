"""`python -m flowlang`."""

from flowlang.cli import main

if __name__ == "__main__":
    main()
