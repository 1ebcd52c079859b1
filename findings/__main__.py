"""``python -m findings``: see :mod:`findings.command`."""

from findings.command import main

if __name__ == "__main__":
    main()
