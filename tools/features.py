"""Embeddings of a folder of images: the backbone's output, not the projector's.

    python tools/features.py digits --pretrained runs/digits/checkpoint.pth --out digits.npz
    torchrun --nproc_per_node=8 tools/features.py /data/imagenet --split train \\
        --pretrained runs/vit_small_300/checkpoint.pth --out imagenet.npy

FILE.npz holds `features` float32 [n, d], NaN for an image that can't be read, `paths` [n] below DIR
(numbers where they are no files), and where there are any `labels` int64 [n] and `classes`, their
names. FILE.npy, for sets that don't fit in memory, holds the features alone (np.load with
mmap_mode="r"), and FILE.index.npz beside it the rest.

The same line again continues a run that was interrupted, on any number of processes; until all is
there, the parts lie in FILE.npz.parts/.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moco import UserError, checkpoint, cli, data, distributed
from moco.builder import features
from moco.distributed import rank, world
from moco.evaluation import BATCH, batches
from moco.sources import NAMES, Files, Rows


def model_flags():
    """Flags of a tool that shows images to a pre-trained backbone, as a parent for its parser."""
    parser = argparse.ArgumentParser(add_help=False, parents=[cli.input_flags()])
    parser.add_argument("--pretrained", metavar="CKPT", required=True, help="checkpoint of "
        "main_moco.py or of the official release; arch and sizes are taken from it")  # fmt: skip
    parser.set_defaults(arch=None, img_size=None, in_chans=None, from_scratch=False)
    return parser


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, parents=[model_flags()])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="FILE.npz, or FILE.npy for large "
        "sets")  # fmt: skip
    add("--split", choices=("train", "val"), default="train", help="where DIR has both (default: "
        "train); train of stl10 is its labelled part")  # fmt: skip
    args = parser.parse_args(argv)
    if args.out.suffix not in (".npz", ".npy"):
        parser.error(f"--out {args.out}: the name must end in .npz or .npy")
    return args


def main(args):
    device, amp = distributed.set_up(args.device, args.amp)
    model, setting = load_model(args, device)
    source, index = load_split(args, setting)
    about = setting | dict(
        data=where_from(source, args.data),
        split=args.split,
        images=len(source),
        names_and_labels=digest(index.values()),
        weights=digest(value.cpu().numpy() for value in model.state_dict().values()),
        precision=str(amp or torch.float32).removeprefix("torch."),
        batch=BATCH,
    )
    index["about"] = json.dumps(about)
    beside = args.out if args.out.suffix == ".npz" else args.out.with_suffix(".index.npz")
    if args.out.exists():
        refuse_other(args.out, lambda: np.load(beside)["about"].item(), about)
        distributed.say(f"{args.out} is complete: nothing left to do")
        return

    parts = Path(f"{args.out}.parts")
    todo = claim(parts, about)
    distributed.check_agreement(device, images=len(source), parts=len(todo))
    if done := -(-len(source) // BATCH) - len(todo):
        distributed.say(f"continuing: {done} of {done + len(todo)} parts are done")
    try:
        if todo:
            shares = torch.arange(len(source)).split(BATCH)
            chosen = torch.cat([shares[n] for n in todo])
            size = setting["img_size"]
            for share, h in embed(model, source, chosen, size, args, device, amp):
                number = int(chosen[share[0]]) // BATCH
                save_part(parts, number, len(shares[number]), chosen[share] % BATCH, h.cpu())
            for number in todo[rank() :: world()]:
                if not (parts / part_name(number)).exists():  # nothing in it can be read
                    none = torch.empty(0, model.num_features)
                    save_part(parts, number, len(shares[number]), [], none)
    except KeyboardInterrupt:
        raise UserError("interrupted; the same line again continues", code=130) from None
    distributed.barrier()
    if rank() == 0:
        assemble(args.out, beside, parts, index)
        distributed.say(f"{len(source):,} × {model.num_features} features in {args.out}")


def load_model(args, device):
    """The frozen backbone of --pretrained → model, its setting."""
    model, setting = checkpoint.create_downstream(args)
    return model.requires_grad_(False).eval().to(device), setting


def load_split(args, setting):
    """--split of DIR → source, what is known of its images: paths, labels and classes, arrays."""
    dataset = cli.images(args, setting)
    if args.split == "val" and dataset.val is None:
        raise UserError(f"{args.data} has no val to take: {dataset.note}")
    source = dataset.val if args.split == "val" else dataset.bank or dataset.train
    index = dict(paths=np.array(names(source, args.data)))
    if source.labels is not None:
        index["labels"] = source.labels.numpy()
        if dataset.names:
            index["classes"] = np.array(dataset.names)
    return source, index


def where_from(source, where):
    """`where` in full: what tells these images from others."""
    if isinstance(source, Rows):
        return f"{source.name} {source.column}"
    return where if where in NAMES else str(Path(where).resolve())


def names(source, where):
    """Of each image its path below `where`; in memory, its number."""
    if not isinstance(source, Files):
        return [str(i) for i in range(len(source))]
    where = where if os.path.isdir(where) else os.path.dirname(where)  # of a list
    below = os.path.relpath(source.root, where or ".")
    return [os.path.normpath(os.path.join(below, os.fsdecode(path))) for path in source.paths]


def embed(model, source, chosen, size, args, device, amp):
    """This rank's batches of `chosen` → positions in `chosen` [n], features float32 [n, d]."""
    autocast = partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
    # disable=None: no bar where stderr is no terminal
    with tqdm(total=len(chosen), unit=" images", disable=rank() != 0 or None) as bar:
        bad = data.BadImages(share=1, images=len(source))
        for share, images in batches(source, chosen, size, args.workers, device, bad):
            with autocast():
                h = features(model, images)
            yield share, h.float()
            bar.update(min(world() * len(share), len(chosen) - bar.n))  # the other ranks' as well


