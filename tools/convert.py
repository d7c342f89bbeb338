"""Checkpoints in and out: other projects' weights for our scripts, and ours for other projects.

A folder for timm.create_model("local-dir:vit_small_timm", pretrained=True), from timm 1.0.16 on:
    python tools/convert.py runs/vit_small_300/checkpoint.pth vit_small_timm --to timm
A state_dict for torchvision; MMSelfSup's weights for main_lincls.py and main_finetune.py:
    python tools/convert.py runs/resnet50_100/checkpoint.pth resnet50.pth --to torchvision
    python tools/convert.py mmselfsup.pth vit_small.pth --to official --num-heads 12
A linear probe's backbone and classifier:
    python tools/convert.py linear_lr3.pth vit_small_classifier --to timm --with-heads

IN is a .pth, a .safetensors or a folder of timm's, and is recognised by its keys: MoCo v3 (ours or
the official release's, pre-training or with a classifier), MMSelfSup and MMPretrain 1.x (ViT and
ResNet, as published: weights and plain metadata), timm, DeiT, torchvision. OUT is the backbone,
whose output is the class token or the pooled last stage; of fine-tuning with --ema it takes the
weights, not their average. A ViT-S of 6 heads becomes our timm/vit_small_patch16_224.
"""

import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moco import UserError, checkpoint, cli, reason
from moco.backbones import RESNETS, create_backbone
from vits import VITS, pair, size_text

PRETRAINING, MM = "MoCo v3 pre-training", "MMSelfSup or MMPretrain"
KINDS = {  # by how a key begins, beside module.; the first that fits
    PRETRAINING: "base_encoder.",
    MM: "backbone.",
    "MoCo v3 with a classifier": "module.",
    "timm, DeiT or torchvision": "",
}
MM_NAMES = (  # MMPretrain's ViT → timm's, in this order
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.ln", r"blocks.\1.norm"),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"^ln1\.", "norm."),
)


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("source", metavar="IN", help="checkpoint, or folder of timm's")
    add("out", metavar="OUT", help="what to write; must not exist")
    add("--to", choices=("timm", "torchvision", "deit", "official"), required=True)
    add("--with-heads", action="store_true", help="keep the classifier; with --to official, "
        "projectors, predictor and momentum encoder, too")  # fmt: skip
    add("--num-heads", type=int, choices=(6, 12), help="attention heads of a ViT-S, where IN or "
        "the layout of OUT does not state them: 12 in MoCo v3, 6 in timm and DeiT")  # fmt: skip
    return parser.parse_args(argv)


def main(args):
    out = Path(args.out)
    if out.exists() or not out.parent.is_dir():
        problem = "exists already" if out.exists() else "lies in a folder that does not exist"
        raise UserError(f"{out} {problem}: name another OUT")
    content, state = read(args.source)
    kind = recognise(state)
    prefix = KINDS[kind] if kind in (PRETRAINING, MM) else ""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    encoder = {
        timm_name(kind, key.removeprefix(prefix)): value
        for key, value in state.items()
        if key.startswith(prefix)
    }

    setting = describe(args, kind, content, encoder)
    model = create_backbone(**setting)
    head = f"{model.classifier_name}."
    backbone = {key: value for key, value in encoder.items() if not key.startswith(head)}
    stated = dict(arch=setting["arch"], num_heads=content.get("num_heads"), state_dict=backbone)
    checkpoint.load_model(model, stated, args.source)
    about = setting | dict(num_heads=checkpoint.num_heads(model))
    about |= {key: content[key] for key in ("mean", "std", "max_value") if content.get(key)}
    heads = {  # by their names in the file
        key: value
        for key, value in state.items()
        if not key.startswith(prefix) or key.startswith(prefix + head)
    }
    check(args, kind, about, model, heads)
    dropped = set() if args.with_heads else {k.removeprefix(prefix).split(".")[0] for k in heads}
    heads = heads if args.with_heads else {}

    try:
        write(args.to, out, kind, backbone, heads, about, model)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"can't write {out}: {reason(error)}", code=1) from None
    what = f", {about['num_heads']} heads" if about["num_heads"] else ""
    what = f"{kind}: {about['arch']}{what}, {size_text(about['img_size'])} pixels"
    without = f", without {', '.join(sorted(dropped))}" if dropped else ""
    print(f"{args.source} ({what}) → {out} ({args.to}: {len(backbone | heads)} tensors{without})")


