"""Attributes of known NNX layers, read off the shapes of their smaller arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from compaware_jax.adapters.widths import surviving_blocks
from compaware_jax.surgery.plan import Plan


def update_attributes(model: nnx.Module, plan: Plan) -> None:
    """Set the width attributes of a module's layers to the shapes of its arrays, in place.

    Args:
      model: a module with the arrays of the plan.
      plan: what was kept.
    """
    for path, module in nnx.iter_modules(model):
        for kind, widths in _WIDTHS:
            if isinstance(module, kind):
                for name, value in widths(module, "/".join(map(str, path)), plan).items():
                    # Only what is there, as plain numbers: a subclass may have replaced it.
                    if isinstance(getattr(module, name, None), int | tuple):
                        setattr(module, name, value)
                break


def _linear(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    return {"in_features": layer.kernel.shape[-2], "out_features": layer.kernel.shape[-1]}


def _linear_general(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    inputs, outputs = len(layer.in_features), len(layer.out_features)
    shape = layer.kernel.shape[-inputs - outputs :]
    return {"in_features": shape[:inputs], "out_features": shape[inputs:]}


def _conv(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    shape = layer.kernel.shape
    groups = surviving_blocks(plan, f"{path}/kernel", layer.feature_group_count)[0]
    return {
        "kernel_shape": shape,
        "in_features": shape[-2] * groups,
        "out_features": shape[-1],
        "feature_group_count": groups,
    }


def _conv_transpose(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    shape = layer.kernel.shape
    ins, outs = (shape[-1], shape[-2]) if layer.transpose_kernel else shape[-2:]
    return {"kernel_shape": shape, "in_features": ins, "out_features": outs}


def _embed(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    return {"num_embeddings": layer.embedding.shape[-2], "features": layer.embedding.shape[-1]}


def _norm(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    arrays = [getattr(layer, name, None) for name in ("scale", "bias", "mean")]
    found = [array for array in arrays if array is not None]
    return {"num_features": found[0].shape[-1]} if found else {}


def _group_norm(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    name = next((n for n in ("scale", "bias") if getattr(layer, n) is not None), None)
    if name is None:
        return {}
    groups, size = surviving_blocks(plan, f"{path}/{name}", layer.num_groups)
    return {"num_features": groups * size, "num_groups": groups, "group_size": size}


def _attention(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    query, key = layer.query.kernel.shape, layer.key.kernel.shape
    return {
        "num_heads": query[1],
        "head_dim": query[2],
        "qkv_features": query[1] * query[2],
        "num_kv_heads": key[1],
        "in_features": query[0],
        "in_kv_features": key[0],
        "out_features": layer.out.kernel.shape[-1],
    }


def _lora(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    return {"in_features": layer.lora_a.shape[-2], "out_features": layer.lora_b.shape[-1]}


def _einsum(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    bias = {} if layer.bias is None else {"bias_shape": layer.bias.shape}
    return {"kernel_shape": layer.kernel.shape} | bias


def _gated_cell(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    inner, outer = layer.dense_h.kernel.shape[-2], layer.dense_i.kernel.shape[-2]
    return {"hidden_features": inner, "in_features": outer}


def _lstm_cell(layer: Any, path: str, plan: Plan) -> dict[str, Any]:
    return {"hidden_features": layer.hf.kernel.shape[-2], "in_features": layer.if_.kernel.shape[-2]}


_WIDTHS: tuple[tuple[type | tuple[type, ...], Callable[[Any, str, Plan], dict[str, Any]]], ...] = (
    (nnx.LinearGeneral, _linear_general),
    (nnx.Linear, _linear),
    (nnx.Conv, _conv),
    (nnx.ConvTranspose, _conv_transpose),
    (nnx.Embed, _embed),
    (nnx.GroupNorm, _group_norm),
    ((nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.InstanceNorm), _norm),
    (nnx.MultiHeadAttention, _attention),
    (nnx.LoRA, _lora),
    (nnx.Einsum, _einsum),
    ((nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell), _gated_cell),
    (nnx.LSTMCell, _lstm_cell),
)
