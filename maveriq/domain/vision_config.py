"""Counts the parameters of the vision tower of a multimodal model, for the layouts that are known.

Only text is served, but engines load the tower too. Each layout is recognised by the keys that it alone has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from maveriq.domain.config_fields import Config, Fields


def vision_parameters(config: Config, where: str, hidden_size: int) -> int | None:
    """Return the parameters of a multimodal model's vision tower and of what joins it to the decoder.

    Args:
        config: the parsed `config.json`.
        where: the file's name, for messages.
        hidden_size: the decoder's hidden size.

    Returns:
        The parameters, None where the layout is not known.

    Raises:
        InputError: a key of a known layout is missing or wrong.
    """
    fields = Fields(config, where).part("vision_config")
    return next((count(fields, hidden_size) for key, count in _LAYOUTS.items() if fields.has(key)), None)


def _blocks(number: int, size: int, width: int) -> int:
    """Return the parameters of blocks with two norms, attention and a plain feed-forward part, all with biases."""
    return number * (4 * size + 4 * (size * size + size) + 2 * size * width + width + size)


def _merged_patches(fields: Fields, hidden_size: int) -> int:
    """Count patches in time, blocks, and mergers of patches into the decoder and into some of its first layers."""
    del hidden_size  # out_hidden_size says it
    size, out = fields.count(("hidden_size",)), fields.count(("out_hidden_size",))
    patch = fields.count(("patch_size",), maximum=1024) ** 2 * fields.count(("temporal_patch_size",), maximum=1024)
    merged = size * fields.count(("spatial_merge_size",), maximum=64) ** 2
    merger = merged * merged + merged + merged * out + out
    further = len(fields.values("deepstack_visual_indexes") or ())
    return (
        size * fields.count(("in_channels",), maximum=1024) * patch
        + size
        + fields.count(("num_position_embeddings",)) * size
        + _blocks(fields.count(("depth",), maximum=1000), size, fields.count(("intermediate_size",)))
        + (2 * size + merger)
        + further * (2 * merged + merger)
    )


def _shuffled_pixels(fields: Fields, hidden_size: int) -> int:
    """Count patches with a class token, blocks, an adapter of shuffled pixels, and a projection."""
    size, patch = fields.count(("hidden_size",)), fields.count(("patch_size",), maximum=1024)
    patches = (fields.count(("image_size",)) // patch) ** 2 + 1
    ratio = fields.config["pixel_shuffle_ratio"]
    if not isinstance(ratio, float) or not 0.01 <= ratio <= 1:
        raise fields.refuse(f"{fields.path}pixel_shuffle_ratio must be a number from 0.01 to 1, not {ratio!r}")
    inputs, outputs = fields.count(("projector_input_dim",)), fields.count(("projector_output_dim",))
    return (
        size
        + patches * size
        + size * fields.count(("num_channels",), maximum=1024) * patch * patch
        + 4 * size
        + _blocks(fields.count(("num_hidden_layers",), maximum=1000), size, fields.count(("intermediate_size",)))
        + int(size / ratio**2) * inputs
        + inputs * outputs
        + fields.count(("vision_output_dim",)) * hidden_size
    )


def _merged_kernels(fields: Fields, hidden_size: int) -> int:
    """Count patches, a table of positions, blocks, and a projector of merged patches."""
    size, patch = fields.count(("vt_hidden_size",)), fields.count(("patch_size",), maximum=1024)
    rows, columns = fields.count(("init_pos_emb_height",)), fields.count(("init_pos_emb_width",))
    merged = size
    kernels = fields.values("merge_kernel_size", length=2)
    if kernels is None:
        raise fields.refuse(f"no {fields.path}merge_kernel_size")
    for kernel in kernels:
        merged *= fields.checked("merge_kernel_size", kernel, 64)
    return (
        size * 3 * patch * patch
        + size
        + rows * columns * size
        + _blocks(fields.count(("vt_num_hidden_layers",), maximum=1000), size, fields.count(("vt_intermediate_size",)))
        + 2 * size
        + 2 * size
        + (merged * merged + merged + merged * hidden_size + hidden_size)
    )


def _gated_blocks(fields: Fields, hidden_size: int) -> int:
    """Count two tables of positions, gated blocks with four norms without biases, and one projection."""
    size, patch = fields.count(("hidden_size",)), fields.count(("patch_size",), maximum=1024)
    head = fields.count(("head_dim",))
    heads, kv_heads = fields.count(("num_attention_heads",)) * head, fields.count(("num_key_value_heads",)) * head
    block = 2 * size * (heads + kv_heads) + 2 * head + 3 * size * fields.count(("intermediate_size",)) + 4 * size
    return (
        2 * fields.count(("position_embedding_size",)) * size
        + size * 3 * patch * patch
        + fields.count(("num_hidden_layers",), maximum=1000) * block
        + size * hidden_size
    )


_LAYOUTS: Mapping[str, Callable[[Fields, int], int]] = {
    "deepstack_visual_indexes": _merged_patches,
    "pixel_shuffle_ratio": _shuffled_pixels,
    "vt_hidden_size": _merged_kernels,
    "position_embedding_size": _gated_blocks,
}
