"""End-to-end fine-tuning of a pre-trained backbone, by DeiT's recipe and timm's parts.

One process (GPU or CPU), after `python main_moco.py @recipes/digits.txt`:
    python main_finetune.py @recipes/finetune_digits.txt
8 GPUs:
    torchrun --nproc_per_node=8 main_finetune.py @recipes/finetune_vit_base_150_deit.txt \\
        /data/imagenet --pretrained runs/vit_base_300/checkpoint.pth
Transfer; then the accuracy of what it left:
    torchrun --nproc_per_node=8 main_finetune.py @recipes/finetune_vit_base_cifar10.txt \\
        --pretrained runs/vit_base_300/checkpoint.pth --output-dir runs/vit_base_300_cifar10
    python main_finetune.py cifar10 --pretrained runs/vit_base_300_cifar10/best.pth --evaluate
"""

import re
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from engine import cli, downstream, evaluation, flags, launch, weights
from engine.backbones import Classifier, check_bf16_conv_gradients
from engine.compiler import should_compile
from engine.data.loader import create_loader
from engine.data.sampler import EpochBatchSampler
from engine.data.timm_crops import TransformedCrops, create_training_transform, seed_generators
from engine.errors import UserError
from engine.evaluation import AccuracyRecord, format_accuracy
from engine.flops import peak_images_per_s
from engine.run import Run, find_checkpoints, run_metadata
from moco import optimizer_step, scaled_lr, set_lr, warmup_cosine_lr
from moco.compilation import compile_backbone
from moco.distributed import rank, world_size

INTERPOLATION = "bicubic"  # of the crops and of the images that are measured

MIN_STEPS = 100  # of a run whose accuracy means something
MAX_INITIAL_WEIGHT = 0.1  # largest fraction of the final average that may be initial weights


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, usage=flags.USAGE)
    flags.add_image_flags(parser, in_chans=None)
    add = flags.add_model_flags(parser, arch=None, img_size=None)
    downstream.add_flags(add)
    number, below_1 = flags.non_negative_float, flags.fraction_below_1
    drop_path = "stochastic depth: rate of the last block, rising linearly from 0"
    add("--drop-path", drop_path, type=below_1, default=0.1)

    add = flags.add_optimization_flags(parser, epochs=100, batch_size=1024)
    lr = "base lr of AdamW, scaled by batch/256 (DeiT's 5e-4 · batch/512)"
    add("--lr", lr, type=flags.positive_float, default=2.5e-4)
    wd = "weight decay; none on norms, biases, class token and position embedding"
    add("--wd --weight-decay", wd, type=number, default=0.05)
    warmup = "epochs of linear warm-up from --warmup-lr"
    add("--warmup-epochs", warmup, type=flags.non_negative_int, default=5)
    add("--warmup-lr", "lr at the start, unscaled", type=number, default=1e-6)
    add("--min-lr", "lr at the end, unscaled", type=number, default=1e-5)
    often = ("iteration", "epoch")
    add("--lr-per", "how often the lr changes", choices=often, default="epoch")
    decay = "layer-wise lr decay: factor from each block to the one before (default: none)"
    add("--layer-decay", decay, type=flags.fraction)
    add("--clip-grad", "largest gradient norm (default: no limit)", type=flags.positive_float)
    policy = "timm's name of the augmentation policy, or none"
    add("--aa", policy, default="rand-m9-mstd0.5-inc1", metavar="POLICY")
    add("--reprob", "probability of random erasing", type=flags.fraction, default=0.25)
    add("--mixup", "alpha of mixup; 0: off", type=number, default=0.8)
    add("--cutmix", "alpha of cutmix; 0: off", type=number, default=1.0)
    add("--smoothing", "label smoothing", type=below_1, default=0.1)
    views = "repeated augmentation: each epoch shows 1/N of the images, N times"
    add("--repeated-aug", views, type=flags.positive_int, default=1)
    ema = "decay of a moving average of the weights, which is kept too (default: none)"
    add("--ema", ema, type=below_1)
    evaluate_ema = "measure the moving average in place of the weights"
    add("--evaluate-ema", evaluate_ema, action="store_true")
    flags.add_evaluation_flags(parser)
    flags.add_run_flags(parser)
    flags.add_compile_flag(flags.add_hardware_flags(parser))
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """What argparse can't check."""
    flags.check_downstream(parser, args)
    if args.evaluate:  # no schedule acts
        return
    peak_lr = scaled_lr(args.lr, args.batch_size)
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.lr_per == "epoch" and 0 < args.epochs == args.warmup_epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} leaves no epoch at the full --lr")
    for flag, lr in (("--min-lr", args.min_lr), ("--warmup-lr", args.warmup_lr)):
        if lr > peak_lr:
            parser.error(
                f"{flag} {lr:g} is above the peak lr, --lr {args.lr:g} · {args.batch_size}/256 = "
                f"{peak_lr:g}: lower it"
            )
    if args.evaluate_ema and not args.ema:
        parser.error("--evaluate-ema needs --ema DECAY")
    if args.ema == 0:
        parser.error("--ema 0 would average nothing: drop it")
    parts = args.aa.split("-")[1:]  # timm skips those that it doesn't know
    unknown = [part for part in parts if not re.fullmatch(r"[a-z]+\d+(\.\d+)?", part)]
    if unknown:
        parser.error(f"--aa {args.aa}: {unknown[0]!r} is not a letter and a number, as in m9")
    if args.layer_decay == 0:
        parser.error("--layer-decay 0 would train the classifier alone: so does main_lincls.py")
    if args.repeated_aug > args.batch_size:
        parser.error(
            f"--repeated-aug {args.repeated_aug} is more than --batch-size {args.batch_size}"
        )
    if not args.epochs:
        parser.error("--epochs 0 leaves nothing to do: add --evaluate")


