"""The typed spec of a FineTuneJob: every field with its meaning, default and bounds, once.

The CRD's schema and docs/api.md are generated from these classes, and parse_job makes them from an object of the API
server. Checks that need more than one field are in rules.py; what is typed but not built yet is in features.py. Field
descriptions give the meaning; the generator adds default and bounds to them. spec.stages is typed in overrides.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from finetune_operator.api.model import DnsName, Model, Revision, Source
from finetune_operator.api.overrides import Stages
from finetune_trainer.contract import digest_of
from finetune_trainer.spec_rules import MAX_PROMPT_CHARACTERS

DatasetFormat = Literal["dolly", "samsum", "promptCompletion", "alpaca", "messages", "sharegpt", "text", "template"]
Packing = Literal["bestFit", "none", "wrapped"]
AcceleratorType = Literal["cpu", "cuda", "neuron"]

_SOURCE_FORMS = (
    "`hf://org/name` (a repository on the hub), `s3://bucket/prefix` (read with the stage's own credentials) or "
    "`workspace:///path` (a folder of the workspace volume)"
)


class SecretKeyRef(Model):
    """One key of a Secret in the job's namespace."""

    name: DnsName = Field(description="Name of the Secret, in the job's namespace.")
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")] = Field(
        description="Key of the Secret that holds the value."
    )


class BaseModelSource(Model):
    """The base model."""

    source: Source = Field(description=f"Where the base model comes from: {_SOURCE_FORMS}.")
    revision: Revision = Field(
        default="main",
        description="Branch, tag or commit of a hub repository; not used by other sources. A commit makes the job "
        "repeatable.",
    )
    token_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Secret key with the hub's access token, for a gated or private model. Mounted as a file.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Whether Python code that comes with the model may run. False refuses such a model."
    )


class RecordTemplate(Model):
    """Prompt and completion of a record, with {name} in place of each field of that name; {{ and }} are braces."""

    prompt: Annotated[str, Field(min_length=1, max_length=8192)] = Field(
        description="What the model reads, such as `Question: {question}\\nAnswer: `."
    )
    completion: Annotated[str, Field(min_length=1, max_length=8192)] = Field(
        description="What it is to answer, such as `{answer}`."
    )


class Dataset(Model):
    """The records to train on and how they become rows of tokens."""

    source: Source = Field(description=f"Where the dataset comes from: {_SOURCE_FORMS}.")
    configuration: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None, description="Configuration (subset) of a hub dataset that has several."
    )
    split: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_][-.A-Za-z0-9_]*$")] = Field(
        default="train", description="Split of a hub dataset; not used where `files` names the files."
    )
    revision: Revision = Field(
        default="main", description="Branch, tag or commit of a hub dataset; not used by other sources."
    )
    files: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None,
        description="Glob below the source that picks the files to read, such as `data/*.jsonl`. Absent: every data "
        "file of the split.",
    )
    token_secret_ref: SecretKeyRef | None = Field(
        default=None,
        description="Secret key with the hub's access token, for a gated or private dataset. Mounted as a file.",
    )
    format: DatasetFormat = Field(
        description="Form of a record. `dolly`: instruction, optional context, response. `samsum`: dialogue, summary. "
        "`promptCompletion`: prompt, completion. `alpaca`: instruction, optional input, output. `messages`: a "
        "conversation of role and content, by the tokenizer's own chat template; loss on the assistant's turns. "
        "`sharegpt`: the same with conversations of from and value. `text`: text, learnt as it is. `template`: fields "
        "of your own, by `template`."
    )
    template: RecordTemplate | None = Field(
        default=None,
        description="Prompt and completion of a record. Required with format template, refused with others.",
    )
    max_length: int = Field(
        default=2048,
        ge=16,
        le=131072,
        description="Length of a training row, in tokens. A longer record is rejected, but with packing wrapped, which "
        "cuts it.",
    )
    packing: Packing = Field(
        default="bestFit",
        description="How records share rows. `bestFit`: whole records side by side, none cut, none sees another. "
        "`none`: one record "
        "a row. `wrapped`: one stream of records cut at row ends. With accelerator type neuron, bestFit is for rows of "
        "up to 2048 tokens without pipeline stages, and beyond that records in the rows of wrapped see what stands "
        "before them.",
    )
    loss_on: Literal["completion", "all"] = Field(
        default="completion",
        description="Tokens that count in the loss. `completion`: the answer and its end only. `all`: the prompt too.",
    )
    validation_percent: int = Field(
        default=2,
        ge=0,
        le=50,
        description="Share of the records held out of training and used to measure the loss, in percent.",
    )
    max_rejected_percent: int = Field(
        default=0, ge=0, le=100, description="Share of records that may be unusable before the stage fails, in percent."
    )


