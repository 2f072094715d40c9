"""The programs: each module has a `main`, a console script and a shell of its name in tools/."""