def read(path):
    """A file, or a folder of timm's → what it says beside the weights, the weights by name."""
    file = Path(path, "model.safetensors") if Path(path).is_dir() else Path(path)
    content = read_timm(file) if file.suffix == ".safetensors" else checkpoint.read(file)
    content = content if isinstance(content, dict) else {}
    checkpoint.check_kinds(content, file)
    state = content.get("state_dict", content.get("model", content))
    items = state.items() if isinstance(state, dict) else ()
    if not items or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in items):
        raise UserError(f"{file} holds no weights by name")
    return content, state


def read_timm(file):
    """A .safetensors, config.json beside it or not → the same as a checkpoint of ours."""
    try:
        content, path = dict(state_dict=load_file(file)), file.with_name("config.json")
        if not path.is_file():
            return content
        config = json.loads(path.read_text())
        options, arch = config.get("model_args") or {}, config["architecture"]
        images = config["pretrained_cfg"]
        content |= {key: tuple(images[key]) for key in ("mean", "std") if key in images}
        size = options.get("img_size") or images["input_size"][1:]
        content |= dict(img_size=pair(size), in_chans=options.get("in_chans"))
        content["patch_size"] = options.get("patch_size") and pair(options["patch_size"])
        if "embed_dim" in options:  # a ViT of ours, by write_timm
            return content | dict(num_heads=options["num_heads"])
        return content | dict(arch=arch if arch in RESNETS else f"timm/{arch}")
    except Exception as error:  # whatever a damaged or foreign file provokes
        raise UserError(f"{file} can't be read as timm's: {type(error).__name__}") from None


def recognise(state):
    """One of KINDS."""
    for kind, start in KINDS.items():
        if any(key.startswith((start, f"module.{start}")) for key in state):
            return kind


def timm_name(kind, name):
    if kind == MM:
        for theirs, ours in MM_NAMES:
            name = re.sub(theirs, ours, name)
    return name


def describe(args, kind, content, encoder):
    """Arguments of create_backbone: what the file says, or the shapes of its weights."""
    arch, path = content.get("arch") or "", args.source
    if arch not in (*VITS, *RESNETS) and not arch.startswith("timm/"):
        arch = find_arch(path, encoder)
        heads = content.get("num_heads") or args.num_heads
        if arch == "vit_small" and kind != PRETRAINING:
            if heads is None:
                raise UserError(
                    f"{path} does not say how many attention heads it has: --num-heads 12 if it is "
                    "MoCo v3's, 6 if it is timm's or DeiT's"
                )
            arch = "timm/vit_small_patch16_224" if heads == 6 else arch

    size, patch = content.get("img_size"), content.get("patch_size")
    if "cls_token" in encoder and not size:
        size, patch = find_size(path, encoder)
    return dict(
        arch=arch,
        img_size=pair(size or 224),
        patch_size=patch and pair(patch),
        small_stem=bool(content.get("small_stem")),
        in_chans=content.get("in_chans") or 3,
    )


def find_arch(path, encoder):
    """A ViT's width, depth and stem name it, a ResNet's shapes."""
    if "cls_token" in encoder:
        dim = encoder["cls_token"].numel()
        depth = len({key.split(".")[1] for key in encoder if key.startswith("blocks.")})
        conv_stem = "patch_embed.proj.0.weight" in encoder
        for arch, config in VITS.items():
            own = config["embed_dim"], config["depth"], config.get("conv_stem", False)
            if own == (dim, depth, conv_stem):
                return arch
        raise UserError(f"{path} is none of the ViTs of vits.py: {dim} wide, {depth} blocks")
    shapes = {key: v.shape for key, v in encoder.items() if not key.startswith("fc.")}
    for arch in RESNETS:
        with torch.device("meta"):
            expected = create_backbone(arch).state_dict()
        if {key: v.shape for key, v in expected.items()} == shapes:
            return arch
    raise UserError(
        f"{path} is by its keys neither a ViT nor a ResNet: other backbones of timm are read from "
        "our checkpoints and from folders with timm's config.json"
    )


