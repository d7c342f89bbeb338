"""main_moco.py with all weights and activations in float64, where rounding hides nothing.

In fp32 a single ReLU whose input changes sign by rounding moves a gradient by 1e-3 or so.
"""

import main_moco
from engine import cli
from moco import augmentation

if __name__ == "__main__":
    create_model, augment = main_moco.create_model, augmentation.augment
    main_moco.create_model = lambda *args: create_model(*args).double()
    main_moco.augment = augmentation.augment = lambda *args: augment(*args).double()
    cli.run_script(main_moco.main, main_moco.parse_args)