def main(args):
    env = launch.init_distributed(args.device, args.amp, args.timeout)
    if args.evaluate:
        evaluate_saved(args, env)
    else:
        finetune(args, env)


def evaluate_saved(args, env):
    """Prints the accuracy of the classifier in --pretrained."""
    model, config, class_names = weights.create_classifier(
        args.pretrained,
        flags.backbone_options(args),
        use_ema=args.evaluate_ema or None,
        interpolation=INTERPOLATION,
    )
    classifier = model.get_submodule(model.classifier_name)
    splits = downstream.load_test_splits(args, config, class_names, classifier)
    classify = classify_images(model.to(env.device), env)
    downstream.print_accuracy(args, classify, splits, config, env)


def finetune(args, env):
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    folder = downstream.output_folder(args, "finetune")
    checkpoint_paths = find_checkpoints(folder, args.resume)
    options = flags.backbone_options(args)
    model, config = weights.create_pretrained_backbone(
        args.pretrained, options, args.from_scratch, args.drop_path
    )
    config = replace(config, interpolation=INTERPOLATION)
    splits = downstream.load_training_splits(args, config.pixel_format)
    model = add_classifier(model, splits.num_classes, config, env)
    loader = create_training_loader(args, splits.train, config, env)
    mixup = create_mixup(args, splits.num_classes)

    optimizer = create_adamw(args, model, config.arch)
    ema = create_ema(args, model, num_steps=args.epochs * len(loader))
    if should_compile(args.compile, model, env.device):
        compile_backbone(model)
    scaler, results = env.grad_scaler(), AccuracyRecord(1)
    metadata = run_metadata(config, vars(args), env, splits.train, splits.class_names, splits.val)
    state = dict(model=model, optimizer=optimizer, scaler=scaler, ema=ema, results=results)
    # Mixup and drop path draw in each process.
    draws = dict(same_world_size=mixup is not None or args.drop_path > 0)
    peak_rate = peak_images_per_s(model, config, env, passes=1 + 2)
    options = flags.run_options(args) | draws | dict(peak_images_per_s=peak_rate)
    run = Run(folder, env, loader, metadata, state, resume_from=checkpoint_paths, **options)
    run.resume()
    run.metadata["best_acc1"] = results.best[0][0]
    ddp_model = env.wrap_ddp(model)

    with run:
        lr = f"{args.lr:g} · {args.batch_size}/256 = {scaled_lr(args.lr, args.batch_size):g}, adamw"
        downstream.print_config(args, run, config.arch, model, splits, lr)
        warn_of_few_steps(run, num_steps=args.epochs * len(loader))
        for epoch in range(run.epoch + 1, args.epochs + 1):
            train_one_epoch(args, run, ddp_model, model, ema, loader, mixup, optimizer, scaler)
            classify = classify_images(ema.module if args.evaluate_ema else model, env)
            settings = config.img_size, args.workers, env, run.unreadable, config.interpolation
            [(acc1, acc5)] = evaluation.measure_accuracy(classify, 1, splits.val, *settings)
            [is_best] = results.update([(acc1, acc5)], epoch)
            run.metadata["best_acc1"] = results.best[0][0]
            run.log_eval(f"top-1 {acc1:.2f} %", splits.val, acc1=acc1, acc5=acc5)
            run.end_epoch(keep_as="best.pth" if is_best else None)
        (best_acc1, best_epoch), last = results.best[0], results.last[0]
        run.print(
            f"tuned   {format_accuracy(*last, splits.num_classes)} after {args.epochs} epochs; "
            f"best {best_acc1:.2f} % in epoch {best_epoch}{run.unreadable.remark(splits.val)}"
        )


