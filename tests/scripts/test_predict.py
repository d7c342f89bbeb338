"""Predictions: the table against --evaluate and the model's own scores, on any images."""

import csv
import re
import shutil
import sys
import tarfile

import pytest
import torch
from conftest import CPU, FP32, PROBE, ROOT, TUNE, launch
from test_visualize import assert_readable

import main_finetune
import main_lincls
from engine.backbones import BackboneConfig, Classifier, create_backbone
from engine.data.splits import load_splits, open_source
from engine.weights import create_classifier
from moco.augmentation import normalize

sys.path.insert(0, str(ROOT / "tools"))

import predict


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pretrained):
    """The classifiers that probe and fine-tuning left: with --evaluate-ema, its average counts."""
    folder = tmp_path_factory.mktemp("trained")
    for script, args, name in (
        (main_lincls, PROBE, "probe"),
        (main_finetune, (*TUNE, "--evaluate-ema"), "tuned"),
    ):
        argv = [*args, "--pretrained", pretrained, "--output-dir", folder / name]
        script.main(script.parse_args([str(arg) for arg in argv]))
    probe, tuned = folder / "probe/linear_lr0.1.pth", folder / "tuned/best.pth"
    return {"main_lincls.py": probe, "main_finetune.py": tuned}


def save_classifier(path, names):
    """A random classifier of few images; without names as the official release has it."""
    config = BackboneConfig("vit_nano", (16, 16), (8, 8))
    model = create_backbone(config)
    model.head = Classifier(model.num_features, 2)
    torch.nn.init.normal_(model.head.weight)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(config.to_dict() | dict(state_dict=state, class_names=names), path)
    return path


def read(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("evaluate", ["main_lincls.py", "main_finetune.py"])
def test_the_tables_accuracy_is_that_of_evaluate(trained, succeed, tmp_path, evaluate, amp):
    out = tmp_path / "p.csv"
    argv = ("digits", *CPU, "--amp", amp, "--pretrained", trained[evaluate])
    printed = succeed("tools/predict.py", *argv, "--out", out)
    assert "360 images of val, not train (--split train takes those), labelled" in printed
    [line] = re.findall(r"^top-1 .* % on 360 images$", printed, re.MULTILINE)
    for script in trained:
        assert line in succeed(script, *argv, "--evaluate"), script
    rows, classes = read(out), read(tmp_path / "p_classes.csv")
    acc1 = 100 * sum(row["class"] == row["label"] for row in rows) / len(rows)
    keys = ["class", "class_2", "class_3", "class_4", "class_5"]
    acc5 = 100 * sum(row["label"] in [row[key] for key in keys] for row in rows) / len(rows)
    assert line == f"top-1 {acc1:.2f} %, top-5 {acc5:.2f} % on 360 images"
    for row in classes:
        hits = [r["class"] == r["label"] for r in rows if r["label"] == row["class"]]
        assert (int(row["images"]), int(row["correct"])) == (len(hits), sum(hits))
        assert row["accuracy"] == f"{100 * sum(hits) / len(hits):.2f}"
    assert len(classes) == 10
    assert (tmp_path / "p_confusion.png").read_bytes().startswith(b"\x89PNG")


def test_classes_and_scores_are_the_models_best(trained, succeed, tmp_path):
    path, out = trained["main_lincls.py"], tmp_path / "p.csv"
    succeed("tools/predict.py", "digits", *FP32, "--pretrained", path, "--out", out, "--top-k", 2)
    model, _, names = create_classifier(path, {})
    images = load_splits(open_source("digits")).val.images
    with torch.no_grad():
        expected = model.eval()(normalize(images.float() / 255)).softmax(1).topk(2)
    rows = read(out)
    assert list(rows[0]) == ["path", "label", "class", "score", "class_2", "score_2"]
    for i, row in enumerate(rows):
        assert row["path"] == str(i)
        assert [row["class"], row["class_2"]] == [names[j] for j in expected.indices[i]]
        scores = [float(row["score"]), float(row["score_2"])]
        assert scores == pytest.approx(expected.values[i].tolist(), abs=2e-6)


def test_two_processes_write_the_same_table(trained, tmp_path):
    argv = ("tools/predict.py", "digits", *FP32, "--pretrained", trained["main_finetune.py"])
    one, two = (launch(n, *argv, "--out", tmp_path / f"{n}.csv") for n in (1, 2))
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert two.stdout == one.stdout.replace("1.csv", "2.csv").replace("1_", "2_")
    for end in (".csv", "_classes.csv", "_confusion.png"):
        assert (tmp_path / f"1{end}").read_bytes() == (tmp_path / f"2{end}").read_bytes(), end


@pytest.fixture
def images(two_classes, tmp_path):
    """train/ and val/ of the classes a and b; one of the six in val can't be read."""
    shutil.copytree(two_classes, tmp_path / "images")
    (tmp_path / "images/val/b/1.png").write_text("broken")
    return tmp_path / "images"


def test_what_cant_be_read_has_no_class_and_counts_as_wrong(images, tmp_path, script):
    pretrained = save_classifier(tmp_path / "c.pth", ["b", "a"])
    argv = (images, *FP32, "--pretrained", pretrained)
    code, out, err = script("tools/predict.py", *argv, "--out", tmp_path / "p.csv")
    assert code == 0 and err.count("unreadable image") == 1
    assert "6 predictions in" in out and "1 of them without a class" in out
    rows = read(tmp_path / "p.csv")
    assert [row["path"] for row in rows] == [f"val/{c}/{i}.png" for c in "ab" for i in range(3)]
    assert [row["label"] for row in rows] == list("aaabbb")
    assert [(row["class"] == "", row["score_2"] == "") for row in rows].index((True, True)) == 4
    correct = sum(row["class"] == row["label"] for row in rows)
    assert f"top-1 {100 * correct / 6:.2f} % on 6 images" in out
    for path in (images / "val").rglob("*.png"):
        path.write_text("broken")
    code, out, err = script("tools/predict.py", *argv, "--out", tmp_path / "none.csv")
    assert code == 1 and "none of the images can be read" in err
    assert not (tmp_path / "none.csv").exists()


def test_images_without_labels_get_predictions_alone(images, tmp_path, succeed):
    argv = (*FP32, "--pretrained", save_classifier(tmp_path / "c.pth", ["a", "b"]))
    (folder := tmp_path / "folder").mkdir()
    for i in range(2):
        shutil.copy(images / f"val/a/{i}.png", folder)
    (folder / "list.txt").write_text("0.png\n1.png\n")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder / "0.png", "0.png")
        archive.add(folder / "1.png", "1.png")
    tables = []
    for data in (folder, folder / "list.txt", tmp_path / "images.tar"):
        out = succeed("tools/predict.py", data, *argv, "--out", tmp_path / f"{data.name}.csv")
        assert "labels are not used" in out and "top-1" not in out
        tables.append(read(tmp_path / f"{data.name}.csv"))
        assert [row.pop("path")[-5:] for row in tables[-1]] == ["0.png", "1.png"]
    assert tables[0] == tables[1] == tables[2]
    assert list(tables[0][0]) == ["class", "score", "class_2", "score_2"]
    assert not list(tmp_path.glob("*_classes.csv"))


