"""The linear probe as its users run it."""

import pytest
import torch
from conftest import CPU, FP32, PROBE, ROOT, interrupted_after_saving, launch
from official import linear, pretraining

import main_lincls
from engine import checkpoint
from engine.log import read_log


@pytest.fixture
def probe(succeed):
    def run(folder, *args, data="digits"):
        return succeed("main_lincls.py", data, *PROBE[1:], "--output-dir", folder, *args)

    return run


def state(path):
    return checkpoint.load(path)["state_dict"]


def test_a_probe_leaves_what_it_promises(probe, succeed, tmp_path, pretrained):
    out = probe(tmp_path, "--pretrained", pretrained, "--lr", 0.3, 3, "--knn")
    for k in (10, 100, 200):
        assert f"% with k {k}, bank 1,437" in out
    assert "% with k 20 (that of the pre-training log), bank 1,437" in out
    assert "lr 0.3     last top-1" in out and "linear  top-1" in out
    files = {path.name for path in tmp_path.iterdir()}
    assert {"args.json", "log.jsonl", "curves.png", "checkpoint.pth"} <= files
    assert {"linear_lr0.3.pth", "linear_lr3.pth"} <= files
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "acc1/lr3" in line]
    assert [line["step"] for line in lines] == [5, 10]

    saved = checkpoint.load(tmp_path / "linear_lr3.pth")
    assert {"epoch", "arch", "state_dict", "best_acc1", "num_heads", "img_size"} <= saved.keys()
    assert saved["state_dict"]["module.head.weight"].shape == (10, 128)

    saved = ("--pretrained", tmp_path / "linear_lr3.pth", "--evaluate")
    assert f"top-1 {lines[-1]['acc1/lr3']:.2f} %" in succeed("main_lincls.py", *PROBE, *saved)


@pytest.mark.parametrize("arch", ["vit_conv_nano", "resnet18"])
def test_the_backbone_and_its_statistics_stay_as_they_are(probe, tmp_path, two_classes, arch):
    size = 16 if arch == "vit_conv_nano" else 32
    patch = ["--patch-size", 4] if arch == "vit_conv_nano" else []
    argv = ["--from-scratch", "-a", arch, "--img-size", size, *patch, "--lr", 1, "-b", 8]
    probe(tmp_path / "0", *argv, "--epochs", 1, data=two_classes)
    probe(tmp_path / "1", *argv, "--epochs", 2, data=two_classes)
    once, twice = (state(tmp_path / n / "linear_lr1.pth") for n in "01")
    for key, value in once.items():
        head = key.startswith(("module.head.", "module.fc."))
        assert torch.equal(value, twice[key]) != head, key


def test_the_backbone_is_the_pretrained_one(probe, tmp_path, pretrained):
    probe(tmp_path, "--pretrained", pretrained)
    before, after = state(pretrained), state(tmp_path / "linear_lr0.1.pth")
    for key, value in after.items():
        if not key.startswith("module.head."):
            assert torch.equal(value, before[key.replace("module.", "module.base_encoder.")]), key


def test_an_lr_in_a_sweep_trains_as_it_does_alone(probe, tmp_path, pretrained):
    probe(tmp_path / "many", "--pretrained", pretrained, "--lr", 0.1, 30, 1)
    for lr in ("0.1", "30", "1"):
        probe(tmp_path / lr, "--pretrained", pretrained, "--lr", lr)
        many = state(tmp_path / "many" / f"linear_lr{lr}.pth")
        for key, value in state(tmp_path / lr / f"linear_lr{lr}.pth").items():
            assert torch.equal(value, many[key]), (lr, key)


def test_a_single_lr_is_the_published_protocol():
    """SGD with momentum .9, no decay, lr · batch/256 by a cosine per epoch: torch.optim agrees."""
    args = main_lincls.parse_args(["digits", "--from-scratch", "-a", "vit_nano", "--lr", "3"])
    assert (args.epochs, args.batch_size, args.crop_min) == (90, 1024, 0.08)
    [classifier] = main_lincls.create_classifiers(args, 4096, 1000).linears
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert (classifier.bias == 0).all()

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3 * 1024 / 256)
    published = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    for epoch in range(90):
        assert main_lincls.epoch_lrs(args, epoch) == pytest.approx(published.get_last_lr())
        optimizer.step()
        published.step()


