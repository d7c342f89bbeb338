"""Hugging Face's datasets: hf:NAME, hf:NAME:CONFIG, and hf:DIR, which save_to_disk wrote."""

import os
from functools import partial
from pathlib import Path

import torch

from engine.data.images import EncodedDataset, Part, check_file_size, read_file
from engine.errors import UserError, first_line, join_some, printable
from engine.launch import rank0_first

SAVE = "load_dataset(…), then save_to_disk(DIR), then hf:DIR"  # with what can't be asked for here
VAL_NAMES = ("validation", "val", "test")


class HuggingFaceDataset(EncodedDataset):
    """Images of a Hugging Face dataset, read from its Arrow files one by one.

    column: of the images; split_name: how messages name the split. folders: where a record's path
    may lead to.
    """

    def __init__(self, records, column, split_name, pixel_format, folders=()):
        self.records, self.column, self.split_name = records, column, split_name
        self.pixel_format, self.folders = pixel_format, folders

    def __len__(self):
        return len(self.records)

    def get_bytes(self, i):
        image = self.records[int(i)][self.column] or {}
        if image.get("bytes"):
            check_file_size(len(image["bytes"]))
            return image["bytes"]
        if not image.get("path"):
            raise ValueError("the record has no image")
        path = os.path.realpath(image["path"])
        if not any(path.startswith(os.path.join(folder, "")) for folder in self.folders):
            raise ValueError(f"its path {path} leads out of the data set")
        return read_file(path)

    def name(self, i):
        return printable(f"{self.split_name}, record {int(i)}")


def find(path, pixel_format):
    """→ {split: function that reads its Part}, remarks."""
    splits = rank0_first(lambda download: _load(path))
    names = {"train": "train"} if "train" in splits else {}
    val_names = [name for name in VAL_NAMES if name in splits]
    if val_names:
        names["val"] = val_names[0]
    if not names:
        raise UserError(
            f"{path} has the splits {join_some(splits)}: call one train, and one val ({SAVE})"
        )
    unread = [name for name in splits if name not in names.values()]
    remarks = (f"splits that are not read: {join_some(unread)}",) if unread else ()
    read = partial(_read_split, path, pixel_format=pixel_format)
    return {split: partial(read, name, splits[name]) for split, name in names.items()}, remarks


def _load(path):
    """→ {name: datasets.Dataset}"""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path} needs Hugging Face's datasets: pip install datasets") from None
    if int(datasets.__version__.split(".")[0]) < 4:  # they run DIR/DIR.py
        raise UserError(
            f"{path} needs datasets 4 or newer, not {datasets.__version__}: pip install -U datasets"
        )
    name, _, config = path.removeprefix("hf:").partition(":")
    try:
        is_saved = any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json"))
        if is_saved and not config:
            splits = datasets.load_from_disk(name)
        else:
            splits = datasets.load_dataset(name, name=config or None)
    except Exception as error:  # as many kinds as there are ways to keep data
        # Further lines may list the names that exist; examples of code follow.
        reason = " ".join(str(error).split("\nExample")[0].split())
        raise UserError(
            f"can't load {path}: {reason or first_line(error)} (hf:NAME:CONFIG; for other options: "
            f"{SAVE})"
        ) from None
    return {"train": splits} if isinstance(splits, datasets.Dataset) else splits


def _read_split(path, name, records, pixel_format):
    """→ Part. The columns of the image and of the label, if any, are told by their types."""
    import datasets

    split_name, features = f"{path} {name}", records.features
    images = [name for name in features if isinstance(features[name], datasets.Image)]
    labels = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
    if len(images) != 1 or len(labels) > 1:
        raise UserError(
            f"{split_name} has {len(images)} columns of type Image and {len(labels)} of type "
            f"ClassLabel: keep one of each by select_columns ({SAVE})"
        )
    encoded = records.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    folder = path.removeprefix("hf:").partition(":")[0]
    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE)
    folders = [os.path.realpath(folder) for folder in (folder, *caches)]
    dataset = HuggingFaceDataset(encoded, images[0], split_name, pixel_format, folders)
    others = [name for name in features if name not in images + labels]
    remarks = (f"columns that are not read: {join_some(others)}",) if others else ()
    if not labels:
        return Part(dataset, remarks=remarks)
    # From Arrow: numpy would turn labels that are missing into NaN.
    values = records.select_columns(labels).with_format("arrow")[:].column(0).to_pylist()
    # -1: test sets whose labels are kept secret.
    missing = [value is None or value < 0 for value in values]
    if any(missing):
        flaw = f"{split_name}: {sum(missing):,} of {len(missing):,} records have no {labels[0]}"
        return Part(dataset, flaw="" if all(missing) else flaw, remarks=remarks)
    dataset.labels = torch.tensor(values)
    return Part(dataset, features[labels[0]].names, remarks=remarks)
