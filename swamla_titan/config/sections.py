"""The sections of a TOML file: a dataclass each, whose fields declare allowed values and meaning.

effects.py has the conditions for keys to have an effect, rules.py the conflicts between keys.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from swamla_titan.fields import HUGE, Factor, Limits, Setting, Share, sections, settings
from swamla_titan.kernels.limits import AttentionBackend
from swamla_titan.model.config import LONGEST_SEQUENCE, MOST_LAYERS, ModelConfig

# Upper bounds beyond any real use; larger values would only cost time and memory.
MOST_RANKS = 1 << 15
_MOST_STEPS = 99_999_999  # as many digits as a checkpoint's name has
_LONGEST_WAIT = 31_536_000.0  # seconds: a year

OptimizerName = Literal["adamw", "lion", "adamw8bit", "adamw4bit", "adamw_fp8", "muon", "auto"]
Recipe = Literal["off", "tensorwise", "rowwise", "rowwise_with_gw_hp", "native", "auto"]
MuonAdjustment = Literal["match_rms_adamw", "original"]
GradientDtype = Literal["e5m2", "e4m3"]
ALLOWED_DIFFERENCES = ("model", "data", "tokenizer", "batch")  # between a checkpoint and the run that resumes from it
_Path = Annotated[str, Limits(path=True)]
_Steps = Annotated[int, Limits(1, _MOST_STEPS)]
_StepsOr0 = Annotated[int, Limits(0, _MOST_STEPS)]
_Count = Annotated[int, Limits(1, 1_000_000)]
_CountOr0 = Annotated[int, Limits(0, 1_000_000)]


@dataclass(frozen=True)
class Job:
    dump_folder: _Path = "outputs/run"
    """Folder that receives everything the run writes."""
    seed: Annotated[int, Limits(0, 2**62)] = 0
    """Seed of the initial weights, dropout and the order of the data."""
    deterministic: bool = False
    """Repeated runs give bit-identical results, at some cost in speed."""


@dataclass(frozen=True)
class DataSource:
    """A source of a mixture. Keys that are not given are as in [data]; `subset` is what data.name is there."""

    name: str
    """Name of the source, in metrics, log lines and overrides (--data.sources.NAME.weight 0.3): letters, digits, _, -.
    """
    weight: Annotated[float, Limits(0, 1)] = 1.0
    """Share of the sequences that come from this source; the weights of all sources add up to 1."""
    source: str = ""
    """As data.source."""
    path: _Path = ""
    """As data.path."""
    subset: str = ""
    """huggingface: configuration of the dataset, as data.name."""
    split: str = ""
    """As data.split."""
    revision: str = ""
    """As data.revision."""
    text_key: str = ""
    """As data.text_key."""
    text_separator: Annotated[str, Limits(any_text=True)] = ""
    """As data.text_separator."""
    max_document_mib: Annotated[int, Limits(0, 1 << 20)] = 0
    """As data.max_document_mib; 0: not given."""


@dataclass(frozen=True)
class Data:
    source: Literal["builtin", "local", "huggingface", "shards"] = "huggingface"
    """builtin: Python's own documentation topics; local: files under data.path; huggingface: a dataset, streamed;
    shards: what `data prepare` wrote."""
    path: _Path = ""
    """local: a .txt, .md, .jsonl, .json or .parquet file or a folder of them; huggingface: dataset name or folder;
    shards: the folder that they are in."""
    name: str = ""
    """huggingface: configuration of the dataset."""
    split: str = "train"
    """huggingface: split of the dataset."""
    revision: str = ""
    """huggingface: commit, tag or branch; empty: the newest commit, which is then written here."""
    text_key: str = "text"
    """Field that holds a document's text in jsonl, parquet and Hugging Face rows."""
    text_separator: Annotated[str, Limits(any_text=True)] = ""
    """String between the documents of a text file, taken literally; empty: a file is one document."""
    max_document_mib: Annotated[int, Limits(1, 1 << 20)] = 64
    """Maximum size of a document, in MiB of text."""
    tokenizer: _Path = "gpt2"
    """byte; gpt2 or another tiktoken encoding (r50k_base, p50k_base, cl100k_base, o200k_base); or the path of a
    .tiktoken file."""
    streams: Annotated[int, Limits(1, 1 << 16)] = 64
    """Logical streams that the corpus is divided into; part of the data order."""
    shuffle_documents: Annotated[int, Limits(1, 10_000_000)] = 1000
    """Documents shuffled together within a stream, of shards always all; 1: keep the order of the files."""
    num_workers: Annotated[int, Limits(0, 1024)] = 1
    """Loader processes per rank; 0: read in the training process."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """concatenate: documents follow each other and are cut where sequences end, without padding; best_fit: sequences
    hold whole documents, of which only longer ones are cut, and padding, whose share the metric `padding` is."""
    document_mask: bool = False
    """Attention and positions stop at document boundaries."""
    on_error: Literal["stop", "skip_file"] = "stop"
    """What happens when data cannot be read, after all retries. stop: save a checkpoint and end the run; skip_file:
    exclude the rest of the file, in later epochs too, log a warning, and continue."""
    retry_seconds: Annotated[float, Limits(-1, _LONGEST_WAIT)] = -1.0
    """Maximum time that a step waits for a network or disk that does not answer, with retries; 0: no retries, -1: 300,
    or half of fault_tolerance.step_timeout if that is less. Missing files are not waited for."""
    sources: tuple[DataSource, ...] = ()
    """Several sources that are mixed by weights, instead of data.path: a table [[data.sources]] for each."""


_Length = Annotated[int, Limits(1, LONGEST_SEQUENCE)]
_Sequences = Annotated[int, Limits(1, 1 << 20)]
_MicroBatch = Annotated[int, Limits(1, 1 << 16)]


@dataclass(frozen=True)
class Stage:
    """A table of training.stages. A key that is left out (0) keeps the value that it had before."""

    tokens: Annotated[int, Limits(1, 1 << 60)]
    """Tokens seen before it: the stage begins with the first step that begins with so many or more."""
    seq_len: _Length = 0
    """training.seq_len from then on."""
    global_batch_size: _Sequences = 0
    """training.global_batch_size from then on."""
    local_batch_size: _MicroBatch = 0
    """training.local_batch_size from then on."""
    swa_window: _Length = 0
    """model.swa_window from then on."""
    weights: Annotated[dict[str, float], Limits(0, 1)] = field(default_factory=dict)
    """Weights of [[data.sources]] from then on, by name; sources that are left out keep theirs."""


@dataclass(frozen=True)
class Training:
    seq_len: _Length = 2048
    """Tokens per sequence."""
    local_batch_size: _MicroBatch = 8
    """Sequences per micro-batch of a rank."""
    global_batch_size: _Sequences = 8
    """Sequences per step, over all ranks and micro-batches."""
    steps: _Steps = 1000
    """Optimizer steps of the whole run."""
    max_grad_norm: Factor = 1.0
    """Global norm that gradients are clipped to; 0: no clipping."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of activations and matmuls; weights are kept in float32."""
    fp32_precision: Literal["tf32", "ieee"] = "tf32"
    """Precision of float32 matmuls on CUDA: tf32 is fast, ieee is exact."""
    gc_interval: _StepsOr0 = 100
    """Steps between runs of Python's garbage collector, in addition to those at checkpoints; 0: automatic."""
    stages: tuple[Stage, ...] = ()
    """Changes of sequence length, batch, window or the weights of a mixture while the run trains, as
    [[training.stages]] tables, by the tokens seen."""


