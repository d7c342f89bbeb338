"""Checkpoints in and out: other projects' weights for our scripts, and ours for other projects.

A folder for timm.create_model("local-dir:vit_small_timm", pretrained=True), from timm 1.0.26 on:
    python tools/convert.py runs/vit_small_300/checkpoint.pth vit_small_timm --to timm
A state_dict for torchvision; MMSelfSup's weights for main_lincls.py and main_finetune.py:
    python tools/convert.py runs/resnet50_100/checkpoint.pth resnet50.pth --to torchvision
    python tools/convert.py mmselfsup.pth vit_small.pth --to official -a vit_small
A linear probe's backbone and classifier:
    python tools/convert.py linear_lr3.pth vit_small_classifier --to timm --with-heads

IN is whatever --pretrained takes: a .pth, a .safetensors or a folder of timm's. -a names the
architecture where IN does not state it: a ViT-S is vit_small with the 12 heads of MoCo v3, and
timm/vit_small_patch16_224 with the 6 of timm, DeiT and DINO.
OUT is the backbone, whose output is the class token or the pooled last stage; of fine-tuning with
--ema it takes the weights, not their average.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import cli
from engine.backbones import RESNETS, choose_config, create_backbone
from engine.errors import UserError, first_line, print_line, printable
from engine.files import exists
from engine.weights import PRETRAINING, load_state_dict_strict, num_heads, read_weights
from vits import VITS

CLASS_MAP = "class_map.txt"
PREPROCESSING = (
    "measured here: images of the model's size as they are (--crop-pct 1), others at crop_pct 0.875"
)
# timm's names of the ViTs that it calls otherwise than vit_…_patch16_224.
TIMM_NAMES = {"vit_nano": "vit_tiny_patch16_224", "vit_huge": "vit_huge_patch14_224"}


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("source", metavar="IN", help="checkpoint, or folder of timm's")
    add("out", metavar="OUT", help="what to write; must not exist")
    formats = dict(choices=("timm", "torchvision", "deit", "official"), required=True)
    add("--to", help="whose names and layout OUT has", **formats)
    heads = "keep the classifier; with --to official all heads, momentum encoder and predictor, too"
    add("--with-heads", action="store_true", help=heads)
    number = "confirms the attention heads of a ViT-S, which --to deit does not state"
    add("--num-heads", type=int, choices=(6, 12), help=number)
    add("-a", "--arch", help="name of the architecture, where IN does not state it")
    return parser.parse_args(argv)


def main(args):
    out = Path(args.out)
    if exists(out):
        raise UserError(f"{out} exists already: name another OUT")
    if not out.parent.is_dir():
        raise UserError(f"{out} lies in a folder that does not exist: name another OUT")
    weights = read_weights(args.source, args.arch)
    config = choose_config(dict(arch=args.arch), weights.config, args.source)
    model = create_backbone(config)
    backbone, heads = weights.split(model.classifier_name)
    load_state_dict_strict(model, backbone, weights.config, args.source)
    check(args, weights, config, model, heads)
    kept = heads if args.with_heads else {}
    try:
        write(args.to, out, weights, config, backbone, kept, model)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"can't write {out}: {first_line(error)}", exit_code=1) from None
    print_line(
        f"{args.source} ({weights}) → {args.out} ({args.to}: {len(backbone | kept)} tensors)"
    )
    if args.to == "timm" and kept:
        print_line(f"timm's validate.py: --class-map {out / CLASS_MAP}; {PREPROCESSING}")


def check(args, weights, config, model, heads):
    """UserError where OUT would be another model, or has no place for what is asked for."""
    source, to, arch, own_heads = args.source, args.to, config.arch, num_heads(model)
    if args.num_heads not in (None, own_heads):
        raise UserError(f"{source} ({arch}) has {own_heads or 'no'} heads: drop --num-heads")
    if to == "deit" and arch == "vit_small" and not args.num_heads:
        raise UserError(
            "DeiT's ViT-S has 6 heads, this one 12, and the shapes agree: --to timm states them; "
            "--num-heads 12 if you build what reads OUT with 12"
        )
    is_torchvisions = arch in RESNETS and model.conv1.weight.shape == (64, 3, 7, 7)
    has_own_stem = config.small_stem or VITS.get(arch, {}).get("conv_stem")
    is_ablation = config.pool != "token" or config.pos_embed == "none"
    is_lacking = {"torchvision": not is_torchvisions, "timm": has_own_stem or is_ablation}
    if is_lacking.get(to):
        raise UserError(
            f"{to} has no {arch} of this form: --to deit or official keeps the weights, and "
            "engine.backbones.create_backbone makes the model"
        )
    classifier = {f"{model.classifier_name}.{name}" for name in ("weight", "bias")}
    has_place = heads.keys() == classifier
    has_place |= weights.kind == PRETRAINING and to == "official"
    if args.with_heads and not has_place:
        raise UserError(
            f"{source} ({weights.kind.name}) has no heads for --to {to}: drop --with-heads"
        )


def write(to, out, weights, config, backbone, heads, model):
    """OUT, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        new, state = Path(folder, out.name), backbone | heads
        has_classifier = bool(heads) and weights.kind != PRETRAINING
        class_names = weights.config.get("class_names") if has_classifier else None
        stated = config.to_dict() | dict(num_heads=num_heads(model), class_names=class_names)
        del stated["interpolation"]  # each script has its own, unless the file states it
        if "interpolation" in weights.config:
            stated["interpolation"] = weights.config["interpolation"]
        if to == "timm":
            write_timm(new, state, stated, model)
            card = model_card(out.name, weights, config, class_names)
            (new / "README.md").write_text(card, encoding="utf-8")
        elif to == "torchvision":
            torch.save(state, new)
        elif to == "deit":
            torch.save(stated | dict(model=state), new)
        else:
            prefix = "module." if has_classifier else "module.base_encoder."
            state = {prefix + key: value for key, value in backbone.items()}
            state |= {f"module.{key}": value for key, value in heads.items()}
            torch.save(stated | dict(state_dict=state), new)
        os.replace(new, out)