def test_labels_of_other_classes_are_refused_unless_they_are_none(
    images, tmp_path, refusal, succeed
):
    out = ("--out", tmp_path / "p.csv")
    argv = (images, *FP32, "--pretrained", save_classifier(tmp_path / "c.pth", ["a", "cat"]))
    line = refusal("tools/predict.py", *argv, *out)
    assert "has classes that" in line and "b" in line and "--no-labels predicts without" in line
    succeed("tools/predict.py", *argv, "--split", "train", "--no-labels", *out)
    assert len(read(tmp_path / "p.csv")) == 16


def test_without_names_classes_are_those_of_the_images_or_numbers(images, tmp_path, succeed):
    argv = (images / "train", *FP32, "--pretrained", save_classifier(tmp_path / "c.pth", None))
    out = succeed("tools/predict.py", *argv, "--out", tmp_path / "p.csv")
    assert "c.pth states no class names: the images' are taken, in order" in out
    succeed("tools/predict.py", *argv, "--no-labels", "--out", tmp_path / "n.csv")
    named, numbered = read(tmp_path / "p.csv"), read(tmp_path / "n.csv")
    assert [row["class"] for row in named] == ["ab"[int(row["class"])] for row in numbered]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out", "p.txt"], "must end in .csv"),
        (["--out", "p.csv", "--top-k", "3"], "--top-k 3: "),
        (["--out", "taken.csv"], "exists already: name another --out"),
        (["--out", "taken.csv/p.csv"], "can't write"),
        (["--out", "{images}/val/p.csv"], "is among the images of"),
        (["--out", "p.csv", "--pretrained", "{pretrained}"], "has no classifier"),
    ],
)
def test_an_error_is_one_line(images, pretrained, tmp_path, monkeypatch, refusal, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.csv").write_text("mine")
    flags = [flag.format(images=images, pretrained=pretrained) for flag in flags]
    argv = (images, *FP32, "--pretrained", save_classifier(tmp_path / "c.pth", ["a", "b"]))
    assert words in refusal("tools/predict.py", *argv, *flags)
    assert (tmp_path / "taken.csv").read_text() == "mine"


def test_the_picture_has_percents_of_each_label():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 0, 1, 1, -1, 0])
    figure = predict.draw_confusion(labels, predicted, ["a", "$b^{$", "c" * 30])
    [axes] = figure.axes
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "75", (1, 0): "25", (1, 1): "50", (3, 1): "50", (0, 2): "100"}
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == ["a", "$b^{$", "cccccccccccc…ccccccccccc", "unreadable"]
    assert_readable(figure)


def test_of_many_classes_those_with_most_errors_are_drawn():
    labels = torch.arange(100).repeat(2)
    predicted = labels.clone()
    predicted[50:90] = 0
    figure = predict.draw_confusion(labels, predicted, [f"class {i}" for i in range(100)])
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"class {i}" for i in range(50, 80)
    ]
    assert axes.get_xticklabels()[-1].get_text() == "other classes"
    assert_readable(figure)
