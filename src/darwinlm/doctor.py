"""`darwinlm doctor`: whether a model can be pruned rightly, shown on a few of its own layers before any long work.

Everything is compared with a second way to the same numbers: transformers' own model, a dense model whose removed units
are zeros, a pass without a cache, the model before it was saved. Units are cut at random: what a cut does to the
quality of a model is no matter here.
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

from darwinlm.adapters.cutting import Cut, build_model, cut_site, output_columns
from darwinlm.adapters.experts import hide_experts
from darwinlm.adapters.families import (
    LAYERS,
    Granularity,
    Site,
    causal_lm,
    dense_config,
    family_of,
    find_sites,
    sites_needed,
    window_of,
)
from darwinlm.adapters.loading import (
    DenseModel,
    choose_device,
    expected_shapes,
    open_dense,
    some_layers,
)
from darwinlm.adapters.modeling_darwinlm import PrunedConfig, PrunedModel
from darwinlm.adapters.walking import CACHE
from darwinlm.demo import resolve
from darwinlm.errors import UserError
from darwinlm.export.hf import export_hf, load, save_model
from darwinlm.export.proof import ProofError
from darwinlm.export.targets import TARGETS, export_model
from darwinlm.memory import check_room, naming_memory_faults
from darwinlm.progress import task
from darwinlm.report.checks import Check, Examination

_LAYERS, _LAYER_PARAMETERS = 8, 100_000_000
"""As many layers are taken as are no more and have no more; two at least."""
_BLOCKS, _TOKENS, _NEW_TOKENS = 2, 64, 8
_WINDOW = 32
_SHARES = (0.5, 0.75, 0.25)
"""Of the units of sites that follow one another, what is kept: sizes differ within a layer and between layers."""
_LOGITS, _GRADIENTS, _SAVED, _EXPORTED = 1e-4, 1e-3, 1e-6, 1e-3
"""Float32 sums in another order; gradients have larger sums; what was saved is the same; engines compute otherwise."""
_ONE_SIZE = ("hf-native",)
"""The targets that take a model only if its layers are all of one size."""
_LAYER_COPIES, _OTHER_COPIES = 5, 3
"""In float32 at the same time, of the layers: weights, masked weights, a cut model, two sets of gradients; of what is
outside of them: the model, what was written of it, and what was read of that."""


def examine(source: str) -> Examination:
    """Check that a model is pruned, run, trained, saved and exported as it should be.

    Args:
        source: a local folder, a Hub id, or `smollm2`.

    Raises:
        UserError: if the model cannot be read, its family is not known, or the memory does not suffice.
    """
    with naming_memory_faults("doctor"):
        base_config, whole = open_dense(resolve(source), "kv_group", choose_device("auto"))
        patient, reduced = _Patient.of(base_config, whole)
        with tempfile.TemporaryDirectory(prefix="darwinlm-doctor-") as scratch:
            planned = list(_checks(patient, Path(scratch)))
            done = []
            with task("doctor", len(planned)) as progress:
                for check in planned:
                    done.append(check())
                    progress.advance(note=done[-1].name)
    title = f"{source}: {base_config.model_type}, {whole.parameters:,} parameters, checked on {whole.device}"
    return Examination(title=title, reduced=tuple(reduced), checks=tuple(done))


class _SkipError(Exception):
    """A check that does not apply, with the reason."""


@dataclass(frozen=True, kw_only=True)
class _Patient:
    """Some layers of the model, with all that comes before and after them."""

    base_config: Any
    """Of transformers."""
    dense: DenseModel
    tokens_BT: Tensor

    @classmethod
    def of(cls, base_config: Any, whole: DenseModel) -> tuple["_Patient", list[str]]:
        """As many layers as are cheap, and what that leaves out. Raises UserError."""
        config, device, count = whole.config, whole.device, whole.config.num_hidden_layers
        layers = choose_layers(config)
        reduced = []
        if len(layers) < count:
            listed = ", ".join(map(str, layers))
            reduced.append(f"{len(layers)} of {count} layers ({listed}); the weights of the others were not read")
        few = some_layers(base_config, layers)
        window = max((window_of(config, layer) or 0 for layer in layers), default=0)
        if window > _WINDOW:
            few.sliding_window = _WINDOW
            reduced.append(f"the sliding window of {window:,} tokens to {_WINDOW}")
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
        # Names what holds NaN or Inf.
        dense.checkpoint.fingerprint(dense.shapes)
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(0, config.vocab_size, (_BLOCKS, length), generator=generator).to(device)
        return cls(base_config=few, dense=dense, tokens_BT=tokens_BT), reduced

    @property
    def config(self) -> PrunedConfig:
        return self.dense.config

    @property
    def last(self) -> int:
        """The number of the last layer."""
        return int(self.config.num_hidden_layers) - 1

    @cached_property
    def grouped(self) -> bool:
        """Whether a KV head serves several query heads."""
        return bool(self.config.num_attention_heads > self.config.num_key_value_heads)

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """The kinds of attention units that differ."""
        return ("kv_group", "query_head") if self.grouped else ("kv_group",)

    def cuts(self, granularity: Granularity, removed: Mapping[str, set[int]]) -> dict[str, Cut]:
        """Random units of every site, none where a layer is `removed` (by kind of site)."""
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
        """A smaller model."""
        return build_model(self.config, find_sites(self.config, granularity), self.dense.weights, cuts)

    def masked_weights(self, granularity: Granularity, cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
        """The dense weights, with zeros in the place of what `cuts` removes."""
        weights = self.dense.weights
        for site in find_sites(self.config, granularity):
            if site.routed:  # what its router does without some of them no weights can say: see `hide`
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
        """`model`, its tokens sent past the experts that `cuts` removes."""
        for site in self.dense.sites:
            if site.routed:
                hide_experts(model, site, cuts[site.name].kept)
        return model

    def factors(self, granularity: Granularity, cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
        """What `masked_weights` multiplies rows by, where a norm goes over all heads at once: with zeros in place of
        some and the others larger, it divides by what is the mean of those kept."""
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

    def worn(self) -> Iterator[tuple[Granularity, dict[str, Cut]]]:
        """Cuts of all kinds at once: no attention in the first layer, no MLP in the last, all others smaller."""
        for granularity in self.granularities:
            yield granularity, self.cuts(granularity, {"attention": {0}, "mlp": {self.last}})


def choose_layers(config: PrunedConfig) -> list[int]:
    """Evenly spread layers, the first and the last among them, and one of each kind of attention at least."""
    count = config.num_hidden_layers
    size = sum(prod(shape) for name, shape in expected_shapes(config).items() if name.startswith(f"{LAYERS}0."))
    wanted = min(count, _LAYERS, max(2, _LAYER_PARAMETERS // size))
    spread = {round(number * (count - 1) / max(1, wanted - 1)) for number in range(wanted)}
    of_layers = getattr(config, "layer_types", None) or [""] * count
    kinds = {kind: layer for layer, kind in reversed(list(enumerate(of_layers)))}
    known = {of_layers[layer] for layer in spread}
    return sorted(spread | {layer for kind, layer in kinds.items() if kind not in known})


def _checks(patient: _Patient, scratch: Path) -> Iterator[Callable[[], Check]]:
    """All checks, the ones that others rest on first."""

    last = {patient.last}
    for name, tolerance, work in (
        ("level 0 equals transformers' model", _LOGITS, partial(_level_0, patient)),
        ("cut KV groups and channels equal masked ones", _LOGITS, partial(_masked, patient, "kv_group", {})),
        ("cut query heads equal masked ones", _LOGITS, partial(_masked, patient, "query_head", {})),
        ("layers without attention", _LOGITS, partial(_masked, patient, "kv_group", {"attention": {0} | last})),
        ("layers without MLP", _LOGITS, partial(_masked, patient, "kv_group", {"mlp": {0} | last})),
        ("a layer without both", _LOGITS, partial(_masked, patient, "kv_group", {"attention": {0}, "mlp": {0}})),
        ("KV cache, token by token", _LOGITS, partial(_step_by_step, patient)),
        ("KV cache in generate()", _LOGITS, partial(_generated, patient)),
        ("gradients equal the masked model's", _GRADIENTS, partial(_gradients, patient)),
        ("gradients with activations recomputed", _GRADIENTS, partial(_recomputed, patient)),
        ("saved and loaded", _SAVED, partial(_reloaded, patient, scratch / "saved")),
    ):
        yield partial(_outcome, name, tolerance, work)
    for target in TARGETS:
        exported = partial(_exported, patient, target, scratch / target)
        yield partial(_outcome, f"export --to {target}", _EXPORTED, exported)


def _outcome(name: str, tolerance: float, work: Callable[[], float | tuple[float, str]]) -> Check:
    """Run `work`, which gives a difference, or that and a note; whatever it raises is this check's alone."""
    try:
        with naming_memory_faults(name):
            answer = work()
    except _SkipError as reason:
        return Check(name=name, result="skipped", note=str(reason))
    except Exception as error:
        told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Check(name=name, result="failed", tolerance=tolerance, note=told)
    difference, note = answer if isinstance(answer, tuple) else (answer, "")
    result: Literal["passed", "failed"] = "passed" if difference <= tolerance else "failed"
    return Check(name=name, result=result, difference=difference, tolerance=tolerance, note=note)


