"""The paper's instability, reported when it happens: spikes of the gradient and dips of kNN."""

import math
import statistics
from collections import deque

SPIKE_FACTOR = 5  # above this multiple of the running median a gradient is a spike
WINDOW = 100  # steps without spikes that the running median is of
MIN_STEPS = 20  # before a median means something
MAX_LAG = 100  # steps from a spike in the first layer to the one in the last that belongs to it
DIP = 1.0  # percentage points below the best kNN so far


class SpikeDetector:
    """Counts spikes in the first layer and the last block, and the lags between them.

    A spike is a step whose gradient is SPIKE_FACTOR times the median of the WINDOW steps before it;
    it lasts until the gradient is below that again, and its steps don't enter the median. Its state
    is part of the checkpoint.
    """

    def __init__(self):
        self.windows = {"first": deque(maxlen=WINDOW), "last": deque(maxlen=WINDOW)}
        self.spiking = {"first": False, "last": False}
        self.counts = {"first": 0, "last": 0}
        self.onset = None  # step of the last spike in the first layer, while unmatched
        self.lags = []  # steps by which the first layer was ahead
        self.best_knn = 0.0
        self.num_dips = 0

    def state_dict(self):
        state = dict(vars(self))
        state["windows"] = {place: list(window) for place, window in self.windows.items()}
        return state

    def load_state_dict(self, state):
        for name in vars(self):
            if name != "windows":
                setattr(self, name, state[name])
        for place, window in self.windows.items():
            window.clear()
            window.extend(float(value) for value in state["windows"][place])

    def update(self, step, first, last):
        """Gradients (ℓ∞) of one step → a sentence about a spike that begins there, or None."""
        messages = []
        for place, value in (("first", first), ("last", last)):
            median = self._check(place, value)
            if median is None:
                continue
            name = "first layer" if place == "first" else "last block"
            messages.append(f"{name} {value / median:.1f} times its median")
            if place == "first":
                self.onset = step
            elif self.onset is not None:
                if step - self.onset <= MAX_LAG:
                    self.lags.append(step - self.onset)
                    messages[-1] += f", {self.lags[-1]} steps after the first layer"
                self.onset = None
        return f"gradient spike in step {step}: {'; '.join(messages)}" if messages else None

    def _check(self, place, value):
        """The running median if a spike begins, else None."""
        window = self.windows[place]
        median = statistics.median(window) if len(window) >= MIN_STEPS else None
        # Not finite: a step that fp16's loss scaler skips, or a divergence that the loss shows.
        is_finite = math.isfinite(value)
        is_spike = median is not None and is_finite and value > SPIKE_FACTOR * median > 0
        begins = is_spike and not self.spiking[place]
        self.spiking[place] = is_spike
        if begins:
            self.counts[place] += 1
        if not is_spike and is_finite:
            window.append(value)
        return median if begins else None

    def update_knn(self, accuracy):
        """kNN in percent → a sentence if it dipped, or None."""
        is_dip = accuracy < self.best_knn - DIP
        drop = self.best_knn - accuracy
        self.best_knn = max(self.best_knn, accuracy)
        if not is_dip:
            return None
        self.num_dips += 1
        return f"kNN dips: {accuracy:.1f} %, {drop:.1f} points below the best so far"

    def __str__(self):
        count = self.counts["first"]
        text = f"{count} gradient spike{'' if count == 1 else 's'} in the first layer"
        text += f", {self.counts['last']} in the last block"
        if self.lags:
            lag = statistics.median(self.lags)
            text += f", first layer before last by a median of {lag:g} steps"
        return f"{text}; {self.num_dips} kNN dip{'' if self.num_dips == 1 else 's'}"