def warn_of_few_steps(run, num_steps):
    """A backbone with a new classifier has hardly moved by then; the probe tells more."""
    if num_steps < MIN_STEPS:
        run.print(
            f"warning: only {num_steps} steps, too few to tell how good the backbone is: more "
            "--epochs, as in recipes/finetune_few_labels.txt"
        )


def train_one_epoch(args, run, ddp_model, model, ema, loader, mixup, optimizer, scaler):
    """The steps that are left of an epoch; `model` is inside ddp_model, and `ema` averages it."""
    env = run.env
    ddp_model.train()
    for images, labels in run.batches(loader):  # float32 [N, C, H, W], [N]
        # Mixup and drop path draw from the global generators: seeded by the step, a resumed run
        # repeats them exactly.
        seed_generators(args.seed, run.step, rank())
        lr = current_lr(args, run, steps_per_epoch=len(loader))
        set_lr(optimizer, lr)

        images, labels = env.to_device(images, labels)
        if mixup is not None:
            images, labels = mixup(images, labels)  # labels: [N, num_classes], smoothed
        with env.autocast():
            logits = ddp_model(images)  # [N, num_classes]
        smoothing = args.smoothing if mixup is None else 0.0
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        optimizer_step(loss, optimizer, scaler, args.clip_grad)
        if ema is not None:
            ema.update(model)
        run.end_step(loss=loss, lr=lr)


def current_lr(args, run, steps_per_epoch):
    """Of the classifier; --layer-decay multiplies those below it by their `lr_scale`.

    Per iteration (MMPretrain) the cosine begins after the warm-up. Per epoch (DeiT) it spans all
    epochs, and the warm-up replaces its first part.
    """
    schedule = dict(
        total=args.epochs,
        warmup=args.warmup_epochs,
        peak_lr=scaled_lr(args.lr, args.batch_size),
        start_lr=args.warmup_lr,
        end_lr=args.min_lr,
    )
    if args.lr_per == "iteration":
        return warmup_cosine_lr(run.step / steps_per_epoch, **schedule)
    return warmup_cosine_lr(run.epoch, **schedule, cosine_start=0)


def classify_images(model, env):
    """→ a function: images → [logits]."""

    def classify(images):
        model.eval()
        with env.autocast():
            return [model(images)]

    return classify


def create_training_loader(args, dataset, config, env):
    transform = create_training_transform(
        config.img_size, config.pixel_format, args.crop_min, args.aa, args.reprob, INTERPOLATION
    )
    crop_dataset = TransformedCrops(dataset, transform, args.seed)
    repeats = args.repeated_aug
    sampler = EpochBatchSampler(len(dataset), args.batch_size, args.seed, repeats)
    return create_loader(crop_dataset, sampler, args.workers, env.device, persistent=True)


def add_classifier(model, num_classes, config, env):
    """A new classifier on the backbone, all of which trains, patch projection and position too."""
    check_bf16_conv_gradients(model, config, env)
    model.requires_grad_(True)
    classifier = Classifier(model.num_features, num_classes)
    nn.init.trunc_normal_(classifier.weight, std=0.02)
    nn.init.zeros_(classifier.bias)
    model.set_submodule(model.classifier_name, classifier)
    return env.sync_batchnorm(model).to(env.device)


def create_adamw(args, model, arch):
    """timm leaves norms, biases, class token and position embedding without weight decay."""
    if args.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise UserError(f"--layer-decay is for ViTs and timm's models, not {arch}: drop it")
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=scaled_lr(args.lr, args.batch_size),
        weight_decay=args.wd,
        layer_decay=args.layer_decay,
        betas=(0.9, 0.999),
        eps=1e-8,
    )


def create_ema(args, model, num_steps):
    """The moving average of the weights, or None. UserError if it would hardly leave its start."""
    if args.ema is None:
        return None
    initial_weight = args.ema**num_steps
    if initial_weight > MAX_INITIAL_WEIGHT:
        raise UserError(
            f"--ema {args.ema:g} after {num_steps} steps would still be {100 * initial_weight:.0f} "
            "% initial weights: lower it"
        )
    return ModelEmaV3(model, decay=args.ema)


def create_mixup(args, num_classes):
    if not args.mixup and not args.cutmix:
        return None
    if args.batch_size // world_size() % 2:
        raise UserError("--mixup and --cutmix need an even number of images in each process")
    return Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)


if __name__ == "__main__":
    cli.run_script(main, parse_args)
