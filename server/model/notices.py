"""What is said while a model is made ready, which takes a while: to the log where one is set up, else on stderr."""

import logging
import sys

log = logging.getLogger(__name__)


def tell(words: str) -> None:
    """Say so."""
    if logging.getLogger().handlers:
        log.info("%s", words)
    else:
        print(words, file=sys.stderr, flush=True)
