"""Hugging Face's datasets, in folders of save_to_disk."""

import pytest
import torch

from engine.data.decode import RGB, PixelFormat, UnreadableImage, decode_image
from engine.data.hub import HuggingFaceDataset
from engine.data.splits import load_knn_splits, load_splits, open_source
from engine.errors import UserError

datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
datasets.disable_progress_bars()

CLASSES = datasets.ClassLabel(names=["b", "a"])


@pytest.fixture
def image(image_file):
    return {"bytes": image_file("a.png").read_bytes(), "path": None}


@pytest.fixture
def save(tmp_path):
    """save(train=Dataset, …) → hf:DIR"""

    def write(**splits):
        folder = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        datasets.DatasetDict(**splits).save_to_disk(str(folder))
        return f"hf:{folder}"

    return write


def records(images, labels=None):
    features, columns = {"image": datasets.Image()}, {"image": images}
    if labels is not None:
        features, columns = features | {"label": CLASSES}, columns | {"label": labels}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_records_are_read_as_files_are(image_file, save):
    paths = [image_file(f"{i}.png", height=20 + i) for i in range(2)]
    images = [{"bytes": paths[0].read_bytes(), "path": None}, {"path": str(paths[1])}]
    images += [{"bytes": b"no image", "path": "2.png"}, None]
    where = save(train=records(images, [0, 1, 0, 0]))
    part = open_source(where).train()
    assert part.class_names == ["b", "a"] and part.dataset.labels.tolist() == [0, 1, 0, 0]
    for i in range(2):
        assert torch.equal(part.dataset.read(i), decode_image(paths[i].read_bytes()))
    gray = open_source(where, PixelFormat(1)).train().dataset
    assert torch.equal(gray.read(0), decode_image(paths[0].read_bytes(), PixelFormat(1)))
    for i, words in ((2, "no image of a known format"), (3, "the record has no image")):
        with pytest.raises(UnreadableImage, match=words) as error:
            part.dataset.read(i)
        assert error.value.path == f"{where} train, record {i}"


def test_splits_are_found_by_name(image, save):
    a, b = records([image], [0]), records([image, image], [1, 0])
    splits = load_splits(open_source(save(train=b, validation=a, test=a, extra=a)))
    assert (len(splits.train), len(splits.val), splits.class_names) == (2, 1, ["b", "a"])
    assert splits.remarks[0] == "splits that are not read: test, extra"
    source = open_source(save(extra=b, test=a))
    assert source.val_or_all().dataset.labels.tolist() == [0]
    with pytest.raises(UserError, match="has no train, only val"):
        source.train()
    with pytest.raises(UserError, match="has the splits extra: call one train"):
        open_source(save(extra=a))


def test_columns_are_found_by_type(image, save):
    one = records([image], [0]).add_column("caption", ["a"])
    part = open_source(save(train=one)).train()
    assert part.class_names and part.remarks == ("columns that are not read: caption",)
    two = one.add_column("more", [1]).cast_column("more", CLASSES)
    for data, words in ((two, "1 columns .* and 2 of"), (one.select_columns("label"), "0 columns")):
        with pytest.raises(UserError, match=f"{words}.* by select_columns"):
            open_source(save(train=data)).train()
    values = one.cast_column("label", datasets.Value("int64"))  # which may mean anything
    part = open_source(save(train=values)).train()
    assert part.class_names is None and part.remarks == (
        "columns that are not read: label, caption",
    )


@pytest.mark.parametrize("labels, missing", [([0, None, 1], 1), ([-1, 1], 1), ([-1, -1], 2)])
def test_records_without_a_label_are_a_flaw_unless_all_are(image, save, labels, missing):
    source = open_source(save(train=records([image] * len(labels), labels)))
    part = source.train()
    assert part.class_names is None and part.dataset.labels is None
    if missing < len(labels):
        assert f"{missing} of {len(labels)} records have no label" in part.flaw
    else:  # of test sets labels are kept secret
        assert not part.flaw and load_knn_splits(source)[1]


def test_names_of_configurations(image_file, tmp_path, monkeypatch, image, save):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("one/train/a", "one/train/b", "one/test/a", "two/a"):
        image_file(f"hub/{name}/1.png")
    configs = "".join(f"- config_name: {n}\n  data_dir: {n}\n" for n in ("one", "two"))
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    splits = load_splits(open_source(f"hf:{tmp_path}/hub:one"))
    assert (len(splits.train), len(splits.val), splits.class_names) == (2, 1, ["a", "b"])
    saved = save(train=records([image]))
    for path, words in (
        (f"hf:{tmp_path}/hub", r"pick one among the available configs: \['one', 'two'\] \(hf:NAME"),
        (f"hf:{tmp_path}/hub:three", r"'three' not found\. Available: \['one', 'two'\]"),
        (f"{saved}:one", r"can't load hf:.*:one: "),
        (f"hf:{tmp_path}/no", "can't load"),
    ):
        with pytest.raises(UserError, match=words) as error:
            open_source(path)
        assert "\n" not in str(error.value)


def test_a_version_that_runs_code_of_the_set_is_refused(image, save, monkeypatch):
    where = save(train=records([image]))
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(UserError, match=r"needs datasets 4 or newer, not 3\.6"):
        open_source(where)


def test_a_path_in_a_record_leads_to_a_file_of_the_set(image_file, tmp_path):
    inside, outside = image_file("set/inside.png"), image_file("outside.png")
    (tmp_path / "set" / "link.png").symlink_to(outside)
    paths = [
        inside,
        outside,
        tmp_path / "set" / "link.png",
        tmp_path / "set" / ".." / "outside.png",
    ]
    images = [{"image": {"bytes": None, "path": str(path)}} for path in paths]
    dataset = HuggingFaceDataset(images, "image", "x", RGB, [str(tmp_path / "set")])
    assert dataset.read(0).shape == (3, 40, 60)
    for i in (1, 2, 3):
        with pytest.raises(UnreadableImage, match=r"outside\.png leads out of the data set"):
            dataset.read(i)
