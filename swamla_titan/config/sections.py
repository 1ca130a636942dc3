"""The sections of a TOML file: one dataclass each, one documented and bounded line per key."""

from dataclasses import dataclass, field
from typing import Any, get_args

from swamla_titan.conditions import One, when, when_both, when_either, when_not, when_on
from swamla_titan.fields import HUGE, key
from swamla_titan.kernels.limits import AttentionBackend
from swamla_titan.model.config import LONGEST_SEQUENCE, MOST_LAYERS, ModelConfig

# Upper bounds that nobody meets who means it; what is larger would only keep programs busy, or their memory full.
MOST_RANKS = 1 << 15
_MOST_STEPS = 99_999_999  # as many digits as a checkpoint's name has
_LONGEST_WAIT = 31_536_000.0  # seconds: a year

# When keys have an effect, see conditions.py.


def _reads_rows(config: Any) -> bool:
    """Of fields with names: not of a single text file, nor of text that ships with Python."""
    paths = [config.validation.path] if config.validation.path else []
    paths += [config.data.path] if config.data.source == "local" else []
    return config.data.source == "huggingface" or not all(path.endswith((".txt", ".md")) for path in paths)


def _reads_text_files(config: Any) -> bool:
    paths = [config.validation.path] if config.validation.path else []
    paths += [config.data.path] if config.data.source == "local" else []
    return not all(path.endswith((".jsonl", ".json", ".parquet")) for path in paths)


_HUB = when("data.source", "huggingface")
_FILES = when("data.source", "local", "huggingface")
_FILES_OF_ANY_KIND = when_either(_FILES, when_on("validation.path"))
_ROWS_OF_TEXT = One(
    ("data.source", "data.path"), _reads_rows, 'data.source = "huggingface", or a path to jsonl or parquet'
)
_TEXT_FILES = One(("data.source", "data.path"), _reads_text_files, 'data.source = "local" and a path to text files')
_STREAMS_FOR_WORKERS = One(
    ("data.streams",), lambda config: config.data.num_workers <= config.data.streams, "data.streams to it or more"
)
_BATCH_TO_CUT = One(
    ("training.global_batch_size",),
    lambda config: config.training.local_batch_size <= config.training.global_batch_size,
    "training.global_batch_size to it or more",
    ignorable=False,
)
_STEPS_TO_WARM_UP = One(
    ("training.steps",),
    lambda config: config.lr_schedule.warmup_steps <= config.training.steps,
    "training.steps to it or more: the run would end before its peak",
    ignorable=False,
)
_MUON = when("optimizer.name", "muon")
_TABLES = when_either(*(when_on(f"model.{name}.layers") for name in ModelConfig.annex_configs()))
_SHARDS = when("parallel.data_parallel", "fsdp", "hsdp")
_TENSOR = One(("parallel.tensor",), lambda config: config.parallel.tensor > 1, "parallel.tensor to 2 or more")
_PIPELINE = One(("parallel.pipeline",), lambda config: config.parallel.pipeline > 1, "parallel.pipeline to 2 or more")
_COMPILED = when_on("compile.enabled", "compile.enabled = true")
_SELECTIVE = when("activation_checkpoint.mode", "selective")
_SELECTED_BLOCKS = when_both(_SELECTIVE, when("activation_checkpoint.selective", "blocks"))
_FLOAT8 = when_not("float8.recipe", "off")
_NATIVE = when("float8.recipe", "native", "auto")
_GATHERED = One(
    ("float8.recipe",),
    lambda config: config.float8.recipe == "tensorwise" or config.float8.fsdp_all_gather == "never",  # as is so anyway
    'float8.recipe = "tensorwise"',
)
_NO_PATH = One(
    ("validation.path",),
    lambda config: not config.validation.path or config.validation.fraction == 0,  # as is so anyway
    'validation.path = ""',
)
_VALIDATION = when_either(when_on("validation.interval"), when_on("validation.path"))
_PROFILING = when_on("profiling.enabled", "profiling.enabled = true")
_SKIPPING = when_on("fault_tolerance.skip_bad_steps", "fault_tolerance.skip_bad_steps = true")


@dataclass(frozen=True)
class Job:
    dump_folder: str = key("outputs/run", "Folder that receives everything the run writes.", path=True)
    seed: int = key(0, "Seed of the initial weights, dropout and the order of the data.", minimum=0, maximum=2**62)
    deterministic: bool = key(False, "Bit-identical results on repetition, at some cost in speed.")


