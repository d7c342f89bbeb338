"""The paper's instability, reported when it happens: spikes of the gradient and dips of kNN."""

import math
import statistics
from collections import deque

SPIKE_FACTOR = 5  # above this multiple of the running median a gradient is a spike
WINDOW = 100  # steps without spikes that the running median is of
MIN_STEPS = 20  # before a median means something
DIP = 1.0  # percentage points below the best kNN so far
PLACES = {"first": "first layer", "last": "last block"}


class SpikeDetector:
    """Counts spikes of the gradient in the first layer and the last block, and dips of kNN.

    A spike is a step whose gradient is SPIKE_FACTOR times the median of the WINDOW steps before it;
    it lasts until the gradient is below that again, and its steps don't enter the median. The state
    is part of the checkpoint, without the best kNN: a resumed run may measure it on other images.
    """

    def __init__(self):
        self.windows = {place: deque(maxlen=WINDOW) for place in PLACES}
        self.spiking = dict.fromkeys(PLACES, False)
        self.counts = dict.fromkeys(PLACES, 0)
        self.num_dips = 0
        self.best_knn = 0.0

    def state_dict(self):
        windows = {place: list(window) for place, window in self.windows.items()}
        spiking, counts = dict(self.spiking), dict(self.counts)
        return dict(windows=windows, spiking=spiking, counts=counts, num_dips=self.num_dips)

    def load_state_dict(self, state):
        for place in PLACES:
            self.windows[place] = deque(map(float, state["windows"][place]), maxlen=WINDOW)
            self.spiking[place] = bool(state["spiking"][place])
            self.counts[place] = int(state["counts"][place])
        self.num_dips = int(state["num_dips"])

    def update(self, step, **gradients):
        """first=, last=: ℓ∞ of a step's gradients → a sentence about spikes that begin, or None."""
        texts = []
        for place, value in gradients.items():
            window, was_spiking = self.windows[place], self.spiking[place]
            median = statistics.median(window) if len(window) >= MIN_STEPS else math.inf
            # Not finite: a step that fp16's loss scaler skips, or a divergence that the loss shows.
            is_finite = math.isfinite(value)
            self.spiking[place] = is_finite and value > SPIKE_FACTOR * median > 0
            if is_finite and not self.spiking[place]:
                window.append(value)
            if self.spiking[place] and not was_spiking:
                self.counts[place] += 1
                texts.append(f"{PLACES[place]} {value / median:.1f} times its median")
        return f"gradient spike in step {step}: {'; '.join(texts)}" if texts else None

    def update_knn(self, accuracy):
        """kNN in percent → a sentence if it dipped, or None."""
        drop = self.best_knn - accuracy
        self.best_knn = max(self.best_knn, accuracy)
        if drop <= DIP:
            return None
        self.num_dips += 1
        return f"kNN dips: {accuracy:.1f} %, {drop:.1f} points below the best so far"

    def __str__(self):
        first, last = self.counts["first"], self.counts["last"]
        return (
            f"{first} gradient spike{'' if first == 1 else 's'} in the first layer, {last} in the "
            f"last block; {self.num_dips} kNN dip{'' if self.num_dips == 1 else 's'}"
        )