def find_size(path, vit):
    """img_size, taken as a square, and patch_size, by the shapes of a ViT's weights."""
    stem = [v for k, v in vit.items() if k.startswith("patch_embed.proj.") and v.ndim == 4]
    table = vit.get("pos_embed", torch.empty(0))
    cells = table.shape[1] - 1 if table.ndim == 3 else 0
    side = math.isqrt(cells)
    if not stem or not cells or side**2 != cells:
        raise UserError(f"{path} states no image size, and has no patches that make up a square")
    patch = tuple(stem[0].shape[2:]) if len(stem) == 1 else pair(2 ** (len(stem) - 1))
    return (side * patch[0], side * patch[1]), patch


def check(args, kind, about, model, heads):
    """UserError where OUT would be another model, or has no place for what is asked for."""
    source, to, arch = args.source, args.to, about["arch"]
    if args.num_heads not in (None, about["num_heads"]):
        raise UserError(
            f"{source} ({arch}) has {about['num_heads'] or 'no'} heads, not {args.num_heads}: drop "
            "--num-heads"
        )
    if to == "deit" and arch == "vit_small" and not args.num_heads:
        raise UserError(
            "DeiT's ViT-S has 6 heads, this one 12, and the shapes agree: --to timm states them; "
            "--num-heads 12 if you build what reads OUT with 12"
        )
    resnet = arch in RESNETS and model.conv1.weight.shape == (64, 3, 7, 7)
    own_stem = about["small_stem"] or VITS.get(arch, {}).get("conv_stem")
    if (to == "torchvision" and not resnet) or (to == "timm" and own_stem):
        raise UserError(
            f"{to} has no {arch}{' with this stem' * (arch not in VITS)}: --to deit or official "
            "keeps the weights, and moco.backbones.create_backbone makes the model"
        )
    classifier = {f"{model.classifier_name}.{name}" for name in ("weight", "bias")}
    kept = heads.keys() == classifier or (kind == PRETRAINING and to == "official")
    if args.with_heads and not kept:
        raise UserError(f"{source} ({kind}) has no heads for --to {to}: drop --with-heads")


def write(to, out, kind, backbone, heads, about, model):
    """OUT, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        new, weights = Path(folder, out.name), backbone | heads
        if to == "timm":
            write_timm(new, weights, about, model)
        elif to == "torchvision":
            torch.save(weights, new)
        elif to == "deit":
            torch.save(about | dict(model=weights), new)
        else:
            prefix = "module." if heads and kind != PRETRAINING else "module.base_encoder."
            state = {prefix + key: value for key, value in backbone.items()}
            state |= {f"module.{key}": value for key, value in heads.items()}
            torch.save(about | dict(state_dict=state), new)
        os.replace(new, out)


def write_timm(folder, weights, about, model):
    """model.safetensors and config.json, which names an architecture of timm's, its arguments."""
    arch, size = about["arch"], about["img_size"]
    options = getattr(model, "timm_args", {})
    if arch in VITS:
        near = dict(vit_nano="vit_tiny_patch16_224", vit_huge="vit_huge_patch14_224")
        options = dict(embed_dim=model.embed_dim, depth=len(model.blocks))
        options |= dict(num_heads=about["num_heads"], img_size=size)
        options |= dict(patch_size=model.patch_embed.patch_size)
        arch = near.get(arch, f"{arch}_patch16_224")
    arch, options = arch.removeprefix("timm/"), options | dict(in_chans=about["in_chans"])
    classes = len(weights.get(f"{model.classifier_name}.weight", ()))
    theirs = timm.create_model(arch, num_classes=classes, **options)
    checkpoint.load_model(theirs, dict(state_dict=weights, arch=arch), "what timm would read")
    config = dict(
        architecture=arch,
        num_classes=classes,
        num_features=model.num_features,
        model_args=options,
        pretrained_cfg=dict(
            num_classes=classes,
            input_size=(about["in_chans"], *size),
            fixed_input_size=theirs.pretrained_cfg.get("fixed_input_size", False),
            interpolation="bilinear",
            crop_pct=0.875,
            mean=about.get("mean", IMAGENET_DEFAULT_MEAN),
            std=about.get("std", IMAGENET_DEFAULT_STD),
            first_conv=theirs.pretrained_cfg.get("first_conv"),
            classifier=model.classifier_name,
        ),
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # safetensors takes no tensors that share memory.
    weights = {k: v.clone(memory_format=torch.contiguous_format) for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    cli.run(main, parse_args)
