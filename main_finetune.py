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

import random
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from moco import UserError, checkpoint, cli, data, distributed, evaluation
from moco.augment import RGB
from moco.backbones import Classifier, check_precision
from moco.keeper import Keeper
from moco.log import Log, describe, introduce
from moco.optimizer import descend
from moco.sources import labelled


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__, parents=[cli.shared_flags(), cli.downstream_flags()])
    parser.set_defaults(arch=None, img_size=None, in_chans=None, batch_size=1024)
    add = parser.add_argument
    add("--lr", type=cli.positive_float, default=2.5e-4, help="base rate of AdamW; used: "
        "lr · batch/256 (DeiT's 5e-4 · batch/512)")  # fmt: skip
    add("--wd", "--weight-decay", type=cli.nonnegative, default=0.05, help="weight decay; none on "
        "norms, biases, class token and position embedding")  # fmt: skip
    add("--warmup-epochs", type=cli.count, default=5, help="linear, from --warmup-lr")
    add("--warmup-lr", type=cli.nonnegative, default=1e-6, help="rate at the start, as it is used")
    add("--min-lr", type=cli.nonnegative, default=1e-5, help="rate at the end, as it is used")
    add("--lr-per", choices=("iteration", "epoch"), default="epoch", help="when the rate changes")
    add("--layer-decay", type=cli.share, metavar="FACTOR", help="of the rate, from each block to "
        "the one before")  # fmt: skip
    add("--clip-grad", type=cli.positive_float, metavar="NORM", help="largest norm of the gradient")
    add("--drop-path", type=cli.below_1, default=0.1, help="of the last block, rising from 0")
    add("--crop-min", type=cli.share, default=0.08, help="smallest crop, share of the area")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's name of the "
        "augmentation, or none")  # fmt: skip
    add("--reprob", type=cli.share, default=0.25, help="of random erasing, by noise")
    add("--mixup", type=cli.nonnegative, default=0.8, help="alpha; 0: off")
    add("--cutmix", type=cli.nonnegative, default=1.0, help="alpha; 0: off")
    add("--smoothing", type=cli.below_1, default=0.1, help="of labels")
    add("--repeated-aug", type=cli.positive, default=1, metavar="VIEWS", help="of an image in an "
        "epoch, of as many images fewer")  # fmt: skip
    add("--ema", type=cli.below_1, metavar="DECAY", help="keep a moving average of the weights")
    add("--evaluate-ema", action="store_true", help="measure the average, not the weights")
    args = cli.check_downstream(parser, parser.parse_args(argv))
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.evaluate_ema and not (args.ema or args.evaluate):
        parser.error("--evaluate-ema needs --ema DECAY")
    if args.ema == 0:
        parser.error("--ema 0 would average nothing: drop it")
    if args.layer_decay == 0:
        parser.error("--layer-decay 0 would train the classifier alone: so does main_lincls.py")
    if args.repeated_aug > args.batch_size:
        parser.error(
            f"--repeated-aug {args.repeated_aug} is more than --batch-size {args.batch_size}"
        )
    if not (args.epochs or args.evaluate):
        parser.error("--epochs 0 leaves nothing to do: add --evaluate")
    return args


def main(args):
    device, amp = distributed.set_up(args.device, args.amp, args.timeout)
    autocast = partial(torch.autocast, device.type, dtype=amp, enabled=amp is not None)
    if args.evaluate:
        weights = "ema" if args.evaluate_ema else "state_dict"
        model, setting = checkpoint.create_downstream(args, classifier=True, weights=weights)
        model.to(device)
        dataset = labelled(cli.images(args, setting), args.data)
        checkpoint.check_classes(model, dataset.classes, args.pretrained)
        bad = data.BadImages(args.max_bad_images, len(dataset.val))
        found = measure(model, dataset, setting["img_size"], args.workers, autocast, bad)
        distributed.say(
            f"{evaluation.in_words(*found, dataset.classes)} on {len(dataset.val):,} images"
        )
    else:
        finetune(args, device, amp, autocast)


