"""What a run says: progress bar, log.jsonl, TensorBoard, curves.png, views.png; rank 0 alone."""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from moco import UserError, checkpoint
from moco.augment import denormalize
from moco.data import checked
from moco.distributed import average, rank


class Log:
    """Collects scalars on the device and reads them every `print_freq` steps: one wait, not many.

    Lines of log.jsonl are of two kinds: training, averaged since the line before, and `knn`.
    `steps`: of the whole run; `step`: where it begins; `chance`: the loss of a blind guess.
    """

    def __init__(
        self, folder, steps, epoch_steps, step, batch_size, chance, print_freq, tensorboard
    ):
        self.folder, self.epoch_steps, self.batch_size = Path(folder), epoch_steps, batch_size
        self.chance, self.print_freq = chance, print_freq
        self.knn = None  # the last one measured
        self.pending, self.names = [], ()  # scalars on the device, not read yet
        self.latest = {}  # the last training line
        self.waited, self.since = 0.0, time.perf_counter()  # since that line, in seconds
        self.drawn = 0.0
        self.speaks = rank() == 0
        self.file = self.board = self.bar = None
        if not self.speaks:
            return

        path = self.folder / "log.jsonl"
        rows = [row for row in read_rows(path) if row["step"] <= step] if step else []
        trimmed = path.with_suffix(".tmp")
        trimmed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        trimmed.replace(path)
        self.file = open(path, "a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.folder, purge_step=step + 1 if step else 0)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def say(self, text):
        """A line of text, above the bar if there is one."""
        if self.bar:
            self.bar.write(text)
        elif self.speaks:
            print(text, flush=True)

    def timed(self, loader):
        """The loader's batches; the time spent waiting for them is counted."""
        self.since, self.waited = time.perf_counter(), 0.0
        asked = time.perf_counter()
        for batch in checked(loader):
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def step(self, step, lr, m, **scalars):
        """After `step` steps in all; scalars: 0-d tensors on the device, `loss` among them."""
        self.names = tuple(scalars)
        self.pending.append(torch.stack([v.detach().float() for v in scalars.values()]))
        if self.bar:
            self.bar.update()
        if step % self.print_freq == 0 or step % self.epoch_steps == 0:
            self._flush(step, lr, m)

    def _flush(self, step, lr, m):
        values = average(torch.stack(self.pending)).cpu()  # [steps since, scalars]; waits here
        self._check(step, values[:, self.names.index("loss")])
        now = time.perf_counter()
        seconds = now - self.since
        self.latest = dict(zip(self.names, values.mean(0).tolist()))
        self.latest |= dict(chance=self.chance, lr=lr, m=m)
        self.latest |= dict(
            images_per_s=len(values) * self.batch_size / seconds, data_wait=self.waited / seconds
        )
        self.row(step, **self.latest)
        self.pending, self.waited, self.since = [], 0.0, now
        if self.bar:
            self.bar.set_postfix_str(self._short())

    def _check(self, step, losses):
        bad = ~losses.isfinite()
        if bad.any():
            self._stop(
                f"loss became {losses[bad][0]:f}", step - len(losses) + int(bad.int().argmax())
            )

    def check_weights(self, step, model):
        """Stops the run if a weight is no number: the last step of an epoch shows in no loss."""
        norms = torch.stack(torch._foreach_norm(list(model.parameters())))
        if not norms.isfinite().all():
            self._stop("weights are no numbers any more", step - 1)

    def _stop(self, what, step):
        epoch, iteration = divmod(step, self.epoch_steps)
        last = self.folder / checkpoint.LAST
        raise UserError(
            f"the {what} in epoch {epoch}, iteration {iteration} (both from 0); last good "
            f"checkpoint: {last if last.exists() else 'none yet'}; what helps: a lower --lr, "
            "--clip-grad, --stop-grad-conv1, --amp bf16 or off",
            code=1,
        )

    def row(self, step, **values):
        """One line of log.jsonl; `epoch` has fractions."""
        if not self.speaks:
            return
        self.knn = values.get("knn", self.knn)
        values = {key: float(f"{value:.6g}") for key, value in values.items()}
        row = dict(epoch=round(step / self.epoch_steps, 4), step=step) | values
        self.file.write(json.dumps(row) + "\n")
        if self.board:
            for key, value in values.items():
                self.board.add_scalar(key, value, step)

    def _short(self):
        knn = "" if self.knn is None else f", kNN {self.knn:.1f} %"
        return f"loss {self.latest['loss']:.3f} (chance {self.chance:.2f}){knn}"

    def epoch(self, epoch, epochs, new_knn):
        """The line after an epoch. Beside a bar only those with a new kNN are worth one."""
        if not self.speaks:
            return
        if new_knn or not self.bar:
            last = self.latest
            self.say(
                f"epoch {epoch}/{epochs}  {self._short()}  top-1 {100 * last['top1']:.1f} %  "
                f"spread {last['spread']:.2f}  {last['images_per_s']:,.0f} images/s, "
                f"{100 * last['data_wait']:.0f} % of it waiting for data"
            )
        if epoch == epochs or time.perf_counter() - self.drawn > 60:  # seconds
            draw_curves(self.folder)
            self.drawn = time.perf_counter()

    def close(self):
        for end in (self.bar, self.board, self.file):
            if end:
                end.close()


def read_rows(path):
    """log.jsonl → list of dicts; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


PANELS = {
    "loss": "loss, and its chance level (dashed)",
    "knn": "kNN accuracy on held-out images, %",
    "top1": "contrastive top-1, share of queries",
    "spread": "spread of the features (0: collapsed)",
    "lr": "learning rate",
    "m": "momentum coefficient m",
}


def draw_curves(folder):
    """folder/log.jsonl → folder/curves.png."""
    from matplotlib.figure import Figure

    rows = read_rows(Path(folder, "log.jsonl"))
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        points = [(row["epoch"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points), marker="." if key == "knn" else None)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        if key == "loss" and points:
            chance = next(row["chance"] for row in rows if "chance" in row)
            axes.axhline(chance, ls="--", color="gray")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(Path(folder, "curves.png"), dpi=100)


def draw_views(folder, x1, x2, most=10):
    """Pairs of normalised views [N, 3, H, W], as the model sees them → folder/views.png."""
    from matplotlib.figure import Figure

    n = min(most, len(x1))
    height, width = x1.shape[-2:]
    figure = Figure(figsize=(1.3 * n + 0.3, 2.6 * height / width + 0.3), layout="constrained")
    for row, (views, name) in enumerate(((x1, "view 1"), (x2, "view 2"))):
        for column in range(n):
            axes = figure.add_subplot(2, n, row * n + column + 1, xticks=[], yticks=[])
            image = denormalize(views[column].float().cpu()).clamp(0, 1)
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            if column == 0:
                axes.set_ylabel(name)
    figure.savefig(Path(folder, "views.png"), dpi=100)


def versions():
    """What a run stood on: package versions and the git revision, `+` if files were changed."""
    import timm
    import torchvision

    found = dict(
        python=sys.version.split()[0],
        torch=str(torch.__version__),  # a plain str: the checkpoint holds it
        torchvision=torchvision.__version__,
        timm=timm.__version__,
    )
    git, here = ("git", "describe", "--always", "--dirty=+"), Path(__file__).parent
    try:
        described = subprocess.run(git, cwd=here, capture_output=True, text=True, check=True)
        found["git"] = described.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["git"] = "none"
    return found