@dataclass(frozen=True)
class Optimizer:
    name: OptimizerName = "adamw"
    """adamw; lion: a third of AdamW's lr and three times its weight_decay are usual; adamw8bit, adamw4bit, adamw_fp8:
    AdamW with quantized moments of matrices; muon: orthogonalized updates of the blocks' matrices, AdamW for embedding,
    head and norms; auto: adamw_fp8 if matmuls are in float8, else adamw; a resumed run keeps what it began with."""
    lr: Factor = 3e-4
    """Peak learning rate."""
    beta1: Share = 0.9
    """Decay of the first moment; lion: weight of the momentum in the update direction."""
    beta2: Share = 0.95
    """Decay of the second moment; lion: decay of the momentum, where 0.99 is usual."""
    eps: Annotated[float, Limits(above=0, maximum=HUGE)] = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: Factor = 0.1
    """Decoupled weight decay of the blocks' matrices; embedding, head, norms and biases have none."""
    decay_embeddings: bool = False
    """Apply weight decay to the embedding and the output head too, tied or not."""
    lazy_tables: bool = True
    """true: Adam updates the rows of embedding tables that a step looked up, other rows keep weights and moments;
    false: all rows, as AdamW without weight decay, at the cost of reading and writing the tables in each step."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the moments of matrices (adamw, lion, muon); norms and tables keep float32."""
    lr_multipliers: Annotated[dict[str, float], Limits(0, HUGE)] = field(default_factory=dict)
    """Learning-rate multipliers by patterns (*, ?) of parameter names: {"embedding.weight" = 0.5, "*.wo.weight" = 2.0}.
    If several match a name, the last one counts."""
    muon_momentum: Share = 0.95
    """muon: decay of the momentum."""
    muon_nesterov: bool = True
    """muon: Nesterov momentum."""
    muon_ns_steps: Annotated[int, Limits(1, 99)] = 5
    """muon: Newton-Schulz iterations."""
    muon_adjust_lr_fn: MuonAdjustment = "match_rms_adamw"
    """muon: how lr scales with the shape of a matrix. match_rms_adamw: updates have the RMS of AdamW's, so one lr
    serves both; original: by sqrt(max(1, rows / columns)), with an lr of its own through lr_multipliers."""