def test_interrupted_and_resumed_equals_uninterrupted(script, probe, tmp_path, pretrained):
    argv = ["--pretrained", pretrained, "--lr", 1, 3]
    probe(tmp_path / "whole", *argv)
    broken = tmp_path / "broken"
    with interrupted_after_saving():
        assert script("main_lincls.py", *PROBE, "--output-dir", broken, *argv)[0] == 130
    probe(broken, *argv, "--resume", "auto")
    for name in ("linear_lr1.pth", "linear_lr3.pth"):
        whole, resumed = state(tmp_path / "whole" / name), state(broken / name)
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    assert "linear  top-1" in probe(broken, *argv, "--resume", "auto")  # nothing left to do


def test_a_batch_that_is_too_large_is_refused_before_knn(script, tmp_path, pretrained):
    argv = ("--pretrained", pretrained, "--knn", "-b", 4096, "--output-dir", tmp_path / "run", *CPU)
    code, out, err = script("main_lincls.py", "digits", *argv)
    assert code == 2 and "images don't fill one" in err and "kNN" not in out


def test_a_probe_of_other_weights_is_not_resumed(script, refusal, probe, tmp_path, pretrained):
    path, run = tmp_path / "pretrained.pth", tmp_path / "probe"
    state = checkpoint.load(pretrained)
    torch.save(state, path)
    with interrupted_after_saving():
        argv = ("--output-dir", run, "--pretrained", path)
        assert script("main_lincls.py", *PROBE, *argv)[0] == 130
    state["state_dict"]["module.base_encoder.cls_token"] += 1
    torch.save(state, path)  # the run that is probed has gone on
    argv = ("--pretrained", path, "--resume", "auto")
    err = refusal("main_lincls.py", *PROBE, "--output-dir", run, *argv)
    assert f"other weights in {path}" in err
    assert "other weights" in probe(run, *argv, "--allow-changed-args")


def test_the_loss_is_the_same_on_any_number_of_processes(tmp_path, pretrained):
    losses = []
    for size in (1, 2):
        argv = [*PROBE, "--epochs", 1, "--pretrained", pretrained, "--lr", 0.1, 1, "--batchnorm"]
        done = launch(size, "main_lincls.py", *argv, "--output-dir", tmp_path / str(size))
        assert done.returncode == 0, done.stderr
        lines = read_log(tmp_path / str(size) / "log.jsonl")
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_accuracy_is_the_same_on_any_number_of_processes(succeed, probe, tmp_path, pretrained):
    probe(tmp_path, "--pretrained", pretrained, "--lr", 3)
    argv = ["digits", *CPU, "--pretrained", tmp_path / "linear_lr3.pth", "--evaluate", "--knn"]
    one = succeed("main_lincls.py", *argv)
    two, three = (launch(size, "main_lincls.py", *argv).stdout for size in (2, 3))
    assert one.count("kNN") == 4 and "on 360 images" in one
    assert one == two == three


def test_batchnorm_is_folded_into_the_classifier():
    args = main_lincls.parse_args(["digits", "--from-scratch", "-a", "vit_nano", "--batchnorm"])
    classifiers = main_lincls.create_classifiers(args, 8, 3).double()
    for _ in range(3):
        classifiers(3 + 2 * torch.randn(16, 8, dtype=torch.float64))
    h = torch.randn(5, 8, dtype=torch.float64)
    [logits], [linear] = classifiers.eval()(h), classifiers.export()
    torch.testing.assert_close(linear(h), logits)


def test_an_lr_that_diverges_leaves_the_others(probe, tmp_path, pretrained):
    out = probe(tmp_path, "--pretrained", pretrained, "--lr", 1, 1e38)
    assert out.count("(diverged)") == 1 and out.rstrip().endswith("lr 1")


@pytest.mark.parametrize("arch", ["resnet18", pytest.param("vit_small", marks=pytest.mark.slow)])
def test_official_files_are_read(succeed, tmp_path, image_file, arch):
    for split in ("train", "val"):
        for name in "abcd":
            image_file(f"data/{split}/{name[0] < 'c'}/{name}.png")
    torch.save(pretraining(arch), tmp_path / "pre.pth")
    torch.save(linear(arch, 2), tmp_path / "linear.pth")
    argv = (tmp_path / "data", "--img-size", 64, *FP32)
    pre = ("--pretrained", tmp_path / "pre.pth")
    evaluate = ("--pretrained", tmp_path / "linear.pth", "--evaluate")
    out = succeed("main_lincls.py", *argv, *pre, "--knn", "--epochs", 0)
    assert f"model   {arch}, frozen, from {pre[1]}\ndata    {argv[0]}: 4 images to train" in out
    assert out.endswith(", on 4 images\n")
    assert "top-1" in succeed("main_lincls.py", *argv, *evaluate)
    argv += ("--epochs", 1, "--warmup-epochs", 0, "-b", 2)
    tune = ("--lr", 1, "--drop-path", 0, "--output-dir", tmp_path / "tuned")
    succeed("main_finetune.py", *argv, *pre, *tune)
    init = ("-a", arch, "--init-from", tmp_path / "pre.pth", "--knn-every", 0)
    succeed("main_moco.py", *argv, *init, "--output-dir", tmp_path / "moco")