def write_timm(folder, state, config, model):
    """model.safetensors and config.json, which names an architecture of timm's, its arguments."""
    arch, img_size, in_chans = config["arch"], config["img_size"], config["in_chans"]
    options = getattr(model, "timm_args", {})
    if arch in VITS:
        options = dict(
            embed_dim=model.embed_dim,
            depth=len(model.blocks),
            num_heads=config["num_heads"],
            img_size=img_size,
            patch_size=model.patch_embed.patch_size,
        )
        arch = TIMM_NAMES.get(arch, f"{arch}_patch16_224")
    arch, options = arch.removeprefix("timm/"), options | dict(in_chans=in_chans)
    num_classes = len(state.get(f"{model.classifier_name}.weight", ()))
    timm_model = timm.create_model(arch, num_classes=num_classes, **options)
    load_state_dict_strict(timm_model, state, dict(arch=arch), "what timm would read")
    timm_config = dict(
        # timm ignores these two, we read them back.
        arch=config["arch"],
        value_range=config["value_range"],
        label_names=config["class_names"],
        architecture=arch,
        num_classes=num_classes,
        num_features=model.num_features,
        model_args=options,
        pretrained_cfg=dict(
            num_classes=num_classes,
            input_size=(in_chans, *img_size),
            fixed_input_size=timm_model.pretrained_cfg.get("fixed_input_size", False),
            interpolation=config.get("interpolation", "bilinear"),
            crop_pct=0.875,
            mean=config["mean"],
            std=config["std"],
            first_conv=timm_model.pretrained_cfg.get("first_conv"),
            classifier=model.classifier_name,
        ),
    )
    folder.mkdir()
    if config["class_names"]:
        timm_config["preprocessing"] = PREPROCESSING
        # timm's validate.py numbers folders by itself, in another order than ours.
        names = "".join(f"{name}\n" for name in config["class_names"])
        (folder / CLASS_MAP).write_text(names, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(timm_config, indent=2) + "\n")
    # safetensors takes no tensors that share memory.
    state = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# The model card

