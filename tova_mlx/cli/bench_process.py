"""A process of `tova-mlx bench`: one setting reads, and says what it finds.

A job comes from stdin as JSON; lines of JSON go to stdout, numbers of tokens read and
objects. Peak memory is that of this process alone.
"""

import json
import sys
from contextlib import redirect_stdout


def main() -> None:
    given, out = json.load(sys.stdin), sys.stdout
    # Whatever else is printed shall not come between.
    with redirect_stdout(sys.stderr):
        from ..benchmark.decoding import wired
        from ..benchmark.reading import Job, read_contexts
        from .models import load

        def say(what: object) -> None:
            print(json.dumps(what), file=out, flush=True)

        model, *_ = load(given["path"])
        with wired(model):
            for found in read_contexts(model, Job.of(given["job"]), say):
                say(found.to_dict())


if __name__ == "__main__":
    main()
