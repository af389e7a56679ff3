"""Entry point of `python -m darwinlm`."""

from darwinlm.cli import main

if __name__ == "__main__":
    main()
