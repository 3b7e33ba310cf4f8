"""The benchmark's options, checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from architectures import default_config, make, positions_of, small_model
from common import OptionError, read_overrides
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from .contenders import CannotRun, Contender, ContenderError, parse_contender
from .pipelines import PIPELINES

SETTLING_TICKS = 10
THROUGHPUT = (
    *("naive", "ddp", "fsdp"),
    *(f"{peer}{micro_batches}" for peer in PIPELINES for micro_batches in ("", ":M=8")),
    *("pipelined@processes", "pipelined:M=8@processes", "pipelined", "lockstep@processes", "lockstep"),
    *("1f1b@processes", "1f1b:M=8@processes", "1f1b"),
    *("zero_bubble@processes", "zero_bubble:M=8@processes", "zero_bubble"),
)
TIME_TO_LOSS = (
    *("naive", "torch-1f1b", "torch-1f1b:M=8", "1f1b:M=8@processes"),
    "pipelined:M=8,delay_compensation=muon+auto",
)


@dataclass
class BenchmarkArguments:
    """What to measure."""

    contenders: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"In the order in which they run: naive, ddp, fsdp, {', '.join(PIPELINES)}, our schedules, and "
            "schedule@processes; settings behind a colon, as in pipelined:M=8,learning_rate=5e-4@processes. "
            f"Default, without those that can't run: {' '.join(THROUGHPUT)}; with --until_loss: {' '.join(TIME_TO_LOSS)}."
        },
    )
    devices: list[str] = field(
        default_factory=lambda: ["cpu:0", "cpu:1"], metadata={"help": "Devices of the pipeline, a core each on CPU."}
    )
    device_map: str = field(default="auto", metadata={"help": "Split of ours, as in OuroborosArguments."})
    repetitions: int = field(default=3, metadata={"help": "How often all contenders run, each time with another seed."})
    updates: int = field(default=16, metadata={"help": "Optimizer steps per run."})
    micro_batches: int = field(default=4, metadata={"help": "Micro-batches per update, M, of contenders without M=."})
    batch_size: int = field(
        default=4, metadata={"help": "Rows per micro-batch; M times it is everyone's global batch."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens per row."})
    model_type: str = field(
        default="gpt2",
        metadata={
            "help": "Architecture: gpt2, llama, qwen3, mixtral, ..., in the proportions of its default configuration; a "
            "transfo-xl reads every row by itself, without memory."
        },
    )
    config_overrides: str = field(
        default="", metadata={"help": "Further changes of the configuration: name=value,... They win over all sizes."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Train this model over bytes on instead of one from scratch; its sizes take the place of --model_type, "
            "--n_embd, --n_layer, --vocab_size and --untied, and its dropout is switched off."
        },
    )
    n_embd: int = field(default=256, metadata={"help": "Width of the model."})
    n_layer: int = field(default=8, metadata={"help": "Layers of the model."})
    vocab_size: int = field(default=257, metadata={"help": "Vocabulary of the model; the text is bytes."})
    init_std: float = field(
        default=0.02,
        metadata={
            "help": "Standard deviation of the weights at the start. The usual value keeps narrow models on the plateau of "
            "letter frequencies for most of a short run; for a time to a loss take 0.05."
        },
    )
    untied: bool = field(
        default=False,
        metadata={"help": "Give the head a matrix of its own, for all contenders; ours then has K = devices."},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters of this rank on all linear modules of the layers, and nothing else (needs the extra "
            "`peft`); torch-* can't."
        },
    )
    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "Optimizer of all contenders: adamw, or muon with AdamW. Default: adamw, with --until_loss muon, as is "
            "recommended with delays.",
            "choices": ["adamw", "muon"],
        },
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "The optimizer's, after the warm-up."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={
            "help": "How the learning rate goes on after the warm-up, over the planned length of a run.",
            "choices": ["constant_with_warmup", "linear", "cosine"],
        },
    )
    warmup_updates: int = field(default=10, metadata={"help": "Updates of linear learning rate warm-up."})
    train_file: str | None = field(default=None, metadata={"help": "Text; default: Python's standard library."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and data of the first repetition."})
    time_limit: float = field(
        default=3600.0, metadata={"help": "Seconds after which a run is ended and counts as failed."}
    )
    until_loss: str | None = field(
        default=None,
        metadata={
            "help": "Measure time and tokens to a validation loss instead: a number (nats per token), or 'naive' for what "
            "the naive run reaches in --updates updates."
        },
    )
    eval_every: int = field(default=10, metadata={"help": "With --until_loss: updates between evaluations."})
    at_most: float = field(
        default=2.0,
        metadata={
            "help": "With --until_loss: plan runs other than the naive one, and those with a max_steps of their own, for so "
            "many times --updates."
        },
    )
    slack: float = field(
        default=0.0,
        metadata={
            "help": "With --until_loss naive: put the target so much, relatively, above what the naive run ends at. Where the "
            "learning rate goes to 0, runs of the same numbers would miss each other's last loss by their rounding."
        },
    )
    output_dir: str = field(default="runs/benchmark", metadata={"help": "Where results, plots and timelines go."})

    def __post_init__(self) -> None:
        if self.optimizer is None:
            self.optimizer = "adamw" if self.until_loss is None else "muon"

    @property
    def global_batch(self) -> int:
        """Rows per update."""
        return self.micro_batches * self.batch_size

    @property
    def tokens_per_update(self) -> int:
        """Tokens per update, the same for all contenders."""
        return self.global_batch * self.block_size

    @property
    def on_cpu(self) -> bool:
        """Whether the devices are CPU cores."""
        return self.devices[0].startswith("cpu")

    @property
    def most_updates(self) -> int:
        """Updates of the longest run."""
        return max(map(self.planned_updates, self.parsed_contenders()))

    def planned_updates(self, contender: Contender) -> int:
        """Updates of a contender's run, if it does not reach the target earlier."""
        if contender.max_steps is not None:
            return contender.max_steps
        longer = self.until_loss is not None and not self.sets_target(contender)
        return round(self.updates * self.at_most) if longer else self.updates

    def sets_target(self, contender: Contender) -> bool:
        """Whether it is this contender's loss that the others have to reach."""
        return self.until_loss == "naive" and contender.label == "naive"

    def parsed_contenders(self) -> list[Contender]:
        """The contenders, in the order in which they run.

        Raises:
            ContenderError: an unknown or impossible one.
        """
        return self._sorted_out()[0]

    def left_out(self) -> dict[str, str]:
        """Of the contenders that run by default, those that can't, and why; what was asked for is refused instead."""
        return self._sorted_out()[1]

    def _sorted_out(self) -> tuple[list[Contender], dict[str, str]]:
        able, unable, layers = [], {}, self._layers()
        for name in self.contenders or (THROUGHPUT if self.until_loss is None else TIME_TO_LOSS):
            try:
                contender = parse_contender(name, self.micro_batches, self.global_batch, len(self.devices))
                if self.lora_rank is not None and contender.kind in PIPELINES:
                    raise CannotRun(f"contender {name!r}: it has no stages of a model with adapters (--lora_rank)")
                stages = (
                    len(PIPELINES[contender.kind].placement(len(self.devices))) if contender.kind in PIPELINES else 0
                )
                if stages > layers:
                    raise CannotRun(
                        f"contender {name!r}: it has {stages} stages, the model {layers} layers; use more layers"
                    )
                able.append(contender)
            except CannotRun as error:
                if self.contenders:
                    raise
                unable[name] = str(error)
        return able, unable

    def _layers(self) -> int:
        """How many layers the model has."""
        if self.model_name_or_path is not None:
            return self.n_layer
        return self.config().get_text_config().num_hidden_layers

    def take_sizes(self) -> None:
        """Replaces the sizes by those of `model_name_or_path`, if there is one.

        Raises:
            ContenderError: it can't be read, is no causal language model, or is too short for the rows.
        """
        if self.model_name_or_path is None:
            return
        try:
            config = AutoConfig.from_pretrained(self.model_name_or_path)
        except (OSError, ValueError) as error:
            raise ContenderError(f"--model_name_or_path {self.model_name_or_path}: {error}") from error
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ContenderError(
                f"--model_name_or_path {self.model_name_or_path} is a {config.model_type}; use a causal language model"
            )
        positions = positions_of(config)
        if positions and positions < self.block_size:
            raise ContenderError(
                f"--model_name_or_path {self.model_name_or_path} has {positions} positions, --block_size is "
                f"{self.block_size}; use a smaller --block_size"
            )
        text = config.get_text_config()
        self.model_type, self.untied = config.model_type, not config.tie_word_embeddings
        self.n_embd, self.n_layer, self.vocab_size = text.hidden_size, text.num_hidden_layers, text.vocab_size

    def config(self) -> PretrainedConfig:
        """The configuration of a model from scratch, without dropout.

        Raises:
            ContenderError: there is no such type, or it does not take these sizes.
        """
        heads = max(1, self.n_embd // 64)
        try:
            default = default_config("--model_type", self.model_type)
            values = small_model(default, self.n_embd, heads, self.n_layer, self.init_std) | {
                "vocab_size": self.vocab_size
            }
            values |= {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": not self.untied}
            if self.model_type == "transfo-xl":  # with a plain softmax; attention is what it costs
                plain = {"cutoffs": [], "div_val": 1, "d_embed": self.n_embd, "d_head": 64, "d_inner": 4 * self.n_embd}
                values |= plain | {"mem_len": 0, "clamp_len": 0, "same_length": False}
            else:
                values["pad_token_id"] = None
            if positions_of(default):
                name = default.attribute_map.get("max_position_embeddings", "max_position_embeddings")
                values[name] = self.block_size
            return make(default, values | read_overrides(self.config_overrides, default))
        except OptionError as error:
            raise ContenderError(str(error)) from error

    def check(self) -> None:
        """Refuses what can't be measured.

        Raises:
            ContenderError: with the option, what was found and what to do.
        """
        contenders = self.parsed_contenders()
        if len({c.label for c in contenders}) < len(contenders):
            raise ContenderError(f"--contenders names one twice: {' '.join(c.label for c in contenders)}")
        if not self.on_cpu and self.devices != [f"cuda:{i}" for i in range(len(self.devices))]:
            raise ContenderError(f"--devices {' '.join(self.devices)}: use cpu:0 cpu:1 ... or cuda:0 cuda:1 ...")
        if self.vocab_size < 256:
            raise ContenderError(f"--vocab_size {self.vocab_size} can't hold bytes; use 256 or more")
        if self.model_name_or_path is None:
            self.config()
        if self.lora_rank is not None and self.optimizer == "muon":
            raise ContenderError("--lora_rank with --optimizer muon: Muon leaves adapters alone; use --optimizer adamw")
        if self.until_loss is None:
            for contender in contenders:
                first = settling_updates(contender)
                if self.updates < first + 4:
                    raise ContenderError(
                        f"--updates {self.updates} leaves no steady state after {SETTLING_TICKS} ticks of "
                        f"{contender.label}; use {first + 4} or more"
                    )
            return
        # The last evaluation is at the end of a run: the naive one's may set the target, others may only then reach it.
        if self.updates % self.eval_every:
            raise ContenderError(f"--updates {self.updates} must be a multiple of --eval_every {self.eval_every}")
        for contender in contenders:
            if (contender.max_steps or 0) % self.eval_every:
                raise ContenderError(
                    f"contender {contender.label!r}: its max_steps must be a multiple of --eval_every {self.eval_every}"
                )
        if self.until_loss == "naive":
            if contenders[0].label != "naive":
                raise ContenderError("--until_loss naive takes the target from the naive run: name naive first")
        else:
            try:
                float(self.until_loss)
            except ValueError:
                raise ContenderError(f"--until_loss {self.until_loss!r} must be a number or 'naive'") from None


def settling_updates(contender: Contender) -> int:
    """Updates at the start of a run that the throughput leaves out."""
    return -(-SETTLING_TICKS // contender.micro_batches)
