"""The pictures: what they show against the formulas, and that nothing in them is cut."""

import json
import os
import sys

import pytest
import timm
import torch
from conftest import FP32, ROOT
from matplotlib.text import Text
from PIL import Image
from timm.layers import set_fused_attn

from engine.backbones import BackboneConfig, choose_config, create_backbone
from engine.data.splits import load_splits, open_source
from engine.errors import UserError
from engine.weights import create_pretrained_backbone
from moco.augmentation import normalize

sys.path.insert(0, str(ROOT / "tools"))

import visualize


def draw(picture, pretrained, out, *flags, data="digits"):
    """Draws it → what visualize.draw_… was given, and the figure."""
    name, calls = f"draw_{picture}", []
    drawer = getattr(visualize, name)

    def remember(*args, **kwargs):
        calls.append((args, drawer(*args, **kwargs)))
        return calls[-1][1]

    args = [picture, data, "--pretrained", pretrained, *FP32, "--out", out, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, name, remember)
        visualize.main(visualize.parse_args([str(arg) for arg in args]))
    assert out.read_bytes().startswith(b"\x89PNG")
    return calls[0]


def assert_readable(figure):
    """Every text lies within the picture."""
    figure.draw_without_rendering()
    frame = figure.bbox
    for text in figure.findobj(Text):
        box = text.get_window_extent()
        if text.get_visible() and text.get_text():
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text
            assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text


@pytest.fixture
def photographs(image_file):
    """Classes with long names, of photographs that are not square."""
    for split, n in (("train", 4), ("val", 2)):
        for name in ("wwwwwwwwwwwwwwwwww", "n01440764", "dog"):
            for i in range(n):
                path = image_file(f"photographs/{split}/{name}/WWWWWWWWWWWWWWWWWWWW{i:05}.png")
    return path.parents[2]


def test_attention_is_the_softmax_of_the_last_block():
    fused = create_backbone(BackboneConfig("vit_nano", (16, 24), 4)).eval()
    assert fused.blocks[-1].attn.fused_attn
    set_fused_attn(False)
    model = create_backbone(BackboneConfig("vit_nano", (16, 24), 4)).eval()
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


def test_attention_is_drawn_of_each_head(tmp_path, photographs):
    pretrained = save_backbone(tmp_path / "b.pth", "vit_nano", 16, patch_size=(4, 4))
    (_, maps, captions, _), figure = draw(
        "attention", pretrained, tmp_path / "a.png", "--images", "5"
    )
    assert maps.shape == (5, 4, 4, 4) and captions == ["0", "3", "4", "7", "9"]
    assert len(figure.axes) == 5 * 5
    assert_readable(figure)

    flags = ["--img-size", "16", "32"]
    (images, maps, captions, _), figure = draw(
        "attention", pretrained, tmp_path / "b.png", *flags, data=photographs
    )
    assert images.shape == (6, 3, 16, 32) and maps.shape == (6, 4, 4, 8)
    assert captions == ["dog", "dog", "n01440764", "n01440764", "www…wwwwww", "www…wwwwww"]
    assert_readable(figure)


@pytest.fixture
def odd_names(image_file):
    """Images whose names would be formulas, aren't Unicode, or aren't in the font."""
    names = [b"a$b$c", b"$x^{_$", b"caf\xe9", "猫".encode(), b"new\nline", "é".encode()]
    folder = image_file("odd/plain.png").parent
    for name in names:
        (folder / os.fsdecode(name + b".png")).write_bytes((folder / "plain.png").read_bytes())
    return folder


@pytest.mark.filterwarnings("error")  # of glyphs that the font lacks
def test_names_are_drawn_literally(pretrained, tmp_path, odd_names):
    flags = ["--images", "7", "--img-size", "16"]
    (_, _, captions, _), figure = draw(
        "attention", pretrained, tmp_path / "a.png", *flags, data=odd_names
    )
    odd = ["a$b$c", "$x^{_$", r"caf\udce9", r"\u732b", r"new\nline", "é", "plain"]
    assert sorted(captions) == sorted(odd)
    assert_readable(figure)
    labels = [axes.xaxis.label for axes in figure.axes[::5]]
    assert not any(label.get_parse_math() for label in labels)


