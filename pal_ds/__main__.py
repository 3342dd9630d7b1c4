"""`python -m pal_ds COMMAND`."""

from pal_ds.cli.main import console

if __name__ == "__main__":
    console()
