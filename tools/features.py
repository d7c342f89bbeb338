"""Features of a folder of images: the backbone's output, not the projector's.

    python tools/features.py digits --pretrained runs/digits/checkpoint.pth --out digits.npz
    torchrun --nproc_per_node=8 tools/features.py /data/imagenet --split train \\
        --pretrained runs/vit_small_300/checkpoint.pth --out imagenet.npy
A ViT's patches in its third block from the end, row by row: [n, patches, d]:
    python tools/features.py digits --pretrained CKPT --tokens patch --layer -3 --out patches.npy

FILE.npz holds `features` float32 [n, d], NaN for an image that can't be read; `paths` [n] below
DIR, or the images' numbers where they are not files; and where there are labels `labels` int64 [n]
and the names of the `classes`, by their value if all are numbers. FILE.npy, for datasets that don't
fit in memory, holds the features alone (np.load with mmap_mode="r"), FILE.safetensors features and
labels; FILE.index.npz beside it has the rest.

After an interruption the same command continues, on any number of processes; until everything is
computed, the parts lie in FILE.npz.parts/.
"""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import cli, flags, launch
from engine.data.hub import HuggingFaceDataset
from engine.data.images import ImageFileDataset, dataset_digest
from engine.data.named import NAMED_SETS
from engine.data.unreadable import UnreadableImages
from engine.errors import UserError, failure_reason
from engine.evaluation import EVAL_BATCH_SIZE, iterate_eval_batches
from engine.files import atomic_write, exists
from engine.launch import print_rank0
from engine.weights import create_pretrained_backbone, weights_digest
from moco.distributed import is_main, rank, world_size

WAIT_SECONDS = 60  # longer than NFS keeps what it knows of a folder


def parse_args(argv=None):
    parser = cli.Parser(
        description=__doc__, usage="%(prog)s DIR --pretrained CKPT --out FILE [FLAGS]"
    )
    flags.add_tool_flags(parser)
    add = parser.group("features")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="FILE.npz, FILE.safetensors, or FILE.npy for large datasets",
    )
    add(
        "--split",
        choices=("train", "val"),
        default="train",
        help="which one, where DIR has both; train of stl10 is its labelled part",
    )
    add(
        "--tokens",
        choices=("class", "patch", "avg"),
        help="of a ViT: class token, patches, or their average (default: the backbone's output)",
    )
    layer = "block of a ViT, from 0 or the end; the last LayerNorm is applied (default: -1)"
    add("--layer", type=int, metavar="N", help=layer)
    args = parser.parse_args(argv)
    if args.out.suffix not in (".npz", ".npy", ".safetensors"):
        parser.error(f"--out {args.out}: the name must end in .npz, .npy or .safetensors")
    return args


def main(args):
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    model, config = create_pretrained_backbone(args.pretrained, flags.backbone_options(args))
    model.requires_grad_(False).eval()
    encoder, shape = select_tokens(model, config, args.tokens, args.layer)
    model.to(env.device)
    source, part, which = load_split(args, config.pixel_format)
    dataset, class_names = part.dataset, part.class_names
    remarks = [f"{len(dataset):,} images{which}", *source.remarks, *part.remarks]
    remarks += [f"without labels: {part.flaw}"] if part.flaw else []
    print_rank0(f"data    {args.data}: {'; '.join(remarks)}")
    metadata = config.to_dict() | dict(
        data=dataset_id(dataset, args.data),
        split=args.split,
        images=len(dataset),
        data_digest=dataset_digest(dataset, class_names),
        weights=weights_digest(model),
        precision=str(env.amp_dtype or torch.float32).removeprefix("torch."),
        batch=EVAL_BATCH_SIZE,
        tokens=args.tokens,
        layer=args.layer,
    )
    index = create_index(dataset, class_names, args.data, metadata)
    index_path = args.out if args.out.suffix == ".npz" else args.out.with_suffix(".index.npz")
    if exists(args.out):
        check_same_inputs(args.out, lambda: np.load(index_path)["about"].item(), metadata)
        print_rank0(f"{args.out} is complete: nothing left to do")
        return

    folder = Path(f"{args.out}.parts")
    missing = open_parts(folder, metadata)
    launch.check_same_on_all_ranks(
        {"the number of images": len(dataset), "the missing parts": missing},
        "do all hosts see the same data and the same --out?",
    )
    num_parts = math.ceil(len(dataset) / EVAL_BATCH_SIZE)
    if len(missing) < num_parts:
        print_rank0(f"continuing: {num_parts - len(missing)} of {num_parts} parts are done")
    try:
        compute_parts(folder, missing, encoder, shape, dataset, config, args, env)
    except KeyboardInterrupt:
        raise UserError("interrupted; the same line again continues", exit_code=130) from None
    launch.barrier()
    num_nan = launch.on_rank0(lambda: merge_parts(folder, num_parts, args.out, index_path, index))
    size = " × ".join(map(str, shape))
    text = f"{len(dataset):,} × {size} features, {env.precision()}, in {args.out}"
    print_rank0(f"{text}, {num_nan:,} of them NaN" if num_nan else text)