class Lora(Model):
    """A low-rank adapter."""

    rank: int = Field(ge=1, le=1024, description="Rank of the adapter's matrices (r).")
    alpha: float = Field(
        default=16,
        gt=0,
        le=4096,
        description="Scale of the adapter: its output is multiplied by alpha / rank (rslora: alpha / sqrt(rank)).",
    )
    dropout: float = Field(
        default=0, ge=0, lt=1, description="Probability with which an input of the adapter is dropped in training."
    )
    target_modules: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.\-]+$")], ...],
        Field(min_length=1, max_length=32, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = Field(
        description="Names of the linear layers that get an adapter, such as q_proj and v_proj, or query_key_value "
        "for BLOOM; or all-linear alone, for every linear layer but the output's."
    )
    modules_to_save: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.\-]+$")], ...],
        Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = Field(
        default=(),
        description="Names of modules that are trained as a whole beside the adapter, such as lm_head or embed_tokens.",
    )
    variant: Literal["standard", "rslora", "dora"] = Field(
        default="standard",
        description="`standard`: LoRA. `rslora`: scaled by the rank's square root. `dora`: with a trained magnitude.",
    )


class Method(Model):
    """What is trained."""

    type: Literal["lora", "full"] = Field(
        default="lora", description="`lora`: a small adapter, the base model frozen. `full`: every weight of the model."
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none", description="Precision in which the frozen base model is held while an adapter is trained."
    )
    lora: Lora | None = Field(default=None, description="The adapter. Required with type lora, refused with type full.")


class Training(Model):
    """The optimisation. One step is one update of the weights from one global batch."""

    max_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Length of the training, in steps. Exactly one of maxSteps and epochs is set.",
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="Length of the training, in passes over the dataset. Exactly one of maxSteps and epochs is set.",
    )
    learning_rate: float = Field(
        gt=0,
        le=1,
        description="Largest learning rate of AdamW. Usual: 1e-4 to 3e-4 for an adapter, 1e-5 to 5e-5 for every "
        "weight.",
    )
    learning_rate_schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear",
        description="Course of the learning rate after the warm-up: down to 0 on a line or a half cosine, or constant.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, le=1_000_000, description="Steps in which the learning rate rises from 0 to its largest."
    )
    weight_decay: float = Field(
        default=0, ge=0, le=1, description="Decoupled weight decay of AdamW; biases and norms have none."
    )
    max_grad_norm: float = Field(
        default=1, ge=0, le=1000, description="Global norm of the gradient above which it is scaled down; 0 never does."
    )
    micro_batch_size: int = Field(
        default=1, ge=1, le=1024, description="Rows that one data parallel rank takes through the model at once."
    )
    gradient_accumulation_steps: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="Micro batches that make one step. Global batch = microBatchSize x gradientAccumulationSteps x "
        "data parallel size.",
    )
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="Number format of the model's arithmetic.")
    gradient_checkpointing: bool = Field(
        default=False,
        description="Whether activations are computed again in the backward pass instead of being kept: less memory "
        "for about a third more time. The result is the same.",
    )
    seed: int = Field(
        default=42, ge=0, le=2**31 - 1, description="Seed of the order of rows, the adapter's start and dropout."
    )
    checkpoint_every_steps: int = Field(
        default=500,
        ge=1,
        le=1_000_000,
        description="Steps between checkpoints. A fault costs at most so many; the last step has one always.",
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, le=100, description="Newest complete checkpoints kept on the workspace while the stage runs."
    )
    log_every_steps: int = Field(
        default=10, ge=1, le=100_000, description="Steps between lines of loss and throughput in training.jsonl."
    )
    evaluate_every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None,
        description="Steps between measurements of the loss on the held-out records, which go to training.jsonl, "
        "TensorBoard and progress; the last step has one too. Absent measures none during training.",
    )


class Parallelism(Model):
    """How one copy of the model is split. Data parallel size = world size / both sizes, exact or refused."""

    tensor_parallel_size: int = Field(default=1, ge=1, le=64, description="Devices over which each layer is split.")
    pipeline_parallel_size: int = Field(
        default=1, ge=1, le=64, description="Groups of layers, one after another, on devices of their own."
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="What data parallel ranks hold. `ddp`: each a whole copy. `fsdp`: each a share of weights, "
        "gradients and optimizer, gathered layer by layer (FSDP2), for models that are too large for one device; "
        "types cpu and cuda.",
    )


