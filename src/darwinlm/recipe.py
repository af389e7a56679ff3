"""A recipe: everything that was asked of a run, as data that checks itself before any model is loaded."""

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from darwinlm.target import not_a_size, parse_size, parse_target, show, split_targets

Target = Literal["gguf", "vllm", "hf-native", "mlx", "onnx"]
"""What a pruned model can be exported to."""
Offload = Literal["auto", "device", "cpu", "disk"]


def _written_out(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMBT]\s*", value, re.IGNORECASE):
        return parse_size(value)
    return value


Tokens = Annotated[int, BeforeValidator(_written_out)]
"""A number of tokens, which may be written `10B` or `32K`."""


def _rate(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError("rate", "auto or a number is expected, > 0 and <= 1") from None


Rate = Annotated[Annotated[float, Field(gt=0, le=1)] | Literal["auto"], WrapValidator(_rate)]
"""A learning rate of AdamW, or one that is found for the model."""


def _yes_no_or_auto(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError("yes_no_or_auto", "auto, true or false is expected") from None


_CHOICE = Annotated[bool, Strict()] | Literal["auto"]
Choice = Annotated[_CHOICE, WrapValidator(_yes_no_or_auto)]
"""Yes, no, or what fits the model."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = None if info.field_name is None else cls.model_fields[info.field_name].annotation
        asked = annotation is bool
        if asked and not isinstance(value, bool):
            raise PydanticCustomError("yes_or_no", "true or false is expected")
        # Without this, YAML's `offspring: yes` would be read as 1.
        if isinstance(value, bool) and not asked and annotation != _CHOICE:
            raise PydanticCustomError("yes_or_no", "this setting is no yes or no")
        return value


class DataRecipe(_Section):
    """Where text comes from and how many tokens each split gets."""

    source: str = Field("self", min_length=1)
    """`self` (the dense model writes it), a local text, JSON, CSV or Parquet file or folder, or a Hub data set id."""
    text_field: str = Field("text", min_length=1)
    """The key (JSON) or column (CSV, Parquet, Hub) that holds a document; records without it are passed over."""
    sequence_length: int = Field(512, ge=8, le=131_072)
    """Tokens in a block."""
    calibration_tokens: Tokens = Field(65_536, ge=1)
    """Text on which the inputs of every site are collected."""
    trial_tokens: Tokens = Field(32_768, ge=1)
    """Training text: trials read its beginning, recovery all of it."""
    score_tokens: Tokens = Field(8_192, ge=1)
    """Text on which plans are compared."""
    held_out_tokens: Tokens = Field(16_384, ge=1)
    """Text that judges at the end and is read by nothing else."""

    def blocks(self, tokens: int) -> int:
        """How many whole blocks hold `tokens` tokens."""
        return -(-tokens // self.sequence_length)


class DatabaseRecipe(_Section):
    """Second-order structured pruning of every site (paper, section 3: second-order pruning)."""

    granularity: Literal["kv_group", "query_head"] = "kv_group"
    """What an attention unit is: a KV head with its query heads, or one query head (the paper's way)."""
    experts: Literal["whole", "channels"] = "whole"
    """What a mixture of experts loses: whole experts, or channels of every expert of a layer, as many of each."""
    levels: int = Field(10, ge=1, le=64)
    """Steps from a dense site to a removed one, even in parameters."""
    damping: float = Field(0.01, gt=0, le=10)
    """lambda in H + lambda * mean(diag H) * I."""
    batch_size: int = Field(8, ge=1)
    """Blocks in one forward pass."""
    offload: Offload = "auto"
    """Where hidden states lie between blocks: `device`, `cpu` or `disk`; `auto` takes the fastest that has room."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the stored columns; `auto` is the checkpoint's."""


class SearchRecipe(_Section):
    """Evolution with training-aware, multi-step selection (paper, section 3: search and selection)."""

    uniform: Choice = "auto"
    """All layers that stay get the same sizes, so that the result is a model of transformers' own (`export --to
    hf-native`); whole layers may go. Of all largest such plans, the `offspring` best without training are trained a
    little and scored as in the last step; no descent, no evolution. `auto`: if the model is a mixture of experts, whose
    numbers engines know for all layers at once, or `export.targets` has `hf-native`."""
    descent_rounds: int = Field(4, ge=0)
    """Before the evolution: at most so many steps downhill by the model's sensitivities; 0 leaves them out."""
    sensitivity_tokens: Tokens = Field(8_192, ge=1)
    """Tokens of the trial split on which a step's sensitivities are measured; the score split judges the step."""
    generations: int = Field(4, ge=0)
    """Of the evolution; 0 leaves it out."""
    offspring: int = Field(6, ge=1)
    """Candidates in a generation."""
    max_flips: int = Field(3, ge=1)
    """A mutation exchanges min(U{1..max_flips}, U{1..max_flips}) pairs of sites."""
    survivors: tuple[int, ...] = (2, 1)
    """Candidates kept after each step; the last step keeps one."""
    trial_tokens: tuple[int, ...] = (512, 1_024)
    """Training tokens of each candidate, step by step."""
    score_tokens: tuple[int, ...] = (1_024, 2_048)
    """Tokens on which KL(dense || candidate) is measured, step by step."""
    learning_rate: Rate = "auto"
    """Of trials. `auto`: in units of each weight tensor's root mean square, and searched for on the plan that the
    evolution begins with, by KL on trial text that no trial trains on; where none helps, nothing is trained."""
    trial_optimizer: Literal["auto", "sign", "adamw"] = "auto"
    """Of trials. `sign`: every weight moves by the sign of its gradient, in the backward pass, in 3 bytes a parameter;
    `adamw`: as published, in 18. `auto`: `sign` where `learning_rate` is `auto`."""
    offload: Literal["auto", "device", "cpu"] = "auto"
    """Where the layers of the model and of candidates are: on the device, or in the CPU's memory, from where they pass
    through it one at a time. `auto`: there if twice the model, and what its layers keep of a block for their gradients,
    do not fit a GPU's memory, unless trials use `adamw`."""
    trial_loss: Literal["next-token", "distillation"] = "distillation"
    """What trials train on; `distillation` is KL(dense || candidate)."""
    batch_size: int = Field(1, ge=1)
    """Blocks in one optimiser step of a trial."""
    forecast_candidates: int = Field(0, ge=0)
    """After the search, train so many plans on the whole trial split, and say how well each step's score ranks them."""

    @property
    def optimizer(self) -> Literal["sign", "adamw"]:
        """Of trials."""
        if self.trial_optimizer == "auto":
            return "sign" if self.learning_rate == "auto" else "adamw"
        return self.trial_optimizer

    @property
    def trains(self) -> bool:
        """Whether any candidate is trained."""
        return any(self.trial_tokens) or self.forecast_candidates > 0

    def offloads(self, size: float, kept: float, room: float, *, accelerator: bool) -> bool:
        """Whether layers are to pass through a device with `room` bytes free, of which the model takes `size`, and what
        its layers keep of a block for their gradients `kept`."""
        if self.offload != "auto":
            return self.offload == "cpu"
        trained = self.trains and self.optimizer == "adamw"
        needed = 2 * size + (kept if self.descent_rounds else 0)
        return accelerator and not trained and needed > room

    @model_validator(mode="after")
    def _steps_agree(self) -> "SearchRecipe":
        if not len(self.survivors) == len(self.trial_tokens) == len(self.score_tokens) > 0:
            raise ValueError(
                f"search.survivors={list(self.survivors)}, search.trial_tokens={list(self.trial_tokens)} and "
                f"search.score_tokens={list(self.score_tokens)} must be equally long, one entry a step"
            )
        if self.survivors[-1] != 1 or any(b > a for a, b in zip(self.survivors, self.survivors[1:], strict=False)):
            raise ValueError(f"search.survivors={list(self.survivors)} must never grow and must end in 1")
        if self.survivors[0] > self.offspring:
            raise ValueError(
                f"search.survivors={list(self.survivors)} keeps more than search.offspring={self.offspring}; "
                "lower the first or raise the second"
            )
        if self.offload == "cpu" and self.optimizer == "adamw" and self.trains:
            raise ValueError(
                "search.offload=cpu needs search.trial_optimizer=sign: AdamW's moments do not pass through the device"
            )
        if min(self.trial_tokens) < 0 or min(self.score_tokens) < 1:
            raise ValueError("search.trial_tokens must be at least 0 and search.score_tokens at least 1")
        return self


class WorkloadRecipe(_Section):
    """The request that budgets of FLOPs, memory and latency are counted for."""

    batch_size: int = Field(1, ge=1)
    """Requests at the same time."""
    prompt_tokens: int = Field(512, ge=1)
    """Read at once."""
    new_tokens: int = Field(128, ge=0)
    """Written one by one."""


class RecoveryRecipe(_Section):
    """Refit and training of the plan found (the paper's post-training)."""

    @property
    def wanted(self) -> bool:
        """Whether anything is to be done."""
        return self.tokens > 0 or self.refit_tokens > 0

    refit_tokens: Tokens = Field(32_768, ge=0)
    """Before the training, output projections are solved once more on so many tokens of the trial split; 0: not."""
    tokens: Tokens = Field(32_768, ge=0)
    """Training tokens in all; 0: none. Text that has run out is read again."""
    text: Literal["trial", "stream"] = "trial"
    """`trial`: that split of the run's text; `stream`: all of `data.source` but what judges, read as it is needed."""
    cut_documents: bool = False
    """No token attends to the document before its own in a block, and positions begin anew with each; by default blocks
    are read whole, as by calibration, trials and scores."""
    learning_rate: Rate = "auto"
    """The highest, reached after the warm-up; `auto`: in units of each weight tensor's root mean square, and by the
    tokens of an optimiser step."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Of the learning rate after the warm-up; `wsd`: constant, and in the last fifth of the steps down to zero."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """The share of all steps in which the learning rate rises from zero."""
    batch_size: int = Field(2, ge=1)
    """Blocks in one optimiser step, on all devices together."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Blocks that a device computes at a time, gradients adding up; by default all of its share."""
    activations: Literal["keep", "recompute"] = "keep"
    """`recompute`: each layer's are computed again for its gradient; a third more time, a fraction of the memory."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Of AdamW."""
    lora_rank: int = Field(0, ge=0)
    """Train low-rank updates of this rank, merged at the end; 0: train the weights themselves."""
    distillation: float = Field(1.0, ge=0, le=1)
    """The share of KL(dense || model) in the loss; the rest is next-token loss."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Of distillation."""
    router_loss: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Of mixtures: what the load-balancing loss of the routers, which is added, is multiplied by. `auto`: the
    checkpoint's `router_aux_loss_coef` if its `output_router_logits` is true, else 0."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Of the dense model in distillation; `auto`: bfloat16 where the hardware is faster with it; `int8`: its layers'
    weights in 8 bits."""
    teacher_top_k: int = Field(0, ge=0)
    """Write the dense model's so many likeliest next tokens, for the trial and the score split, to disk, and train
    without the model; all other tokens count as one. 0: it predicts at every step."""
    sharding: Literal["none", "fsdp", "fsdp_offload"] = "none"
    """Each of several processes holds the whole model (`none`), or a part of weights, gradients and optimizer state
    (FSDP2): on its device, or with `fsdp_offload` in the CPU's memory, where the optimizer steps too."""
    evaluations: int = Field(2, ge=0)
    """How often the loss is measured on the score split, evenly spread, besides before the first step; the weights that
    did best are the result."""
    checkpoint_steps: int = Field(100, ge=1)
    """An interrupted recovery repeats at most so many optimiser steps."""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Where losses are sent besides the run directory."""

    @model_validator(mode="after")
    def _goes_together(self) -> "RecoveryRecipe":
        if self.sharding != "none" and self.lora_rank > 0:
            raise ValueError("recovery.lora_rank and recovery.sharding=fsdp do not go together; leave one of them out")
        if self.sharding != "none" and self.teacher_dtype == "int8":
            raise ValueError(
                "recovery.teacher_dtype=int8 and recovery.sharding=fsdp do not go together: the dense model is sharded "
                "too; leave one of them out"
            )
        if self.text == "stream" and self.teacher_top_k > 0:
            raise ValueError(
                "recovery.teacher_top_k needs recovery.text=trial: what is read once would be written for nothing"
            )
        return self


class EvaluationRecipe(_Section):
    """What is measured besides held-out perplexity and KL."""

    prefill_tokens: int = Field(512, ge=2)
    """Of a timed prompt."""
    decode_tokens: int = Field(32, ge=1)
    """Timed after it, one by one."""
    repeats: int = Field(3, ge=1)
    """Timed passes of each model, interleaved; the median is reported."""


class ExportRecipe(_Section):
    """The engines that the result is for."""

    targets: tuple[Target, ...] = ()
    """Written at the end of the run, beside `model/`, as `darwinlm export` does. What an engine cannot run is refused
    before the search, and what it would need a stub for in the first layer is not proposed."""
    tensor_parallel: int = Field(1, ge=1)
    """Divides the KV heads and the MLP width of every layer at every level of the database, so that so many devices can
    share out each layer."""


class Recipe(_Section):
    """One run, complete: two runs of the same recipe, versions and device give the same plan."""

    model: str = Field(min_length=1)
    """A local folder, a Hub model id, or `smollm2` (the model in the `demo` extra)."""
    target: float | str
    """The fraction of the dense model's parameters to keep (0.5), or a number of them (2.7B); limits by resource
    (`params=0.5,kv_cache=0.5`; also `active_params`, those that a token meets, `flops`, `memory`, `latency`); or the
    sizes of a family (`0.8,0.6,0.45`)."""
    steps: int = Field(1, ge=1, le=16)
    """Prune and recover so many times on the way to the target, each time the model that the step before has left;
    `recovery.tokens` are shared out evenly. The model that the run began with stays the teacher and the measure."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of everything that is drawn."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    deterministic: bool = False
    """Use kernels alone that give the same bits every time: slower, and needed on GPUs only, where two runs may differ
    otherwise (docs/troubleshooting.md says what holds)."""
    data: DataRecipe = DataRecipe()
    database: DatabaseRecipe = DatabaseRecipe()
    search: SearchRecipe = SearchRecipe()
    workload: WorkloadRecipe = WorkloadRecipe()
    recovery: RecoveryRecipe = RecoveryRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    export: ExportRecipe = ExportRecipe()

    def wants_uniform(self, *, experts: bool) -> bool:
        """Whether layers are to get the same sizes; `experts` says whether the model is a mixture of experts."""
        if self.search.uniform != "auto":
            return self.search.uniform
        return "hf-native" in self.export.targets or (experts and self.database.granularity == "kv_group")

    @field_validator("target", mode="before")
    @classmethod
    def _target_is_a_size(cls, value: Any) -> float | str:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(not_a_size(value))
        value = value.strip() if isinstance(value, str) else value
        for target in split_targets(value):
            for name, size in parse_target(target).items():
                if isinstance(size, float) and not 0 < size <= 1:
                    count = ", or a count such as 2.7B" if name.endswith("params") else ""
                    raise ValueError(f"target {str(target)[:80]} must be above 0 and at most 1 (a fraction){count}")
        if isinstance(value, str) and ("=" in value or "," in value):
            if len(set(split_targets(value))) < len(split_targets(value)):
                raise ValueError(f"target {show(value)}: a size is asked for twice")
            return value
        size = parse_size(value)
        if isinstance(size, int):
            return value if isinstance(value, str) else str(size)
        return size

    @model_validator(mode="after")
    def _one_way_to_the_target(self) -> "Recipe":
        targets = split_targets(self.target)
        if self.steps > 1 and len(targets) > 1:
            raise ValueError(
                f"steps={self.steps} with target {show(self.target)}: the sizes of a family come from one database; "
                "ask for one size, or leave steps out"
            )
        if self.steps > 1 and "latency" in parse_target(targets[0]):
            raise ValueError(
                f"steps={self.steps} with a limit on latency: what was measured in one step does not compare with "
                "another's measurements; limit params, flops, kv_cache or memory, or leave steps out"
            )
        return self

    @model_validator(mode="after")
    def _text_can_be_streamed(self) -> "Recipe":
        if self.recovery.text == "stream" and self.data.source == "self":
            raise ValueError("recovery.text=stream needs a source of text; data.source=self has none beyond the splits")
        return self

    @model_validator(mode="after")
    def _tokens_suffice(self) -> "Recipe":
        block = self.data.sequence_length
        if max(self.search.score_tokens) > self.data.blocks(self.data.score_tokens) * block:
            raise ValueError(
                f"search.score_tokens={list(self.search.score_tokens)} asks for more than "
                f"data.score_tokens={self.data.score_tokens}; raise the latter"
            )
        if self.export.targets and self.database.granularity != "kv_group":
            raise ValueError(
                f"export.targets={list(self.export.targets)} with database.granularity={self.database.granularity}: "
                "only transformers can run KV heads that serve different numbers of query heads; set "
                "database.granularity=kv_group"
            )
        if self.export.tensor_parallel > 1 and self.database.granularity != "kv_group":
            raise ValueError(
                f"export.tensor_parallel={self.export.tensor_parallel} with "
                f"database.granularity={self.database.granularity}: query heads and KV heads would not be shared out "
                "alike; set database.granularity=kv_group"
            )
        if "hf-native" in self.export.targets and self.search.uniform is False:
            raise ValueError("export.targets with hf-native needs layers of one size; leave out search.uniform=false")
        if self.search.uniform is True and self.database.granularity != "kv_group":
            raise ValueError(
                f"search.uniform=true with database.granularity={self.database.granularity} does not make layers "
                "alike: KV heads would serve different numbers of query heads; set database.granularity=kv_group"
            )
        if max(self.search.trial_tokens) > self.data.blocks(self.data.trial_tokens) * block:
            raise ValueError(
                f"search.trial_tokens={list(self.search.trial_tokens)} asks for more than "
                f"data.trial_tokens={self.data.trial_tokens}; raise the latter"
            )
        trained = self.data.blocks(max(self.search.trial_tokens))
        if self.search.learning_rate == "auto" and 0 < trained == self.data.blocks(self.data.trial_tokens):
            raise ValueError(
                f"search.learning_rate=auto needs trial text beyond search.trial_tokens="
                f"{list(self.search.trial_tokens)}; raise data.trial_tokens={self.data.trial_tokens}, or set a number"
            )
        return self

    def to_yaml(self) -> str:
        """Every setting, defaults filled in, in the order of this file.

        Returns:
            YAML, which `load_recipe` reads.
        """
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