@dataclass(frozen=True)
class Data:
    source: str = key(
        "huggingface",
        "builtin: Python's own documentation topics; local: files under data.path; huggingface: a dataset, streamed.",
        choices=("builtin", "local", "huggingface"),
    )
    path: str = key(
        "",
        "local: a .txt, .md, .jsonl, .json or .parquet file or a folder of them; huggingface: dataset name or folder.",
        path=True,
        needs=_FILES,
    )
    name: str = key("", "huggingface: configuration of the dataset.", needs=_HUB)
    split: str = key("train", "huggingface: split of the dataset.", needs=_HUB)
    revision: str = key(
        "", "huggingface: commit, tag or branch; empty: the newest commit, which is then written here.", needs=_HUB
    )
    text_key: str = key(
        "text", "Field that holds a document's text in jsonl, parquet and Hugging Face rows.", needs=_ROWS_OF_TEXT
    )
    text_separator: str = key(
        "",
        "String between the documents of a text file, literally; empty: a file is one document.",
        any_text=True,
        needs=_TEXT_FILES,
    )
    max_document_mib: int = key(
        64, "Largest document accepted, in MiB of text.", minimum=1, maximum=1 << 20, needs=_FILES_OF_ANY_KIND
    )
    tokenizer: str = key(
        "gpt2",
        "byte; gpt2 or another tiktoken encoding (r50k_base, p50k_base, cl100k_base, o200k_base); "
        "or the path of a .tiktoken file.",
        path=True,
    )
    streams: int = key(
        64,
        "Logical streams that the corpus is divided among; part of the order of the data.",
        minimum=1,
        maximum=1 << 16,
    )
    shuffle_documents: int = key(
        1000,
        "Documents shuffled together within a stream; 1: keep the order of the files.",
        minimum=1,
        maximum=10_000_000,
    )
    num_workers: int = key(
        1,
        "Loader processes per rank; 0: read in the training process.",
        minimum=0,
        maximum=1024,
        needs=_STREAMS_FOR_WORKERS,
    )
    document_mask: bool = key(False, "Attention and positions stop at document boundaries.")
    on_error: str = key(
        "stop",
        "What cannot be read, also after trying again: stop: save and end the run; skip_file: pass over the rest of "
        "the file, in every later epoch too, tell so, and go on.",
        choices=("stop", "skip_file"),
        needs=_FILES,
    )
    retry_seconds: float = key(
        -1.0,
        "Longest time that a step waits for a network or disk that does not answer, trying again; 0: never try again, "
        "-1: 300, or half of fault_tolerance.step_timeout if that is less. Missing files are not waited for.",
        minimum=-1,
        maximum=_LONGEST_WAIT,
        needs=_FILES_OF_ANY_KIND,
    )


@dataclass(frozen=True)
class Training:
    seq_len: int = key(2048, "Tokens a sequence.", minimum=1, maximum=LONGEST_SEQUENCE)
    local_batch_size: int = key(
        8, "Sequences a rank computes at a time (one micro-batch).", minimum=1, maximum=1 << 16, needs=_BATCH_TO_CUT
    )
    global_batch_size: int = key(8, "Sequences a step, over all ranks and micro-batches.", minimum=1, maximum=1 << 20)
    steps: int = key(1000, "Optimizer steps of the whole run.", minimum=1, maximum=_MOST_STEPS)
    max_grad_norm: float = key(1.0, "Gradients are scaled down to this global norm; 0: never.", minimum=0, maximum=HUGE)
    compute_dtype: str = key(
        "bfloat16", "Type of activations and products; weights are kept in float32.", choices=("bfloat16", "float32")
    )
    fp32_precision: str = key(
        "tf32", "How CUDA multiplies float32 matrices: tf32 is fast, ieee is exact.", choices=("tf32", "ieee")
    )
    gc_interval: int = key(
        100,
        "Steps between runs of Python's garbage collector, beside those at checkpoints; 0: leave it automatic.",
        minimum=0,
        maximum=_MOST_STEPS,
    )


