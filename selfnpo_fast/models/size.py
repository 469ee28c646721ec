"""The size of a picture or a video, and how a run asks for one."""

from __future__ import annotations

from dataclasses import dataclass

from selfnpo_fast.runtime.errors import UserError


@dataclass(frozen=True)
class Size:
    """What is drawn: a picture, or a video of so many frames."""

    height: int
    """In pixels."""
    width: int
    """In pixels."""
    frames: int = 1
    """1 for a picture."""

    @property
    def sides(self) -> tuple[tuple[str, int], ...]:
        """(name, pixels) of both sides, for checks and messages."""
        return ("height", self.height), ("width", self.width)

    def check_sides(self, cell: int, most: int, field: str) -> None:
        """UserError where a side is no multiple of `cell` pixels, or more than `most`; it names the next
        possible one. `field` is that of `side_field`."""
        most = most // cell * cell
        for side, pixels in self.sides:
            if pixels % cell or not cell <= pixels <= most:
                following = min(max(cell, -(-pixels // cell) * cell), most)
                raise UserError(
                    f"{side_field(field, side)}: {pixels} is no multiple of {cell} from {cell} to {most}; the next is "
                    f"{following}"
                )

    def refuse_frames(self, field: str, model: str) -> None:
        """UserError where more than one frame is asked of a model that draws pictures; `field` is
        that of `side_field`."""
        if self.frames != 1:
            raise UserError(
                f"{side_field(field, 'frames')}: {self.frames} is not possible; {model} draws pictures, of 1 frame"
            )


@dataclass(frozen=True)
class AskedSize:
    """The size that a config or a command asks for; None is the model's own."""

    resolution: int | None = None
    """Height and width in pixels."""
    height: int | None = None
    width: int | None = None
    frames: int | None = None

    def of(self, default: Size) -> Size:
        """The size, where the model's own is `default`."""
        height, width = self.height or self.resolution, self.width or self.resolution
        return Size(height or default.height, width or default.width, self.frames or default.frames)

    @property
    def has_sides(self) -> bool:
        """Whether the model's own height and width are of no account."""
        return (self.height or self.resolution) is not None and (self.width or self.resolution) is not None


def side_field(field: str, side: str) -> str:
    """The field that an error about a side names.

    `field` is the field itself, or a section with its dot ("model."), or nothing for the side's
    name alone. An error about frames never names the resolution.
    """
    if side == "frames" and not field.endswith("."):
        field = field.rpartition(".")[0]
        field += "." if field else ""
    return f"{field}{side}" if not field or field.endswith(".") else field