class Accelerator(Model):
    """What the training runs on."""

    type: AcceleratorType = Field(description="`cpu`, `cuda` (NVIDIA GPUs) or `neuron` (AWS Trainium).")
    instance_type: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9][-a-z0-9.]*$")] | None = Field(
        default=None,
        description="Instance type such as ml.trn1.32xlarge; it fixes devices, cores and network interfaces of a "
        "node. Required with "
        "type cuda and neuron.",
    )
    nodes: int = Field(default=1, ge=1, le=1024, description="Pods of the train stage, one a node.")
    processes_per_node: int = Field(
        default=1,
        ge=1,
        le=128,
        description="Training processes a pod with type cpu; elsewhere the instance type decides.",
    )


class Workspace(Model):
    """The shared volume of the job's stages."""

    claim_name: DnsName = Field(
        description="PersistentVolumeClaim in the job's namespace, mounted by every stage; ReadWriteMany if training "
        "has several nodes."
    )


class Compile(Model):
    """Ahead-of-time compilation for AWS Trainium."""

    enabled: bool = Field(
        default=True, description="Whether the compile stage runs before train. Applies to type neuron only."
    )


class Merge(Model):
    """The adapter put into the base model."""

    enabled: bool = Field(
        default=True, description="Whether the merge stage writes a whole model. Never runs with method full."
    )
    max_shard_size: Annotated[str, Field(max_length=8, pattern=r"^[1-9][0-9]{0,4}(MB|GB|MiB|GiB)$")] = Field(
        default="5GB",
        description="Largest weight file of the merged model, such as 5GB; a single larger tensor has a file of its "
        "own.",
    )
    precision: Literal["base", "bf16", "fp16", "fp32"] = Field(
        default="base",
        description="Number format of the merged weights, or with method full of consolidate's. `base`: each tensor "
        "keeps the base model's.",
    )


class EvaluationPrompt(Model):
    """A prompt that both models answer."""

    text: Annotated[str, Field(min_length=1, max_length=8192)] = Field(
        description="The instruction, dialogue, prompt or what the user says, as it stands in a record; the dataset's "
        "format is put around it. With format template it stands for the prompt's first field."
    )
    context: Annotated[str, Field(min_length=1, max_length=16384)] | None = Field(
        default=None,
        description="The record's context, for formats that have a place for one: `dolly` its context, `alpaca` its "
        "input, `messages` and `sharegpt` a system message, `template` the prompt's second field, or the one called "
        "context.",
    )
    expected: Annotated[str, Field(min_length=1, max_length=8192)] | None = Field(
        default=None, description="The right answer, shown beside both models' answers and compared with them."
    )


class EvaluationGate(Model):
    """Thresholds that the tuned model has to meet for the job to succeed; at least one is set."""

    max_loss_ratio_to_base: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="Largest allowed held-out loss of the tuned model, as a ratio to the base model's.",
    )
    max_loss: float | None = Field(
        default=None, gt=0, le=1000, description="Largest allowed held-out loss of the tuned model, in nats a token."
    )
    max_perplexity: float | None = Field(
        default=None,
        ge=1,
        le=1_000_000_000,
        description="Largest allowed perplexity of the tuned model on the held-out records, which is exp(loss).",
    )
    min_exact_match: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Smallest allowed share of the prompts with an expected answer that the tuned model answers with "
        "exactly that text; white space around and between words does not count.",
    )
    min_rouge_l: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Smallest allowed ROUGE-L (F-measure) of the tuned model's answers, as mean over the prompts with "
        "an expected answer.",
    )


class Evaluate(Model):
    """The comparison of base and tuned model."""

    enabled: bool = Field(default=True, description="Whether the evaluate stage runs.")
    prompts: Annotated[
        tuple[EvaluationPrompt, ...], Field(max_length=64, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = Field(
        default=(),
        description=f"Prompts that the base and the tuned model answer; at most {MAX_PROMPT_CHARACTERS} "
        "characters in all.",
    )
    do_sample: bool = Field(
        default=False,
        description="Whether each token of an answer is drawn at random by temperature and topP. False: the likeliest "
        "is taken, and temperature, topP and seed do nothing.",
    )
    temperature: float = Field(
        default=0.6, gt=0, le=10, description="What logits are divided by before a token is drawn."
    )
    top_p: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Tokens are drawn from the likeliest ones whose probabilities add up to this; 1: from all.",
    )
    max_new_tokens: int = Field(default=256, ge=1, le=4096, description="Longest answer, in tokens.")
    seed: int = Field(
        default=42,
        ge=0,
        le=2**31 - 1,
        description="Seed of what is drawn, the same for each prompt and both models.",
    )
    gate: EvaluationGate | None = Field(
        default=None,
        description="Thresholds. A tuned model that misses one fails the job, and nothing after evaluate runs.",
    )


class PublishS3(Model):
    """Upload of the result."""

    uri: Annotated[
        str, Field(min_length=6, max_length=1024, pattern=r"^s3://[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9](/.*)?$")
    ] = Field(
        description="Bucket and prefix that the model is written to, such as s3://bucket/models/name. It is complete "
        "once manifest.json is there, and is then never replaced."
    )
    contents: Literal["adapter", "model", "both"] | None = Field(
        default=None,
        description="What is uploaded; `both`: the whole model, and the adapter in adapter/ below it. Absent: the "
        "whole model where there is one, else the adapter.",
    )


class SageMakerEndpoint(Model):
    """A SageMaker endpoint that serves the result."""

    instance_type: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^ml\.[a-z0-9][-a-z0-9.]*$")] = Field(
        description="Instance type of the endpoint, such as ml.g5.4xlarge."
    )
    deletion_policy: Literal["Retain", "Delete"] = Field(
        default="Retain", description="Whether the endpoint stays or goes when the job is deleted."
    )