@dataclass(frozen=True)
class Optimizer:
    name: str = key(
        "adamw",
        "adamw; lion: a third of AdamW's lr and three times its weight_decay are usual; adamw8bit, adamw4bit, "
        "adamw_fp8: AdamW with quantized moments of matrices; muon: orthogonalized updates of the blocks' matrices, "
        "AdamW for embedding, head and norms; auto: adamw_fp8 where products are in float8, else adamw, and in a run "
        "that is resumed what it began with.",
        choices=("adamw", "lion", "adamw8bit", "adamw4bit", "adamw_fp8", "muon", "auto"),
    )
    lr: float = key(3e-4, "Peak learning rate.", minimum=0, maximum=HUGE)
    beta1: float = key(0.9, "Decay of the first moment; lion: its share in the direction.", minimum=0, below=1)
    beta2: float = key(
        0.95, "Decay of the second moment; lion: of its momentum, where 0.99 is usual.", minimum=0, below=1
    )
    eps: float = key(
        1e-8, "Added to AdamW's denominator.", above=0, maximum=HUGE, needs=when_not("optimizer.name", "lion")
    )
    weight_decay: float = key(
        0.1,
        "Decoupled weight decay of the blocks' matrices; embedding, head, norms and biases have none.",
        minimum=0,
        maximum=HUGE,
    )
    decay_embeddings: bool = key(
        False,
        "Weight decay of the embedding and the output head, tied or not, as well.",
        needs=when_on("optimizer.weight_decay"),
    )
    lazy_tables: bool = key(
        True,
        "Tables of embeddings move by Adam: true: the rows that a step looked up, others keep weights and moments; "
        "false: all rows, as AdamW without decay moves them, at the cost of a pass over the tables each step.",
        needs=_TABLES,
    )
    moments: str = key(
        "float32",
        "Type of the moments of matrices (adamw, lion, muon); norms and tables keep float32.",
        choices=("float32", "bfloat16"),
        needs=when_not("optimizer.name", "adamw8bit", "adamw4bit", "adamw_fp8"),
    )
    lr_multipliers: dict[str, float] = key(
        {},
        "Factors of the learning rate, by patterns (*, ?) of parameters' names: "
        '{"embedding.weight" = 0.5, "*.wo.weight" = 2.0}. Of several that fit a name the last one counts.',
        minimum=0,
        maximum=HUGE,
    )
    muon_momentum: float = key(0.95, "muon: decay of the momentum.", minimum=0, below=1, needs=_MUON)
    muon_nesterov: bool = key(True, "muon: Nesterov's momentum.", needs=_MUON)
    muon_ns_steps: int = key(5, "muon: Newton-Schulz iterations.", minimum=1, maximum=99, needs=_MUON)
    muon_adjust_lr_fn: str = key(
        "match_rms_adamw",
        "muon: how lr follows a matrix's shape. match_rms_adamw: updates as large as AdamW's, one lr serves both; "
        "original: by sqrt(max(1, rows / columns)), with an lr of its own through lr_multipliers.",
        choices=("match_rms_adamw", "original"),
        needs=_MUON,
    )


@dataclass(frozen=True)
class EMA:
    decay: float = key(
        0.0,
        "Decay a step of a float32 average of the weights, which checkpoints keep as well; 0: none, 0.999 is usual.",
        minimum=0,
        below=1,
    )


@dataclass(frozen=True)
class LRSchedule:
    name: str = key(
        "cosine", "Shape after warm-up; wsd holds the peak and decays at the end.", choices=("cosine", "wsd", "linear")
    )
    warmup_steps: int = key(
        -1,
        "Steps of linear warm-up to the peak; -1: 400, or a tenth of training.steps if that is less.",
        minimum=-1,
        maximum=_MOST_STEPS,
        needs=_STEPS_TO_WARM_UP,
    )
    decay_steps: int = key(
        0,
        "wsd: steps of the final decay; 0: a tenth of training.steps.",
        minimum=0,
        maximum=_MOST_STEPS,
        needs=when("lr_schedule.name", "wsd"),
    )
    min_lr_ratio: float = key(0.1, "Learning rate at the end, as a share of the peak.", minimum=0, maximum=1)


