"""`python -m weldment`: the `weld` command."""

from __future__ import annotations

from weldment.cli import main

if __name__ == "__main__":
    main()