@dataclass(frozen=True)
class EMA:
    decay: Share = 0.0
    """Decay per step of a float32 moving average of the weights, which checkpoints hold too; 0: no average, 0.999 is
    usual."""


@dataclass(frozen=True)
class LRSchedule:
    name: Literal["cosine", "wsd", "linear"] = "cosine"
    """Shape after warm-up; wsd holds the peak and decays at the end."""
    warmup_steps: Annotated[int, Limits(-1, _MOST_STEPS)] = -1
    """Steps of linear warm-up to the peak; -1: 400, or a tenth of training.steps if that is less."""
    decay_steps: _StepsOr0 = 0
    """wsd: steps of the final decay; 0: a tenth of training.steps."""
    min_lr_ratio: Annotated[float, Limits(0, 1)] = 0.1
    """Final learning rate, as a fraction of the peak."""


@dataclass(frozen=True)
class Parallel:
    data_parallel: Literal["fsdp", "hsdp", "ddp"] = "fsdp"
    """fsdp: one copy of the weights, sharded over all ranks; ddp: each rank has a full copy; hsdp: dp_replicate copies,
    each sharded over dp_shard ranks."""
    dp_shard: Annotated[int, Limits(-1, MOST_RANKS)] = -1
    """Ranks that each copy of the weights is sharded over; -1: all that are left (ddp: 1)."""
    dp_replicate: Annotated[int, Limits(-1, MOST_RANKS)] = 1
    """Copies of the weights; -1: all ranks that are left (ddp: 1 and -1 mean that)."""
    tensor: Annotated[int, Limits(1, 1024)] = 1
    """Ranks that each linear layer is sharded over (tensor and sequence parallel)."""
    context: Annotated[int, Limits(1, 1024)] = 1
    """Ranks that each sequence is sharded over (context parallel)."""
    pipeline: Annotated[int, Limits(1, 128)] = 1
    """Ranks that the layers are divided over (pipeline parallel)."""
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    """Free a block's gathered weights after its forward pass, and all-gather them again in the backward pass; auto: if
    all gathered weights would take more than 4 GiB of a GPU, and never with pipelines."""
    reduce_every_micro_batch: bool = False
    """Reduce-scatter gradients after each micro-batch and not only the last: less memory, more communication (fsdp,
    hsdp)."""
    cpu_offload: bool = False
    """Keep weights and optimizer state in host memory (fsdp and hsdp on GPUs)."""
    tables_on_host: bool = False
    """Keep embedding tables, their moments and their average in host memory, where GPUs read and write the rows of a
    step; results are the same. Has no effect on a CPU."""
    async_tensor: bool = False
    """Overlap tensor-parallel communication with matmuls (GPUs with peer access, compiled)."""
    pipeline_schedule: Literal["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"] = "1F1B"
    """Order of forward and backward passes in a pipeline, by the names of torch.distributed.pipelining."""
    pipeline_stages_per_rank: Annotated[int, Limits(0, 32)] = 0
    """Pipeline stages per rank; 0: what the schedule needs (1, or 2 for interleaved schedules)."""


@dataclass(frozen=True)
class Compile:
    enabled: bool = True
    """torch.compile each block, the loss and the optimizer's updates."""
    cache_folder: _Path = ""
    """Folder that keeps compiled kernels between runs; empty: TORCHINDUCTOR_CACHE_DIR, or ~/.cache/swamla-titan."""


