"""The awkward pooling problems that every backend and kernel is tested on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolCase:
    """A pooling of an input (N, C, H, W); pairs are (height, width)."""

    name: str
    shape: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    @property
    def options(self):
        """The keywords of the pooling operations, without dilation."""
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "ceil_mode": self.ceil_mode,
        }


POOL_PROBLEMS = [
    PoolCase("columns that step over the image", (1, 1, 1, 1), (2, 2), (1, 1), (1, 1), (1, 2)),
    PoolCase("one pixel", (1, 1, 1, 1), (1, 1), (1, 1)),
    PoolCase("halves", (2, 3, 8, 8), (2, 2), (2, 2)),
    PoolCase("halves of an odd image", (2, 3, 7, 9), (2, 2), (2, 2)),
    PoolCase("halves of an odd image, ceil", (2, 3, 7, 9), (2, 2), (2, 2), ceil_mode=True),
    PoolCase("halves of an odd width, ceil", (2, 2, 6, 5), (2, 2), (2, 2), ceil_mode=True),
    PoolCase("thirds", (1, 2, 9, 6), (3, 3), (3, 3)),
    PoolCase("overlapping, as in AlexNet", (2, 2, 9, 11), (3, 3), (2, 2)),
    PoolCase("overlapping and padded, as in ResNet", (2, 3, 10, 8), (3, 3), (2, 2), (1, 1)),
    PoolCase("overlapping and padded, odd image, ceil", (1, 2, 7, 9), (3, 3), (2, 2), (1, 1), ceil_mode=True),
    PoolCase("stride 1, padded", (1, 2, 5, 4), (3, 3), (1, 1), (1, 1)),
    PoolCase("gaps between windows", (2, 1, 8, 11), (2, 2), (3, 4)),
    PoolCase("gaps, ceil", (1, 2, 9, 8), (2, 1), (3, 2), ceil_mode=True),
    PoolCase("rectangular window", (1, 3, 6, 7), (1, 3), (2, 1)),
    PoolCase("rectangular, padded on one axis", (2, 2, 5, 6), (4, 2), (3, 2), (2, 0)),
    PoolCase("even window, padded", (1, 2, 6, 6), (2, 2), (2, 2), (1, 1)),
    PoolCase("dilated", (1, 2, 9, 8), (3, 2), (1, 2), dilation=(2, 3)),
    PoolCase("dilated, padded, ceil", (2, 1, 8, 9), (3, 3), (2, 2), (1, 1), (2, 2), ceil_mode=True),
    # Windows times places is the image's size here by chance: some pixels lie in no window.
    PoolCase("gaps, padded, as many places as pixels", (1, 2, 4, 4), (2, 2), (3, 3), (1, 1)),
    PoolCase("dilated, padded, as many places as pixels", (1, 2, 16, 16), (2, 2), (2, 2), (1, 1), (3, 3)),
    PoolCase("global", (3, 4, 5, 7), (5, 7), (5, 7)),
    PoolCase("one row", (2, 2, 1, 9), (1, 2), (1, 2)),
    PoolCase("more than 256 places", (1, 1, 18, 17), (17, 17), (1, 1)),
    PoolCase("many images", (9, 5, 6, 6), (3, 3), (2, 2), (1, 1)),
    PoolCase("sixteen channels, halves", (1, 16, 5, 6), (2, 2), (2, 2)),
    PoolCase("sixteen channels, overlapping", (2, 16, 5, 5), (3, 3), (2, 2), (1, 1)),
    PoolCase("no images", (0, 3, 6, 6), (3, 3), (2, 2), (1, 1)),
]
