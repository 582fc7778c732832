"""All images of a page, thinned until the page stays small."""

from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.evaluation.results import Evaluation
from sfumato.report.comparison import steps_at_equal_reward
from sfumato.report.pictures import (
    SIZES,
    SMALLEST,
    Grid,
    Picture,
    Sheet,
    Sizes,
    before_and_after,
    image_grids,
    sheets,
    step_grids,
    validation_grid,
)
from sfumato.report.records import RunRecord

MOST_BYTES = 3_500_000  # of images; with figures and tables a page has less than 5 MB


@dataclass(frozen=True)
class Album:
    """The grids of a page.

    Attributes:
        courses: of supervised runs, before and after training.
        steps: of the slider of `over_steps`.
        many: many images of one prompt.
        pairs: validations of runs without an evaluation.
    """

    sizes: Sizes
    courses: Sequence[Grid]
    steps: Sequence[int]
    over_steps: Sequence[Grid]
    equal: Sequence[Grid]
    last: Sequence[Grid]
    many: Sequence[Sheet]
    pairs: Sequence[Grid]

    @property
    def pictures(self) -> list[Picture]:
        grids = [*self.courses, *self.over_steps, *self.equal, *self.last, *self.pairs]
        rows = [row for grid in grids for row in grid.rows]
        rows += [row for sheet in self.many for _, row in sheet.rows]
        return [picture for row in rows for picture in row]


def album(
    records: Sequence[RunRecord], base_run: RunRecord | None, base: Evaluation | None
) -> Album:
    """Return the images of a page, as many and as large as it can have.

    Args:
        base_run: the run whose evaluation of the base model is `base`.

    Raises:
        ValueError: if scores or pairs cannot be read, or evaluations differ in their images.
    """
    found = (_album(records, base_run, base, sizes) for sizes in SIZES)
    small = (one for one in found if sum(len(p.uri) for p in one.pictures) <= MOST_BYTES)
    return next(small, None) or _album(records, base_run, base, SMALLEST)


def _album(
    records: Sequence[RunRecord], base_run: RunRecord | None, base: Evaluation | None, sizes: Sizes
) -> Album:
    first = [("base model", base_run, 0)] if base_run else []
    last = [(record.name, record, record.final.step) for record in records if record.final]
    equal = [(record.name, record, step) for record, step in steps_at_equal_reward(records, base)]
    unseen = [record for record in records if not record.supervised and not record.evaluations]
    steps, over_steps = step_grids(first, records, sizes)
    return Album(
        sizes,
        [grid for r in records if r.supervised and (grid := before_and_after(r, sizes))],
        steps,
        over_steps,
        image_grids([*first, *equal], sizes) if any(c not in last for c in equal) else [],
        image_grids([*first, *last], sizes),
        sheets([*first, *last], sizes),
        [grid for r in unseen if (grid := validation_grid(r, sizes))],
    )