@dataclass(frozen=True)
class ActivationCheckpoint:
    mode: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass: of no block (none), of all blocks (full), or as `selective` says."""
    selective: Literal["operators", "blocks"] = "operators"
    """operators: keep the outputs of attention and of most matmuls, recompute the rest; blocks: recompute every
    `every_n_blocks`-th block."""
    every_n_blocks: Annotated[int, Limits(1, MOST_LAYERS)] = 2
    """selective = "blocks": every n-th block is recomputed."""
    modules: Literal["block", "attention", "feed_forward", "both"] = "block"
    """What of a block is recomputed. block: the whole block at once; attention or feed_forward: that part with the norm
    before it; both: each part by itself, which keeps one more residual per block and recomputes half a block at a
    time."""
    memory_budget: Annotated[float, Limits(0, 1)] = 1.0
    """mode = "none", compiled: fraction of activation memory to use; the compiler recomputes what is cheapest."""


@dataclass(frozen=True)
class Float8:
    recipe: Recipe = "off"
    """Matmuls of the blocks in float8. By torchao: tensorwise (one scale per tensor), rowwise (one per row),
    rowwise_with_gw_hp (and weight gradients in full precision: most exact). native: by our kernels, which cast within
    the operations before the matmuls, one scale per tensor. auto: native where GPU and shapes gain by it, else off."""
    linear_layers: Literal["auto", "all"] = "auto"
    """auto: convert linear layers that are large enough to gain by it on an H100; all: each whose sides are multiples
    of 16."""
    output_head: bool = False
    """Convert the output head too, at some cost in the precision of the loss."""
    fsdp_all_gather: Literal["auto", "always", "never"] = "auto"
    """tensorwise: FSDP2 all-gathers weights in float8, half the bytes, with all scales computed at once before each
    step. auto: where it is possible: with fsdp or hsdp and weights whose rows divide evenly among all ranks, without
    tensor parallelism and offloading; always: an error where it is not possible."""
    gradient_dtype: GradientDtype = "e5m2"
    """native: dtype of gradients; e5m2 has more range, e4m3 one more bit of precision."""
    fast_accumulation: bool = False
    """native: accumulate gradient matmuls in the tensor cores' short registers too: faster, less exact."""
    loss_scaling: bool = False
    """Multiply the loss by a dynamic scale in the backward pass. Not needed, because each gradient tensor has its own
    scale."""


@dataclass(frozen=True)
class Kernels:
    attention: AttentionBackend = "auto"
    """auto: the fastest implementation on this device. triton: our kernels for sliding windows and for documents in
    MLA, which auto takes on H100 and H200 in 16 bits (CUDA); there MLA has CUDA C++ kernels in bfloat16. flex:
    FlexAttention for windows and documents (CUDA). sdpa: PyTorch's attention with boolean masks. reference: plain and
    slow. All but reference take our kernels for mla_selective (CUDA, 16 bits)."""
    loss: Literal["auto", "fused", "plain"] = "auto"
    """fused: output head and loss in one operation, which never materializes all logits. auto: fused on GPUs in 16
    bits, but not with a float8 head, tensor or pipeline parallelism. plain: all logits first."""
    elementwise: Literal["auto", "triton", "plain"] = "auto"
    """Fused elementwise kernels: SwiGLU, and the rotation of queries and keys. triton: our kernels (CUDA); rotation in
    SWA if attention is by triton, without qk_norm; in MLA if it is by cuDNN or our kernels, without context
    parallel; in both without selective = "operators". auto: these on H100 and H200 in 16 bits. plain: left to
    torch.compile."""


@dataclass(frozen=True)
class Checkpoint:
    interval: _Steps = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_latest: _CountOr0 = 3
    """Number of checkpoints kept; 0: all."""
    keep_every: _StepsOr0 = 0
    """Also keep, permanently, checkpoints of steps that this divides; 0: none."""
    async_mode: Literal["async", "disabled"] = "async"
    """async: copy the tensors to host memory and write them while training continues, one checkpoint at a time;
    disabled: training waits."""
    max_failures: _Count = 3
    """Consecutive checkpoints that fail to be written before the run ends; the last one of a run must succeed."""
    allow: Annotated[str, Limits(words=ALLOWED_DIFFERENCES)] = ""
    """Which differences between the checkpoint and this run are allowed, as in "data,batch": model (if weights
    keep their shapes), data and tokenizer (the data start over), batch (sequences per step, or their length)."""
    initial_load: _Path = ""
    """What a new run begins with: a folder that `export` wrote, a checkpoint, or the dump folder of another run (its
    newest intact checkpoint); empty: weights drawn by job.seed. Not read again once the run has checkpoints itself."""
    initial_load_state: Literal["weights", "weights_and_optimizer", "all"] = "weights"
    """What is taken of it. weights: step, data, optimizer and schedule start fresh, so all of them may be others;
    weights_and_optimizer: the optimizer's states and the average of weights too; all: the run continues where that one
    stood, as with its own checkpoint (checkpoint.allow counts), and the other run stays as it is."""


