"""What the stages of one size share."""

from dataclasses import dataclass

from darwinlm.config.recipe import Recipe
from darwinlm.data.corpus import Corpus
from darwinlm.database.prunable import Prunable
from darwinlm.models.modeling_darwinlm import PrunedModel
from darwinlm.plan import Budget, Plan
from darwinlm.run.directory import RunDirectory, Size, Step


@dataclass(frozen=True)
class Job:
    """One size in one step of a run: its inputs, and what its plan must meet."""

    recipe: Recipe
    run: RunDirectory
    corpus: Corpus
    original: Prunable
    """The model given, with its database."""
    source: Prunable
    """What this step prunes: `original`, or the result of the step before."""
    step: Step
    size: Size
    budget: Budget
    """Budget of plans for `source`."""
    original_budget: Budget
    """Budget of the size for plans of `original`."""
    uniform: bool
    """Whether all layers get the same sizes."""

    def result(self, plan: Plan) -> PrunedModel:
        """Build the model of `plan`, with its trained weights if recovery is enabled."""
        if not self.recipe.recovery.wanted:
            return self.source.cut(plan)
        return self.source.trained(plan, self.size.folder / "recovery" / "weights.safetensors")
