"""What is measured: pieces, each some arms that run alternately, as fresh processes, so many rounds.

A piece is done when its file of results holds all its rounds; ``bench.py`` goes on where it stopped. Curves are pieces
whose arms have a place on an axis and a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import predict, shapes
from benchmarks.predict import Work
from benchmarks.shapes import SHAPES, SMOLLM2, Texts
from benchmarks.task import Task

OURS, PEER, PACKED, SFT = "benchmarks.ours", "benchmarks.peer", "benchmarks.packed", "benchmarks.sft"
PREPARED = (PEER, PACKED, SFT)  # arms that need what benchmarks.task makes


@dataclass(frozen=True)
class Arm:
    name: str
    task: Task
    module: str = OURS
    arguments: tuple[str, ...] = ()
    x: float | None = None  # its place on a curve's axis
    work: Work | None = None  # what it must cost, for a prediction

    @property
    def ordered(self) -> bool:
        """Whether its steps see what ours see, so that their losses can be compared."""
        return "grouped" not in self.arguments


@dataclass(frozen=True)
class Curve:
    """How a piece is drawn. ``prediction``: flops (from the arm's work, through the first point), flat (as the first
    point), or a line of ``slope`` a unit of x through the first point."""

    title: str
    x: str
    y: str  # the figure that is drawn
    label: str
    prediction: str
    slope: float = 0.0
    log: bool = False


@dataclass(frozen=True)
class Piece:
    name: str
    about: str
    arms: tuple[Arm, ...]
    rounds: int
    curve: Curve | None = None
    losses: bool = False  # kept, step by step


@dataclass(frozen=True)
class Size:
    """What a set of pieces is measured on: the real one, or one of seconds for the tests."""

    real: str  # the model of the acceptance table
    cut: str  # that of the curves
    data: str | None  # its data; None: generated
    steps: int  # timed, of the acceptance table
    curve_steps: int
    tokens: int  # a step of the curves
    shortest: int  # document of the curves
    rounds: int
    curve_rounds: int
    losses: int  # steps of the comparison of losses
    ranks: tuple[int, ...]
    vocabularies: tuple[int, ...]


CPU = Size("smollm2", "smollm2-cut", "stdlib", 3, 4, 1024, 128, 5, 3, 50, (8, 16, 32, 64), (8192, 32768, 131072))
TINY = Size("tiny", "tiny", None, 2, 2, 256, 64, 1, 1, 4, (2, 4), (512, 2048))


def cpu(folder: Path, size: Size = CPU, device: str = "cpu", precision: str = "fp32") -> list[Piece]:
    """The pieces of ``make bench``; texts are written into ``folder``."""
    made = Making(folder, size, device, precision)
    return [
        made.rates(),
        made.saved(),
        made.peers(),
        made.losses(),
        made.methods(),
        made.nf4(),
        made.lengths(),
        made.memory(),
        made.variance(),
        made.residents(),
        made.ranks(),
        made.loss_memory(),
        made.targets(),
        made.top_layers(),
    ]


@dataclass(frozen=True)
class Making:
    folder: Path
    size: Size
    device: str
    precision: str

    # The acceptance table

    def rates(self) -> Piece:
        work = self.generated((self.size.tokens,), model=self.size.cut)
        return Piece("rates", "what this machine does in a second", (Arm("rates", work, "benchmarks.rates"),), 1)

    def saved(self) -> Piece:
        arm = Arm("lowrank", self.real(1, warmup=1), "benchmarks.saved")
        return Piece("saved", "bytes kept between forward and backward, counted, against the formula", (arm,), 1)

    def peers(self) -> Piece:
        work = self.real(self.size.steps)
        arms = (
            Arm("PEFT + Trainer", work, PEER),
            Arm("PEFT + Trainer, grouped by length", work, PEER, ("grouped",)),
            Arm("PEFT, our packs and head rows", work, PACKED),
            Arm("lowrank", work),
        )
        return Piece("peers", "the same training by four programs", arms, self.size.rounds)

    def losses(self) -> Piece:
        work = replace(self.real(self.size.losses), micro_batch=2)
        arms = (
            Arm("PEFT, our packs and head rows", work, PACKED),
            Arm("lowrank", work),
            Arm("PEFT in fp64", work, PACKED, ("fp64",)),
        )
        return Piece("losses", "losses step by step", arms, 1, losses=True)

    def methods(self) -> Piece:
        work = self.real(self.size.steps)
        arms = (
            Arm("LoRA", work),
            Arm("dropout 0.05", replace(work, extra=("adapter.dropout=0.05",))),
            Arm("AdaLoRA", self.method(work, "adapter=adalora", "adapter.alpha=16")),
            Arm("prefix-20", self.method(work, "adapter=prefix", "adapter.length=20")),
        )
        return Piece("methods", "methods and options against LoRA", arms, self.size.rounds)

    def method(self, work: Task, *changes: str) -> Task:
        """Another adapter in place of LoRA: what the task says of LoRA is taken back."""
        return replace(work, rank=0, extra=changes)

    def nf4(self) -> Piece:
        work = self.real(self.size.steps)
        arms = (Arm("dense", work), Arm("nf4", replace(work, extra=("quant=nf4", "quant.double=true"))))
        return Piece("nf4", "an NF4 base against a dense one", arms, self.size.rounds)

    # Curves

    def lengths(self) -> Piece:
        tokens = self.size.tokens * 2
        lengths = doubled(self.size.shortest, tokens)
        arms = [self.point(f"s={s}", s, self.generated((s,), tokens), self.work(tokens, s)) for s in lengths]
        curve = Curve("Tokens a second against document length", "s", "tokens_per_s", "tokens/s", "flops", log=True)
        return self.curve("lengths", f"documents of s tokens, {tokens:,} a step", arms, curve)

    def memory(self) -> Piece:
        s, shape = self.size.shortest, self.shape
        counts = doubled(self.size.tokens // 2, self.size.tokens * 4)
        arms = [self.point(f"T={t}", t, self.generated((s,), t, steps=0), None, "benchmarks.saved") for t in counts]
        size = 4 if self.precision == "fp32" else 2
        slope = (predict.saved_bytes(shape, size) + predict.saved_beside(shape, 0.125, size)) / 1e6
        title = "Bytes kept for backward against tokens a step"
        curve = Curve(title, "T", "saved_mb", "MB kept", "line", slope)
        return Piece("memory", f"documents of {s} tokens", tuple(arms), 1, curve)

    def variance(self) -> Piece:
        tokens, mean = self.size.tokens, self.size.tokens // 6
        arms = []
        for deviation in (0.0, 0.4, 0.8):
            lengths = shapes.spread(mean, deviation, 64, tokens)
            one = self.generated(lengths, tokens)
            arms.append(self.point(f"σ={deviation}", deviation, one, self.work(tokens, mean)))
        title = "Real tokens a second against the variance of lengths"
        curve = Curve(title, "deviation of log length", "tokens_per_s", "real tokens/s", "flat")
        return self.curve("variance", f"documents of {mean} tokens in the mean, packs of {tokens:,}", arms, curve)

    def residents(self) -> Piece:
        work = self.generated((self.size.shortest * 2,))
        arms = [
            Arm(f"{n} resident", work, "benchmarks.resident", (str(n),), float(n))
            for n in ((1, 4, 16) if self.size is not TINY else (1, 3))
        ]
        title = "Tokens a second against resident adapters, one of which trains"
        curve = Curve(title, "adapters", "tokens_per_s", "tokens/s", "flat", log=True)
        return self.curve("residents", "one adapter trains, the others stand by", arms, curve)

    def ranks(self) -> Piece:
        s, tokens = self.size.shortest * 2, self.size.tokens
        arms = [
            self.point(f"r={r}", r, replace(self.generated((s,)), rank=r), self.work(tokens, s, r))
            for r in self.size.ranks
        ]
        curve = Curve("Tokens a second against rank", "r", "tokens_per_s", "tokens/s", "flops", log=True)
        return self.curve("ranks", f"documents of {s} tokens", arms, curve)

    def loss_memory(self) -> Piece:
        rows, width, work = self.size.tokens * 2, self.shape.d, self.generated((self.size.tokens,))
        room = 2e9 if self.device == "cpu" else 40e9  # for the plain loss: logits, their log-softmax, its gradient
        arms = [
            Arm(f"{how}, V={v}", work, "benchmarks.loss_layer", (str(rows), str(v), str(width), how), float(v))
            for v in self.size.vocabularies
            for how in ("chunks", "plain")
            if how == "chunks" or 12 * rows * v <= room
        ]
        title = "Memory of the loss against vocabulary"
        curve = Curve(title, "V", "extra_mb", "MB above inputs and result", "flat", log=True)
        return Piece("loss", f"{rows} target rows of width {width}", tuple(arms), 1, curve)

    def targets(self) -> Piece:
        s, tokens = self.size.shortest * 2, self.size.tokens
        arms = []
        for share in (0.75, 0.5, 0.25, 0.05):
            one, work = self.generated((s,), share=share), self.work(tokens, s, share=share)
            arms.append(self.point(f"{share:.0%} targets", 1 - share, one, work))
        title = "Time of a step against the share of tokens that are no targets"
        curve = Curve(title, "share", "seconds", "seconds a step", "flops")
        return self.curve("targets", f"documents of {s} tokens", arms, curve)

    def top_layers(self) -> Piece:
        s, tokens, layers = self.size.shortest * 2, self.size.tokens, self.shape.layers
        arms = []
        for top in sorted({1, layers // 3 or 1, 2 * layers // 3, layers}):
            one = replace(self.generated((s,)), targets=f"all-linear@{layers - top}-{layers - 1}")
            arms.append(self.point(f"top {top}", top, one, self.work(tokens, s, top=top)))
        title = "Time of a step with adapters on the top k layers"
        curve = Curve(title, "k", "seconds", "seconds a step", "flops")
        return self.curve("top", f"documents of {s} tokens", arms, curve)

    # What they are made of

    @property
    def shape(self) -> shapes.Shape:
        return SMOLLM2 if self.size.cut == "smollm2" else SHAPES[self.size.cut]

    def work(self, tokens: int, s: float, r: int = 16, share: float = 0.125, top: int | None = None) -> Work:
        return predict.step(self.shape, tokens, s, r, share, top)

    def point(self, name: str, x: float, task: Task, work: Work | None, module: str = OURS) -> Arm:
        return Arm(name, task, module, (), float(x), work)

    def curve(self, name: str, about: str, arms: Sequence[Arm], curve: Curve) -> Piece:
        return Piece(name, about, tuple(arms), self.size.curve_rounds, curve)

    def real(self, steps: int, warmup: int = 1) -> Task:
        """The acceptance table's: real lengths where there is data of its own."""
        data = self.size.data or str(Texts((96, 130, 70, 210), 8 * (steps + warmup + 2)).write(self.folder))
        return Task(self.size.real, data, steps + warmup, warmup, precision=self.precision, device=self.device)

    def generated(
        self, lengths: tuple[int, ...], tokens: int = 0, *, steps: int = -1, share: float = 0.125, model: str = ""
    ) -> Task:
        """Packs of ``tokens`` of random text, the share of them learnt."""
        tokens, steps = tokens or self.size.tokens, self.size.curve_steps if steps < 0 else steps
        needed = (steps + 2) * tokens * len(lengths) // sum(lengths) + len(lengths)
        data = Texts(lengths, round(needed / 0.85) + 4, share).write(self.folder)  # a tenth is held out
        return Task(
            model or self.size.cut,
            str(data),
            steps + 1,
            1,
            micro_batch=None,
            micro_batch_tokens=tokens,
            precision=self.precision,
            device=self.device,
            max_length=max(lengths),
        )


def doubled(first: int, last: int) -> list[int]:
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return found