def test_runs_are_named_literally(tmp_path, succeed):
    runs = [tmp_path / name for name in ("$y^{$", "_x$a$")]
    for run in runs:
        run.mkdir()
        (run / "log.jsonl").write_text('{"epoch": 1, "step": 1, "loss": 5}\n')
    succeed("tools/visualize.py", "curves", *runs, "--out", tmp_path / "c.png")


@pytest.mark.parametrize("arch", ["vit_nano", "vit_conv_nano", "timm/test_vit2"])
def test_pca_is_of_the_normalized_patches(arch):
    size = (16, 32) if arch.startswith("vit") else (32, 64)
    model = create_backbone(BackboneConfig(arch, size, (8, 8) if size[0] == 16 else None)).eval()
    seen, images = [], torch.randn(2, 3, *size)
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model.forward_features(images)
        found = visualize.patch_tokens(model, images, arch)
    assert found.shape[:3] == (2, 2, 4)
    torch.testing.assert_close(found.flatten(1, 2), seen[0][:, -8:])


def test_colors_are_components_over_all_images():
    patches = torch.randn(4, 5, 6, 20) * torch.linspace(0.1, 3, 20)
    colors, explained = visualize.component_colors(patches)
    x = patches.double().flatten(0, 2)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert explained == pytest.approx(float((s[:3] ** 2).sum() / (s**2).sum()))
    inside = (colors > 0) & (colors < 1)
    assert inside.float().mean() > 0.95 and (colors.min(), colors.max()) == (0, 1)
    for i in range(3):  # up to the sign, and linear between the ends
        values = torch.stack([colors.flatten(0, 2)[:, i], u[:, i]])[:, inside.flatten(0, 2)[:, i]]
        assert abs(torch.corrcoef(values)[0, 1]) == pytest.approx(1, abs=1e-9)
    same, _ = visualize.component_colors(torch.ones(1, 2, 2, 20))
    assert same.isfinite().all()


def test_pca_is_drawn_beside_each_image(tmp_path, pretrained):
    for n in (1, 5):
        flags = ["--images", n, "--img-size", "32"]
        (images, colors, _, captions, _), figure = draw(
            "pca", pretrained, tmp_path / "p.png", *flags
        )
        assert (
            images.shape == (n, 3, 32, 32) and colors.shape == (n, 4, 4, 3) and len(captions) == n
        )
        assert sum(len(axes.images) for axes in figure.axes) == 2 * n
        assert_readable(figure)


@pytest.mark.parametrize("arch, size", [("resnet18", 16), ("timm/convnext_atto", 32)])
def test_pca_without_patches_is_refused(tmp_path, arch, size):
    path = save_backbone(tmp_path / "b.pth", arch, size)
    with pytest.raises(UserError, match=f"{arch} has no grid of patches: pca is drawn for ViTs"):
        draw("pca", path, tmp_path / "p.png")


def test_neighbours_are_the_nearest_by_cosine(pretrained, tmp_path):
    (queries, found, similarity, same_class, captions, found_captions, _), figure = draw(
        "neighbours", pretrained, tmp_path / "n.png", "--images", "10", "-k", "3"
    )
    assert_readable(figure)
    assert captions == [str(i) for i in range(10)]  # one of each class

    model, _ = create_pretrained_backbone(pretrained, {})
    digits = load_splits(open_source("digits"))
    bank = normalize(digits.train.images.float() / 255)
    with torch.no_grad():
        h, bank_h = model.eval()(queries), model(bank)
    expected = torch.nn.functional.cosine_similarity(h[:, None], bank_h, dim=-1)
    nearest = expected.argsort(descending=True)
    unit = torch.nn.functional.normalize
    mean = unit(bank_h).mean(0)  # the numbers are cosines without what all features share
    centered = unit(unit(h) - mean) @ unit(unit(bank_h) - mean).T
    torch.testing.assert_close(similarity, centered.gather(1, nearest[:, :3]))
    assert torch.equal(found, bank[nearest[:, :3]])
    labels = digits.train.labels[nearest[:, :3]]
    assert torch.equal(same_class, labels == torch.arange(10)[:, None])
    assert found_captions == [str(int(label)) for label in labels.flatten()]


@pytest.fixture
def dogs(photographs):
    """A folder of four images without labels: 0.png to 3.png, all of other pixels."""
    folder = photographs / "train" / "dog"
    for i, path in enumerate(sorted(folder.glob("*"))):
        with Image.open(path) as image:
            image.rotate(90 * i).save(folder / f"{i}.png")
        path.unlink()
    return folder


