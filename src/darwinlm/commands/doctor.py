"""`darwinlm doctor`: check on a few layers of a model that it can be pruned correctly, before any long work.

All results are compared with a second way to compute them: transformers' own model, a dense model whose removed units
are zeroed, a pass without KV cache, the model before saving. Units are removed at random, because the quality of the
pruned model does not matter here.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from darwinlm.config.exports import ONE_SIZE
from darwinlm.errors import UserError
from darwinlm.export.hf import export_hf, save_model
from darwinlm.export.proof import ProofError
from darwinlm.export.targets import ENGINES, TARGETS, export_model
from darwinlm.models.cutting import Cut, build_model, cut_site, output_columns
from darwinlm.models.experts import hide_experts
from darwinlm.models.families import LAYERS, causal_lm, dense_config, family_of, window_of
from darwinlm.models.loading import (
    DenseModel,
    choose_device,
    expected_shapes,
    open_dense,
    some_layers,
)
from darwinlm.models.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.models.pruned import load
from darwinlm.models.sites import Granularity, Site, find_sites, sites_needed
from darwinlm.models.smollm2 import resolve
from darwinlm.models.walking import CACHE
from darwinlm.report.checks import Check, Examination
from darwinlm.runtime.memory import check_room, naming_memory_faults
from darwinlm.runtime.progress import task

_LAYERS, _LAYER_PARAMETERS = 8, 100_000_000
"""Limits on the number of checked layers and on their parameters; at least two layers are checked."""
_BLOCKS, _TOKENS, _NEW_TOKENS = 2, 64, 8
_WINDOW = 32
_SHARES = (0.5, 0.75, 0.25)
"""Fractions of units kept at consecutive sites, so that sizes differ within a layer and between layers."""
_LOGITS, _GRADIENTS, _SAVED, _EXPORTED = 1e-4, 1e-3, 1e-6, 1e-3
"""Tolerances: float32 sums in another order; gradients with larger sums; identical after saving; other engines."""
_LAYER_COPIES, _OTHER_COPIES = 5, 3
"""Float32 copies held at the same time. Layers: weights, masked weights, a pruned model, two sets of gradients. Other
tensors: the model, the saved model and the loaded model."""


def examine(source: str) -> Examination:
    """Check that a model is pruned, run, trained, saved and exported correctly.

    Args:
        source: local folder, Hub model id, or `smollm2`.

    Returns:
        Every check with its result; `passed` is true if none failed.

    Raises:
        UserError: if the model cannot be read, its family is not supported, or there is not enough memory.
    """
    with naming_memory_faults("doctor"):
        base_config, whole = open_dense(resolve(source), "kv_group", choose_device("auto"))
        test_model, reduced = _TestModel.of(base_config, whole)
        with tempfile.TemporaryDirectory(prefix="darwinlm-doctor-") as scratch:
            planned = list(_checks(test_model, Path(scratch)))
            done = []
            with task("doctor", len(planned)) as progress:
                for check in planned:
                    done.append(check())
                    progress.advance(note=done[-1].name)
    title = f"{source}: {base_config.model_type}, {whole.parameters:,} parameters, checked on {whole.device}"
    return Examination(title=title, reduced=tuple(reduced), checks=tuple(done))


class _SkipError(Exception):
    """A check does not apply; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class _TestModel:
    """Some layers of the model, with everything before and after them."""

    base_config: Any
    """Config of transformers."""
    dense: DenseModel
    tokens_BT: Tensor

    @classmethod
    def of(cls, base_config: Any, whole: DenseModel) -> tuple["_TestModel", list[str]]:
        """Choose a few cheap layers; also return a description of what is omitted. Raises UserError."""
        config, device, count = whole.config, whole.device, whole.config.num_hidden_layers
        layers = choose_layers(config)
        reduced = []
        if len(layers) < count:
            listed = ", ".join(map(str, layers))
            reduced.append(f"{len(layers)} of {count} layers ({listed}); the weights of the others are not read")
        few = some_layers(base_config, layers)
        window = max((window_of(config, layer) or 0 for layer in layers), default=0)
        if window > _WINDOW:
            few.sliding_window = _WINDOW
            reduced.append(f"sliding window of {window:,} tokens reduced to {_WINDOW}")
        few_config = dense_config(few)
        for name, value in few_config.to_dict().items():
            if name.endswith(("dropout", "pdrop")):
                setattr(few, name, value)
        length = min(_TOKENS, config.max_position_embeddings - _NEW_TOKENS)
        reduced.append(f"text: {_BLOCKS} x {length} random tokens")
        dense = replace(
            whole,
            config=few_config,
            sites=find_sites(few_config, "kv_group"),
            checkpoint=whole.checkpoint.some_layers(layers),
        )
        in_layers = dense.parameters - dense.fixed_parameters
        check_room(
            4 * (_LAYER_COPIES * in_layers + _OTHER_COPIES * dense.fixed_parameters),
            device,
            f"checking {whole.source!r}",
        )
        # Raises an error that names tensors with NaN or Inf.
        dense.checkpoint.fingerprint(dense.shapes)
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(0, config.vocab_size, (_BLOCKS, length), generator=generator).to(device)
        return cls(base_config=few, dense=dense, tokens_BT=tokens_BT), reduced

    @property
    def config(self) -> PrunedConfig:
        return self.dense.config

    @property
    def last(self) -> int:
        """Index of the last layer."""
        return int(self.config.num_hidden_layers) - 1

    @cached_property
    def grouped(self) -> bool:
        """Whether a KV head serves several query heads."""
        return bool(self.config.num_attention_heads > self.config.num_key_value_heads)

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Kinds of attention units that differ in this model."""
        return ("kv_group", "query_head") if self.grouped else ("kv_group",)

    def cuts(self, granularity: Granularity, removed: Mapping[str, set[int]]) -> dict[str, Cut]:
        """Keep random units of every site, and none in layers listed in `removed` (by kind of site)."""
        generator = torch.Generator().manual_seed(1)
        found = {}
        sites = find_sites(self.config, granularity)
        needed = sites_needed(self.config, sites)
        for number, site in enumerate(sites):
            if site.layer in removed.get(site.kind, ()) and site.name not in needed:
                found[site.name] = Cut(kept=(), output_weight=None)
                continue
            count = max(site.routed if site.of_experts else 1, round(_SHARES[number % len(_SHARES)] * site.num_units))
            kept = tuple(sorted(torch.randperm(site.num_units, generator=generator)[:count].tolist()))
            found[site.name] = _cut(site, self.dense.weights, kept)
        return found

    def cut_model(self, granularity: Granularity, cuts: Mapping[str, Cut]) -> PrunedModel:
        """Build a pruned model."""
        return build_model(self.config, find_sites(self.config, granularity), self.dense.weights, cuts)

    def masked_weights(self, granularity: Granularity, cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
        """Return the dense weights, with zeros in place of the units removed by `cuts`."""
        weights = self.dense.weights
        for site in find_sites(self.config, granularity):
            if site.routed:  # Masking weights cannot express the routing without some experts; see `hide`.
                continue
            name, bias, kept = site.output_tensor, f"{site.output}.bias", cuts[site.name].kept
            masked = torch.zeros_like(weights[name])
            columns = _columns(site, kept)
            masked[:, columns] = weights[name][:, columns]
            weights[name] = masked
            if not kept and bias in weights:
                weights[bias] = torch.zeros_like(weights[bias])
        for name, factor in self.factors(granularity, cuts).items():
            weights[name] = weights[name] * factor
        return weights

    def hide(self, model: Any, cuts: Mapping[str, Cut]) -> Any:
        """Mask the experts removed by `cuts` in the router of `model`."""
        for site in self.dense.sites:
            if site.routed:
                hide_experts(model, site, cuts[site.name].kept)
        return model

    def factors(self, granularity: Granularity, cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
        """Return row factors for `masked_weights` where one norm spans all heads: zeroed heads lower its mean square,
        so the remaining rows are scaled up to match the norm over the kept heads only."""
        found: dict[str, Tensor] = {}
        for site in find_sites(self.config, granularity):
            for norm in site.inputs if cuts[site.name].kept else ():
                if not norm.norm:
                    continue
                left, count = norm.kept(cuts[site.name].kept), self.dense.shapes[norm.tensor][0] // norm.rows
                larger = torch.zeros(count, device=self.dense.device)
                larger[left] = (count / len(left)) ** 0.5
                module = family_of(self.config).queries_keys_values[1 if norm.serves else 0]
                for rows in site.inputs:
                    if f".{module}." in rows.tensor:
                        by_row = larger.repeat_interleave(rows.rows)
                        found[rows.tensor] = by_row[:, None] if rows.tensor.endswith("weight") else by_row
                found[norm.tensor] = 1 / torch.full((), (count / len(left)) ** 0.5, device=self.dense.device)
        return found

    def pruned_variants(self) -> Iterator[tuple[Granularity, dict[str, Cut]]]:
        """Yield all kinds of cuts at once: no attention in the first layer, no MLP in the last, all other sites
        smaller."""
        for granularity in self.granularities:
            yield granularity, self.cuts(granularity, {"attention": {0}, "mlp": {self.last}})


def choose_layers(config: PrunedConfig) -> list[int]:
    """Return evenly spaced layers including the first and the last, and at least one of each attention type."""
    count = config.num_hidden_layers
    size = sum(prod(shape) for name, shape in expected_shapes(config).items() if name.startswith(f"{LAYERS}0."))
    wanted = min(count, _LAYERS, max(2, _LAYER_PARAMETERS // size))
    spread = {round(number * (count - 1) / max(1, wanted - 1)) for number in range(wanted)}
    of_layers = getattr(config, "layer_types", None) or [""] * count
    kinds = {kind: layer for layer, kind in reversed(list(enumerate(of_layers)))}
    known = {of_layers[layer] for layer in spread}
    return sorted(spread | {layer for kind, layer in kinds.items() if kind not in known})


def _checks(test_model: _TestModel, scratch: Path) -> Iterator[Callable[[], Check]]:
    """Yield all checks, basic ones first."""

    last = {test_model.last}
    for name, tolerance, work in (
        ("level 0 equals transformers' model", _LOGITS, partial(_level_0, test_model)),
        ("cut KV groups and channels equal masked ones", _LOGITS, partial(_masked, test_model, "kv_group", {})),
        ("cut query heads equal masked ones", _LOGITS, partial(_masked, test_model, "query_head", {})),
        ("layers without attention", _LOGITS, partial(_masked, test_model, "kv_group", {"attention": {0} | last})),
        ("layers without MLP", _LOGITS, partial(_masked, test_model, "kv_group", {"mlp": {0} | last})),
        ("a layer without both", _LOGITS, partial(_masked, test_model, "kv_group", {"attention": {0}, "mlp": {0}})),
        ("KV cache, token by token", _LOGITS, partial(_step_by_step, test_model)),
        ("KV cache in generate()", _LOGITS, partial(_generated, test_model)),
        ("gradients equal the masked model's", _GRADIENTS, partial(_gradients, test_model)),
        ("gradients with activations recomputed", _GRADIENTS, partial(_recomputed, test_model)),
        ("saved and loaded", _SAVED, partial(_reloaded, test_model, scratch / "saved")),
    ):
        yield partial(_outcome, name, tolerance, work)
    for target in TARGETS:
        exported = partial(_exported, test_model, target, scratch / target)
        yield partial(_outcome, f"export --to {target}", _EXPORTED, exported)


def _outcome(name: str, tolerance: float, work: Callable[[], float | tuple[float, str]]) -> Check:
    """Run `work`, which returns a difference and optionally a note; exceptions only fail this check."""
    try:
        with naming_memory_faults(name):
            answer = work()
    except _SkipError as reason:
        return Check(name=name, result="skipped", note=str(reason))
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Check(name=name, result="failed", tolerance=tolerance, note=message)
    difference, note = answer if isinstance(answer, tuple) else (answer, "")
    result: Literal["passed", "failed"] = "passed" if difference <= tolerance else "failed"
    return Check(name=name, result=result, difference=difference, tolerance=tolerance, note=note)


@torch.no_grad()
def _level_0(test_model: _TestModel) -> float:
    native = _native_model(test_model, test_model.dense.weights)
    return _difference(native(test_model.tokens_BT).logits, test_model.dense.model(test_model.tokens_BT).logits)


def _native_model(test_model: _TestModel, weights: Mapping[str, Tensor]) -> Any:
    """Load transformers' own model with these weights."""
    config, state = test_model.base_config, dict(weights)
    kind: Any = causal_lm(config) if isinstance(config, PrunedConfig) else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    native = kind.from_pretrained(None, config=config, state_dict=state, dtype=next(iter(state.values())).dtype)
    return native.to(test_model.dense.device).eval()


