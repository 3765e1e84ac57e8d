"""`python -m phi3edge`."""

from phi3edge.cli.app import main

main()
