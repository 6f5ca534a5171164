"""`python -m searche1_lite`: the command line."""

from searche1_lite.cli.main import main

if __name__ == "__main__":
    main()
