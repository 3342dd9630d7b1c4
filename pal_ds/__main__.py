"""`python -m pal_ds COMMAND`."""

from pal_ds.cli import main

if __name__ == "__main__":
    main()