# Parts on disk: a file for each batch, so that neither a crash nor the number of ranks matters.


def claim(parts, about):
    """Makes the folder of parts, or finds what the same line left → numbers of the missing ones."""
    claimed = parts / "about.json"
    if rank() == 0 and not claimed.exists():
        try:
            parts.mkdir(parents=True, exist_ok=True)
            with replacing(claimed) as file:
                file.write(json.dumps(about).encode())
        except OSError as error:
            raise UserError(f"can't write {claimed}: {error.strerror}") from None
    distributed.barrier()
    refuse_other(parts, claimed.read_text, about)
    numbers = range(-(-about["images"] // BATCH))
    return [n for n in numbers if not (parts / part_name(n)).exists()]


def part_name(number):
    return f"{number:07d}.npy"


def save_part(parts, number, images, where, h):
    """h: the features of those `where` of its images; the others can't be read."""
    rows = torch.full((images, h.shape[1]), torch.nan)
    rows[where] = h
    with replacing(parts / part_name(number)) as file:
        np.save(file, rows.numpy())


def assemble(out, beside, parts, index):
    """Parts → the file, or the two. `out` comes last: where it is, all is."""
    paths = sorted(parts.glob("*.npy"))
    if out == beside:
        index = dict(features=np.concatenate([np.load(path) for path in paths])) | index
    with replacing(beside) as file:
        np.savez(file, **index)
    if out != beside:  # one part in memory at a time
        first = np.load(paths[0])
        shape = len(index["paths"]), first.shape[1]
        header = dict(descr=first.dtype.str, fortran_order=False, shape=shape)
        with replacing(out) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for path in paths:
                file.write(np.load(path).tobytes())
    shutil.rmtree(parts)


def refuse_other(path, read_about, about):
    """UserError unless `path` was made from the same images by the same model."""
    try:
        found = json.loads(read_about())
    except Exception:  # whatever a foreign file provokes
        raise UserError(
            f"{path} was not written by this tool, or not where this host sees it: choose another "
            "--out"
        ) from None
    changed = [
        f"{name} {found.get(name)} → {value}"
        for name, value in json.loads(json.dumps(about)).items()
        if value != found.get(name)
    ]
    if changed:
        raise UserError(
            f"{path} holds features of something else ({', '.join(changed)}): delete it, or choose "
            "another --out"
        )


def digest(arrays):
    """Names and weights in 16 characters."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


@contextmanager
def replacing(path):
    """A file under a temporary name, which becomes `path` when all of it is on disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


if __name__ == "__main__":
    cli.run(main, parse_args)