class Publish(Model):
    """Where the result goes. At least one of s3 and sageMakerEndpoint; an endpoint needs s3."""

    s3: PublishS3 | None = Field(default=None, description="Upload to S3.")
    sage_maker_endpoint: SageMakerEndpoint | None = Field(
        default=None, description="A SageMaker endpoint that serves the uploaded model."
    )
    service_account_name: DnsName | None = Field(
        default=None,
        description="Service account of the publish pod; it carries the AWS role. Absent: the namespace's default.",
    )


class Queue(Model):
    """Admission by Kueue."""

    name: DnsName = Field(description="LocalQueue in the job's namespace.")
    priority_class: DnsName | None = Field(default=None, description="WorkloadPriorityClass of the stages' Jobs.")
    policy: Literal["perStage", "wholePipeline"] = Field(
        default="perStage",
        description="`perStage`: quota is held for the stage that runs. `wholePipeline`: for all stages from the "
        "start.",
    )


class RetryPolicy(Model):
    """Attempts after a failure."""

    max_retries: int = Field(
        default=3,
        ge=0,
        le=100,
        description="Attempts of a stage after its first. Faults of the infrastructure use up none; errors of the "
        "spec or the data are "
        "not tried again.",
    )


class FineTuneJobSpec(Model):
    """What is wished: one base model, one dataset, and how to get from them to a tuned model."""

    suspend: bool = Field(
        default=False,
        description="Whether the job is held: running stages get time to write a checkpoint and stop, and no stage "
        "starts. What stages "
        "read can be changed meanwhile.",
    )
    model: BaseModelSource = Field(description="The base model to tune.")
    dataset: Dataset = Field(description="The records to train on and how they become rows of tokens.")
    method: Method = Field(description="What is trained: an adapter or every weight.")
    training: Training = Field(description="The optimisation: length, learning rate, batch, checkpoints.")
    parallelism: Parallelism = Field(
        default=Parallelism(), description="How one copy of the model is split over devices."
    )
    accelerator: Accelerator = Field(description="What the training runs on, and how much of it.")
    workspace: Workspace = Field(description="The shared volume that stages read from and write to.")
    compile: Compile | None = Field(
        default=None, description="Ahead-of-time compilation; absent: on with accelerator neuron."
    )
    merge: Merge = Field(default=Merge(), description="The adapter put into the base model.")
    evaluate: Evaluate = Field(default=Evaluate(), description="Comparison of base and tuned model.")
    publish: Publish | None = Field(
        default=None, description="Where the result goes; absent: it stays on the workspace."
    )
    queue: Queue | None = Field(default=None, description="Admission by Kueue; absent: none.")
    retry_policy: RetryPolicy = Field(default=RetryPolicy(), description="Attempts after a failure.")
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=31_536_000,
        description="Time from the job's start after which it fails, in seconds; absent: none.",
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=31_536_000,
        description="Time after its end at which the FineTuneJob object is deleted, in seconds; absent: never. "
        "Artifacts stay.",
    )
    dry_run: bool = Field(
        default=False,
        description="Whether only the plan of what is left to run is reported, in status.plan, and no stage starts. A "
        "stage that runs goes on to its end; spec.suspend stops it.",
    )
    stages: Stages = Field(default=Stages(), description="Overrides of single stages' pods.")

    @cached_property
    def plain(self) -> Mapping[str, Any]:
        """as_json() made once, for reading: every round of a job asks for it, and a spec never changes."""
        return self.as_json()

    @cached_property
    def end_digest(self) -> str:
        """Digest of what a job's end depends on: all of the spec but ttlSecondsAfterFinished."""
        return digest_of({key: value for key, value in self.plain.items() if key != "ttlSecondsAfterFinished"})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, without what was made from the original's fields."""
        copy = super().model_copy(update=update, deep=deep)
        for made in ("plain", "end_digest"):
            copy.__dict__.pop(made, None)
        return copy
