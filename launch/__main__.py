"""`python -m launch` is `flowmask`."""

from launch.cli import main

main()
