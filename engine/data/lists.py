"""Lists of images: PATH or PATH<TAB>LABEL a line, PATH relative to the list's folder."""

import os
from collections import Counter

from engine.data.images import MAX_NAME, Listing
from engine.errors import UserError, printable

MAX_LIST_BYTES = 2**31  # 20 million lines of 100 characters


def read_list(path, extensions):
    """A .txt → Listing. UserError, naming the line, for one that is no such line."""
    try:
        if os.path.getsize(path) > MAX_LIST_BYTES:
            raise UserError(f"{path} is larger than {MAX_LIST_BYTES:,} bytes: it is no list")
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    names, labels, label_of, flaw = [], [], {}, ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, label = line.partition("\t")
        name, label = os.path.normpath(name), label.strip()
        problem = ""
        if max(len(name), len(label)) > MAX_NAME:
            problem = f"a name or label of more than {MAX_NAME} characters"
        elif os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
            problem = f"{name} leads out of the folder of the list"
        elif not name.lower().endswith(extensions):
            problem = (
                f"{name} is not the name of an image (known: {' '.join(extensions)}): a label goes "
                "after a tab; rename the file if it is no list"
            )
        elif "\t" in label:
            problem = "one tab at most, before the label"
        elif labels and bool(label) != bool(labels[0]):
            problem = "either each line has a label, or none has"
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        names.append(name)
        labels.append(label)
        if label_of.setdefault(name, label) != label:
            flaw = f"{path.name} gives {name} the labels {label_of[name]} and {label}"
    if not names:
        raise UserError(f"{path} names no images")
    return Listing(str(path.parent), names, Counter(), labels, flaw, printable(str(path)))
