"""A user's own module beside his config: what the config tests build."""

from __future__ import annotations


class Part:
    """A constructor with typed arguments; ``width`` comes by position from its parent."""

    def __init__(self, width: int, *, scale: float = 1.0, kind: str = "plain", shape: tuple[int, ...] = (1, 2)) -> None:
        self.width, self.scale, self.kind, self.shape = width, scale, kind, shape
        if scale < 0:
            raise ValueError(f"scale = {scale} is negative")


class Ports:
    """The end of a chain of constructors that hand keyword arguments on."""

    def __init__(self, *, reads: dict[str, str] | None = None, stream: str | None = None) -> None:
        self.reads, self.stream = reads, stream


class Model(Ports):
    def __init__(self, dim: int, part, *, parts: dict | None = None, layers: int = 1, **ports) -> None:
        super().__init__(**ports)
        self.dim, self.layers, self.parts = dim, layers, parts or {}
        self.part = part(dim)


class Data:
    def __init__(self, rows: int, *, path: str = "nowhere", mesh_rank: int = 0) -> None:
        self.rows, self.path, self.mesh_rank = rows, path, mesh_rank


class Loss:
    def __init__(self, weight: float | None = 1.0) -> None:
        self.weight = weight