def test_without_val_an_image_is_no_neighbour_of_its_own(pretrained, tmp_path, dogs):
    (_, found, _, same_class, captions, found_captions, _), figure = draw(
        "neighbours", pretrained, tmp_path / "n.png", data=dogs
    )
    assert found.shape[:2] == (4, 3) and same_class is None  # the other three; without labels
    for i, name in enumerate(captions):
        assert sorted([name, *found_captions[3 * i : 3 * i + 3]]) == ["0", "1", "2", "3"]
    assert_readable(figure)


def test_unreadable_images_leave_the_others_their_names(pretrained, tmp_path, dogs, capsys):
    def found_names():
        """{query: the names of its neighbours, nearest first}."""
        (_, found, _, _, captions, found_captions, _), _ = draw(
            "neighbours", pretrained, tmp_path / "n.png", data=dogs
        )
        k = found.shape[1]
        return {name: found_captions[k * i : k * i + k] for i, name in enumerate(captions)}

    before = found_names()
    (dogs / "1.png").write_text("broken")
    after = found_names()
    assert "1.png" in capsys.readouterr().err and before.pop("1")
    assert after == {query: [n for n in names if n != "1"] for query, names in before.items()}


def test_a_single_image_has_no_neighbours(pretrained, tmp_path, image_file):
    folder = image_file("one/1.png").parent
    with pytest.raises(UserError, match="a single image has no neighbours"):
        draw("neighbours", pretrained, tmp_path / "n.png", data=folder)
    (folder / "1.png").write_text("broken")
    for picture in ("attention", "neighbours"):
        with pytest.raises(UserError, match="none of the images can be read"):
            draw(picture, pretrained, tmp_path / "n.png", data=folder)