@dataclass(frozen=True)
class Parallel:
    data_parallel: str = key(
        "fsdp",
        "fsdp: ranks share one copy of the weights; ddp: each has its own; hsdp: dp_replicate copies, each shared by "
        "dp_shard ranks.",
        choices=("fsdp", "hsdp", "ddp"),
    )
    dp_shard: int = key(
        -1, "Ranks that share one copy of the weights; -1: the rest (ddp: 1).", minimum=-1, maximum=MOST_RANKS
    )
    dp_replicate: int = key(
        1, "Copies of the weights; -1: the rest (ddp: 1 and -1 are the rest).", minimum=-1, maximum=MOST_RANKS
    )
    tensor: int = key(
        1, "Ranks that share each matrix product (tensor and sequence parallel).", minimum=1, maximum=1024
    )
    context: int = key(1, "Ranks that share each sequence (context parallel).", minimum=1, maximum=1024)
    pipeline: int = key(1, "Ranks that share the layers (pipeline parallel).", minimum=1, maximum=128)
    reshard_after_forward: str = key(
        "auto",
        "Free a block's gathered weights after its forward pass, and gather them again; auto: if all would take more "
        "than 4 GiB of a GPU, and never under pipelines.",
        choices=("auto", "always", "never"),
        needs=_SHARDS,
    )
    reduce_every_micro_batch: bool = key(
        False,
        "Reduce gradients after each micro-batch, not only the last: less memory, more communication (fsdp, hsdp).",
        needs=when_both(_SHARDS, when("parallel.pipeline", 1)),
    )
    cpu_offload: bool = key(
        False, "Keep weights and optimizer state in the memory of the host (fsdp and hsdp on GPUs).", needs=_SHARDS
    )
    tables_on_host: bool = key(
        False,
        "Keep tables of embeddings, their moments and their average in the memory of the host, where GPUs read and "
        "write the rows of a step; the same results. A CPU has no other memory.",
        needs=_TABLES,
    )
    async_tensor: bool = key(
        False,
        "Overlap tensor-parallel communication with the products (GPUs with peer access, compiled).",
        needs=when_both(_TENSOR, _COMPILED, when_not("float8.recipe", "native")),
    )
    pipeline_schedule: str = key(
        "1F1B",
        "Order of forward and backward passes in a pipeline, by torch.distributed.pipelining's names.",
        choices=("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"),
        needs=_PIPELINE,
    )
    pipeline_stages_per_rank: int = key(
        0,
        "Stages a pipeline rank holds; 0: what the schedule needs (1, or 2 for those that interleave).",
        minimum=0,
        maximum=32,
        needs=_PIPELINE,
    )


@dataclass(frozen=True)
class Compile:
    enabled: bool = key(True, "torch.compile each block, the loss and what moves the weights.")
    cache_folder: str = key(
        "",
        "Folder that keeps compiled kernels between runs; empty: TORCHINDUCTOR_CACHE_DIR, or ~/.cache/swamla-titan.",
        path=True,
        needs=_COMPILED,
    )


@dataclass(frozen=True)
class ActivationCheckpoint:
    mode: str = key(
        "none",
        "Recompute activations in the backward pass: of no block, of all, or as `selective` says.",
        choices=("none", "selective", "full"),
    )
    selective: str = key(
        "operators",
        "operators: keep the results of attention and of most matrix products, recompute the rest; "
        "blocks: recompute every `every_n_blocks`-th block.",
        choices=("operators", "blocks"),
        needs=_SELECTIVE,
    )
    every_n_blocks: int = key(
        2,
        'selective = "blocks": each n-th block is recomputed.',
        minimum=1,
        maximum=MOST_LAYERS,
        needs=_SELECTED_BLOCKS,
    )
    modules: str = key(
        "block",
        "What of a block is recomputed. block: all of it, as one; attention or feed_forward: that alone, with the norm "
        "before it; both: each by itself, which keeps one residual more a block and recomputes half a block at a time.",
        choices=("block", "attention", "feed_forward", "both"),
        needs=when_not("activation_checkpoint.mode", "none"),
    )
    memory_budget: float = key(
        1.0,
        'mode = "none", compiled: share of activation memory to use; the compiler recomputes what is cheapest.',
        minimum=0,
        maximum=1,
        needs=when_both(
            when("activation_checkpoint.mode", "none"), when_on("compile.enabled", "compile.enabled = true")
        ),
    )