# How a run trained, by an argument that its script alone has.
TRAINED_BY = {
    "moco_t": "pre-trained without labels by MoCo v3",
    "batchnorm": "frozen, with a linear classifier that was trained on its features",
    "mixup": "fine-tuned end to end, with a classifier",
}
# Arguments that say nothing of the weights, or where somebody's files are.
UNSTATED = set(
    "data data_root pretrained init_from val output_dir resume allow_changed_args save_minutes "
    "save_every print_freq max_bad_images tensorboard evaluate knn knn_every knn_data knn_bank "
    "device amp workers timeout compile epochs max_pixels".split()
)


def model_card(name, weights, config, class_names):
    """README.md of timm's folder `name`; class_names: None without classifier."""
    task = "image-classification" if class_names else "image-feature-extraction"
    height, width = config.img_size
    output = f"logits of {len(class_names)} classes" if class_names else "features"
    interpolation = weights.config.get("interpolation", "bilinear")
    return f"""---
library_name: timm
pipeline_tag: {task}
tags: [timm, moco-v3]
# license:
---
# {printable(name)}

{describe_training(weights)}

MoCo v3: Chen, Xie, He, *An Empirical Study of Training Self-Supervised Vision Transformers*,
ICCV 2021, [arXiv 2104.02057](https://arxiv.org/abs/2104.02057).

## Use

The model returns {output}. timm 1.0.26 or later loads it, from this folder or from the Hub:

```python
import timm

model = timm.create_model("local-dir:{printable(name)}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

`hf upload USER/NAME {printable(name)}` uploads the folder; then `hf-hub:USER/NAME` takes the place
of `local-dir:{printable(name)}`.

## Evaluation settings

`config.json` states them: {height}×{width} pixels, {interpolation}, crop_pct 0.875, mean
{list(config.pixel_format.mean)}, std {list(config.pixel_format.std)}. Images of exactly this size
were measured as they are, which is crop_pct 1.{describe_accuracy(weights, class_names)}

## License

Not stated yet: whoever publishes these weights names their license here and in the first lines of
this file. The images they were trained on may restrict it.
"""


def describe_training(weights):
    """Markdown: the backbone, and what its file states of the run that left it."""
    arch, args = weights.config["arch"], weights.run.get("args") or {}
    how = [text for argument, text in TRAINED_BY.items() if argument in args]
    if not how:
        return f"`{arch}`. Its file ({weights.kind.name}) does not state how it was trained."
    epochs = f"{weights.run.get('epoch', 0)} of {args.get('epochs')} epochs"
    lines = [f"`{arch}`, {how[0]}, on `{last_part(args.get('data'))}`, {epochs}."]
    if args.get("pretrained"):
        lines.append(f"It started from `{last_part(args['pretrained'], 2)}`.")
    if versions := weights.run.get("versions"):
        precision = weights.run.get("precision", "unknown")
        code = f"commit {versions.get('git')}, torch {versions.get('torch')}"
        lines.append(f"Code: {code}. Precision: {precision}.")
    return printable_lines([*lines, "", "```", *flag_lines(args), "```"])


def printable_lines(lines):
    return "\n".join(map(printable, lines))


def flag_lines(args):
    """The arguments that matter, each as a flag."""
    lines = []
    for name, value in args.items():
        if name in UNSTATED or value is None or value is False:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        words = [] if value is True else map(str, values)
        lines.append(" ".join([f"--{name.replace('_', '-')}", *words]))
    return lines


def last_part(path, parts=1):
    """Of a path; hf:NAME as it is. What lies above tells only where somebody keeps files."""
    path = str(path)
    return path if path.startswith("hf:") else "/".join(Path(path).parts[-parts:])


def describe_accuracy(weights, class_names):
    """Markdown, below the settings; empty for a backbone alone."""
    if not class_names:
        return ""
    lines = ["", "", f"{len(class_names)} classes, in the order of `label_names` in `config.json`."]
    acc1, args = weights.run.get("best_acc1"), weights.run.get("args") or {}
    if acc1:
        images = last_part(args.get("val") or args.get("data"))
        ema = ", of a moving average that is not in this folder" if args.get("evaluate_ema") else ""
        lines.append(
            f"The best epoch of the run had a top-1 accuracy of {acc1:.2f} %, measured on the "
            f"validation images of `{images}`{ema}."
        )
    return printable_lines(lines)


if __name__ == "__main__":
    cli.run_script(main, parse_args)