def select_tokens(model, config, tokens, layer):
    """--tokens and --layer → images to features [N, …], by default the model's output; their shape.

    UserError for a backbone without such tokens.
    """
    if tokens is None and layer is None:
        return model, (model.num_features,)
    num_blocks = len(getattr(model, "blocks", ()))
    index = num_blocks - 1 if layer is None else layer
    if num_blocks and not -num_blocks <= index < num_blocks:
        raise UserError(f"--layer {layer}: {config.arch} has layers 0 to {num_blocks - 1}")

    options = dict(norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True)

    def encode(images):
        block = index % num_blocks
        [output] = model.forward_intermediates(
            images, [block], return_prefix_tokens=True, **options
        )
        patches, prefix = output if isinstance(output, tuple) else (output, None)
        if tokens in ("patch", "avg"):
            return patches if tokens == "patch" else patches.mean(1)  # [N, patches, d], [N, d]
        if prefix is None or model.cls_token is None:
            raise UserError(f"{config.arch} has no class token: --tokens avg or patch")
        return prefix[:, 0]

    try:
        h = encode(torch.zeros(1, config.pixel_format.in_chans, *config.img_size))
    except UserError:
        raise
    except Exception:  # each kind of backbone lacks something else
        raise UserError(
            f"--tokens and --layer are for ViTs, not {config.arch}: drop them"
        ) from None
    return encode, tuple(h.shape[1:])


def load_split(args, pixel_format):
    """--split of DIR → Source, Part, and where there is another split, words on both."""
    source = flags.source(args, args.data, pixel_format)
    part = source.val_or_all() if args.split == "val" else source.train_labelled()
    other = "train" if args.split == "val" else "val"
    which = f" of {args.split}, not {other} (--split {other} takes those)"
    return source, part, which if source.has_both() else ""


def create_index(dataset, class_names, path, metadata):
    """What the file holds beside the features: arrays by name."""
    index = dict(paths=np.array(image_names(dataset, path)))
    if dataset.labels is not None:
        index["labels"] = dataset.labels.numpy()
    if dataset.labels is not None and class_names:
        if all(name.isdecimal() for name in class_names):  # "2" before "10", as a user numbers them
            order = np.argsort([int(name) for name in class_names], kind="stable")
            index["labels"] = np.argsort(order)[index["labels"]]
            class_names = [class_names[i] for i in order]
        index["classes"] = np.array(class_names)
    index["about"] = json.dumps(metadata)
    return index


def image_names(dataset, path):
    """The path of each image below `path`, which load_splits got; its number if it is not a file.

    Not dataset.name(i), which escapes what a terminal can't print: these open the files.
    """
    if not isinstance(dataset, ImageFileDataset):
        return [str(i) for i in range(len(dataset))]
    folder = path if os.path.isdir(path) else os.path.dirname(path)  # of a list
    root = os.path.relpath(dataset.root, folder or ".")
    return [os.path.normpath(os.path.join(root, name)) for name in dataset.paths]


def dataset_id(dataset, path):
    """`path` in full."""
    if isinstance(dataset, HuggingFaceDataset):
        return f"{dataset.split_name} {dataset.column}"
    return path if path in NAMED_SETS else str(Path(path).resolve())


def check_same_inputs(path, read_metadata, metadata):
    """UserError if `path` was made from other images or by another model."""
    try:
        found = json.loads(read_metadata())
        changes = [
            f"{name} {found.get(name)} → {value}"
            for name, value in json.loads(json.dumps(metadata)).items()
            if value != found.get(name)
        ]
    except Exception:  # whatever a foreign file provokes
        raise UserError(
            f"{path} was not written by this tool, or not where this host sees it: choose another "
            "--out"
        ) from None
    if changes:
        raise UserError(
            f"{path} holds features of something else ({', '.join(changes)}): delete it, or choose "
            "another --out"
        )


# Parts on disk: a file for each batch, so that neither a crash nor the number of ranks matters.


