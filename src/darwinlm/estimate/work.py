"""What the predicted cost of a stage depends on: the model, the machine, and how much of the model is left.

Each stage predicts its cost next to its code (`database/cost.py`, `search/cost.py`, `recovery/cost.py`,
`evaluation/cost.py`), in tokens through a layer and through the head and in matrix products; `rates` has the seconds of
each. For the accuracy of past predictions see docs/lab-log.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch

from darwinlm.config.recipe import Recipe, SearchRecipe
from darwinlm.config.stage import Stage
from darwinlm.estimate.rates import Machine, Rates
from darwinlm.models.cutting import count_parameters
from darwinlm.models.device_memory import kept_bytes
from darwinlm.models.families import dense_again
from darwinlm.models.loading import expected_shapes
from darwinlm.models.modeling_darwinlm import PrunedConfig
from darwinlm.models.sites import Site

SLACK = 1.15
"""Memory overhead factor beyond tensors: buffers, fragmentation."""
LIBRARIES = 650_000_000
"""Bytes of memory in use before any model is loaded."""
LINK = 1e10
"""Bandwidth from CPU memory to a device, in bytes per second."""
SCORED_TOGETHER = 4096
"""Tokens of a scoring pass of streamed layers."""
_OVERHEAD = 1.25
"""Overhead factor of database, search and recovery beyond layers and head: optimizer, I/O, Python."""
_TEMPORARY = 24 * 2**24
"""Bytes that a step of `SignSGD` needs in addition to gradients."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Predicted cost of one stage."""

    stage: Stage
    seconds: float
    memory: float
    """Peak memory in bytes, on each device."""
    host_memory: float = 0.0
    """CPU memory in bytes, in each process, for what the device cannot hold."""
    disk: float = 0.0
    """Bytes that stay on disk."""

    @property
    def name(self) -> str:
        """Name of the stage, as in the manifest of a run."""
        return str(self.stage)

    def with_overhead(self) -> "StageCost":
        """Return the cost with what layers, head and tensors do not account for."""
        seconds = self.seconds * (1 if self.stage.kind == "evaluation" else _OVERHEAD)
        return replace(self, seconds=seconds, memory=LIBRARIES + SLACK * (self.memory - LIBRARIES))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Predicted cost of a whole run."""

    dense_parameters: int
    target_parameters: int
    smallest_parameters: int
    stages: tuple[StageCost, ...]
    host_memory: float
    """CPU memory in bytes for layers that are streamed through the devices (each process has its own candidates; the
    dense model's files and the database's are cached once) or for offloaded sharded training; 0 if there are none."""
    disk: float
    """Disk space in bytes at the end, including checkpoints."""
    advice: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One step of a gradual run, or the only step of any other run."""

    config: PrunedConfig
    """Config of the model, dense or already pruned."""
    sites: tuple[Site, ...]
    recipe: Recipe
    machine: Machine
    rates: Rates
    """Rates of one device, for layers that were never pruned."""
    before: float
    """Fraction of the dense model's layer parameters present at the beginning of the step."""
    left: float
    """Fraction of the dense model's layer parameters present at the end of the step."""
    number: int | None
    """Number of the step, in all steps except the last."""

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every weight of the dense model."""
        return expected_shapes(self.config)

    @cached_property
    def dense(self) -> int:
        """Parameters of the dense model."""
        return sum(prod(shape) for shape in self.shapes.values())

    @cached_property
    def in_sites(self) -> int:
        """Parameters of the dense model's sites."""
        return sum(count_parameters(site, self.shapes, range(site.num_units)) for site in self.sites)

    @property
    def fixed(self) -> int:
        """Parameters outside all sites."""
        return self.dense - self.in_sites

    @property
    def candidate(self) -> float:
        """Parameters of a candidate's sites."""
        return self.left * self.in_sites

    @cached_property
    def layers(self) -> float:
        """Number of equivalent unpruned layers, to which the rates refer."""
        again = sum(map(prod, expected_shapes(dense_again(self.config)).values()))
        return self.depth * self.in_sites / (again - self.fixed)

    @property
    def item(self) -> int:
        """Bytes per weight of the dense model: on an accelerator in the checkpoint's dtype, elsewhere float32."""
        return 2 if self.machine.accelerator else 4

    @property
    def exact(self) -> float:
        """Seconds per token through a layer in the dense model's dtype."""
        return self.rates.layer_fast if self.machine.accelerator else self.rates.layer_float32

    @property
    def depth(self) -> int:
        """Number of layers."""
        return int(self.config.num_hidden_layers)

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.config.vocab_size)

    @property
    def rows(self) -> int:
        """Rows of an output projection."""
        return int(self.config.hidden_size)

    @property
    def columns(self) -> list[float]:
        """Columns of the output projection of every site without experts."""
        return [self.before * site.columns(site.num_units) for site in self.sites if not site.routed]

    @property
    def mixtures(self) -> list[Site]:
        """Sites with experts."""
        return [site for site in self.sites if site.routed]

    @property
    def expert_columns(self) -> float:
        """Columns of the output projections of all experts."""
        return self.before * sum(site.columns(site.num_units) for site in self.mixtures)

    @property
    def uniform(self) -> bool:
        """Whether all layers get the same sizes."""
        return self.recipe.wants_uniform(experts=bool(self.mixtures))

    @property
    def search(self) -> SearchRecipe:
        """Settings of the search; one for uniform sizes has neither descent nor evolution."""
        search = self.recipe.search
        return search.model_copy(update={"descent_rounds": 0, "generations": 0}) if self.uniform else search

    @cached_property
    def block_bytes(self) -> float:
        """Bytes of activations kept for the gradients of one block."""
        length = self.recipe.data.sequence_length
        return kept_bytes(self.config, length, length, torch.bfloat16)

    @property
    def offload(self) -> bool:
        """Whether layers are streamed through the device."""
        machine = self.machine
        return self.search.offloads(
            self.item * self.dense, self.block_bytes, machine.memory, accelerator=machine.accelerator
        )

    @property
    def whole(self) -> float:
        """Bytes of the dense model and, in later steps, of the model that they prune."""
        earlier = self.fixed + self.before * self.in_sites if self.before < 1 else 0.0
        return float(self.item * (self.dense + earlier))

    @property
    def output_elements(self) -> float:
        """Elements of all output projections; experts count whole, with inputs not shared with other sites."""
        return sum(self.rows * d for d in self.columns) + 3 * self.rows * self.expert_columns

    @property
    def level_bytes(self) -> float:
        """Bytes of the columns of all levels."""
        return 2 * self.output_elements * self.recipe.database.levels / 2

    @property
    def resident(self) -> float:
        """Bytes of models on the device while none is trained: `whole`, or what streaming needs."""
        return self.passing if self.offload else self.whole

    @property
    def trained_together(self) -> int:
        """Tokens of one optimizer step of a trial."""
        return self.search.batch_size * self.recipe.data.sequence_length

    @property
    def passing(self) -> float:
        """Bytes on the device if layers are streamed: embeddings and head, one layer with its gradients, dense or at
        all levels, and the layers' inputs."""
        layers = self.depth
        reads = max(self.trained_together, self.recipe.data.sequence_length) * self.rows * 2 * (layers + 1)
        layer = self.search.batch_size * self.block_bytes / layers
        return self.item * self.fixed + 4 * self.in_sites / layers + _TEMPORARY + reads + layer