@dataclass(frozen=True)
class Float8:
    recipe: str = key(
        "off",
        "Products of the blocks in float8. By torchao: tensorwise (one scale a tensor), rowwise (one a row), "
        "rowwise_with_gw_hp (and gradients of weights in full precision: most exact). native: by our kernels, which "
        "cast within the operations before the products, one scale a tensor. auto: native where GPU and shapes gain by "
        "it, else off.",
        choices=("off", "tensorwise", "rowwise", "rowwise_with_gw_hp", "native", "auto"),
    )
    products: str = key(
        "auto",
        "auto: the products that are large enough to gain by it on an H100; all: each whose sides are multiples of 16.",
        choices=("auto", "all"),
        needs=_FLOAT8,
    )
    output_head: bool = key(False, "The output head too, at some cost in exactness of the loss.", needs=_FLOAT8)
    fsdp_all_gather: str = key(
        "auto",
        "tensorwise: FSDP2 gathers weights in float8, half the bytes, with scales computed for all at once before each "
        "step. auto: where that can be: with fsdp or hsdp and weights whose rows all ranks can share evenly, without "
        "tensor parallelism and offloading; always: refused where it cannot be.",
        choices=("auto", "always", "never"),
        needs=_GATHERED,
    )
    gradient_dtype: str = key(
        "e5m2",
        "native: type of gradients; e5m2 has more range, e4m3 a bit more precision.",
        choices=("e5m2", "e4m3"),
        needs=_NATIVE,
    )
    fast_accumulation: bool = key(
        False,
        "native: sum products of gradients, too, in the tensor cores' short registers: faster, less exact.",
        needs=_NATIVE,
    )
    loss_scaling: bool = key(
        False,
        "Multiply the loss by a dynamic scale in the backward pass. Not needed: each tensor of gradients has its own "
        "scale.",
        needs=_FLOAT8,
    )


@dataclass(frozen=True)
class Kernels:
    attention: AttentionBackend = key(
        "auto",
        "auto: what is fastest on this device. triton: our kernels for sliding windows and for documents in MLA, which "
        "auto takes on H100 and H200 in 16 bits (CUDA). flex: FlexAttention for windows and documents (CUDA). sdpa: "
        "PyTorch's attention under boolean masks. reference: plain and slow. All but reference take our kernels for "
        "mla_selective (CUDA, 16 bits).",
        choices=get_args(AttentionBackend),
    )
    loss: str = key(
        "auto",
        "fused: output head and loss as one, which never holds all logits. auto: fused on GPUs in 16 bits, but "
        "not with a float8 head, tensor or pipeline parallelism. plain: all logits first.",
        choices=("auto", "fused", "plain"),
    )
    pointwise: str = key(
        "auto",
        "SwiGLU, and the rotation of queries and keys. triton: our kernels (CUDA); for rotation in SWA where attention "
        "is by triton, without qk_norm, in MLA where it is by cuDNN, or documents by triton, without context parallel, "
        'in both without checkpoints of operators (selective = "operators"). auto: these on H100 and H200 in 16 bits. '
        "plain: left to torch.compile.",
        choices=("auto", "triton", "plain"),
    )


@dataclass(frozen=True)
class Checkpoint:
    interval: int = key(
        500, "Steps between checkpoints; the last step is always saved.", minimum=1, maximum=_MOST_STEPS
    )
    keep_latest: int = key(3, "Checkpoints kept; 0: all.", minimum=0, maximum=1_000_000)
    keep_every: int = key(
        0,
        "Besides, checkpoints of steps that this divides are kept for good; 0: none.",
        minimum=0,
        maximum=_MOST_STEPS,
        needs=when_on("checkpoint.keep_latest", "checkpoint.keep_latest to a number from 1"),
    )
    async_mode: str = key(
        "async",
        "async: copy the tensors to the memory of the host and write them while training goes on, one checkpoint at a "
        "time; disabled: training waits.",
        choices=("async", "disabled"),
    )
    max_failures: int = key(
        3,
        "Checkpoints in a row that cannot be written before the run ends; the last of a run must be.",
        minimum=1,
        maximum=1_000_000,
    )
    allow: str = key(
        "",
        'What of the checkpoint may differ from this run, as in "data,batch": model (what leaves the weights their '
        "shapes), data and tokenizer (the data start over), batch (sequences a step, or their length).",
    )


