"""main_moco.py with all weights and activations in float64, where rounding hides nothing.

In fp32 a single ReLU whose input changes sign by rounding moves a gradient by 1e-3 or so.
"""

import main_moco
from engine import cli

if __name__ == "__main__":
    create_model, make_views = main_moco.create_model, main_moco.make_views
    main_moco.create_model = lambda *args: create_model(*args).double()
    main_moco.make_views = lambda *args: [x.double() for x in make_views(*args)]
    cli.run_script(main_moco.main, main_moco.parse_args)