@torch.no_grad()
def _masked(test_model: _TestModel, granularity: Granularity, removed: Mapping[str, set[int]]) -> float:
    """Compare a pruned model with the dense one whose removed units are zeroed."""
    if granularity not in test_model.granularities:
        raise _SkipError("each KV head has one query head: the same as KV groups")
    cuts = test_model.cuts(granularity, removed)
    weights = test_model.masked_weights(granularity, cuts)
    masked = test_model.hide(build_model(test_model.config, test_model.dense.sites, weights, {}), cuts)
    cut = test_model.cut_model(granularity, cuts)
    return _difference(masked(test_model.tokens_BT).logits, cut(test_model.tokens_BT).logits)


@torch.no_grad()
def _step_by_step(test_model: _TestModel) -> float:
    """Process half of the text at once, then token by token, and compare with a single pass."""
    differences = []
    for granularity, cuts in test_model.pruned_variants():
        model, tokens_BT = test_model.cut_model(granularity, cuts), test_model.tokens_BT
        half = tokens_BT.shape[1] // 2
        output = model(tokens_BT[:, :half], use_cache=True)
        found = [output.logits]
        for position in range(half, tokens_BT.shape[1]):
            output = model(tokens_BT[:, position : position + 1], use_cache=True, **{CACHE: output[CACHE]})
            found.append(output.logits)
        differences.append(_difference(model(tokens_BT, use_cache=False).logits, torch.cat(found, 1)))
    return max(differences)