def finetune(args, device, amp, autocast):
    torch.manual_seed(args.seed)  # the same weights on every rank
    model, setting = checkpoint.create_downstream(args, drop_path=args.drop_path)
    dataset = labelled(cli.images(args, setting), args.data)
    model = prepare(model, setting, dataset.classes, device, amp)
    folder = cli.output_folder(args, setting["arch"], "finetune")
    previous = checkpoint.find_previous(args, folder)
    size, training_set = setting["img_size"], dataset.bank

    batches = data.EpochBatches(len(training_set), args.batch_size, args.seed, args.repeated_aug)
    augmentation = create_augmentation(args, size, training_set.pixels)
    views = Augmented(training_set, augmentation, args.seed)
    loader = data.create_loader(views, batches, args.workers, device, persistent=True)
    mixup = create_mixup(args, dataset.classes)

    optimizer = create_optimizer(args, model, setting["arch"])
    schedule = create_schedule(args, optimizer, len(batches))
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    ema = ModelEmaV3(model, decay=args.ema) if args.ema else None
    images = len(training_set)
    bad = data.BadImages(args.max_bad_images, images, folder, resumed=bool(previous))
    log = Log(folder, args, len(batches), bad)
    parts = dict(optimizer=optimizer, scaler=scaler, batches=batches, log=log)
    parts |= {"ema": ema} if ema else {}
    results = dict(found=(0.0, 0.0), best=(0.0, 0))  # the last (top-1, top-5); best, its epoch
    same_world = bool(mixup or args.drop_path)  # these draw in each process
    epoch, iteration, results = checkpoint.resume(
        previous, args, model, results, same_world, **parts
    )
    distributed.check_agreement(device, images=len(training_set), steps=iteration)
    ddp = distributed.parallel(model, device)

    about = describe(args, device, amp, **setting)
    introduce(
        folder,
        about,
        model=f"{setting['arch']}, {cli.origin(args)}",
        data=f"{args.data}: {dataset.labelled_in_words()}",
        batch=batches,
        rate=f"{args.lr:g} · {args.batch_size}/256 = {args.lr * args.batch_size / 256:g}, adamw",
    )

    def get_state():
        log.check_weights(model)
        extra = about | results | dict(best_acc1=results["best"][0])
        return checkpoint.training_state(extra, keeper.epoch, keeper.iteration, model, **parts)

    with log, Keeper(folder, args.save_minutes, get_state, epoch, iteration) as keeper:
        for done in range(epoch + 1, args.epochs + 1):
            train_one_epoch(
                ddp, model, ema, loader, mixup, optimizer, schedule, scaler, autocast, args, log,
                keeper,
            )  # fmt: skip
            measured = ema.module if args.evaluate_ema else model
            found = top1, top5 = measure(measured, dataset, size, args.workers, autocast, bad)
            log.evaluation(f"top-1 {top1:.2f} %", acc1=top1, acc5=top5)
            best = evaluation.better(results["best"], (top1, done))
            is_best = best != results["best"]
            results = dict(found=found, best=best)
            keeper.end_epoch(keep_as="best.pth" if is_best else None)
            log.epoch(done)
        best, its_epoch = results["best"]
        log.say(
            f"tuned   {evaluation.in_words(*results['found'], dataset.classes)} after "
            f"{args.epochs} epochs; best {best:.2f} % in epoch {its_epoch}"
        )


def train_one_epoch(
    ddp, model, ema, loader, mixup, optimizer, schedule, scaler, autocast, args, log, keeper
):
    """What is left of an epoch; `ddp` is `model`, or the model wrapped for several processes."""
    ddp.train()
    device = next(model.parameters()).device
    loader.batch_sampler.start(keeper.epoch, keeper.iteration)
    for step, (images, labels) in enumerate(log.timed(loader), keeper.iteration):
        # What the process draws, drop path and mixup, begins anew: a resumed run continues exactly.
        seed_all(args.seed, step, distributed.rank())
        if args.lr_per == "iteration":
            schedule.step_update(step)
        else:
            schedule.step(keeper.epoch)

        images = images.to(device, non_blocking=device.type == "cuda")  # [N, C, H, W]
        labels = labels.to(device, non_blocking=device.type == "cuda")  # [N]
        if mixup:
            images, labels = mixup(images, labels)  # labels: [N, classes]
        with autocast():
            logits = ddp(images)
        smoothing = 0.0 if mixup else args.smoothing  # mixup's labels are smooth already
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        descend(loss, optimizer, scaler, args.clip_grad)
        if ema:
            ema.update(model)
        log.step(step + 1, dict(lr=optimizer.param_groups[-1]["lr"]), loss=loss)
        keeper.step(step + 1)


def prepare(model, setting, classes, device, amp):
    """The backbone, all of it trainable (patch projection, position too), and a new classifier."""
    check_precision(model, setting["img_size"], device, amp, setting["in_chans"])
    model.requires_grad_(True)
    classifier = Classifier(model.num_features, classes)
    nn.init.trunc_normal_(classifier.weight, std=0.02)
    nn.init.zeros_(classifier.bias)
    model.set_submodule(model.classifier_name, classifier)
    return distributed.synchronize_batchnorm(model, device).to(device)


