"""What a user may say of a source beside its name; a recipe holds it, and a manifest so that it can be loaded again."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from fora_trt.models.spec import BATCH, LATENTS, TIMESTEP, InputSpec, TensorSpec


class InputOptions(BaseModel):
    """An input of a module of one's own: the shape of one sample, and how many values whole numbers have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[PositiveInt, ...] = ()
    dtype: str = "float32"
    below: PositiveInt | None = None

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in ("float32", "int64"):
            raise ValueError(f"{dtype!r} is not float32 or int64")
        return dtype


class SourceOptions(BaseModel):
    """A source, and what is said of it where it does not tell by itself; None where the source decides.

    `image_size` is height and width in pixels, `inputs` are those of a module of one's own in the order of its call.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    architecture: str | None = None
    image_size: tuple[int, int] | None = None
    num_heads: int | None = Field(None, ge=1)
    text_length: int | None = Field(None, ge=1)
    vae: str | None = None
    inputs: dict[str, InputOptions] | None = None

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, size: object) -> object:
        return (size, size) if isinstance(size, int) else size

    @field_validator("inputs")
    @classmethod
    def _begins_as_all_do(cls, inputs: dict[str, InputOptions] | None) -> dict[str, InputOptions] | None:
        if inputs is not None and {LATENTS, TIMESTEP} - inputs.keys():
            raise ValueError(f"the inputs {', '.join(inputs)} lack {LATENTS!r} or {TIMESTEP!r}")
        return inputs

    def tensors(self) -> tuple[TensorSpec, ...]:
        """The inputs as tensors of a graph."""
        given = self.inputs or {}
        return tuple(TensorSpec(name, one.dtype, (BATCH, *one.shape)) for name, one in given.items())

    def conditioning(self) -> dict[str, InputSpec]:
        """What may be put in those inputs that say how many values they have."""
        given = self.inputs or {}
        return {name: InputSpec(values=(0, one.below)) for name, one in given.items() if one.below is not None}
