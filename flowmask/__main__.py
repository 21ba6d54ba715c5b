"""`python -m flowmask` is `flowmask`."""

from flowmask.launch.cli.main import main

if __name__ == "__main__":
    main()
