"""`python -m strokenet` is the same as `strokenet`."""

from strokenet.cli import main

if __name__ == "__main__":
    main()