@torch.no_grad()
def _generated(test_model: _TestModel) -> float:
    """Compare the logits of greedy decoding with those of one pass over the generated text."""
    differences = []
    for granularity, cuts in test_model.pruned_variants():
        model, tokens_BT = test_model.cut_model(granularity, cuts), test_model.tokens_BT
        generate: Any = model.generate
        answer = generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            do_sample=False,
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            use_cache=True,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = model(answer.sequences, use_cache=False).logits[:, tokens_BT.shape[1] - 1 : -1]
        differences.append(_difference(expected, torch.stack(answer.logits, 1)))
    return max(differences)


def _gradients(test_model: _TestModel) -> float:
    """Compare gradients of all layer weights with those of transformers' model whose removed units are zeroed."""
    differences = []
    for granularity, cuts in test_model.pruned_variants():
        weights = test_model.masked_weights(granularity, cuts)
        native = test_model.hide(_native_model(test_model, weights), cuts)
        whole = _gradients_of(native, test_model.tokens_BT, allow_none=True)
        for name, factor in test_model.factors(granularity, cuts).items():
            whole[name] = whole[name] * factor
        sites = find_sites(test_model.config, granularity)
        in_sites = {name for site in sites for name in site.tensors}
        expected = {name: gradient for name, gradient in whole.items() if name not in in_sites}
        for site in sites:
            expected |= cut_site(site, whole, _cut(site, whole, cuts[site.name].kept))
        del native, whole
        found = _gradients_of(test_model.cut_model(granularity, cuts), test_model.tokens_BT)
        differences.append(_largest(expected, found))
    return max(differences)


