"""What the benchmarks share: their flags, and the JSON that they print and keep."""

import argparse
import json
import platform
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.run import versions


def parser(doc):
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--out", metavar="JSON", help="keep the report there; -: print it only")
    return parser


def finish(args, device, **results):
    """Prints command, hardware, versions and results; writes them to --out."""
    print(save(args, device, **results), end="")


def about(device):
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    hardware = f"{name}, {torch.get_num_threads()} CPU threads"
    return dict(hardware=hardware, versions=versions())


def save(args, device, **results):
    """Writes the same to --out → its text."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    report = dict(command=command) | about(device) | results
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)  # on one line
    if args.out and args.out != "-":
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text)
    return text
