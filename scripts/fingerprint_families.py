"""Write docs/fingerprint-families.md: which decoders of the installed transformers `maveriq fingerprint` reduces.

Usage: python scripts/fingerprint_families.py [--out docs/fingerprint-families.md] [FAMILY...]

For each family of transformers' causal language models the script builds a small random model with 12 layers, saves
it, writes the fingerprint with the fewest layers, loads it with `AutoModelForCausalLM.from_pretrained`, and compares:
no tensor may be missing or unexpected, the kept layers' tensors equal those of the whole model, a forward pass gives
finite numbers, and the parameters that the layers stand for add up to the whole model's. With names of families it
only prints.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from maveriq.errors import MaveriqError
from maveriq.profiling.fingerprint import Fingerprint, write_fingerprint

_LAYERS = 12
_MAX_PARAMETERS = 50_000_000
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Sizes by the names that families give them; a family gets those that it has.
_SIZES = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "emb_dim", "d_model", "word_embed_proj_dim", "attention_hidden_size", "lru_width"), 64
    ),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "query_pre_attn_scalar"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 256),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank",), 32),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "hidden_size_per_layer_input", "laurel_rank", "index_topk"), 8),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads", "n_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "layer_group_size"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_d_state", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head",), 32),
    **dict.fromkeys(("sliding_window",), 16),
    **dict.fromkeys(("first_k_dense_replace", "eos_token_id"), 2),
    **dict.fromkeys(("bos_token_id",), 1),
    **dict.fromkeys(("pad_token_id",), 0),
}

_NULL_BY_DEFAULT = ("num_key_value_heads", "head_dim", "n_group", "topk_group", "num_experts_per_tok")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a family: "works", "refused", "fails" or "not tried", and what there is to say of it."""

    family: str
    result: str
    text: str


class _NotTriedError(Exception):
    """No small model of the family can be made here."""


def main() -> int:
    """Try families, and write the page or print."""
    parser = argparse.ArgumentParser(description="Try maveriq fingerprint on the decoders of transformers.")
    parser.add_argument("families", nargs="*", help="families to try, by model_type (default: all)")
    parser.add_argument("--out", type=Path, default=Path("docs/fingerprint-families.md"), help="the page to write")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    outcomes = []
    for family in options.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        outcome = try_family(family)
        print(f"{outcome.family}: {outcome.result}: {outcome.text}", file=sys.stderr, flush=True)
        outcomes.append(outcome)
    if not options.families:
        options.out.write_text("\n".join(_page(outcomes)), encoding="utf-8")
    return any(outcome.result == "fails" for outcome in outcomes)


