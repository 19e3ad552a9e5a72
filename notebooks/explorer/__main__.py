"""``python -m notebooks.explorer [results ...]`` writes explorer.html."""

import sys

from notebooks.explorer.page import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