@dataclass(frozen=True)
class Validation:
    interval: _StepsOr0 = 250
    """Steps between validations on held-out text; 0: never."""
    path: _Path = ""
    """Validation text, read like data.path; empty: documents held out of the training data."""
    fraction: Share = 0.01
    """Fraction of documents held out of training, chosen by their text; only without validation.path. They stay held
    out with interval = 0 too; 0: train on all."""
    max_tokens: Annotated[int, Limits(1, 1 << 33)] = 262_144
    """Maximum number of tokens per validation."""
    use_ema: bool = False
    """Validate the average of the weights (ema.decay) instead of the weights."""
    tasks: str = ""
    """Tasks of lm-evaluation-harness, as in "hellaswag,arc_easy" or paths of YAML files, that score the model while it
    trains; needs the extra `eval`. Tasks that generate text are for `swamla-titan evaluate`."""
    tasks_interval: _Steps = 1000
    """Steps between evaluations of the tasks, which also follow the last step."""
    tasks_limit: Annotated[int, Limits(0, 1_000_000_000)] = 0
    """Maximum number of documents of each task; 0: all."""


@dataclass(frozen=True)
class Metrics:
    log_interval: _Steps = 10
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: bool = False
    """Log to Weights & Biases; needs the extra `wandb`."""
    wandb_project: str = "swamla-titan"
    """Weights & Biases project."""
    progress_bar: bool = True
    """Show a progress bar when the output is a terminal."""
    batch_digests: bool = False
    """Append a digest of every global batch to batch_digests.jsonl, which does not depend on the number of ranks: runs
    that read the same data have the same digests."""


@dataclass(frozen=True)
class Profiling:
    enabled: bool = False
    """Record a profile of some steps into traces/."""
    start_step: _Steps = 10
    """First step recorded."""
    num_steps: Annotated[int, Limits(1, 1000)] = 3
    """Steps recorded."""


@dataclass(frozen=True)
class FaultTolerance:
    skip_bad_steps: bool = True
    """Skip a step whose loss or gradient norm is not finite, or a spike: weights and optimizer state stay as they are.
    false: the run fails at the first one that is not finite."""
    max_bad_steps: _Count = 10
    """Consecutive bad steps after which the run is saved and stopped."""
    max_rewinds: _CountOr0 = 0
    """How often a run rewinds instead: it takes the weights of the newest checkpoint from before the streak, and
    continues with the next batch. One more checkpoint than keep_latest is kept for that. 0: never."""
    # Off by default, because clipping bounds what a spike does, and a user should ask for a rule that drops data.
    spike_sigma: Factor = 0.0
    """A gradient norm this many standard deviations above the mean of the last good steps is a spike; 0: none is, 6 is
    cautious."""
    spike_window: Annotated[int, Limits(2, 1_000_000)] = 128
    """Number of last good steps whose norms define a spike; until there are as many, no step is one."""
    step_timeout: Annotated[float, Limits(0, _LONGEST_WAIT)] = 600.0
    """Maximum time between two steps, in seconds; after it, stacks are written to traces/ and the processes end, to be
    restarted. Choose several times the slowest step; 0: no limit."""
    first_step_timeout: Annotated[float, Limits(above=0, maximum=_LONGEST_WAIT)] = 1800.0
    """The same limit for the start, for the first step, which compiles, and for each validation and checkpoint."""


@dataclass(frozen=True)
class Config:
    """A complete, checked configuration. `model.vocab_size` 0 stands for the tokenizer's vocabulary."""

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


SECTIONS: dict[str, type] = sections(Config)
# Names of keys in version 0.1 -> their names since. The old ones work until version 0.3, with a notice.
RENAMED = {"float8.products": "float8.linear_layers", "kernels.pointwise": "kernels.elementwise"}
KEYS: dict[str, Setting] = {
    f"{section}.{name}": setting for section, cls in SECTIONS.items() for name, setting in settings(cls).items()
}
