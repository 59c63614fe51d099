"""`python -m maveriq` is the `maveriq` command."""

from maveriq.cli.start import main

main()
