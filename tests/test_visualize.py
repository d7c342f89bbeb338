"""The pictures: what they show against the formulas, and that nothing in them is cut."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from matplotlib.text import Text
from timm.layers import set_fused_attn

from moco import UserError
from moco.augment import normalize
from moco.backbones import create_backbone
from moco.builder import features
from moco.log import distinct_names
from moco.sources import load_data

sys.path.insert(0, str(ROOT / "tools"))

import visualize


def draw(picture, pretrained, out, *flags, where="digits"):
    """Draws it; → what visualize.draw_… was given, and the figure."""
    name, calls = f"draw_{picture}", []
    drawer = getattr(visualize, name)

    def remember(*args, **kwargs):
        calls.append((args, drawer(*args, **kwargs)))
        return calls[-1][1]

    flags = ["--workers", "0", "--device", "cpu", "--amp", "off", "--out", out, *flags]
    args = [picture, where, "--pretrained", pretrained, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, name, remember)
        visualize.main(visualize.parse_args([str(arg) for arg in args]))
    assert out.read_bytes().startswith(b"\x89PNG")
    return calls[0]


def assert_readable(figure):
    """Every text lies within the picture, and no caption reaches into the next cell's."""
    figure.draw_without_rendering()
    frame = figure.bbox
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        if text.get_visible() and text.get_text():
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text
            assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text
    captions = [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    for i, one in enumerate(captions):
        assert not any(one.overlaps(other) for other in captions[:i] if one.width and other.width)


@pytest.fixture
def photographs(image_file):
    """Classes with long names, of photographs that are not square."""
    for split, n in (("train", 4), ("val", 2)):
        for name in ("wwwwwwwwwwwwwwwwww", "n01440764", "dog"):
            for i in range(n):
                path = image_file(f"photographs/{split}/{name}/WWWWWWWWWWWWWWWWWWWW{i:05}.png")
    return path.parents[2]


def test_attention_is_the_softmax_of_the_last_block():
    fused = create_backbone("vit_nano", (16, 24), 4).eval()
    assert fused.blocks[-1].attn.fused_attn
    set_fused_attn(False)
    model = create_backbone("vit_nano", (16, 24), 4).eval()
    model.load_state_dict(fused.state_dict())
    images = torch.randn(3, 3, 16, 24)

    seen = []
    fused.blocks[-1].attn.qkv.register_forward_hook(lambda m, x, qkv: seen.append(qkv))
    with torch.no_grad():
        fused(images)
        found = visualize.class_attention(model, images)
    q, k, _ = seen[0].view(3, 25, 3, 4, 32).permute(2, 0, 3, 1, 4)  # [3, heads, 1+P, d/heads]
    weights = torch.softmax(q[:, :, :1] @ k.transpose(-1, -2) / 32**0.5, dim=-1)
    torch.testing.assert_close(found, weights[:, :, 0, 1:].view(3, 4, 4, 6))


def test_attention_is_drawn_of_each_head(pretrained, tmp_path, photographs):
    (_, maps, words), figure = draw("attention", pretrained, tmp_path / "a.png", "--images", "10")
    assert maps.shape == (10, 4, 4, 4) and words == [str(i) for i in range(10)]
    assert len(figure.axes) == 10 * 5
    assert_readable(figure)

    flags = ["--img-size", "16", "32"]
    (images, maps, words), figure = draw(
        "attention", pretrained, tmp_path / "b.png", *flags, where=photographs
    )
    assert images.shape == (6, 3, 16, 32) and maps.shape == (6, 4, 4, 8)
    assert words == ["dog", "dog", "n01440764", "n01440764", "www…wwwwww", "www…wwwwww"]
    assert_readable(figure)


def test_neighbours_are_the_nearest_by_cosine(pretrained, tmp_path):
    (queries, found, similarity, same, words, others), figure = draw(
        "neighbours", pretrained, tmp_path / "n.png", "--images", "10", "-k", "3"
    )
    assert_readable(figure)
    assert words == [str(i) for i in range(10)]  # one of each class

    args = visualize.parse_args(["neighbours", "digits", "--pretrained", str(pretrained)])
    model, _ = visualize.load_model(args, torch.device("cpu"))
    digits = load_data("digits")
    bank = normalize(digits.train.images.float() / 255)
    with torch.no_grad():
        h, keys = features(model, queries), features(model, bank)
    expected = torch.nn.functional.cosine_similarity(h[:, None], keys, dim=-1)
    values, nearest = expected.sort(descending=True)
    torch.testing.assert_close(similarity, values[:, :3])
    assert torch.equal(found, bank[nearest[:, :3]])
    labels = digits.train.labels[nearest[:, :3]]
    assert torch.equal(same, labels == torch.arange(10)[:, None])
    assert others == [str(int(label)) for label in labels.flatten()]


def test_without_val_an_image_is_no_neighbour_of_its_own(pretrained, tmp_path, photographs):
    where = photographs / "train" / "dog"
    for i, path in enumerate(sorted(where.glob("*"))):
        path.rename(where / f"{i}.png")
    (_, found, _, same, words, others), figure = draw(
        "neighbours", pretrained, tmp_path / "n.png", where=where
    )
    assert found.shape[:2] == (4, 3) and same is False  # the other three; there are no labels
    for query, name in enumerate(words):
        assert sorted([name, *others[3 * query : 3 * query + 3]]) == ["0", "1", "2", "3"]
    assert_readable(figure)


def test_a_single_image_has_no_neighbours(pretrained, tmp_path, image_file):
    with pytest.raises(UserError, match="a single image has no neighbours"):
        draw("neighbours", pretrained, tmp_path / "n.png", where=image_file("one/1.png").parent)


def test_captions_of_neighbours_fit(pretrained, tmp_path, photographs):
    for k in (1, 8):
        flags = ["-k", k, "--images", "3", "--knn-bank", "9"]
        _, figure = draw("neighbours", pretrained, tmp_path / "n.png", *flags, where=photographs)
        assert_readable(figure)


def test_attention_of_a_resnet_is_refused(tmp_path):
    state = create_backbone("resnet18", 16).state_dict()
    state = {f"module.base_encoder.{key}": value for key, value in state.items()}
    torch.save(dict(arch="resnet18", img_size=(16, 16), state_dict=state), tmp_path / "r.pth")
    with pytest.raises(UserError, match="resnet18 has no attention"):
        draw("attention", tmp_path / "r.pth", tmp_path / "a.png")
    draw("neighbours", tmp_path / "r.pth", tmp_path / "n.png", "--images", "2", "--knn-bank", "20")


def test_curves_of_several_runs_are_overlaid(tmp_path, script):
    runs = [tmp_path / f"a_run_with_a_rather_long_name_{i}" for i in range(5)]
    for i, run in enumerate(runs):
        run.mkdir()
        rows = [{"epoch": e, "step": e, "loss": 5 - e + i, "chance": 6, "acc1 lr 1": 50 + i,
                 "acc1 lr 3": 60 + i} for e in range(4)]  # fmt: skip
        (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for chosen in (runs[:1], runs):
        out = tmp_path / "new" / f"{len(chosen)}.png"
        code, said, _ = script("tools/visualize.py", "curves", *chosen, "--out", out)
        assert code == 0 and said.strip() == str(out)
        assert out.read_bytes().startswith(b"\x89PNG")


def test_runs_are_named_by_as_few_folders_as_tell_them_apart():
    assert distinct_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert distinct_names(["/x/a/0", "/x/b/0/", "/y/1"]) == ["a/0", "b/0", "y/1"]


@pytest.mark.parametrize(
    "args, line",
    [
        (["curves", "nowhere"], "nowhere is no run: it has no log.jsonl"),
        (["curves", "nowhere", "--out", "x.pdf"], "must end in .png"),
        (["attention", "digits"], "--pretrained"),
        ([], "PICTURE"),
    ],
)
def test_an_error_is_one_line(script, args, line):
    code, _, err = script("tools/visualize.py", *args)
    assert code == 2 and err.count("\n") == 1 and line in err


def test_torchrun_is_refused(script, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, _, err = script("tools/visualize.py", "curves", "nowhere")
    assert code == 2 and "drawn by one process" in err
