"""`python -m zqfp_convert`."""

from zqfp_convert.cli.main import main

if __name__ == "__main__":
    main()
