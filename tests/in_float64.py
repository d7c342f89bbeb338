"""main_moco.py with every weight and activation in float64: what rounding can't blur.

A single ReLU whose input changes sign by rounding moves an fp32 gradient by 1e-3 or so.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import main_moco
import moco.augment
from moco import cli

if __name__ == "__main__":
    create_model, augment = main_moco.create_model, main_moco.augment
    main_moco.create_model = lambda *args: create_model(*args).double()
    main_moco.augment = moco.augment.augment = lambda *args: augment(*args).double()
    cli.run(main_moco.main, main_moco.parse_args)