@torch.no_grad()
def _level_0(patient: _Patient) -> float:
    native = _native_model(patient, patient.dense.weights)
    return _difference(native(patient.tokens_BT).logits, patient.dense.model(patient.tokens_BT).logits)


def _native_model(patient: _Patient, weights: Mapping[str, Tensor]) -> Any:
    """Transformers' own model with these weights, made by its own loading."""
    config, state = patient.base_config, dict(weights)
    kind: Any = causal_lm(config) if isinstance(config, PrunedConfig) else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    native = kind.from_pretrained(None, config=config, state_dict=state, dtype=next(iter(state.values())).dtype)
    return native.to(patient.dense.device).eval()


@torch.no_grad()
def _masked(patient: _Patient, granularity: Granularity, removed: Mapping[str, set[int]]) -> float:
    """A cut model against the dense one with zeros in the place of what was cut."""
    if granularity not in patient.granularities:
        raise _SkipError("each KV head has one query head: the same as KV groups")
    cuts = patient.cuts(granularity, removed)
    weights = patient.masked_weights(granularity, cuts)
    masked = patient.hide(build_model(patient.config, patient.dense.sites, weights, {}), cuts)
    cut = patient.cut_model(granularity, cuts)
    return _difference(masked(patient.tokens_BT).logits, cut(patient.tokens_BT).logits)


