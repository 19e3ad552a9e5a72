"""``python -m notebooks.report results/<device>`` writes report.html."""

import sys

from notebooks.report.page import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
