"""What `scripts/demo` runs: `trimtab chat --compare --once QUESTION`, with the question as its last argument."""

import sys

from trimtab.cli import main

if __name__ == "__main__":
    *options, question = sys.argv[1:]
    sys.exit(main(["chat", "--compare", *options, f"--once={question}"]))