@torch.no_grad()
def _step_by_step(patient: _Patient) -> float:
    """Half of the text at once, then one token after another."""
    differences = []
    for granularity, cuts in patient.worn():
        model, tokens_BT = patient.cut_model(granularity, cuts), patient.tokens_BT
        half = tokens_BT.shape[1] // 2
        output = model(tokens_BT[:, :half], use_cache=True)
        found = [output.logits]
        for position in range(half, tokens_BT.shape[1]):
            output = model(tokens_BT[:, position : position + 1], use_cache=True, **{CACHE: output[CACHE]})
            found.append(output.logits)
        differences.append(_difference(model(tokens_BT, use_cache=False).logits, torch.cat(found, 1)))
    return max(differences)


@torch.no_grad()
def _generated(patient: _Patient) -> float:
    """The logits that greedy decoding saw, against those of all its text at once."""
    differences = []
    for granularity, cuts in patient.worn():
        model, tokens_BT = patient.cut_model(granularity, cuts), patient.tokens_BT
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


def _gradients(patient: _Patient) -> float:
    """Of every weight in the layers, against those of the model of transformers with zeros for what was cut."""
    differences = []
    for granularity, cuts in patient.worn():
        weights = patient.masked_weights(granularity, cuts)
        native = patient.hide(_native_model(patient, weights), cuts)
        whole = _gradients_of(native, patient.tokens_BT, allow_none=True)
        for name, factor in patient.factors(granularity, cuts).items():
            whole[name] = whole[name] * factor
        sites = find_sites(patient.config, granularity)
        in_sites = {name for site in sites for name in site.tensors}
        expected = {name: gradient for name, gradient in whole.items() if name not in in_sites}
        for site in sites:
            expected |= cut_site(site, whole, _cut(site, whole, cuts[site.name].kept))
        del native, whole
        found = _gradients_of(patient.cut_model(granularity, cuts), patient.tokens_BT)
        differences.append(_largest(expected, found))
    return max(differences)


