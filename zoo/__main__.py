"""`python -m zoo` is `moe-zoo`."""

from zoo.cli import main

main()
