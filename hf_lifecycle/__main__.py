"""``python -m hf_lifecycle``: the command line."""

from __future__ import annotations

from hf_lifecycle.cli.app import main

if __name__ == "__main__":
    main()