def create_optimizer(args, model, arch):
    """AdamW; timm leaves norms, biases, class token and position embedding without decay."""
    if args.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise UserError(f"--layer-decay is for ViTs and timm's models, not {arch}: drop it")
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=args.lr * args.batch_size / 256,
        weight_decay=args.wd,
        layer_decay=args.layer_decay,
        betas=(0.9, 0.999),
        eps=1e-8,
    )


def create_schedule(args, optimizer, epoch_steps):
    """Warm-up, then half a cosine, which is counted from the end of the warm-up if per iteration
    (MMPretrain), from the start if per epoch (DeiT)."""
    per_iteration = args.lr_per == "iteration"
    steps = epoch_steps if per_iteration else 1
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, args.epochs - args.warmup_epochs * per_iteration) * steps,
        lr_min=args.min_lr,
        warmup_t=args.warmup_epochs * steps,
        warmup_lr_init=args.warmup_lr,
        warmup_prefix=per_iteration,
        t_in_epochs=not per_iteration,
    )


def create_augmentation(args, size, pixels=RGB):
    """Of a uint8 image [C, H, W] → float32 [C, *size], normalised."""
    if pixels.in_chans not in (1, 3):
        return create_without_policy(args, size, pixels)
    colours = 3 // pixels.in_chans  # to timm gray is RGB, whose channels remain alike
    try:
        transform = create_transform(
            (3, *size),
            is_training=True,
            scale=(args.crop_min, 1.0),
            color_jitter=0.0,
            auto_augment=None if args.aa == "none" else args.aa,
            interpolation="bicubic",
            mean=pixels.mean * colours,
            std=pixels.std * colours,
            re_prob=args.reprob,
            re_mode="pixel",
        )
        with seeded(0):  # some policies fail at an image only
            transform(Image.new("RGB", (8, 8)))
    except (AssertionError, KeyError, ValueError):
        raise UserError(f"--aa {args.aa} is no policy that timm knows, or none") from None
    return partial(_through_pil, transform)


def _through_pil(transform, image):
    return transform(tv.to_pil_image(image.expand(3, -1, -1)))[: len(image)]


def create_without_policy(args, size, pixels):
    """The same for channels that PIL can't hold."""
    bicubic = v2.InterpolationMode.BICUBIC
    if args.aa != "none":
        raise UserError(
            f"--aa {args.aa} draws on RGB and gray, the images have {pixels.in_chans} channels: "
            "--aa none"
        )
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (args.crop_min, 1.0), interpolation=bicubic),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(pixels.mean, pixels.std),
            RandomErasing(args.reprob, mode="pixel", device="cpu"),
        ]
    )


def create_mixup(args, classes):
    if not args.mixup and not args.cutmix:
        return None
    if args.batch_size // distributed.world() % 2:
        raise UserError("--mixup and --cutmix need an even number of images in each process")
    return Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes)


def posterize(image, bits, **_):
    """The strongest level of a policy keeps no bit: a black image, which Pillow 13 refuses."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


NAME_TO_OP["PosterizeIncreasing"] = NAME_TO_OP["Posterize"] = posterize


class Augmented:
    """A batch of (epoch, index) → float32 [N, C, H, W], labels [N]; transform: of one image."""

    def __init__(self, source, transform, seed):
        self.source, self.transform, self.seed = source, transform, seed

    def __getitems__(self, keys):
        bad = {}
        try:
            views, shown = zip(*(self._view(epoch, index, bad) for epoch, index in keys))
        except UserError as error:
            return error
        batch = torch.stack(views), self.source.labels[list(shown)]
        return data.Flawed(batch, bad) if bad else batch

    def _view(self, epoch, index, bad):
        image, shown = data.readable(self.source, (self.seed, epoch, index), bad)
        with seeded(self.seed, epoch, index):
            return self.transform(image), shown

    def __len__(self):
        return len(self.source)


@contextmanager
def seeded(*key):
    """The CPU's generators, which timm draws from, begin at `key`, and go on as before after."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_all(*key, cpu_alone=True)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_all(*key, cpu_alone=False):
    """Every global generator begins at `key`; cpu_alone: but a GPU's, for drop path draws there."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    (torch.default_generator if cpu_alone else torch).manual_seed(seed)


def measure(model, dataset, size, workers, autocast, bad):
    """(top-1, top-5) in percent."""
    model.eval()

    def classify(images):
        with autocast():
            return [model(images)]

    device = next(model.parameters()).device
    [found] = evaluation.accuracy(
        classify, 1, dataset.val, size, workers, device, bad, interpolation="bicubic"
    )
    return found


if __name__ == "__main__":
    cli.run(main, parse_args)
