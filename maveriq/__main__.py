"""`python -m maveriq` is the `maveriq` command."""

from maveriq.cli.app import main

main()
