"""What a model takes: fits an arriving item to a model's input, or says why it does not fit.

Layer 2. Only value-preserving conversions are made here (packing hwc to chw, u8 to f32 without
scaling); size, colour order and scaling are the author's to say.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowlang.plan.onnx import Model, Port
from flowlang.plan.types import BYTES, Image, Record, Tensor, Type, Unknown, describe, shape_text


@dataclass(frozen=True, slots=True)
class Misfit:
    """Why an item does not fit a model's input.

    `mend` is the stages that would help; `sides` the height and width a picture should have had.
    """

    slug: str
    wants: str
    mend: str | None = None
    message: str | None = None
    sides: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Packing:
    """How an image becomes the model's input tensor: its layout and dtype."""

    layout: str
    dtype: str


def input_type(model: Model) -> Type:
    """The type of item a model takes as it stands."""
    if len(model.inputs) == 1:
        return model.inputs[0].item
    return Record(tuple((p.name, p.item) for p in model.inputs))


def wants(port: Port) -> str:
    return f"wants `{port.name}`: {port.item}"


def layout_of(port: Port) -> str | None:
    """chw or hwc, by where the model's input has its 1 or 3 channels; None if it has none."""
    if port.shape is None or len(port.shape) != 4:
        return None
    if port.shape[1] in (1, 3):
        return "chw"
    if port.shape[3] in (1, 3):
        return "hwc"
    return "chw" if port.shape[1] is None else None


def image_sides(port: Port) -> tuple[int | None, int | None]:
    shape = port.shape or (None,) * 4
    h, w = shape[2:4] if layout_of(port) == "chw" else shape[1:3]
    return h, w


def fit(given: Type, port: Port, model: Model) -> Packing | Misfit | None:
    """How `given` becomes one item of `port`: a packing, None where it is one already."""
    if isinstance(given, Unknown):
        return None
    if isinstance(given, Image):
        return _fit_image(given, port, model)
    if not isinstance(given, Tensor):
        return Misfit("type-mismatch", wants(port), _mend(given, port))
    item = port.item
    if given.shape is not None and item.shape is not None:
        if len(given.shape) != len(item.shape):
            return Misfit("rank-mismatch", wants(port))
        if any(w not in (None, g) for g, w in zip(given.shape, item.shape, strict=True)):
            return Misfit("size-mismatch", wants(port))
    if given.dtype != item.dtype:
        return Misfit("dtype-mismatch", wants(port))
    return None


def _fit_image(given: Image, port: Port, model: Model) -> Packing | Misfit:
    layout = layout_of(port)
    if layout is None:
        return Misfit("rank-mismatch", wants(port))
    h, w = image_sides(port)
    wrong_size = (h is not None and given.height != h) or (w is not None and given.width != w)
    if wrong_size and not given.is_sized:
        return Misfit("type-mismatch", wants(port), _mend(given, port))
    if wrong_size:
        made = shape_text((given.height, given.width))
        message = f"`{model.name}` takes {shape_text((h, w))}, and this makes {made}"
        mend = _resize_to(h, w) if given.dtype == "u8" else None
        sides = (h or given.height or 1, w or given.width or 1)
        return Misfit("size-mismatch", wants(port), mend, message, sides)
    if given.colour is None:
        return Misfit(
            "undecided-colour",
            wants(port),
            "rgb",
            f"`{model.name}` would get channels in an order nobody decided",
        )
    channels = (port.shape or (None, 3, None, None))[1 if layout == "chw" else 3]
    if channels is not None and channels != given.channels:
        mend = "gray" if channels == 1 and given.dtype == "u8" else None
        counted = f"{channels} channel{'s' if channels > 1 else ''}"
        colour = f"{'an' if given.colour == 'rgb' else 'a'} {given.colour}"
        message = f"`{model.name}` takes {counted}, and {colour} image has {given.channels}"
        return Misfit("channel-mismatch", wants(port), mend, message)
    if given.dtype == "f32" and port.dtype not in ("f32", "f16"):
        return Misfit("dtype-mismatch", wants(port))
    if port.dtype not in ("u8", "f16", "f32"):
        return Misfit("dtype-mismatch", wants(port))
    return Packing(layout, port.dtype)


def tensor_packing(given: Type, wanted: Type) -> dict[str, str] | None:
    """How an image becomes a tensor that is asked for by name, or None where it cannot."""
    if not (isinstance(given, Image) and isinstance(wanted, Tensor)):
        return None
    if given.colour is None or wanted.shape is None or len(wanted.shape) != 3:
        return None
    if wanted.dtype not in ("u8", "f16", "f32") or (given.dtype == "f32" and wanted.dtype == "u8"):
        return None
    sides = (given.height, given.width)
    for layout, shape in (("chw", (given.channels, *sides)), ("hwc", (*sides, given.channels))):
        if all(w in (None, g) for g, w in zip(shape, wanted.shape, strict=True)):
            return {"layout": layout, "dtype": wanted.dtype}
    return None


def _resize_to(h: int | None, w: int | None) -> str:
    if h == w:
        return f"resize({h})"
    return "resize(" + ", ".join(f"{n}={s}" for n, s in (("h", h), ("w", w)) if s) + ")"


def _mend(given: Type, port: Port) -> str | None:
    """The stages that would turn `given` into what the port takes, as text."""
    layout = layout_of(port)
    if layout is None:
        return None
    stages = []
    if not isinstance(given, Image) and given != BYTES:
        return None
    if not isinstance(given, Image):
        stages.append("decode")
    h, w = image_sides(port)
    if h is not None or w is not None:
        stages.append(_resize_to(h, w))
    if not isinstance(given, Image) or given.colour is None:
        channels = (port.shape or (None, 3))[1 if layout == "chw" else 3]
        stages.append("gray" if channels == 1 else "rgb")
    return " -> ".join(stages)


def gives(given: Type) -> str:
    return f"gives {describe(given)}"
