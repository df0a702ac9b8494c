"""Where the numbers of a group without RandAugment and cutout stand among its draws."""

from enum import IntEnum

from ssl_pipeline.augment.operations.jitter import Draw


class Column(IntEnum):
    """TURN and FACTOR have one column for each `Adjustment`."""

    JITTER = Draw.WHETHER
    TURN = Draw.TURN
    FACTOR = Draw.FACTOR
    GRAY = 9
    BLUR_SIGMA = 10
    SOLARIZE = 11


NUM_COLUMNS = 12