@dataclass(frozen=True)
class Validation:
    interval: int = key(250, "Steps between validations on held-out text; 0: never.", minimum=0, maximum=_MOST_STEPS)
    path: str = key(
        "", "Validation text, read like data.path; empty: documents held out of the training data.", path=True
    )
    fraction: float = key(
        0.01,
        "Share of documents held out of training, chosen by their text; only without validation.path. "
        "They stay held out with interval = 0 too; 0: train on all.",
        minimum=0,
        below=1,
        needs=_NO_PATH,
    )
    max_tokens: int = key(262_144, "Most tokens a validation uses.", minimum=1, maximum=1 << 33, needs=_VALIDATION)
    use_ema: bool = key(
        False,
        "Validate the average of the weights (ema.decay) in their place.",
        needs=when_both(when_on("ema.decay", "ema.decay, to 0.999 perhaps"), when_on("validation.interval")),
    )


@dataclass(frozen=True)
class Metrics:
    log_interval: int = key(10, "Steps between log lines.", minimum=1, maximum=_MOST_STEPS)
    tensorboard: bool = key(True, "Write TensorBoard events.")
    wandb: bool = key(False, "Log to Weights & Biases; needs the extra `wandb`.")
    wandb_project: str = key(
        "swamla-titan", "Weights & Biases project.", needs=when_on("metrics.wandb", "metrics.wandb = true")
    )
    progress_bar: bool = key(True, "Show a progress bar when the output is a terminal.")


@dataclass(frozen=True)
class Profiling:
    enabled: bool = key(False, "Record a profile of some steps into traces/.")
    start_step: int = key(10, "First step recorded.", minimum=1, maximum=_MOST_STEPS, needs=_PROFILING)
    num_steps: int = key(3, "Steps recorded.", minimum=1, maximum=1000, needs=_PROFILING)


@dataclass(frozen=True)
class FaultTolerance:
    skip_bad_steps: bool = key(
        True,
        "Pass over a step whose loss or gradient is no finite number, or a spike: weights and optimizer stay as they "
        "are. false: the run fails at the first one that is not finite.",
    )
    max_bad_steps: int = key(
        10,
        "Bad steps in a row after which the run is saved and stopped.",
        minimum=1,
        maximum=1_000_000,
        needs=_SKIPPING,
    )
    max_rewinds: int = key(
        0,
        "How often such a run goes on instead, with the weights of the newest checkpoint that has other ones, and with "
        "the next batch; one checkpoint more than keep_latest is kept for it. 0: never.",
        minimum=0,
        maximum=1_000_000,
        needs=_SKIPPING,
    )
    # Off: what clipping lets through of a spike is bounded, and a rule that drops data is for its user to ask for.
    spike_sigma: float = key(
        0.0,
        "A gradient norm above the mean of the last good steps by this many standard deviations is a spike; "
        "0: none is, 6 is cautious.",
        minimum=0,
        maximum=HUGE,
        needs=_SKIPPING,
    )
    spike_window: int = key(
        128,
        "Good steps that a spike is measured by; before there are as many, nothing is one.",
        minimum=2,
        maximum=1_000_000,
        needs=when_both(_SKIPPING, when_on("fault_tolerance.spike_sigma", "fault_tolerance.spike_sigma = 6")),
    )
    step_timeout: float = key(
        600.0,
        "Longest time between two steps, in seconds; then stacks go to traces/ and the processes end, to be started "
        "again. Choose several times the slowest step; 0: wait for ever.",
        minimum=0,
        maximum=_LONGEST_WAIT,
    )
    first_step_timeout: float = key(
        1800.0,
        "The same for the start, for the first step, which compiles, and for each validation and checkpoint.",
        above=0,
        maximum=_LONGEST_WAIT,
        needs=when_on("fault_tolerance.step_timeout"),
    )


@dataclass(frozen=True)
class Config:
    """A whole, checked configuration. `model.vocab_size` 0 stands for the tokenizer's vocabulary."""

    job: Job = field(default_factory=Job)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema: EMA = field(default_factory=EMA)
    lr_schedule: LRSchedule = field(default_factory=LRSchedule)
    parallel: Parallel = field(default_factory=Parallel)
    compile: Compile = field(default_factory=Compile)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    float8: Float8 = field(default_factory=Float8)
    kernels: Kernels = field(default_factory=Kernels)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    fault_tolerance: FaultTolerance = field(default_factory=FaultTolerance)
