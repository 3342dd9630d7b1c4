"""`python -m MODULE WORDS...` in another directory: `FOLDER MODULE [WORDS...]`."""

import os
import runpy
import sys

if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    os.chdir(folder)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