def skip_unless_known(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")


def save_backbone(path, arch, size, **kwargs):
    config = choose_config(dict(arch=arch, img_size=size, **kwargs))
    state = create_backbone(config).state_dict()
    state = {f"module.base_encoder.{key}": value for key, value in state.items()}
    torch.save(dict(arch=arch, img_size=(size, size), **kwargs, state_dict=state), path)
    return path


def token_that_sees(model, image, row, column):
    """Of the tokens that enter the first block the one that a patch of the image makes."""
    tokens, (grid_h, grid_w) = [], model.patch_embed.grid_size
    h, w = image.shape[1] // grid_h, image.shape[2] // grid_w
    changed = image.clone()
    changed[:, row * h : (row + 1) * h, column * w : (column + 1) * w] += 1
    hook = model.blocks[0].register_forward_pre_hook(lambda block, args: tokens.append(args[0]))
    model(torch.stack([image, changed]))
    hook.remove()
    return int((tokens[0][0] - tokens[0][1]).abs().sum(-1).argmax())


WITH_CLASS_TOKEN = [
    "test_vit",
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",  # with four registers
    pytest.param("vit_small_patch16_rope_224", marks=pytest.mark.slow),
    pytest.param("vit_tiny_r_s16_p8_224", marks=pytest.mark.slow),  # with a convolutional stem
    pytest.param("vit_xsmall_patch16_clip_224", marks=pytest.mark.slow),
    pytest.param("deit3_small_patch16_224", marks=pytest.mark.slow),
    pytest.param("flexivit_small", marks=pytest.mark.slow),
    pytest.param("eva02_base_patch16_clip_224", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", WITH_CLASS_TOKEN)
def test_attention_is_that_of_the_class_token_to_the_patches(name):
    skip_unless_known(name)
    size = timm.get_pretrained_cfg(name).input_size[1]
    size = 56 if size > 500 else size
    set_fused_attn(False)
    model = create_backbone(BackboneConfig(f"timm/{name}", size)).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))
    visualize.check_class_token(model, name)
    image, weights, outputs = torch.randn(3, size, size), [], []

    def keep_output(block, args, output):
        outputs.append(output.requires_grad_())
        return output

    attn_drop = model.blocks[-1].attn.attn_drop
    attn_drop.register_forward_hook(lambda module, args, output: weights.append(output))
    hook = model.blocks[-1].register_forward_hook(keep_output)
    features = model(image[None])
    (features * torch.randn_like(features)).sum().backward()
    hook.remove()
    used = outputs[0].grad[0].abs().sum(-1).nonzero().flatten()
    assert used.tolist() == [0]  # the first token alone makes the features

    maps = visualize.class_attention(model, image[None])
    height, width = maps.shape[2:]
    assert (height, width) == tuple(model.patch_embed.grid_size)
    row, column = height // 2, width // 3
    seen = weights[0][:, :, 0, token_that_sees(model, image, row, column)]
    torch.testing.assert_close(maps[:, :, row, column], seen)


WITHOUT = [
    ("resnet18", 16, "resnet18 has no class token: attention is drawn for ViTs that have one"),
    ("timm/test_vit2", 32, "has no class token"),  # the mean over patches
    ("timm/test_vit3", 32, "has no class token"),  # attention pooling
    ("timm/test_vit4", 32, "has no class token"),  # registers alone
    ("timm/vit_relpos_small_patch16_224", 32, "has no class token"),
    ("timm/swin_tiny_patch4_window7_224", 224, "has no class token"),  # windows
    ("timm/hiera_tiny_224", 224, "has no class token"),
    ("timm/xcit_nano_12_p16_224", 32, "has no attention to draw"),  # between channels
    ("timm/cait_xxs24_224", 32, "has no attention to draw"),  # the class token comes last
    ("timm/pit_ti_224", 224, "has no attention to draw"),
    ("timm/tnt_s_legacy_patch16_224", 224, "has no attention to draw"),
    ("timm/vit_small_patch16_dinov3", 32, "are its patches, pooled .avg., not its class token"),
    ("timm/beit_base_patch16_224", 224, "are its patches, pooled .avg., not its class token"),
    ("timm/eva02_tiny_patch14_224", 28, "are its patches, pooled .avg., not its class token"),
]
FAST = (
    "resnet18",
    "timm/test_vit2",
    "timm/test_vit4",
    "timm/xcit_nano_12_p16_224",
    "timm/eva02_tiny_patch14_224",
)


@pytest.mark.parametrize(
    "arch, size, message",
    [
        pytest.param(*case, marks=[] if case[0] in FAST else pytest.mark.slow, id=case[0])
        for case in WITHOUT
    ],
)
def test_attention_without_a_class_token_is_refused(tmp_path, arch, size, message):
    if arch.startswith("timm/"):
        skip_unless_known(arch.removeprefix("timm/"))
    path = save_backbone(tmp_path / "b.pth", arch, size)
    with pytest.raises(UserError, match=message):
        draw("attention", path, tmp_path / "a.png")


def test_neighbours_are_drawn_of_any_backbone(tmp_path):
    path = save_backbone(tmp_path / "r.pth", "resnet18", 16, in_chans=1)
    draw("neighbours", path, tmp_path / "n.png", "--images", "2", "--knn-bank", "20")


def test_curves_of_several_runs_are_overlaid(tmp_path, script):
    runs = [tmp_path / f"a_run_with_a_rather_long_name_{i}" for i in range(5)]
    for i, run in enumerate(runs):
        run.mkdir()
        acc1 = {"acc1/lr1": 50 + i, "acc1/lr3": 60 + i}
        lines = [dict(epoch=e, step=e, loss=5 - e + i, chance=6, **acc1) for e in range(4)]
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for chosen in (runs[:1], runs):
        out = tmp_path / "new" / f"{len(chosen)}.png"
        code, printed, _ = script("tools/visualize.py", "curves", *chosen, "--out", out)
        assert code == 0 and printed.strip() == str(out)
        assert out.read_bytes().startswith(b"\x89PNG")


def test_runs_are_named_by_as_few_folders_as_tell_them_apart():
    assert visualize.distinct_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert visualize.distinct_names(["/x/a/0", "/x/b/0/", "/y/1"]) == ["a/0", "b/0", "y/1"]


@pytest.mark.parametrize(
    "args, line",
    [
        (["curves", "nowhere"], "nowhere is not the folder of a run: it has no log.jsonl"),
        (["curves", "nowhere", "--out", "x.pdf"], "must end in .png"),
        (["attention", "digits"], "--pretrained"),
        ([], "PICTURE"),
    ],
)
def test_an_error_is_one_line(refusal, args, line):
    assert line in refusal("tools/visualize.py", *args)


def test_torchrun_is_refused(refusal, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert "drawn by one process" in refusal("tools/visualize.py", "curves", "nowhere")