def _recomputed(patient: _Patient) -> float:
    granularity, cuts = next(patient.worn())
    model = patient.cut_model(granularity, cuts)
    expected = _gradients_of(model, patient.tokens_BT)
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = _gradients_of(model, patient.tokens_BT)
    return _largest(expected, found)


def _gradients_of(model: Any, tokens_BT: Tensor, *, allow_none: bool = False) -> dict[str, Tensor]:
    """Of the weights in the layers, by name. Raises ValueError if none reaches one of them."""
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
    """The largest difference between tensors of the same names, over the largest value of all."""
    if expected.keys() != found.keys():
        raise ValueError(f"{sorted(expected.keys() ^ found.keys())[0]} is in one of the models only")
    scale = max(tensor.abs().max().item() for tensor in expected.values())
    return max((found[name] - tensor).abs().max().item() for name, tensor in expected.items()) / scale


@torch.no_grad()
def _reloaded(patient: _Patient, folder: Path) -> float:
    differences = []
    for granularity, cuts in patient.worn():
        model, dtype = patient.cut_model(granularity, cuts), patient.dense.dtype
        target = folder / granularity
        target.mkdir(parents=True)
        save_model(model, dtype, target)
        rounded: Any = model.to(dtype)
        expected = rounded.float()(patient.tokens_BT).logits
        written = load(target, dtype=torch.float32, device=str(patient.dense.device))
        differences.append(_difference(expected, written(patient.tokens_BT).logits))
    return max(differences)


def _exported(patient: _Patient, target: str, folder: Path) -> tuple[float, str]:
    """A cut model, written for an engine, against itself in transformers."""
    cuts = _alike(patient) if target in _ONE_SIZE else next(patient.worn())[1]
    model = patient.cut_model("kv_group", cuts)
    export_hf(model, patient.dense, {}, "", folder / "model")
    # Read again for the next check; the exports hold embeddings and head several times.
    del model, cuts
    patient.dense.release()
    try:
        done = export_model(folder, target, folder / "exported", "f32" if target == "gguf" else None)
    except ProofError:
        raise
    except UserError as reason:
        raise _SkipError(str(reason)) from None
    if done.proof is None:
        raise _SkipError("; ".join(done.notes))
    return done.proof.difference, "; ".join((f"in {done.proof.engine}", *done.notes))


def _alike(patient: _Patient) -> dict[str, Cut]:
    """Half of every site: layers of one size."""
    generator = torch.Generator().manual_seed(2)
    found = {}
    for site in patient.dense.sites:
        kept = torch.randperm(site.num_units, generator=generator)[: max(1, site.num_units // 2)]
        found[site.name] = _cut(site, patient.dense.weights, tuple(sorted(kept.tolist())))
    return found


def _cut(site: Site, weights: Mapping[str, Tensor], kept: tuple[int, ...]) -> Cut:
    """The units `kept`, their columns as they are."""
    return Cut(kept=kept, output_weight=output_columns(site, weights[site.output_tensor], kept) if kept else None)


def _columns(site: Site, kept: tuple[int, ...]) -> list[int]:
    size = site.columns_per_unit
    return [column for unit in kept for column in range(unit * size, (unit + 1) * size)]


def _difference(expected: Tensor, found: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-6)
    return ((expected - found).abs().max() / scale).item()
