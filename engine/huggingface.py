"""Hugging Face's datasets → Splits."""

import re
from pathlib import Path

from engine.datasets import HuggingFaceDataset, LabelError, Labelled, load_in_turns, make_splits
from engine.errors import UserError, first_line

OPTIONS = ("name", "revision", "data_dir", "data_files")  # of load_dataset


def load(path, columns, split_names, pixel_format, need):
    """load_splits for hf:DIR, which save_to_disk wrote, or hf:NAME:CONFIG:OPTION=VALUE…"""
    return load_in_turns(lambda _: _load(path, columns, split_names, pixel_format, need))


def _load(path, columns, split_names, pixel_format, need):
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path} needs Hugging Face's datasets: pip install datasets") from None
    name, options = _parse_name(path)
    saved = any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json"))
    is_local = options.keys() == {"revision"} and Path(name).exists()
    if options and (saved or is_local):
        raise UserError(f"{path}: {name} is a folder, it has no {' '.join(options)}")
    try:
        splits = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, **options)
    except Exception as error:  # as many kinds as there are ways to keep data
        # Further lines may list the names that exist; examples of code follow.
        reason = " ".join(str(error).split("\nExample")[0].split())
        raise UserError(f"can't load {path}: {reason or first_line(error)}") from None
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}
    train_name, val_name = _choose_splits(path, splits, split_names, need)

    first = splits[val_name if train_name is None else train_name].features
    if not columns:
        image_columns = [name for name in first if isinstance(first[name], datasets.Image)]
        label_columns = [name for name in first if isinstance(first[name], datasets.ClassLabel)]
        if need == "images" and len(label_columns) > 1:
            label_columns = []
        if len(image_columns) != 1 or len(label_columns) > 1:
            raise UserError(
                f"{path} has {len(image_columns)} columns of images and {len(label_columns)} of "
                f"labels among {' '.join(first)}: choose by --hf-columns IMAGE LABEL"
            )
        columns = image_columns + label_columns
    parts = []
    for name in (train_name, val_name):
        part = None
        if name is not None:
            part = _read_split(splits[name], columns, f"{path} {name}", pixel_format, need)
        parts.append(part)
    class_names = getattr(first[columns[-1]], "names", None)  # of a ClassLabel
    return make_splits(path, *parts, "no split to validate", class_names)


def _parse_name(path):
    """hf:NAME:CONFIG:OPTION=VALUE… → NAME and the arguments of load_dataset."""
    text = path.removeprefix("hf:")
    if Path(text).exists():
        return text, {}
    name, *parts = re.split(":(?!//)", text)  # but not in a URL
    options = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals:
            option, value = "name", part
        if option not in OPTIONS or not value or option in options:
            raise UserError(
                f"{path}: {part!r} is not CONFIG, nor one of "
                f"{' '.join(f'{option}=VALUE' for option in OPTIONS)}, each once"
            )
        options[option] = value
    return name, options


def _choose_splits(path, splits, names, need):
    """names: --hf-splits or None → the split to train on and the one to validate, or None."""
    train = "train"
    val = next((name for name in ("validation", "val", "test") if name in splits), None)
    if names:
        train, val = names[0], names[1] if len(names) > 1 else None
    if need == "val" and val is None and names:
        train, val = None, train
    if need == "val" and train not in splits and not names:
        train = None
    if need in ("train", "images"):
        val = None
    chosen = [name for name in (train, val) if name is not None]
    unknown = [name for name in chosen if name not in splits]
    if unknown or not chosen:
        missing = unknown[0] if unknown else "validation, val or test"
        raise UserError(
            f"{path} has no {missing}, but {' '.join(map(str, splits))}: choose by --hf-splits "
            "TRAIN VAL"
        )
    return train, val


def _read_split(records, columns, split_name, pixel_format, need):
    """A split and the columns of its image and its label → Labelled."""
    import datasets

    unknown = [column for column in columns if column not in records.features]
    if unknown:
        raise UserError(
            f"{split_name} has no column {unknown[0]}, but {' '.join(records.features)}"
        )
    image_column, label_column = columns[0], columns[1] if len(columns) > 1 else None
    if label_column is not None and not isinstance(
        records.features[label_column], datasets.ClassLabel | datasets.Value
    ):
        raise UserError(f"{split_name}: column {label_column} holds no labels")
    try:
        images = records.select_columns(image_column)
        images = images.cast_column(image_column, datasets.Image(decode=False))
    except Exception as error:  # columns of another type
        raise UserError(
            f"{split_name}: column {image_column} holds no images: {first_line(error)}"
        ) from None
    label_names = None
    if label_column is not None:
        label_names = _read_labels(records, label_column, split_name, need)
    dataset = HuggingFaceDataset(images, image_column, split_name, pixel_format=pixel_format)
    return Labelled(dataset, label_names)


def _read_labels(records, column, split_name, need):
    """The name of each record's class; None if no record has a label, UserError if some have."""
    import datasets

    feature = records.features[column]
    # From Arrow: numpy would turn labels that are missing into NaN, and integers into floats.
    table = records.select_columns(column).with_format("arrow")[:]
    label_names = []
    for value in table.column(0).to_pylist():
        if isinstance(feature, datasets.ClassLabel):
            # -1: test sets whose labels are kept secret.
            missing = value is None or value < 0
            label_names.append(None if missing else feature.names[value])
        else:
            missing = value is None or value == "" or value != value  # NaN
            label_names.append(None if missing else str(value))
    num_missing = label_names.count(None)
    if num_missing == len(label_names) or (num_missing and need == "images"):
        return None
    if num_missing:
        raise LabelError(
            f"{split_name}: {num_missing:,} of {len(label_names):,} records have no label in "
            f"column {column}: filter them out, or give --hf-columns IMAGE alone to use no labels"
        )
    return label_names