def try_family(family: str) -> Outcome:
    """Return what comes of a family."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            whole = _small_model(family, Path(folder) / "whole")
            found = _shortest(Path(folder) / "whole", Path(folder) / "fingerprint")
            problem = _problem(whole, found)
        except _NotTriedError as error:
            return Outcome(family=family, result="not tried", text=str(error))
        except MaveriqError as error:
            text = str(error).partition(".json': ")[2] or str(error)
            return Outcome(family=family, result="refused", text=text.replace(folder, "FOLDER"))
        except Exception as error:  # what transformers raises while it loads or computes
            return Outcome(family=family, result="fails", text=_brief(error))
    if problem:
        return Outcome(family=family, result="fails", text=problem)
    kinds: dict[str, int] = {}
    for layer in found.layers:
        kinds[layer.kind] = kinds.get(layer.kind, 0) + layer.stands_for
    return Outcome(
        family=family, result="works", text="; ".join(f"{number} x {kind}" for kind, number in kinds.items())
    )


def _small_model(family: str, folder: Path) -> Any:
    """Return a small random model of a family, with 12 layers, and save it in a folder.

    Raises:
        _NotTriedError: there is none.
    """
    try:
        config = _small_config(family)
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        _check(parameters <= _MAX_PARAMETERS, f"the small model has {parameters / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        _logits(model)
        model.save_pretrained(folder)
    except _NotTriedError:
        raise
    except Exception as error:  # whatever a family raises about sizes that it cannot have
        raise _NotTriedError(f"no small model: {_brief(error)}") from None
    return model


def _small_config(family: str) -> Any:
    kind = CONFIG_MAPPING[family]
    default = kind()
    alone = not default.is_encoder_decoder and default.get_text_config(decoder=True) is default
    _check(alone, "not a decoder alone")
    names = default.to_dict()
    sizes = {name: size for name, size in _SIZES.items() if isinstance(names.get(name), int)}
    sizes |= {name: _LAYERS for name in _LAYER_COUNTS if name in names}
    # Some defaults are null where every file has a number.
    sizes |= {name: _SIZES[name] for name in _NULL_BY_DEFAULT if name in names and names[name] is None}
    if "kv_lora_rank" in names:
        sizes |= {name: size for name, size in {"head_dim": 8, "num_key_value_heads": 4}.items() if name in names}
    return kind(**sizes, dtype="float32")


def _check(condition: bool, reason: str) -> None:  # noqa: FBT001
    if not condition:
        raise _NotTriedError(reason)


def _shortest(whole: Path, out: Path) -> Fingerprint:
    """Write the fingerprint with the fewest layers."""
    for layers in range(1, _LAYERS):
        try:
            return write_fingerprint(whole, layers=layers, out=out)
        except MaveriqError as error:
            if "kinds of layers" not in str(error):
                raise
    return write_fingerprint(whole, layers=_LAYERS, out=out)


def _problem(whole: Any, found: Fingerprint) -> str:
    """Return what is wrong with a fingerprint, "" where nothing is."""
    model, report = AutoModelForCausalLM.from_pretrained(found.folder, output_loading_info=True, dtype=torch.float32)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[name]:
            return f"{name}: {sorted(map(str, report[name]))[:3]}"
    weights = whole.state_dict()
    for name, tensor in model.state_dict().items():
        if not any(_equal(weights.get(source), tensor, found) for source in _sources(name, found)):
            return f"{name} differs from the whole model's"
    if not torch.isfinite(_logits(model.eval())).all():
        return "the forward pass gives numbers that are not finite"
    total = found.extra_parameters + sum(layer.stands_for * layer.parameters for layer in found.layers)
    if total != found.full_parameters:
        return f"the layers stand for {total} parameters, but the model has {found.full_parameters}"
    return ""


def _equal(whole: Any, tensor: Any, found: Fingerprint) -> bool:
    """Return whether a tensor equals the whole model's, or the kept layers' parts of it."""
    if whole is None or whole.dim() != tensor.dim():
        return False
    different = [axis for axis, size in enumerate(tensor.shape) if size != whole.shape[axis]]
    if len(different) == 1 and whole.shape[different[0]] % found.full_layers == 0:
        parts = whole.chunk(found.full_layers, dim=different[0])
        whole = torch.cat([parts[layer.source_index] for layer in found.layers], dim=different[0])
    return bool(whole.shape == tensor.shape and torch.equal(whole, tensor))


def _sources(name: str, found: Fingerprint) -> Iterator[str]:
    """Yield the names that a tensor of the fingerprint may have in the whole model."""
    yield name
    for match in re.finditer(r"\.(\d+)\.", name):
        place = int(match[1])
        if place < len(found.layers):
            yield f"{name[: match.start()]}.{found.layers[place].source_index}.{name[match.end() :]}"
            return


def _logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8, 9]])).logits


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _page(outcomes: list[Outcome]) -> Iterator[str]:
    works, refused, fails = (
        sum(outcome.result == result for outcome in outcomes) for result in ("works", "refused", "fails")
    )
    yield "# Families of decoders and their fingerprints"
    yield ""
    yield f"Of the {len(outcomes)} families of causal language models in transformers {transformers.__version__},"
    yield f"`maveriq fingerprint` reduces {works}. It refuses {refused}, and {fails} fail. The others are not"
    yield "decoders alone, or the script makes no small model of them."
    yield "`python scripts/fingerprint_families.py` writes this page."
    for result, title in (
        ("works", "Families that work"),
        ("refused", "Families that are refused"),
        ("fails", "Families that fail"),
        ("not tried", "Families that were not tried"),
    ):
        chosen = [outcome for outcome in outcomes if outcome.result == result]
        if not chosen:
            continue
        yield from ("", f"## {title}", "")
        yield "| family | layers, of 12 |" if result == "works" else "| family | why |"
        yield "| --- | --- |"
        for outcome in chosen:
            text = re.sub(r"[|`]", " ", outcome.text)
            yield f"| `{outcome.family}` | {text[:200]} |"
    yield ""


if __name__ == "__main__":
    sys.exit(main())