def open_parts(folder, metadata):
    """Creates the folder of parts, or continues an interrupted one → numbers of missing parts."""
    path = folder / "about.json"

    def create():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not exists(path):
                with atomic_write(path, "w") as file:
                    file.write(json.dumps(metadata))
        except OSError as error:
            raise UserError(f"can't write {path}: {error.strerror}") from None

    launch.on_rank0(create)
    check_same_inputs(folder, path.read_text, metadata)
    num_parts = math.ceil(metadata["images"] / EVAL_BATCH_SIZE)
    return [number for number in range(num_parts) if not exists(part_path(folder, number))]


def part_path(folder, number):
    return folder / f"{number:07d}.npy"


def compute_parts(folder, missing, encoder, shape, dataset, config, args, env):
    """Writes this rank's files of the `missing` parts; shape: of an image's features."""
    if not missing:
        return
    chunks = torch.arange(len(dataset)).split(EVAL_BATCH_SIZE)
    indices = torch.cat([chunks[number] for number in missing])
    for positions, h in embed(encoder, dataset, indices, config.img_size, args.workers, env):
        image_indices = indices[positions]
        number = int(image_indices[0]) // EVAL_BATCH_SIZE
        features = torch.full((len(chunks[number]), *shape), torch.nan)
        features[image_indices % EVAL_BATCH_SIZE] = h.cpu()
        save_part(folder, number, features)
    for number in missing[rank() :: world_size()]:
        if not exists(part_path(folder, number)):  # no image in it can be read
            save_part(folder, number, torch.full((len(chunks[number]), *shape), torch.nan))


@torch.no_grad()
def embed(encoder, dataset, indices, img_size, workers, env):
    """This rank's batches of the images `indices` → positions in `indices` [n], float32 [n, d].

    The second are the encoder's features. Images that can't be read are in no batch, and are
    reported on stderr. All ranks call this and exhaust it.
    """
    unreadable = UnreadableImages(max_fraction=1)
    batches = iterate_eval_batches(dataset, indices, img_size, workers, env, unreadable)
    hide_bar = None if is_main() else True  # None: where stderr is not a terminal
    with tqdm(total=len(indices), unit=" images", disable=hide_bar) as bar:
        for positions, images in batches:
            with env.autocast():
                h = encoder(images)
            yield positions, h.float()
            num_done = world_size() * len(positions)  # the other ranks' as well
            bar.update(min(num_done, len(indices) - bar.n))


def save_part(folder, number, features):
    path = part_path(folder, number)
    try:
        with atomic_write(path) as file:
            np.save(file, features.numpy())
    except OSError as error:
        raise cant_write(path, error) from None


def cant_write(path, error):
    text = f"can't write {path}: {failure_reason(error)}; the same line again continues"
    return UserError(text, exit_code=1)


def merge_parts(folder, num_parts, out, index_path, index):
    """All parts → `out` and the index, which may be the same file; `out` is written last.

    Returns how many images have NaN features: those that can't be read.
    UserError for a part that this host does not see, and for a full disk; the parts stay.
    """
    paths = [part_path(folder, number) for number in range(num_parts)]
    wait_for(paths)
    try:
        write_parts(paths, out, index_path, index)
        num_nan = sum(count_nan(np.load(path)) for path in paths)
    except OSError as error:
        raise cant_write(out, error) from None
    shutil.rmtree(folder)
    return num_nan


def count_nan(features):
    """Images with a NaN among their features [n, …]."""
    return int(np.isnan(features).reshape(len(features), -1).any(1).sum())


def wait_for(paths):
    """Another host's files may take some seconds to be seen here."""
    start = time.monotonic()
    while missing := [path for path in paths if not exists(path)]:
        if time.monotonic() - start > WAIT_SECONDS:
            raise UserError(
                f"{len(missing)} of {len(paths)} parts are not here, {missing[0]} for example: do "
                "all hosts see the same --out? The same line again continues",
                exit_code=1,
            )
        time.sleep(0.1)


def write_parts(paths, out, index_path, index):
    if out == index_path:
        index = dict(features=np.concatenate([np.load(path) for path in paths])) | index
    with atomic_write(index_path) as file:
        np.savez(file, **index)
    if out.suffix == ".safetensors":
        arrays = dict(features=np.concatenate([np.load(path) for path in paths]))
        if "labels" in index:
            arrays["labels"] = index["labels"]
        with atomic_write(out) as file:
            file.write(safetensors.numpy.save(arrays))
    elif out.suffix == ".npy":  # one part in memory at a time
        first = np.load(paths[0])
        shape = len(index["paths"]), *first.shape[1:]
        header = dict(descr=first.dtype.str, fortran_order=False, shape=shape)
        with atomic_write(out) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for path in paths:
                file.write(np.load(path).tobytes())


if __name__ == "__main__":
    cli.run_script(main, parse_args)