def _recomputed(test_model: _TestModel) -> float:
    granularity, cuts = next(test_model.pruned_variants())
    model = test_model.cut_model(granularity, cuts)
    expected = _gradients_of(model, test_model.tokens_BT)
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = _gradients_of(model, test_model.tokens_BT)
    return _largest(expected, found)


def _gradients_of(model: Any, tokens_BT: Tensor, *, allow_none: bool = False) -> dict[str, Tensor]:
    """Return the gradients of the layers' weights by name. Raises ValueError if one of them gets no gradient."""
    layers = {name: weight for name, weight in model.named_parameters() if name.startswith(LAYERS)}
    model.requires_grad_(False)
    for weight in layers.values():
        weight.requires_grad_(True).grad = None
    model.train()
    model(tokens_BT, labels=tokens_BT, use_cache=False).loss.backward()
    model.eval()
    missing = [name for name, weight in layers.items() if weight.grad is None or not weight.grad.any()]
    if missing and not allow_none:
        raise ValueError(f"no gradient reaches {missing[0]}")
    found = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in layers.items()}
    for weight in layers.values():
        weight.grad = None
    return found


def _largest(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Return the largest difference between tensors of the same names, relative to the largest value."""
    if expected.keys() != found.keys():
        raise ValueError(f"{sorted(expected.keys() ^ found.keys())[0]} is in only one of the models")
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    return max((found[name] - tensor).abs().max().item() for name, tensor in expected.items()) / scale


@torch.no_grad()
def _reloaded(test_model: _TestModel, folder: Path) -> float:
    differences = []
    for granularity, cuts in test_model.pruned_variants():
        model, dtype = test_model.cut_model(granularity, cuts), test_model.dense.dtype
        target = folder / granularity
        target.mkdir(parents=True)
        save_model(model, dtype, target)
        rounded: Any = model.to(dtype)
        expected = rounded.float()(test_model.tokens_BT).logits
        written = load(target, dtype=torch.float32, device=str(test_model.dense.device))
        differences.append(_difference(expected, written(test_model.tokens_BT).logits))
    return max(differences)


def _exported(test_model: _TestModel, target: str, folder: Path) -> tuple[float, str]:
    """Compare a pruned model in an engine with the same model in transformers."""
    cuts = _alike(test_model) if target in ONE_SIZE else next(test_model.pruned_variants())[1]
    model = test_model.cut_model("kv_group", cuts)
    export_hf(model, test_model.dense, {}, "", folder / "model")
    # Weights are read again for the next check; exports hold embeddings and head several times.
    del model, cuts
    test_model.dense.release()
    try:
        done = export_model(folder, target, folder / "exported", "f32" if ENGINES[target].dtypes else None)
    except ProofError:
        raise
    except UserError as reason:
        raise _SkipError(str(reason)) from None
    if done.proof is None:
        raise _SkipError("; ".join(done.notes))
    return done.proof.difference, "; ".join((f"in {done.proof.engine}", *done.notes))


def _alike(test_model: _TestModel) -> dict[str, Cut]:
    """Keep half of every site, for uniform layer sizes."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for site in test_model.dense.sites:
        kept = torch.randperm(site.num_units, generator=generator)[: max(1, site.num_units // 2)]
        found[site.name] = _cut(site, test_model.dense.weights, tuple(sorted(kept.tolist())))
    return found


def _cut(site: Site, weights: Mapping[str, Tensor], kept: tuple[int, ...]) -> Cut:
    """Keep the units `kept` with their columns unchanged."""
    return Cut(kept=kept, output_weight=output_columns(site, weights[site.output_tensor], kept) if kept else None)


def _columns(site: Site, kept: tuple[int, ...]) -> list[int]:
    size = site.columns_per_unit
    return [column for unit in kept for column in range(unit * size, (unit + 1) * size)]


def _difference(expected: Tensor, found: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-6)
    return ((expected - found).abs().max() / scale).item()
