"""`python -m ftdpp` is `ftd`."""

from ftdpp.ftd import main

main()