BAD = {
    "no weights": ("digits", "give --pretrained CKPT, or as a control --from-scratch and -a"),
    "no backbone": ("digits --from-scratch", "give --pretrained CKPT, or as a control"),
    "random to evaluate": ("digits --pretrained {pre} --from-scratch --evaluate", "leaves nothing"),
    "missing path": ("digits --pretrained nope.pth", "no checkpoint at nope.pth"),
    "no checkpoint": ("digits --pretrained {root}/README.md", "can't be read as a checkpoint"),
    "wrong arch": ("digits --pretrained {pre} -a vit_small", "holds vit_nano, not vit_small"),
    "wrong patch": ("digits --pretrained {pre} --patch-size 4", "size mismatch for patch_embed"),
    "wrong heads": ("digits --pretrained {six}", "trained with 6 heads, this model has 12"),
    "no arch": ("digits --pretrained {plain}", "states no architecture: name it"),
    "no backbone in it": ("digits --pretrained {probe}", "has a probe's classifiers alone"),
    "nothing to evaluate": ("digits --pretrained {pre} --evaluate", "has no classifier: train one"),
    "other classes": (
        "digits --pretrained {linear} --evaluate --img-size 32",
        "has 7 classes, the images have 10",
    ),
    "missing folder": ("{tmp}/nope --pretrained {pre}", "nope does not exist"),
    "val from": ("{tmp}/noval --pretrained {pre}", "docs/data.md has the forms, or give --val DIR"),
    "val from test": ("{tmp}/tested --pretrained {pre}", "; test/ is not read: --val /"),
    "no labels": ("{tmp}/flat --pretrained {pre}", "flat has no labels: class folders"),
    "one class": ("{tmp}/one --pretrained {pre}", "one has no labels: class folders (two at"),
    "large batch": ("digits --pretrained {pre} -b 4096", "1437 images don't fill one"),
    "two equal lrs": ("digits --pretrained {pre} --lr 1 1.0000001", "names a rate twice"),
    "nothing to do": ("digits --pretrained {pre} --epochs 0", "add --knn or --evaluate"),
    "two tasks": ("digits --pretrained {pre} --evaluate --resume auto", "give one"),
    "resume what": ("digits --pretrained {pre} --resume nope.pth", "no checkpoint at nope.pth"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, pretrained):
    folder = tmp_path_factory.mktemp("files")
    content = checkpoint.load(pretrained)
    vit = pretraining("vit_small", dim=8, mlp=8)
    torch.save(vit | {"num_heads": 6}, folder / "six.pth")
    torch.save(linear("vit_small", 7), folder / "linear.pth")
    state = linear("vit_small", 7)["state_dict"]
    torch.save({k.removeprefix("module."): v for k, v in state.items()}, folder / "plain.pth")
    classifiers = {"module.linears.0.weight": torch.ones(7, 128)}
    torch.save(content | {"state_dict": classifiers}, folder / "probe.pth")
    return folder


@pytest.mark.parametrize("name", ["main_lincls.py", "main_finetune.py"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(refusal, tmp_path, image_file, pretrained, files, case, name):
    for path in ("noval/train/a/1.png", "noval/train/b/1.png", "flat/1.png", "one/train/a/1.png",
                 "one/val/a/1.png", "tested/train/a/1.png", "tested/train/b/1.png",
                 "tested/test/a/1.png"):  # fmt: skip
        image_file(path)
    line, words = BAD[case]
    if name == "main_finetune.py" and case in ("two equal lrs", "nothing to do"):
        pytest.skip("the probe's own")
    paths = {p: files / f"{p}.pth" for p in ("six", "linear", "plain", "probe")}
    line = line.format(tmp=tmp_path, root=ROOT, pre=pretrained, **paths)
    run = tmp_path / "run"
    data, *more = line.split()
    assert words in refusal(name, data, "--output-dir", run, *CPU, *more)
    assert not run.exists()
