"""`python -m cmtool` is the `cmtool` command."""

from cmtool.cli.app import main

if __name__ == "__main__":
    main()
