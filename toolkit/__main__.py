"""`python -m toolkit` is `phiship`."""

from toolkit.cli import main

if __name__ == "__main__":
    main()
